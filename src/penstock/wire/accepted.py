"""One accepted connection: all that does not depend on what is done with its requests.

It guarantees:
- requests of one connection are answered one at a time and in order, the next one only after the response to
  the one before has ended; memory for what is pipelined is bounded;
- whatever a client sends, it gets its response or one error (400, 408, 413, 431, …), and the connection is
  closed after an error of its own making;
- whoever answers a request is told once, by `lost`, when the client goes away before the response has ended;
- no wait without a bound: idle connections, slow requests, lingering closes and clients that stop reading are
  all closed by the server's one sweeper.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, cast

import httptools

from penstock.wire.exchange import Exchange, Request, error_body, response_head

if TYPE_CHECKING:
    from penstock.wire.server import HttpServer

logger = logging.getLogger(__name__)

MAX_HEAD: Final = 64 << 10
"""Bytes of request line and headers; more is answered 431."""
LINGER: Final = 2.0
"""Seconds a connection is read and discarded after an error response, so that the client can read it."""
WRITE_STALL: Final = 300.0
"""Seconds a client may leave a full write buffer untouched before it is cut off."""


class Refusal(Exception):
    """A request that is answered with an error and a close."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Pending(Protocol):
    """Whoever answers a request: an `Exchange`, a relay."""

    def lost(self) -> None:
        """The client has gone."""
        ...


class AcceptedConnection(asyncio.Protocol, ABC):
    """The states of a connection, its requests parsed by callbacks of the class below.

    That class queues complete requests, and `_next` takes the first of them up.
    """

    __slots__ = (
        "_advancing",
        "_begun",
        "_buffered",
        "_fresh",
        "_head_done",
        "_head_raw",
        "_last_seen",
        "_lingering",
        "_parser",
        "_pending",
        "_reading",
        "_receiving",
        "_refusal",
        "_server",
        "_since",
        "_transport",
        "_url",
        "_waiters",
        "retiring",
        "writable",
        "write",
    )

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._pending: Pending | None = None
        """Who answers the current request."""
        self._refusal: Refusal | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._since = server.clock()
        """When the present state (fresh, receiving, idle, lingering, write stalled) began."""
        self._fresh = True
        """Nothing has been received."""
        self._receiving = False
        """A request has begun that is not complete."""
        self._begun = False
        """It began, its head ended or its body grew in the present piece of data."""
        self._head_done = False
        self._head_raw = 0
        """Bytes of the pieces since then: of a head, a trailer or a chunk extension that has not ended."""
        self._url = b""
        self._last_seen = False
        """No further request is read: the client or the server has asked for a close."""
        self._lingering = False
        self._advancing = False
        self._reading = True
        self._buffered = 0
        self.writable = True
        """The client takes what is written."""
        self.retiring = False
        self.write: Callable[[bytes], None] = nowhere

    # -- what a class of connections is made of -----------------------------------------------------

    @abstractmethod
    def _next(self) -> bool:
        """Takes up the next request, if there is one."""

    @abstractmethod
    def _drop_queue(self) -> None:
        """No further request will be taken up."""

    @abstractmethod
    def _wants_more(self) -> bool:
        """Whether what is read now could be kept or passed on."""

    def _sweep_pending(self, age: float) -> None:
        """A request is being answered, and the present state has lasted so many seconds."""

    def _patience(self) -> float:
        """Seconds a request being received may take."""
        return self._server.request_timeout

    # -- the transport's side ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.write = self._transport.write
        self._server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.write = nowhere
        self._last_seen = True
        self._drop_queue()
        self._server.lost(self)
        self._wake()
        pending = self._pending
        if pending is not None:
            self._settled()
            pending.lost()

    def eof_received(self) -> bool:
        if self._pending is not None and self._transport is not None:
            self._transport.abort()
        return False

    def pause_writing(self) -> None:
        self.writable = False
        self._since = self._server.clock()
        self._buffered = 1 << 62
        self.steer()

    def resume_writing(self) -> None:
        self.writable = True
        self._since = self._server.clock()
        self.steer()
        self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # -- the parser's side ------------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        """Feeds the parser, and refuses what is not a request as it should be."""
        self._fresh = self._begun = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(Refusal(400, "protocol upgrades are not supported"))
        except httptools.HttpParserCallbackError as error:
            if not isinstance(error.__context__, Refusal):
                raise
            self._refuse(error.__context__)
        except httptools.HttpParserError as error:
            self._refuse(Refusal(400, f"malformed HTTP request: {error}"))
        else:
            if self._receiving and not self._begun:
                self._head_raw += len(data)  # a header that has not ended is unknown to on_header
                if self._head_raw > MAX_HEAD:
                    part = "trailer or a chunk extension" if self._head_done else "head"
                    self._refuse(Refusal(431, f"the request has a {part} larger than {MAX_HEAD} bytes"))

    def on_message_begin(self) -> None:
        self._receiving = self._begun = True
        self._head_done = False
        self._head_raw = 0
        self._url = b""
        self._since = self._server.clock()

    def on_url(self, url: bytes) -> None:
        self._url = self._url + url if self._url else url

    # -- requests and their answers ---------------------------------------------------------------

    def _advance(self) -> None:
        """Takes up requests while each is answered at once; then sends the refusal, if there is one."""
        if self._advancing:
            return
        self._advancing = True
        while self._pending is None and self._transport is not None and self._next():
            pass
        self._advancing = False
        if self._pending is None and self._refusal is not None:
            self._send_refusal(self._refusal)
        else:
            self.steer()

    def _hand_over(self, request: Request) -> None:
        """The server's handler answers this request."""
        exchange = Exchange(self, request)
        self._take_up(exchange)
        try:
            self._server.handler(exchange)
        except Exception:
            logger.exception("handler failed on %s %s", request.method, request.path)
            if not exchange.started:
                exchange.respond(500, error_body(500, "internal server error"))
            elif self._pending is exchange:
                self.abort()  # half a response cannot be taken back

    def _take_up(self, pending: Pending) -> None:
        self._pending = pending
        self._server.in_flight += 1

    def _settled(self) -> None:
        """The current request has been answered, or its answer given up."""
        self._pending = None
        self._server.in_flight -= 1

    def exchange_ended(self, close: bool) -> None:
        self._settled()
        self._since = self._server.clock()
        if close or self.retiring:
            self._close()
        else:
            self._advance()

    def exchange_broken(self) -> None:
        self._settled()
        self._close()

    async def drained(self) -> None:
        if not self.writable and self._transport is not None:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _refuse(self, refusal: Refusal) -> None:
        """Reads no more requests; the refusal is sent once those before it have been answered."""
        if not self._last_seen:
            self._last_seen = True
            self._refusal = refusal
        self._receiving = False

    def _send_refusal(self, refusal: Refusal) -> None:
        self._refusal = None
        body = error_body(refusal.status, str(refusal))
        framing = b"content-length: %d\r\n\r\n%s" % (len(body), body)
        self.write(response_head(refusal.status, "application/json", None, True, framing))
        self._linger()

    def _linger(self) -> None:
        """Closing with unread bytes in the socket would reset it and destroy the response."""
        self._last_seen = True
        if self._transport is not None:
            self._lingering = True
            self._since = self._server.clock()
            self.steer()
            if self._transport.can_write_eof():
                self._transport.write_eof()

    def steer(self) -> None:
        """Reads, unless what is read could not be kept."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        wanted = self._lingering or self._wants_more()
        if wanted and not self._reading:
            transport.resume_reading()
        elif self._reading and not wanted:
            transport.pause_reading()
        self._reading = wanted

    def _close(self) -> None:
        self._last_seen = True
        self._drop_queue()
        if self._transport is not None:
            self._transport.close()

    # -- the server's side ------------------------------------------------------------------------

    def retire(self) -> None:
        """Closes now, or as soon as the response in flight has ended."""
        self.retiring = True
        if self._pending is None:
            self._close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def sweep(self, now: float) -> None:
        """Closes the connection when its present state has lasted too long."""
        age = now - self._since
        if not self.writable:
            size = self._transport.get_write_buffer_size() if self._transport is not None else 0
            if size < self._buffered:
                self._buffered, self._since = size, now
            elif age > WRITE_STALL:
                self.abort()
        elif self._lingering:
            if age > LINGER:
                self.abort()
        elif self._pending is not None:
            self._sweep_pending(age)
        elif self._receiving:
            if age > self._patience():
                self._refuse(Refusal(408, f"the request was not complete after {age:.0f} s"))
                self._advance()
        elif age > (self._server.request_timeout if self._fresh else self._server.keep_alive):
            self._close()


def nowhere(data: bytes) -> None:
    """The client has gone."""
