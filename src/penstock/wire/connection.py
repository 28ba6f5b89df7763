"""One client connection: a request written, its response parsed, one at a time.

It guarantees:
- the future `send` returns is resolved exactly once: with the complete response, or with the error that says
  why there is none (ConnectionLost, MalformedResponse, PhaseTimeout, ConnectFailed);
- a stream ends exactly once, complete or with one of these errors;
- a connection goes back to its pool only when the response was complete, the server keeps the connection, the
  whole request had been written and not a byte followed the response; else it is closed;
- memory is bounded: MAX_HEAD for the head, `max_response` for all of a response, MAX_UNREAD for a stream.

The parser is made once and reused. Its callbacks for headers and body pieces are methods of a dict and a
list, so that they cost no Python frame. A request in flight has either a waiter (the whole response is
wanted) or a stream, never both.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Final, Protocol, cast

import httptools
import msgspec

from penstock.errors import (
    ConfigError,
    ConnectFailed,
    ConnectionLost,
    MalformedResponse,
    PenstockError,
    PhaseTimeout,
)
from penstock.wire import tls
from penstock.wire.stream import Stream, find_header

MAX_HEAD: Final = 64 << 10
"""Bytes of status line and headers."""
MAX_RESPONSE: Final = 256 << 20
"""Bytes of one whole response. A streamed one has no bound: what lies unread has."""
LARGE_BODY: Final = 64 << 10
"""Bytes from which a request body is written on its own instead of being copied behind its head."""


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds each phase of an exchange may take; None means no limit. There is no limit on the total."""

    connect: float | None = 10.0
    """Name resolution, TCP and TLS."""
    first_byte: float | None = None
    """From the request to the first byte of the response. Without streaming that is the whole generation,
    which may take an hour: no limit by default. TCP keep-alive notices a vanished host in two minutes."""
    idle: float | None = 600.0
    """Between two bytes of a response."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"the {name} timeout must be positive or None, not {value}")


class Response:
    """A complete response."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        self.status = status
        self.headers = headers
        """Names as the server wrote them; of a repeated header the last one. See `header`."""
        self.body = body

    def header(self, name: bytes) -> bytes | None:
        """The value of the header called `name` (lower-case), whatever case the server wrote it in."""
        return find_header(self.headers, name)


class Owner(Protocol):
    """What a connection tells its pool. `lost` may be told twice, and of a connection that was never made."""

    max_response: int

    def made(self, connection: Connection) -> None: ...

    def released(self, connection: Connection) -> None: ...

    def lost(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """One connection to one origin, bound to the loop it was made in."""

    __slots__ = (
        "_begun",
        "_bodyless",
        "_clock",
        "_head_done",
        "_headers",
        "_keep_alive",
        "_loop",
        "_owner",
        "_parser",
        "_parts",
        "_peer",
        "_received",
        "_response",
        "_status",
        "_stream",
        "_transport",
        "_waiter",
        "on_body",
        "on_header",
        "served",
        "since",
    )

    def __init__(self, owner: Owner, loop: asyncio.AbstractEventLoop, peer: str) -> None:
        self._owner = owner
        self._loop = loop
        self._clock = loop.time
        self._peer = peer
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Response] | None = None
        self._stream: Stream | None = None
        self._response: Response | None = None
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._status = 0
        self._received = 0
        self._begun = False
        """A response has begun that has not been completed."""
        self._head_done = False
        self._keep_alive = False
        self._bodyless = False
        self.served = 0
        """Responses completed."""
        self.since = 0.0
        """Loop time of the last event: sent, received or released."""
        self.on_header = self._headers.__setitem__
        self.on_body = self._parts.append
        self._parser = httptools.HttpResponseParser(self)

    @property
    def alive(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, head: bytes, body: bytes) -> asyncio.Future[Response]:
        """Writes a request. `head` is all of it up to, and without, the content-length header.

        The connection must be alive and have no request in flight. A future that nobody wants any longer must
        be handed to `discard`.
        """
        transport = self._transport
        assert transport is not None and self._waiter is None
        waiter = self._waiter = self._loop.create_future()
        self.since = self._clock()
        self._received = 0
        self._begun = self._head_done = False
        self._bodyless = head.startswith(b"HEAD ")
        if len(body) < LARGE_BODY:
            transport.write(b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body))
        else:
            transport.write(b"%scontent-length: %d\r\n\r\n" % (head, len(body)))
            transport.write(body)
        return waiter

    def stream(self, head: bytes, body: bytes) -> Stream:
        """Writes a request, as `send`, whose response is read while it arrives."""
        self.send(head, body)
        self._waiter = None
        self._stream = stream = Stream(self, self._parts, self._loop)
        return stream

    def discard(self, waiter: asyncio.Future[Response]) -> None:
        """Nobody waits for this response any longer: closes the connection, unless it is complete."""
        if self._waiter is waiter:
            self._waiter = None
            self.abort()

    def abort(self) -> None:
        """Closes at once. A request in flight ends with ConnectionLost; what lies unread is dropped."""
        if self._waiter is not None or self._stream is not None:
            self._parts.clear()
            message = f"the connection to {self._peer} was closed while a request was in flight"
            self._fail(ConnectionLost(message, response_started=self._received > 0))
        elif self._transport is not None:
            self._transport.abort()

    def drop(self) -> None:
        """Nobody reads the stream any longer, and it is not complete."""
        self._stream = None
        self.abort()

    def pause(self) -> None:
        """Reads nothing more from the socket, which in time stops the server."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self.since = self._clock()
            self._transport.resume_reading()

    def sweep(self, now: float, timeouts: Timeouts) -> None:
        """Fails the request in flight if its phase has lasted too long."""
        if self._waiter is None and (self._stream is None or self._stream.paused):
            return
        late = overdue(self._peer, now - self.since, timeouts, started=self._received > 0)
        if late is not None:
            self._fail(late)

    # -- the transport's side ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._owner.made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._owner.lost(self)
        if self._waiter is None and self._stream is None:
            return
        if exc is None and self._head_done and self._until_close():
            self._settle(Response(self._status, self._headers, b"".join(self._parts)))
            return
        self._fail(closed_early(self._peer, exc, started=self._received > 0, reused=self.served > 0))

    def data_received(self, data: bytes) -> None:
        if self._waiter is None and self._stream is None:
            self.abort()  # nobody has asked: a 408 on an idle connection, or a server out of step
            return
        self.since = self._clock()
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._keep_alive = False
            if self._response is None:
                self._fail(MalformedResponse(f"{self._peer} sent what is not an HTTP response: {error}"))
                return
        response = self._response
        if response is not None:
            self._complete(response)
        elif self._stream is not None:
            self._streamed(self._stream, len(data))
        elif self._received > self._owner.max_response:
            self._fail(MalformedResponse(f"{self._peer} sent more than {self._owner.max_response} bytes"))
        elif not self._head_done and self._received > MAX_HEAD:
            self._fail_head()

    # -- the parser's side ------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._begun = True

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._keep_alive = self._parser.should_keep_alive()  # afterwards the parser no longer knows
        if self._status >= 200:
            self._head_done = True
            if self._bodyless:
                self._response = Response(self._status, self._headers.copy(), b"")
                self._keep_alive = False  # the parser cannot be told that no body follows

    def on_message_complete(self) -> None:
        self._begun = False
        if self._status < 200:
            self._headers.clear()
        elif self._response is None:
            parts = self._parts
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            self._response = Response(self._status, self._headers.copy(), body)
        else:
            self._keep_alive = False  # a second response to one request

    # -- outcomes ---------------------------------------------------------------------------------

    def _complete(self, response: Response) -> None:
        transport = self._transport
        assert transport is not None
        reusable = self._keep_alive and not self._begun and transport.get_write_buffer_size() == 0
        waiter, self._waiter, self._response = self._waiter, None, None
        if waiter is None:
            self._end_stream(response)
        self._headers.clear()
        self._parts.clear()
        self.served += 1
        if reusable and not transport.is_closing():
            self._owner.released(self)
        else:
            transport.abort()
        if waiter is not None and not waiter.done():
            waiter.set_result(response)

    def _settle(self, response: Response) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is None:
            self._end_stream(response)
        elif not waiter.done():
            waiter.set_result(response)

    def _fail(self, error: PenstockError) -> None:
        waiter, self._waiter = self._waiter, None
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.fail(error)
        elif waiter is not None and not waiter.done():
            waiter.set_exception(error)
        self.abort()

    def _fail_head(self) -> None:
        self._fail(MalformedResponse(f"{self._peer} sent a response head of more than {MAX_HEAD} bytes"))

    def _streamed(self, stream: Stream, size: int) -> None:
        """So many bytes of a response that is not complete have been parsed."""
        if not self._head_done:
            if self._received > MAX_HEAD:
                self._fail_head()
            return
        if stream.status == 0:
            stream.begin(self._status, self._headers.copy())
        stream.arrived(size)

    def _end_stream(self, response: Response) -> None:
        """The response is complete; its body is what the stream's reader has not taken yet."""
        stream, self._stream = self._stream, None
        assert stream is not None
        if stream.paused:  # the connection goes on to serve others
            self.resume()
        if stream.status == 0:
            stream.begin(response.status, response.headers)
        stream.finish(response.body)

    def _until_close(self) -> bool:
        """The body of the response is delimited by the end of the connection."""
        if find_header(self._headers, b"content-length") is not None:
            return False
        coding = find_header(self._headers, b"transfer-encoding")
        return coding is None or not coding.lower().rstrip().endswith(b"chunked")


def closed_early(peer: str, exc: Exception | None, *, started: bool, reused: bool) -> PenstockError:
    """What it means that the server's end of a connection closed before the response was complete.

    started: bytes of the response had come. reused: the connection had served before.
    """
    if isinstance(exc, ssl.SSLError) and not started and not reused:
        # With TLS 1.3 a server refuses our certificate only after the handshake has ended for us.
        return ConnectFailed(f"cannot connect to {peer}: {tls.reason_of(exc)}")
    where = "in the middle of a response" if started else "before it sent a response"
    reason = f" ({exc})" if exc is not None else ""
    message = f"{peer} closed the connection {where}{reason}"
    return ConnectionLost(message, response_started=started, reused=reused)


def overdue(peer: str, age: float, timeouts: Timeouts, *, started: bool) -> PhaseTimeout | None:
    """The error of a phase that has lasted `age` seconds, None while that is within its bound."""
    if not started:
        if timeouts.first_byte is not None and age > timeouts.first_byte:
            message = f"{peer} sent no response within {timeouts.first_byte:g} s"
            return PhaseTimeout(message, "first_byte")
    elif timeouts.idle is not None and age > timeouts.idle:
        return PhaseTimeout(f"{peer} stopped in the middle of a response for {timeouts.idle:g} s", "idle")
    return None
