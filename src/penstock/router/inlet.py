"""The client's side of the router: one accepted connection, its requests parsed and handed on.

It guarantees:
- a request that is malformed, ambiguous in its framing, too large or too slow never reaches an engine whole:
  it gets one error (400, 401, 408, 413, 431) and the connection is closed;
- requests of one connection are answered one at a time and in order; what is pipelined waits, in bounded
  memory;
- `Relay.lost` is called once when a client goes away before its response has ended, also while nothing is
  read from it;
- no timer per connection: the listening server's one sweeper closes what has lasted too long.

It is a connection of `penstock.wire.server.HttpServer`, beside that module's own, which hands over complete
requests. The parser is the same.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import unquote

import httptools

from penstock.router.relay import HOLD, Relay
from penstock.router.requests import Refusal, RequestReader, nowhere
from penstock.wire.exchange import Exchange, Request, error_body, response_head
from penstock.wire.server import LINGER, MAX_HEAD, WRITE_STALL, HttpServer

if TYPE_CHECKING:
    from penstock.router.router import Router

MAX_BACKLOG: Final = 64 << 10
"""Bytes of pipelined requests that are read ahead."""
SLOW_BODY: Final = 60.0
"""Seconds without a byte of a request's body before it is given up."""

_TCP_ESTABLISHED: Final = 1

logger = logging.getLogger(__name__)


class Inlet(RequestReader):
    """One client connection."""

    __slots__ = (
        "_advancing",
        "_backlog",
        "_backlog_size",
        "_buffered",
        "_fresh",
        "_lingering",
        "_reading",
        "_refusal",
        "_transport",
        "_waiters",
        "retiring",
        "writable",
    )

    def __init__(self, server: HttpServer, router: Router) -> None:
        super().__init__(server, router)
        self._transport: asyncio.Transport | None = None
        self._backlog: list[bytes] = []
        """What came after the current request, not parsed yet."""
        self._backlog_size = 0
        self._refusal: Refusal | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._fresh = True
        self._lingering = False
        self._advancing = False
        self._reading = True
        self.writable = True
        """The client takes what is written."""
        self._buffered = 0
        self.retiring = False

    def _new_relay(self) -> Relay:
        return Relay(self)

    # -- the transport's side ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.write = self._transport.write
        self._server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.write = nowhere
        self._last_seen = True
        self._queue.clear()
        self._backlog.clear()
        self._receiving = None
        self._server.lost(self)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        current, self._current = self._current, None
        exchange, self._exchange = self._exchange, None
        if current is not None:
            self._server.in_flight -= 1
            current.lost()
        elif exchange is not None:
            self._server.in_flight -= 1
            exchange.lose()

    def eof_received(self) -> bool:
        if (self._current is not None or self._exchange is not None) and self._transport is not None:
            self._transport.abort()
        return False

    def data_received(self, data: bytes) -> None:
        if self._last_seen:
            return
        current = self._current
        if self._exchange is not None or (current is not None and current.complete):
            self._backlog.append(data)
            self._backlog_size += len(data)
            self.steer()
            return
        self._parse(data)

    def pause_writing(self) -> None:
        self.writable = False
        self._since = self._server.clock()
        self._buffered = 1 << 62
        if self._current is not None:
            self._current.pause()

    def resume_writing(self) -> None:
        self.writable = True
        self._since = self._server.clock()
        if self._current is not None:
            self._current.go_on()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _parse(self, data: bytes) -> None:
        self._fresh = False
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
            if not self._head_done and self._receiving is not None:
                self._head_size += len(data)  # a header that has not ended is unknown to on_header
                if self._head_size > 2 * MAX_HEAD:
                    self._refuse(Refusal(431, f"the request head is larger than {MAX_HEAD} bytes"))
        receiving = self._receiving
        if receiving is not None and receiving is not self._current and receiving.size > HOLD:
            self._queue.append(receiving)  # it begins before it is complete
        if self._queue or self._refusal is not None:
            self._advance()

    # -- requests ---------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Hands on queued requests while each is answered at once; then the refusal, if there is one."""
        if self._advancing:
            return
        self._advancing = True
        while self._transport is not None and self._current is None and self._exchange is None:
            if self._queue:
                self._begin(self._queue.popleft())
            elif self._backlog and not self._last_seen:
                data, self._backlog = b"".join(self._backlog), []
                self._backlog_size = 0
                self._parse(data)
            else:
                break
        self._advancing = False
        if self._refusal is not None and self._current is None and self._exchange is None:
            self._send_refusal(self._refusal)
        elif not self._reading or self._backlog:
            self.steer()

    def _begin(self, request: Relay) -> None:
        self._server.in_flight += 1
        router = self.router
        if request.denied:
            router.statistics.refused += 1
            self._respond(request, 401, "a valid API key is needed")
        elif router.answers(request.path):
            if not request.complete:
                self._server.in_flight -= 1
                self._refuse(Refusal(413, "the request body is too large for this path"))
                return
            self._hand_over(request)
        else:
            resumed = router.resumed(request) if request.resume is not None or router.resumes else None
            if resumed is not None:
                exchange = self._exchange = Exchange(self, _exchange_request(request))
                resumed(exchange)
                return
            self._current = request
            request.start()

    def _respond(self, request: Relay, status: int, message: str) -> None:
        """An error for a request that is not relayed."""
        exchange = self._exchange = Exchange(self, _exchange_request(request))
        exchange.request.keep_alive = request.keep_alive and request.complete
        exchange.respond(status, error_body(status, message))

    def _hand_over(self, request: Relay) -> None:
        exchange = self._exchange = Exchange(self, _exchange_request(request))
        try:
            self._server.handler(exchange)
        except Exception:
            logger.exception("handler failed on %s", request.path)
            if not exchange.started:
                exchange.respond(500, error_body(500, "internal server error"))
            elif self._exchange is exchange and self._transport is not None:
                self._transport.abort()

    def exchange_ended(self, close: bool) -> None:
        self._exchange = None
        self._settled(close)

    def exchange_broken(self) -> None:
        self._exchange = None
        self._server.in_flight -= 1
        self._close()

    def ended(self, request: Relay) -> None:
        """The response of a relayed request has been written to its end."""
        if self._current is request:
            self._current = None
            if not request.complete:  # the engine answered early: the rest of the body is nobody's
                self._receiving = None
                self._server.in_flight -= 1
                self._linger()
                return
            self._settled(self.closes_after(request))

    def break_off(self, request: Relay, event: bytes) -> None:
        """The response of a relayed request will not be complete: writes a last piece, and closes."""
        if self._current is request:
            self._current = None
            self._server.in_flight -= 1
            if event and self._transport is not None:
                self.write(event)
                self._close()
            else:
                self._reset()

    def closes_after(self, request: Relay) -> bool:
        return not request.keep_alive or not request.complete or self.retiring

    def _settled(self, close: bool) -> None:
        self._since = self._server.clock()
        self._server.in_flight -= 1
        if close or self.retiring:
            self._close()
        elif self._queue or self._backlog or self._refusal is not None:
            self._advance()
        elif not self._reading:
            self.steer()

    def _refuse(self, refusal: Refusal) -> None:
        """Reads no more requests; the refusal is sent once those before it have been answered."""
        request, self._receiving = self._receiving, None
        self.router.statistics.refused += 1
        if not self._last_seen:
            self._last_seen = True
            self._refusal = refusal
        if request is None:
            return
        if request is self._current:
            request.abandon()
            self._current = None
            self._server.in_flight -= 1
            if request.begun:
                self._refusal = None
                self._reset()
        elif self._queue and self._queue[-1] is request:
            self._queue.pop()

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
        """Reads, unless what is read could not be passed on."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        current = self._current
        choked = current is not None and not current.complete and not current.takes_more()
        wanted = self._lingering or (not choked and self._backlog_size <= MAX_BACKLOG)
        if wanted and not self._reading:
            self._since = self._server.clock()
            transport.resume_reading()
        elif self._reading and not wanted:
            transport.pause_reading()
        self._reading = wanted

    async def drained(self) -> None:
        if not self.writable and self._transport is not None:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _close(self) -> None:
        self._last_seen = True
        self._queue.clear()
        self._backlog.clear()
        if self._transport is not None:
            self._transport.close()

    def _reset(self) -> None:
        """Ends the connection by RST: the client cannot take what it has for a whole response."""
        self._last_seen = True
        if self._transport is not None:
            peer = self._transport.get_extra_info("socket")
            if peer is not None:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            self._transport.abort()

    # -- the server's side ------------------------------------------------------------------------

    def retire(self) -> None:
        """Closes now, or as soon as the response in flight has ended."""
        self.retiring = True
        if self._current is None and self._exchange is None:
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
        elif self._current is not None or self._exchange is not None:
            self._sweep_busy(age)
        elif self._receiving is not None:
            bound = SLOW_BODY if self._head_done else self._server.request_timeout
            if age > bound:
                self._refuse(Refusal(408, f"the request was not complete after {age:.0f} s"))
                self._advance()
        elif age > (self._server.request_timeout if self._fresh else self._server.keep_alive):
            self._close()

    def _sweep_busy(self, age: float) -> None:
        """A request is being answered: is the client still there, is it still sending?"""
        if not self._reading:
            if self._gone():
                self.abort()
        elif self._receiving is not None and self._receiving is self._current and age > SLOW_BODY:
            self._refuse(Refusal(408, f"the request's body stopped for {age:.0f} s"))
            self._advance()

    def _gone(self) -> bool:
        """Whether the client has closed a connection that is not read."""
        assert self._transport is not None
        peer = self._transport.get_extra_info("socket")
        if peer is None or peer.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        state: bytes = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return state[0] != _TCP_ESTABLISHED


def _exchange_request(request: Relay) -> Request:
    """A request for one of the router's own handlers."""
    fields = request.fields
    headers = {
        fields[at].decode("latin-1").lower(): fields[at + 2].decode("latin-1")
        for at in range(0, len(fields), 4)
    }
    for name, value in (("authorization", request.authorization), ("x-request-id", request.request_id)):
        if value is not None:
            headers[name] = value.decode("latin-1")
    query = request.target.partition(b"?")[2].decode("latin-1")
    path = unquote(request.path.decode("latin-1"))
    body = b"".join(request.body)
    made = Request(request.method.decode("ascii"), path, query, headers, body)
    made.keep_alive, made.http10 = request.keep_alive, request.http10
    return made
