"""The client's side of the router: one accepted connection, its requests parsed and handed on.

It guarantees, besides what `penstock.wire.accepted` does:
- a request that is malformed, ambiguous in its framing, too large or too slow never reaches an engine whole:
  it gets one error (400, 401, 408, 413, 431) and the connection is closed;
- `Relay.lost` is called once when a client goes away before its response has ended, also while nothing is
  read from it.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Final

from penstock.router.relay import HOLD, Relay
from penstock.router.requests import RequestHead, RequestReader
from penstock.wire.accepted import Refusal
from penstock.wire.exchange import Exchange, Request, error_body
from penstock.wire.server import HttpServer

if TYPE_CHECKING:
    from penstock.router.router import Router

MAX_BACKLOG: Final = 64 << 10
"""Bytes of pipelined requests that are read ahead."""
SLOW_BODY: Final = 60.0
"""Seconds without a byte of a request's body before it is given up."""

_TCP_ESTABLISHED: Final = 1


class Inlet(RequestReader):
    """One client connection."""

    __slots__ = ("_backlog", "_backlog_size", "peer")

    def __init__(self, server: HttpServer, router: Router) -> None:
        super().__init__(server, router)
        self._backlog: list[bytes] = []
        """What came after the current request, not parsed yet."""
        self._backlog_size = 0
        self.peer = ""
        """The client's address, for the access log."""

    def _new_relay(self, head: RequestHead, length: int | None, id: bytes | None) -> Relay:
        return Relay(self, head, length, id)

    # -- the transport's side ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self.router.access_log is not None:
            self.peer = _address(transport.get_extra_info("peername"))
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._last_seen:
            return
        pending = self._pending
        if pending is not None and pending is not self._body_of:
            self._backlog.append(data)
            self._backlog_size += len(data)
            self.steer()
        elif (request := self._take(data)) is not None:
            self._begin(request)
        elif self._queue or self._refusal is not None:
            self._advance()

    def _take(self, data: bytes) -> Relay | None:
        """A request that can begin at once; others are queued, large ones before they are complete."""
        request = self._read(data)
        coming = self._body_of
        if coming is not None and coming is not self._pending and coming.size > HOLD:
            self._queue.append(coming)
        return request

    def pause_writing(self) -> None:
        super().pause_writing()
        if isinstance(self._pending, Relay):
            self._pending.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if isinstance(self._pending, Relay):
            self._pending.go_on()

    # -- requests ---------------------------------------------------------------------------------

    def _next(self) -> bool:
        request = None
        if self._queue:
            request = self._queue.popleft()
        elif self._backlog and not self._last_seen:
            data, self._backlog = b"".join(self._backlog), []
            self._backlog_size = 0
            request = self._take(data)
            if request is None:
                return bool(self._queue)
        if request is None:
            return False
        self._begin(request)
        return True

    def _begin(self, request: Relay) -> None:
        router, head = self.router, request.head
        if head.denied:
            router.statistics.refused += 1
            if router.access_log is not None:
                router.access_log(request, 401, 0, router.clock())
            self._respond(request, 401, "a valid API key is needed")
        elif router.answers(head.path):
            if request.complete:
                self._hand_over(_exchange_request(request))
            else:
                self._begin_large(request)
        else:
            resumed = router.resumed(request) if head.resume is not None or router.resumes else None
            if resumed is None:
                self._take_up(request)
                request.start()
            else:
                exchange = Exchange(self, _exchange_request(request))
                self._take_up(exchange)
                resumed(exchange)

    def _begin_large(self, request: Relay) -> None:
        """A request for the router itself whose body is not held whole goes to all workers, or nowhere."""
        taker = self.router.broadcast(self, request)
        if taker is None:
            self._refuse(Refusal(413, "the request body is too large for this path"))
        else:
            self._body_of = taker
            self._take_up(taker)
            taker.start()

    def _respond(self, request: Relay, status: int, message: str) -> None:
        """An error for a request that is not relayed."""
        exchange = Exchange(self, _exchange_request(request))
        exchange.request.keep_alive = request.head.keep_alive and request.complete
        self._take_up(exchange)
        exchange.respond(status, error_body(status, message))

    def ended(self, request: Relay) -> None:
        """The response of a relayed request has been written to its end."""
        if self._pending is not request:
            return
        self._settled()
        if not request.complete:  # the engine answered early: the rest of the body is nobody's
            self._body_of = None
            self._receiving = False
            self._linger()
        elif self.closes_after(request):
            self._close()
        else:
            self._since = self._server.clock()
            if self._queue or self._backlog or self._refusal is not None or not self._reading:
                self._advance()

    def break_off(self, request: Relay, event: bytes) -> None:
        """The response of a relayed request will not be complete: writes a last piece, and closes."""
        if self._pending is request:
            self._settled()
            if event and self._transport is not None:
                self.write(event)
                self._close()
            else:
                self._reset()

    def closes_after(self, request: Relay) -> bool:
        return not request.head.keep_alive or not request.complete or self.retiring

    def _refuse(self, refusal: Refusal) -> None:
        super()._refuse(refusal)
        self.router.statistics.refused += 1
        request, self._body_of = self._body_of, None
        if request is None:
            return
        if request is self._pending:
            request.abandon()
            self._settled()
            if request.begun:
                self._refusal = None
                self._reset()
        elif self._queue and self._queue[-1] is request:
            self._queue.pop()

    def _drop_queue(self) -> None:
        self._queue.clear()
        self._backlog.clear()
        self._body_of = None

    def _wants_more(self) -> bool:
        """What is read can be passed on, or is not too much to keep."""
        request = self._body_of
        choked = request is not None and request is self._pending and not request.takes_more()
        return not choked and self._backlog_size <= MAX_BACKLOG

    def _reset(self) -> None:
        """Ends the connection by RST: the client cannot take what it has for a whole response."""
        self._last_seen = True
        if self._transport is not None:
            peer = self._transport.get_extra_info("socket")
            if peer is not None:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            self._transport.abort()

    # -- the server's side ------------------------------------------------------------------------

    def _patience(self) -> float:
        return SLOW_BODY if self._head_done else super()._patience()

    def _sweep_pending(self, age: float) -> None:
        """Is the client still there, is it still sending?"""
        if not self._reading:
            if self._gone():
                self.abort()
        elif self._body_of is not None and self._body_of is self._pending and age > SLOW_BODY:
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


def _address(name: tuple[object, ...] | None) -> str:
    if not name:
        return ""
    host = f"[{name[0]}]" if ":" in str(name[0]) else name[0]
    return f"{host}:{name[1]}"


def _exchange_request(request: Relay) -> Request:
    """A request for one of the router's own handlers."""
    head = request.head
    fields = head.fields
    headers = {
        fields[at].decode("latin-1").lower(): fields[at + 2].decode("latin-1")
        for at in range(0, len(fields), 4)
    }
    for name, value in (("authorization", head.authorization), ("x-request-id", request.request_id)):
        if value is not None:
            headers[name] = value.decode("latin-1")
    query = head.target.partition(b"?")[2].decode("latin-1")
    path = head.path.decode("utf-8", "replace")
    made = Request(head.method.decode("ascii"), path, query, headers, b"".join(request.body))
    made.keep_alive, made.http10 = head.keep_alive, head.http10
    return made
