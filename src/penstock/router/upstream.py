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
from typing import Final, Protocol

import httptools

from penstock.errors import ConnectionLost, MalformedResponse, PenstockError
from penstock.router.heads import (
    CONNECTION,
    CONTENT_ENCODING,
    CONTENT_LENGTH,
    CONTENT_TYPE,
    KIND,
    PASS,
    RETRY_AFTER,
    TRANSFER_ENCODING,
    learn,
    without_named,
)
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

_PASSING: Final = frozenset({PASS, CONTENT_TYPE, CONTENT_ENCODING, RETRY_AFTER})


class Sink(Protocol):
    """Takes one response."""

    def headed(self, connection: EngineConnection) -> None:
        """The head has arrived: `status`, `fields`, `length`."""
        ...

    def arrived(self, parts: list[bytes], *, complete: bool) -> None:
        """Pieces of the body; none: only the head has come, or the end. The list is emptied afterwards."""
        ...

    def ended(self) -> None:
        """The response is complete; the connection is free for others."""
        ...

    def failed(self, error: PenstockError) -> None:
        """It will not be complete."""
        ...

    def stop_sending(self) -> None:
        """The engine does not take the request's body fast enough."""
        ...

    def go_on_sending(self) -> None: ...


class EngineConnection(Connection):
    """One connection to an engine, relaying one response at a time."""

    __slots__ = (
        "_chunked",
        "_complete_response",
        "_headed",
        "_nominated",
        "fields",
        "length",
        "retry_after",
        "sink",
        "sse",
        "status",
    )

    def __init__(self, owner: Owner, loop: AbstractEventLoop, peer: str) -> None:
        super().__init__(owner, loop, peer)
        self.sink: Sink | None = None
        self.status = 0
        self.fields: list[bytes] = []
        """Header fields that pass: name, separator, value and line end in turn."""
        self.length: bytes | None = None
        """The value of content-length, None: the body is chunked or ends with the connection."""
        self.sse = False
        self.retry_after: bytes | None = None
        self._nominated: list[bytes] = []
        self._complete_response = self._headed = self._chunked = False
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
        self._begun = self._head_done = self._headed = self._complete_response = False
        self._chunked = self.sse = False
        self.length = self.retry_after = None
        self.fields = []
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
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._keep_alive = False
            if not self._complete_response:
                self._fail(MalformedResponse(f"{self._peer} sent what is not an HTTP response: {error}"))
                return
        fresh = not self._headed
        if fresh:
            if not self._head_done:
                if self._received > MAX_HEAD:
                    self._fail_head()
                return
            self._headed = True
            sink.headed(self)
        if self._complete_response:
            self._end(sink)
        elif self._parts or fresh:
            sink.arrived(self._parts, complete=False)
            self._parts.clear()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._owner.lost(self)
        sink = self.sink
        if sink is None:
            return
        if exc is None and self._head_done and self._ends_with_connection():
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

    def _field(self, name: bytes, value: bytes) -> None:
        kind = KIND.get(name, -1)
        if kind < 0:
            kind = learn(name)
        if kind == PASS:
            self.fields += (name, b": ", value, b"\r\n")
        elif kind in _PASSING:
            self.fields += (name, b": ", value, b"\r\n")
            if kind == CONTENT_TYPE:
                self.sse = value[:17].lower() == b"text/event-stream"
            elif kind == RETRY_AFTER:
                self.retry_after = value
        elif kind == CONTENT_LENGTH:
            self.length = value
        elif kind == TRANSFER_ENCODING:
            self._chunked = True
        elif kind == CONNECTION and value.lower() not in (b"keep-alive", b"close"):
            self._nominated.append(value)

    def on_headers_complete(self) -> None:
        parser = self._parser
        status = self.status = parser.get_status_code()
        if status < 200:
            return
        self._keep_alive = parser.should_keep_alive()
        self._head_done = True
        if self._nominated:
            self.fields = without_named(self.fields, self._nominated)
            self._nominated = []
        if self._bodyless:
            self._complete_response = True
            self._keep_alive = False  # the parser cannot be told that no body follows

    def on_message_complete(self) -> None:
        self._begun = False
        if self.status < 200:
            self.fields = []
            self.length = None
        elif self._complete_response:
            self._keep_alive = False  # a second response to one request, or a body where none may be
        else:
            self._complete_response = True

    # -- outcomes ---------------------------------------------------------------------------------

    def _end(self, sink: Sink) -> None:
        transport = self._transport
        assert transport is not None
        self.served += 1
        sink.arrived(self._parts, complete=True)
        self._parts.clear()
        self.sink = None
        if not transport.is_reading() and not transport.is_closing():
            transport.resume_reading()
        if (
            self._keep_alive
            and not self._begun
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

    def _ends_with_connection(self) -> bool:
        return self.length is None and not self._chunked


class RelayPool(Pool):
    """Connections for relaying to one engine."""

    def reuse(self) -> EngineConnection | None:
        """An idle connection, if there is one."""
        connection = self._reuse()
        assert connection is None or isinstance(connection, EngineConnection)
        return connection

    async def connect(self) -> EngineConnection:
        """A new connection. Raises ConnectFailed, PhaseTimeout, and ConfigError once the pool is closed."""
        connection = await self._connect()
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
            connection_type=EngineConnection,
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
