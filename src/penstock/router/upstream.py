"""The engine's side of a relay: a connection whose response is handed on as it arrives, and its pool.

It guarantees:
- what arrives is handed to the `Sink` at once: the head, each piece of the body without its framing, and
  exactly one of `ended` and `failed`; after `release` nothing more;
- a connection goes back to its pool only when the response was complete, the engine keeps the connection and
  the whole request had been written;
- backpressure both ways: a sink that pauses stops the engine, an engine that does not read stops the sink.
"""

from __future__ import annotations

import ssl
from asyncio import AbstractEventLoop
from collections.abc import Sequence
from typing import Any, Protocol

import httptools

from penstock.errors import ConnectionLost, MalformedResponse, PenstockError
from penstock.router.heads import (
    CONTENT_LENGTH,
    END,
    NO_BODY,
    REQUEST_ID,
    TRANSFER_ENCODING,
    Cut,
    KnownHeads,
    cut,
)
from penstock.router.responses import ResponseHead
from penstock.router.statistics import WorkerStatistics
from penstock.wire.address import Address
from penstock.wire.connection import (
    LARGE_BODY,
    MAX_HEAD,
    Connection,
    Owner,
    Response,
    Timeouts,
    closed_early,
    overdue,
)
from penstock.wire.pool import Pool, PoolStatistics
from penstock.wire.stream import Stream


class Sink(Protocol):
    """Takes one response."""

    @property
    def complete(self) -> bool:
        """All of the request has been given to the connection: else it is of no use to others."""
        ...

    def headed(self, connection: EngineConnection) -> None:
        """The head has arrived: `head` and `length`."""
        ...

    def arrived(self, parts: list[bytes], *, complete: bool) -> None:
        """Pieces of the body; none: only the head has come, or the end. The list is emptied afterwards."""
        ...

    def ended(self) -> None:
        """The response is complete."""
        ...

    def failed(self, error: PenstockError) -> None:
        """It will not be complete."""
        ...

    def stop_sending(self) -> None:
        """The engine does not take the request's body fast enough."""
        ...

    def go_on_sending(self) -> None: ...


class EngineConnection(Connection):
    """One connection to an engine, relaying one response at a time.

    A response is parsed, unless it begins with a head that is known: then its body is only counted, and the
    parser stays where it was, between two responses.
    """

    __slots__ = ("_cut", "_headed", "_heads", "_id", "_left", "_whole", "head", "length", "sink")

    def __init__(self, owner: Owner, loop: AbstractEventLoop, peer: str) -> None:
        super().__init__(owner, loop, peer)
        assert isinstance(owner, RelayPool)
        self._heads = owner.heads
        self.sink: Sink | None = None
        self.head = ResponseHead()
        self.length: int | None = None
        """The value of content-length, None: the body is chunked or ends with the connection."""
        self._id: bytes | None = None
        self._cut: Cut | None = None
        """Set while just these bytes are parsed, from the beginning of a response."""
        self._headed = False
        """The sink has been given the head."""
        self._whole = False
        """The parser has come to the end of the response."""
        self._left: int | None = None
        """Bytes missing of a body that is only counted."""
        self.on_header = self._field
        self._parser = httptools.HttpResponseParser(self)

    # -- the relay's side -------------------------------------------------------------------------

    def submit(self, sink: Sink, head: bytes, body: bytes, *, bodyless: bool) -> None:
        """Writes a request, or the beginning of one; `head` includes the empty line."""
        transport = self._transport
        assert transport is not None and self.sink is None
        self.sink = sink
        self.since = self._clock()
        self._received = 0
        self._bodyless = bodyless
        self._begun = self._head_done = self._headed = self._whole = False
        self._left = None
        if len(body) < LARGE_BODY:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)

    def upload(self, data: bytes) -> None:
        """Writes more of the request."""
        if self._transport is not None:
            self.since = self._clock()
            self._transport.write(data)

    @property
    def status(self) -> int:
        return self.head.status

    @property
    def choked(self) -> bool:
        """More of the request has been written than the engine has taken."""
        transport = self._transport
        return transport is not None and transport.get_write_buffer_size() > LARGE_BODY

    def release(self) -> None:
        """Nobody wants the response: closes the connection, so that the engine stops generating."""
        self.sink = None
        self.abort()

    # -- the transport's side ---------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        sink = self.sink
        if sink is None:
            self.abort()  # nobody has asked
            return
        self.since = self._clock()
        first = not self._received
        self._received += len(data)
        if self._left is not None:
            self._count(sink, data, self._left)
        elif first and not self._bodyless:
            self._read(sink, data)
        elif self._feed(data):
            self._pass_on(sink)

    def _read(self, sink: Sink, data: bytes) -> None:
        """The beginning of a response."""
        found = self._heads.find(data)
        if found is not None:
            self.head, end, self.length, _ = found
            assert self.length is not None
            self._keep_alive = self.head.keep_alive
            self._head_done = self._headed = True
            sink.headed(self)
            self._count(sink, data[end:], self.length)
            return
        end = data.find(END) + len(END)
        if end >= len(END):
            self._cut = cut(data[:end])
            good = self._feed(data[:end])
            self._cut = None
            if not good:
                return
            data = data[end:]
        if not data or self._feed(data):
            self._pass_on(sink)

    def _count(self, sink: Sink, data: bytes, left: int) -> None:
        """Passes on so much of a body of which `left` bytes were missing."""
        self._left = left - len(data)
        if self._left > 0:
            sink.arrived([data], complete=False)
        else:
            if self._left < 0:
                self._keep_alive = False  # nobody asked for more
                data = data[:left]
            self._end(sink, [data])

    def _feed(self, data: bytes) -> bool:
        """Parses; whether it is still a response."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._keep_alive = False
            if not self._whole:
                why = error.__context__ or error
                self._fail(MalformedResponse(f"{self._peer} sent what is not an HTTP response: {why}"))
                return False
        return True

    def _pass_on(self, sink: Sink) -> None:
        """What the parser has found in the last piece of data."""
        fresh = not self._headed
        if fresh:
            if not self._head_done:
                if self._received > MAX_HEAD:
                    self._fail_head()
                return
            self._headed = True
            sink.headed(self)
        if self._whole:
            self._end(sink, self._parts)
        elif self._parts or fresh:
            sink.arrived(self._parts, complete=False)
            self._parts.clear()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._owner.lost(self)
        sink = self.sink
        if sink is None:
            return
        if exc is None and self._head_done and self.length is None and not self.head.chunked:
            self.sink = None
            sink.arrived([], complete=True)
            sink.ended()
            return
        self._fail(closed_early(self._peer, exc, started=self._received > 0, reused=self.served > 0))

    def pause_writing(self) -> None:
        if self.sink is not None:
            self.sink.stop_sending()

    def resume_writing(self) -> None:
        if self.sink is not None:
            self.sink.go_on_sending()

    def abort(self) -> None:
        """Closes at once; a request in flight ends with ConnectionLost."""
        if self.sink is not None:
            message = f"the connection to {self._peer} was closed while a request was in flight"
            self._fail(ConnectionLost(message, response_started=self._received > 0))
        elif self._transport is not None:
            self._transport.abort()

    def sweep(self, now: float, timeouts: Timeouts) -> None:
        sink, transport = self.sink, self._transport
        if sink is None or transport is None or not transport.is_reading():
            return
        late = overdue(self._peer, now - self.since, timeouts, started=self._received > 0)
        if late is not None:
            self._fail(late)

    # -- the parser's side ------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._begun = True
        if not self._head_done:  # else it is a second response to one request
            self.head = ResponseHead()
            self.length = self._id = None

    def _field(self, name: bytes, value: bytes) -> None:
        if self._head_done:
            return  # a trailer
        kind = self.head.add(name, value)
        if kind == CONTENT_LENGTH:
            self.length = int(value)
        elif kind == TRANSFER_ENCODING and value.lower() != b"chunked":
            raise MalformedResponse("its transfer coding is not chunked")
        elif kind == REQUEST_ID:
            self._id = value

    def on_headers_complete(self) -> None:
        if self._head_done:
            raise MalformedResponse("a second response to one request")
        parser, head = self._parser, self.head
        status = parser.get_status_code()
        if status < 200:
            if status < 100:
                raise MalformedResponse(f"its status is {status}")
            return
        self._head_done = True
        self._keep_alive = parser.should_keep_alive()
        head.finish(status, keep_alive=self._keep_alive)
        if self._bodyless:
            self._whole = True
            self._keep_alive = False  # the parser cannot be told that no body follows
        elif self._cut is not None and self.length is not None and status not in NO_BODY:
            self._heads.remember(self._cut, self.length, self._id, head)

    def on_message_complete(self) -> None:
        self._begun = False
        if self._whole:
            self._keep_alive = False  # a second response to one request, or a body where none may be
        elif self._head_done:
            self._whole = True

    # -- outcomes ---------------------------------------------------------------------------------

    def _end(self, sink: Sink, parts: list[bytes]) -> None:
        transport = self._transport
        assert transport is not None
        self.served += 1
        sink.arrived(parts, complete=True)
        parts.clear()
        self.sink = None
        if not transport.is_reading() and not transport.is_closing():
            transport.resume_reading()
        if (
            self._keep_alive
            and not self._begun
            and sink.complete
            and transport.get_write_buffer_size() == 0
            and not transport.is_closing()
        ):
            self._owner.released(self)
        else:
            transport.abort()
        sink.ended()

    def _fail(self, error: PenstockError) -> None:
        sink, self.sink = self.sink, None
        self._parts.clear()
        if self._transport is not None:
            self._transport.abort()
        if sink is not None:
            sink.failed(error)


class RelayPool(Pool):
    """Connections for relaying to one engine."""

    def __init__(self, address: Address, **options: Any) -> None:
        super().__init__(address, connection_type=EngineConnection, **options)
        self.heads: KnownHeads[ResponseHead] = KnownHeads()

    def reuse(self) -> EngineConnection | None:
        """An idle connection, if there is one."""
        connection = self._reuse()
        assert connection is None or isinstance(connection, EngineConnection)
        return connection

    async def connect(self, *, fresh: bool) -> EngineConnection:
        """A new connection, or unless it has to be fresh one that has become idle meanwhile. Raises
        ConnectFailed, PhaseTimeout, and ConfigError once the pool is closed."""
        connection = await self._connector.connection(fresh=fresh)
        assert isinstance(connection, EngineConnection)
        return connection


class EngineTransport:
    """How requests get to one engine: relayed ones by `relay`, our own questions by a pool beside it."""

    def __init__(
        self,
        address: Address,
        *,
        timeouts: Timeouts,
        ssl_context: ssl.SSLContext | None = None,
        source_addresses: Sequence[str] = (),
    ) -> None:
        self.address = address
        self.relay = RelayPool(
            address,
            timeouts=timeouts,
            ssl_context=ssl_context,
            source_addresses=source_addresses,
        )
        self.counts = WorkerStatistics()
        self.models: frozenset[str] | None = None
        """The names it serves; None: not known."""
        self.host_line = b" HTTP/1.1\r\nhost: %s\r\n" % address.authority.encode("ascii")
        self.root = address.root.encode("ascii")
        self.api = address.api.encode("ascii")
        self.plain = not self.root and self.api == b"/v1"
        """Paths are the same at the engine."""
        self._own = Pool(address, ssl_context=ssl_context, source_addresses=source_addresses)

    def target(self, target: bytes) -> bytes:
        """A request's path at the engine: `/v1/…` under its API prefix, all others under its root."""
        if self.plain:
            return target
        if target.startswith((b"/v1/", b"/v1?")) or target == b"/v1":
            return self.api + target[3:]
        return self.root + target

    # -- as a transport of the fleet --------------------------------------------------------------

    async def request(self, head: bytes, body: bytes = b"") -> Response:
        return await self._own.request(head, body)

    async def stream(self, head: bytes, body: bytes = b"") -> Stream:
        return await self._own.stream(head, body)

    def drop_silent(self, seconds: float) -> int:
        return self.relay.drop_silent(seconds) + self._own.drop_silent(seconds)

    def statistics(self) -> PoolStatistics:
        return self.relay.statistics()

    async def close(self) -> None:
        await self.relay.close()
        await self._own.close()
