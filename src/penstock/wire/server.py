"""A listening HTTP/1.1 server: complete requests in, responses out, on callbacks.

It guarantees, besides what `penstock.wire.accepted` does:
- one parser per connection, no task per request; the handler runs on the loop;
- `Exchange.on_disconnect` is called exactly once when a client goes away before its response has ended, and
  never otherwise;
- one coarse sweeper for all deadlines of all connections.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from types import TracebackType
from urllib.parse import unquote

from penstock.errors import ConfigError
from penstock.wire.accepted import LINGER, MAX_HEAD, AcceptedConnection, Refusal
from penstock.wire.exchange import Exchange, Request, error_body

__all__ = ["Exchange", "Handler", "HttpServer", "Request", "error_body"]

Handler = Callable[[Exchange], None]
"""Runs on the loop with a complete request. An exception becomes a 500, and is logged."""


def _target(url: bytes) -> tuple[str, str]:
    """Path (percent-decoded) and query of a request target in origin, absolute or asterisk form."""
    text = url.decode("latin-1")
    if not text.startswith("/") and "://" in text:
        text = "/" + text.partition("://")[2].partition("/")[2]
    path, _, query = text.partition("?")
    return (unquote(path) if "%" in path else path), query


class Connection(AcceptedConnection):
    """Hands over complete requests one at a time."""

    __slots__ = ("_body", "_body_size", "_head_size", "_headers", "_http10", "_keep_alive", "_queue")

    def __init__(self, server: HttpServer) -> None:
        super().__init__(server)
        self._queue: deque[Request] = deque()

    # -- the parser's side ------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._headers: dict[str, str] = {}
        self._head_size = 0
        self._body: list[bytes] = []
        self._body_size = 0
        self._http10 = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value) + 4
        self._headers[name.lower().decode("latin-1")] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._head_done = self._begun = True
        self._head_raw = 0
        headers, parser = self._headers, self._parser
        if self._head_size + len(self._url) > MAX_HEAD:
            raise Refusal(431, f"the request head is larger than {MAX_HEAD} bytes")
        self._keep_alive = parser.should_keep_alive()
        if not self._keep_alive or "connection" in headers:
            self._http10 = parser.get_http_version() != "1.1"
            self._keep_alive = self._keep_alive and not self._http10
        if int(headers.get("content-length", 0)) > self._server.max_body:
            self._too_large()
        if "expect" in headers and self._pending is None and not self._queue:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self._begun = True
        self._head_raw = 0
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
        self._queue.append(request)

    def _too_large(self) -> None:
        raise Refusal(413, f"the request body is larger than {self._server.max_body} bytes")

    # -- requests ---------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._last_seen:
            return
        self._parse(data)
        if self._queue or self._refusal is not None:
            self._advance()

    def _next(self) -> bool:
        if not self._queue:
            return False
        self._hand_over(self._queue.popleft())
        return True

    def _drop_queue(self) -> None:
        self._queue.clear()

    def _wants_more(self) -> bool:
        """No request waits for its turn, and the client takes its response."""
        return self.writable and not self._queue


class HttpServer:
    """Listens on host:port and hands complete requests to `handler`; an async context manager.

    keep_alive: seconds an idle connection is kept. request_timeout: seconds from the first byte of a request
    to its last (then 408), and from accept to the first byte (then closed). max_body: bytes (then 413).
    ssl_context: speaks TLS. reuse_port: other processes listen on the same port. protocol: makes
    what serves an accepted connection in place of `Connection`.
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
        protocol: Callable[[HttpServer], AcceptedConnection] | None = None,
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
        self._connections: dict[AcceptedConnection, None] = {}
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

    def opened(self, connection: AcceptedConnection) -> None:
        self._connections[connection] = None
        if self._server is None:
            connection.retire()

    def lost(self, connection: AcceptedConnection) -> None:
        self._connections.pop(connection, None)
        if not self._connections and self._empty is not None and not self._empty.done():
            self._empty.set_result(None)

    def _sweep(self) -> None:
        now = self.clock()
        for connection in list(self._connections):
            connection.sweep(now)
        tick = min(1.0, self.keep_alive / 4, self.request_timeout / 4)
        self._sweeper = asyncio.get_running_loop().call_later(tick, self._sweep)
