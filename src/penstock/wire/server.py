"""A listening HTTP/1.1 server: complete requests in, responses out, on callbacks.

It guarantees:
- one parser per connection, no task per request; the handler runs on the loop;
- requests of one connection are handed over one at a time and in order: the next one only after the response
  to the one before has ended (pipelining works, memory for it is bounded);
- whatever a client sends, it gets its response or one error (400, 408, 413, 431), and the connection is
  closed after an error of its own making;
- `Exchange.on_disconnect` is called exactly once when a client goes away before its response has ended, and
  never otherwise;
- no wait without a bound: idle connections, slow requests, lingering closes and clients that stop reading are
  all closed by one coarse sweeper.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Final, cast
from urllib.parse import unquote

import httptools

from penstock.errors import ConfigError
from penstock.wire.exchange import Accepted, Exchange, Request, error_body, response_head

__all__ = ["Exchange", "Handler", "HttpServer", "Request", "error_body"]

logger = logging.getLogger(__name__)

MAX_HEAD: Final = 64 << 10
"""Bytes of request line and headers; more is answered 431."""
LINGER: Final = 2.0
"""Seconds a connection is read and discarded after an error response, so that the client can read it."""
WRITE_STALL: Final = 300.0
"""Seconds a client may leave a full write buffer untouched before it is cut off."""

Handler = Callable[[Exchange], None]
"""Runs on the loop with a complete request. An exception becomes a 500, and is logged."""


class _Refusal(Exception):
    """A request that is answered with an error and a close."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _target(url: bytes) -> tuple[str, str]:
    """Path (percent-decoded) and query of a request target in origin, absolute or asterisk form."""
    text = url.decode("latin-1")
    if not text.startswith("/") and "://" in text:
        text = "/" + text.partition("://")[2].partition("/")[2]
    path, _, query = text.partition("?")
    return (unquote(path) if "%" in path else path), query


class Connection(asyncio.Protocol):
    """One accepted connection: parses requests, queues them, hands them over one at a time."""

    __slots__ = (
        "_advancing",
        "_begun",
        "_body",
        "_body_size",
        "_buffered",
        "_exchange",
        "_fresh",
        "_head_done",
        "_head_raw",
        "_head_size",
        "_headers",
        "_http10",
        "_keep_alive",
        "_last_seen",
        "_lingering",
        "_parser",
        "_queue",
        "_reading",
        "_receiving",
        "_refusal",
        "_server",
        "_since",
        "_transport",
        "_url",
        "_waiters",
        "_writable",
        "retiring",
    )

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._queue: deque[Request] = deque()
        self._exchange: Exchange | None = None
        self._refusal: _Refusal | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._since = server.clock()
        """When the present state (fresh, receiving, idle, lingering, write stalled) began."""
        self._fresh = True
        self._receiving = False
        self._begun = False
        """The request being received began in the present piece of data."""
        self._last_seen = False
        """No further request is read: the client or the server has asked for a close."""
        self._lingering = False
        self._advancing = False
        self._reading = True
        self._writable = True
        self._buffered = 0
        self.retiring = False
        self._reset()

    def _reset(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._head_size = 0
        self._head_raw = 0
        self._head_done = False
        self._body: list[bytes] = []
        self._body_size = 0
        self._keep_alive = True
        self._http10 = False

    # -- the transport's side ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._last_seen = True
        self._queue.clear()
        self._server.lost(self)
        self.resume_writing()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            self._server.in_flight -= 1
            exchange.lose()

    def eof_received(self) -> bool:
        if self._exchange is not None and self._transport is not None:
            self._transport.abort()
        return False

    def data_received(self, data: bytes) -> None:
        if self._last_seen:
            return
        self._fresh = self._begun = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(_Refusal(400, "protocol upgrades are not supported"))
        except httptools.HttpParserCallbackError as error:
            if not isinstance(error.__context__, _Refusal):
                raise
            self._refuse(error.__context__)
        except httptools.HttpParserError as error:
            self._refuse(_Refusal(400, f"malformed HTTP request: {error}"))
        else:
            if self._receiving and not self._head_done and not self._begun:
                self._head_raw += len(data)  # a header that has not ended is unknown to on_header
                if self._head_raw > MAX_HEAD:
                    self._refuse(_Refusal(431, f"the request head is larger than {MAX_HEAD} bytes"))
        if self._queue or self._refusal is not None:
            self._advance()

    def pause_writing(self) -> None:
        self._writable = False
        self._since = self._server.clock()
        self._buffered = 1 << 62
        self._steer_reading()

    def resume_writing(self) -> None:
        self._writable = True
        self._since = self._server.clock()
        self._steer_reading()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # -- the parser's side ------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._receiving = self._begun = True
        self._since = self._server.clock()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value) + 4
        self._headers[name.lower().decode("latin-1")] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._head_done = True
        headers, parser = self._headers, self._parser
        if self._head_size + len(self._url) > MAX_HEAD:
            raise _Refusal(431, f"the request head is larger than {MAX_HEAD} bytes")
        self._keep_alive = parser.should_keep_alive()
        if not self._keep_alive or "connection" in headers:
            self._http10 = parser.get_http_version() != "1.1"
            self._keep_alive = self._keep_alive and not self._http10
        if int(headers.get("content-length", 0)) > self._server.max_body:
            self._too_large()
        if "expect" in headers and self._exchange is None and not self._queue:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self._body_size += len(data)
        if self._body_size > self._server.max_body:
            self._too_large()
        self._body.append(data)

    def on_message_complete(self) -> None:
        self._receiving = False
        if self._last_seen or self._parser.should_upgrade():
            return
        path, query = _target(self._url)
        body = self._body
        request = Request(
            self._parser.get_method().decode("latin-1"),
            path,
            query,
            self._headers,
            body[0] if len(body) == 1 else b"".join(body),
        )
        request.keep_alive = self._keep_alive
        request.http10 = self._http10
        self._last_seen = not self._keep_alive
        self._reset()
        self._queue.append(request)

    def _too_large(self) -> None:
        raise _Refusal(413, f"the request body is larger than {self._server.max_body} bytes")

    # -- exchanges --------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    async def drained(self) -> None:
        if not self._writable:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def exchange_ended(self, close: bool) -> None:
        self._exchange = None
        self._since = self._server.clock()
        self._server.in_flight -= 1
        if close or self.retiring:
            self._close()
        elif not self._advancing and (self._queue or self._refusal is not None):
            self._advance()

    def exchange_broken(self) -> None:
        self._exchange = None
        self._server.in_flight -= 1
        self._close()

    def _advance(self) -> None:
        """Hands over queued requests while each is answered at once; then the refusal, if there is one."""
        self._advancing = True
        while self._queue and self._exchange is None and self._transport is not None:
            self._handle(self._queue.popleft())
        self._advancing = False
        if self._exchange is None and self._refusal is not None:
            self._send_refusal(self._refusal)
        else:
            self._steer_reading()

    def _handle(self, request: Request) -> None:
        exchange = self._exchange = Exchange(self, request)
        self._server.in_flight += 1
        try:
            self._server.handler(exchange)
        except Exception:
            logger.exception("handler failed on %s %s", request.method, request.path)
            if not exchange.started:
                exchange.respond(500, error_body(500, "internal server error"))
            elif self._exchange is exchange and self._transport is not None:
                self._transport.abort()  # half a response cannot be taken back

    def _refuse(self, refusal: _Refusal) -> None:
        """Stops reading requests; the refusal is sent once the requests before it have been answered."""
        if not self._last_seen:
            self._last_seen = True
            self._refusal = refusal
        self._receiving = False

    def _send_refusal(self, refusal: _Refusal) -> None:
        self._refusal = None
        body = error_body(refusal.status, str(refusal))
        self.write(
            response_head(
                refusal.status,
                "application/json",
                None,
                True,
                b"content-length: %d\r\n\r\n%s" % (len(body), body),
            )
        )
        if self._transport is not None:
            # Closing with unread bytes in the socket would reset it and destroy the response.
            self._lingering = True
            self._since = self._server.clock()
            self._steer_reading()
            if self._transport.can_write_eof():
                self._transport.write_eof()

    def _steer_reading(self) -> None:
        """Reads unless there is a request waiting its turn or the client does not take its response."""
        if self._transport is None:
            return
        wanted = self._lingering or (self._writable and not self._queue)
        if wanted and not self._reading:
            self._transport.resume_reading()
        elif self._reading and not wanted:
            self._transport.pause_reading()
        self._reading = wanted

    def _close(self) -> None:
        self._last_seen = True
        self._queue.clear()
        if self._transport is not None:
            self._transport.close()

    # -- the server's side ------------------------------------------------------------------------

    def retire(self) -> None:
        """Closes now, or as soon as the response in flight has ended."""
        self.retiring = True
        if self._exchange is None:
            self._close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def sweep(self, now: float) -> None:
        """Closes the connection when its present state has lasted too long."""
        age = now - self._since
        if not self._writable:
            size = self._transport.get_write_buffer_size() if self._transport is not None else 0
            if size < self._buffered:
                self._buffered, self._since = size, now
            elif age > WRITE_STALL:
                self.abort()
        elif self._exchange is not None:
            return
        elif self._lingering:
            if age > LINGER:
                self.abort()
        elif self._receiving:
            if age > self._server.request_timeout:
                self._refuse(_Refusal(408, f"the request was not complete after {age:.0f} s"))
                self._advance()
        elif age > (self._server.request_timeout if self._fresh else self._server.keep_alive):
            self._close()


class HttpServer:
    """Listens on host:port and hands complete requests to `handler`; an async context manager.

    keep_alive: seconds an idle connection is kept. request_timeout: seconds from the first byte of a request
    to its last (then 408), and from accept to the first byte (then closed). max_body: bytes (then 413).
    ssl_context: speaks TLS. reuse_port: other processes listen on the same port. protocol: makes
    the asyncio.Protocol of an accepted connection in place of `Connection`: an `Accepted` that tells `opened`
    and `lost` and keeps `in_flight`.
    """

    def __init__(
        self,
        handler: Handler,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        max_body: int = 64 << 20,
        keep_alive: float = 5.0,
        request_timeout: float = 60.0,
        backlog: int = 4096,
        ssl_context: ssl.SSLContext | None = None,
        reuse_port: bool = False,
        protocol: Callable[[HttpServer], asyncio.Protocol] | None = None,
    ) -> None:
        self.handler = handler
        self.host = host
        self.port = port
        """The port asked for; once started, the one listened on."""
        self.max_body = max_body
        self.keep_alive = keep_alive
        self.request_timeout = request_timeout
        self.in_flight = 0
        """Exchanges handed to the handler and not yet ended."""
        self._backlog = backlog
        self._ssl = ssl_context
        self._reuse_port = reuse_port
        self._protocol = protocol or Connection
        self._connections: dict[Accepted, None] = {}
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._empty: asyncio.Future[None] | None = None
        self.clock: Callable[[], float]

    def __repr__(self) -> str:
        state = "listening" if self._server is not None else "closed"
        return (
            f"<HttpServer {self.host}:{self.port} {state} connections={self.connections} "
            f"in_flight={self.in_flight}>"
        )

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def __aenter__(self) -> HttpServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Listens. Raises ConfigError when the address cannot be had."""
        loop = asyncio.get_running_loop()
        self.clock = loop.time
        try:
            self._server = await loop.create_server(
                lambda: self._protocol(self),
                self.host,
                self.port,
                backlog=self._backlog,
                ssl=self._ssl,
                reuse_port=self._reuse_port or None,
            )
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"cannot listen on {self.host}:{self.port}: {reason}") from error
        self.port = self._server.sockets[0].getsockname()[1]
        self._sweep()

    async def close(self, grace: float = 0.0) -> None:
        """Stops accepting, closes idle connections, gives exchanges in flight `grace` seconds; aborts."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for connection in list(self._connections):
            connection.retire()
        await self._emptied(grace)
        self.abort()
        await self._emptied(LINGER)
        if self._sweeper is not None:
            self._sweeper.cancel()
        await server.wait_closed()

    def abort(self) -> None:
        """Cuts off every connection."""
        for connection in list(self._connections):
            connection.abort()

    async def _emptied(self, timeout: float) -> None:
        if not self._connections:
            return
        self._empty = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._empty], timeout=timeout)

    def opened(self, connection: Accepted) -> None:
        self._connections[connection] = None
        if self._server is None:
            connection.retire()

    def lost(self, connection: Accepted) -> None:
        self._connections.pop(connection, None)
        if not self._connections and self._empty is not None and not self._empty.done():
            self._empty.set_result(None)

    def _sweep(self) -> None:
        now = self.clock()
        for connection in list(self._connections):
            connection.sweep(now)
        tick = min(1.0, self.keep_alive / 4, self.request_timeout / 4)
        self._sweeper = asyncio.get_running_loop().call_later(tick, self._sweep)
