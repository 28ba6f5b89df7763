"""One request on its way to an engine, and the response on its way back.

It guarantees:
- one slot for each request in flight, taken by `Attempts` and given back exactly once, whatever happens;
- a request is tried again only while not a byte of a response has been given to the client and all of its
  body is still held; whether and where is decided by `Attempts`, as for the client;
- what was begun to the client is either complete or visibly broken: a body without its end, for server-sent
  events after an event that says what happened; never silently short;
- bodies pass as they came, in memory that does not grow with them; each side waits for the slower one;
- a client that goes away closes its connection to the engine at once.

On the common path (a slot is free, a connection idle) there is no task: what happens is driven by the two
connections' callbacks. Waiting for a slot, for a new connection or after a failure is a task, `_obtain`; it
and `_failed` are together the loop shown in `penstock.fleet.attempts`.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from penstock.errors import ConfigError, ConnectionLost, PenstockError
from penstock.fleet.endpoint import Endpoint
from penstock.router.dispatch import RouterAttempts
from penstock.router.heads import NO_BODY, status_line
from penstock.router.refusals import NOT_ADMITTED, Refused, error_for, refused_for
from penstock.router.upstream import EngineConnection, EngineTransport
from penstock.wire.exchange import error_body

if TYPE_CHECKING:
    from penstock.router.inlet import Inlet
    from penstock.router.requests import RequestHead

HOLD: Final = 1 << 20
"""Bytes of a request's body that are held, so that it can be looked into and sent again. Of a larger one the
rest passes through, and what has passed is not sent again."""
HOLD_ANSWER: Final = 64 << 10
"""Bytes of an error response that are held back while it is decided whether there is another attempt."""
LARGE: Final = 64 << 10
"""Bytes from which a piece is written on its own instead of being copied into its frame."""

RAW: Final = 0
CHUNKED: Final = 1
BODYLESS: Final = 2


class Relay:
    """One request. Its connection fills in the first part as it is received."""

    __slots__ = (
        "_answered_bytes",
        "_arrived_at",
        "_began",
        "_connection",
        "_events",
        "_held",
        "_inlet",
        "_last",
        "_mode",
        "_out",
        "_resent",
        "_task",
        "_transport",
        "attempts",
        "begun",
        "body",
        "chunked",
        "complete",
        "done",
        "head",
        "headed_at",
        "length",
        "request_id",
        "size",
        "status",
        "whole",
        "worker",
    )

    def __init__(self, inlet: Inlet, head: RequestHead, length: int | None, request_id: bytes | None) -> None:
        self._inlet = inlet
        self.head = head
        self.length = length
        """The value of its content-length."""
        self.request_id = request_id
        """The client's, then that of the first attempt."""
        self.chunked = head.chunked
        """The body goes to the engine in chunks."""
        self.body: list[bytes] = []
        """What is held of it."""
        self.size = 0
        """Bytes received of it."""
        self.complete = False
        """All of the request has been received."""
        self.whole = True
        """All that was received of it is held."""
        self.attempts: RouterAttempts | None = None
        self.worker: Endpoint | None = None
        """The one it was last sent to."""
        self.status = 0
        """Of the response given to the client; 0: none yet."""
        self.begun = False
        """The client has been given the beginning of a response."""
        self.done = False
        self._transport: EngineTransport | None = None
        self._connection: EngineConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._resent = False
        self._held: list[bytes] | None = None
        """Body of a response that is held back."""
        self._out: bytes | None = None
        """Head of the response that has not been written yet."""
        self._mode = RAW
        self._last = b""
        """The piece of body written last."""
        self._events = False
        """The response is one of server-sent events, not compressed."""
        self._answered_bytes = 0
        self._arrived_at = self._began = self.headed_at = 0.0

    method = property(attrgetter("head.method"))
    target = property(attrgetter("head.target"))
    path = property(attrgetter("head.path"))
    host = property(attrgetter("head.host"))
    authorization = property(attrgetter("head.authorization"))
    session = property(attrgetter("head.session"))
    resume = property(attrgetter("head.resume"))
    timeout = property(attrgetter("head.timeout"))
    encoded = property(attrgetter("head.encoded"))

    @property
    def fields(self) -> list[bytes]:
        """Header fields that pass: name, separator, value and line end in turn."""
        return self.head.fields

    @fields.setter
    def fields(self, fields: list[bytes]) -> None:
        self.head = self.head.sending(fields, self._inlet.router.own_fields)

    # -- what the client's connection tells --------------------------------------------------------

    def start(self) -> None:
        """It is this request's turn; its head has been received, and all of its body or HOLD bytes."""
        router = self._inlet.router
        router.statistics.requests += 1
        self._arrived_at = router.clock()
        try:
            attempts = self.attempts = router.attempts(self)
            endpoint = attempts.take()
            if endpoint is not None:
                transport = endpoint.transport
                assert isinstance(transport, EngineTransport)
                connection = transport.relay.reuse()
                if connection is not None:
                    self._send(transport, connection)
                    return
            else:
                router.check_queue(attempts, self)
        except Refused as refusal:
            self._answer(refusal.status, str(refusal), refusal.retry_after)
            return
        except ConfigError as error:
            self._give_up(error)
            return
        self._spawn(endpoint)

    def feed(self, data: bytes) -> None:
        """More of the body, after `start`."""
        connection = self._connection
        if connection is None:
            self.body.append(data)
            return
        if self.whole:
            self.whole = False
            self.body = []
        assert self._transport is not None
        self._transport.counts.bytes_sent += len(data)
        connection.upload(b"%x\r\n%s\r\n" % (len(data), data) if self.chunked else data)

    def finish(self) -> None:
        """The body is complete, after `start`."""
        if self._connection is not None and self.chunked:
            self._connection.upload(b"0\r\n\r\n")

    def takes_more(self) -> bool:
        """Whether more of the body can be passed on."""
        return self._connection is not None and not self._connection.choked

    def lost(self) -> None:
        """The client has gone."""
        if self.attempts is None or self.done:
            return
        self._inlet.router.statistics.cancelled += 1
        self.done = True
        self._let_go()
        self._account(499)

    def pause(self) -> None:
        """The client does not take the response."""
        if self._connection is not None:
            self._connection.pause()

    def go_on(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    # -- attempts ---------------------------------------------------------------------------------

    def _spawn(self, endpoint: Endpoint | None, *, fresh: bool = False) -> None:
        self._inlet.steer()
        self._task = self._inlet.router.spawn(self._obtain(endpoint, fresh=fresh))
        self._task.add_done_callback(self._obtained)

    async def _obtain(self, endpoint: Endpoint | None, *, fresh: bool) -> None:
        """Waits for a slot and a connection, and sends. Ends with the error that is final."""
        attempts, router = self.attempts, self._inlet.router
        assert attempts is not None
        while True:
            if endpoint is None:
                endpoint = await router.slot(attempts, self._arrived_at)
            transport = endpoint.transport
            assert isinstance(transport, EngineTransport)
            try:
                connection = None if fresh else transport.relay.reuse()
                connection = connection or await transport.relay.connect(fresh=fresh)
            except PenstockError as error:
                transport.counts.transport_errors += 1
                self.unreached(endpoint, error)
                if not attempts.failed(error):
                    raise
                transport.counts.retries += 1
                endpoint, fresh = None, False
            else:
                self._send(transport, connection)
                return

    def unreached(self, endpoint: Endpoint, error: PenstockError) -> None:
        """A worker could not be connected to: for those who trace."""

    def _obtained(self, task: asyncio.Task[None]) -> None:
        self._task = None
        attempts = self.attempts
        assert attempts is not None
        if task.cancelled():
            if attempts.endpoint is not None and self._connection is None:
                attempts.failed(asyncio.CancelledError())
            if not self.done:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "the router is shutting down", 1)
            return
        error = task.exception()
        if error is None or self.done:
            return
        if isinstance(error, Refused):
            self._answer(error.status, str(error), error.retry_after)
        elif isinstance(error, PenstockError):
            self._give_up(error)
        else:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "internal router error", None)
            raise error

    def _send(self, transport: EngineTransport, connection: EngineConnection) -> None:
        """Writes the request, or as much as there is of it."""
        attempts, head = self.attempts, self.head
        assert attempts is not None
        self._transport, self._connection = transport, connection
        self.worker = attempts.endpoint
        target = head.target if transport.plain else transport.target(head.target)
        id = attempts.request_id.encode("latin-1")
        if self.request_id is None:
            self.request_id = id
        body = self.body[0] if len(self.body) == 1 else b"".join(self.body)
        transport.counts.bytes_sent += len(body)
        self.chunked = self.chunked and not self.complete
        if self.chunked:
            framing = b"transfer-encoding: chunked\r\n"
            body = b"%x\r\n%s\r\n" % (len(body), body)
        elif not self.complete:
            framing = b"content-length: %d\r\n" % (self.length or 0)
        elif body or self.length is not None or head.chunked:
            framing = b"content-length: %d\r\n" % len(body)
        else:
            framing = b""
        start = b"%s %s%s%sx-request-id: %s\r\n%s\r\n" % (
            head.method, target, transport.host_line, head.passing, id, framing,
        )  # fmt: skip
        self._began = self._inlet.router.clock()
        connection.submit(self, start, body, bodyless=head.method == b"HEAD")
        if not self._inlet.writable:
            connection.pause()  # the client has not taken the response before this one
        if not self.complete:
            self._inlet.steer()

    # -- as the sink of an engine's response --------------------------------------------------------

    def headed(self, connection: EngineConnection) -> None:
        assert self._transport is not None
        head, length = connection.head, connection.length
        self.headed_at = self._inlet.router.clock()
        self._transport.counts.first_byte.observe(self.headed_at - self._began)
        self._answered_bytes = 0
        status = self.status = head.status
        if (status >= 500 or status in NOT_ADMITTED) and not self.begun and self.whole:
            self._held = []
        self._last, self._events = b"", head.events
        framing = b"" if length is None else b"content-length: %d\r\n" % length
        if self.head.method == b"HEAD" or status in NO_BODY:
            self._mode = BODYLESS
            if status == HTTPStatus.NO_CONTENT:
                framing = b""
        elif length is not None or self.head.http10:
            self._mode = RAW
        else:
            self._mode, framing = CHUNKED, b"transfer-encoding: chunked\r\n"
        if self._inlet.closes_after(self):
            framing += b"connection: close\r\n"
        self._out = b"%sx-request-id: %s\r\n%s\r\n" % (head.passing, self.request_id, framing)

    def arrived(self, parts: list[bytes], *, complete: bool) -> None:
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        size = len(data)
        self._answered_bytes += size
        assert self._transport is not None
        self._transport.counts.bytes_received += size
        if self._held is not None:
            self._held.append(data)
            if complete or self._answered_bytes <= HOLD_ANSWER:
                return
            data = b"".join(self._held)  # too large to be worth holding: it is the answer
            self._held = None
        self._write(data, complete=complete)

    def ended(self) -> None:
        attempts, transport = self.attempts, self._transport
        assert attempts is not None and transport is not None
        self._connection = None
        status, counts = self.status, transport.counts
        seconds = self._inlet.router.clock() - self._began
        counts.latency.observe(seconds)
        counts.responses[status // 100 if status < 600 else 5] += 1
        if status < 400:
            attempts.succeeded(self._answered_bytes >> 2, seconds)
        elif attempts.failed(error_for(status), final=self._held is None):
            counts.retries += 1
            self._held = self._out = None
            self._spawn(None)
            return
        elif self._held is not None:
            held, self._held = self._held, None
            self._write(b"".join(held), complete=True)
        self._finished(status)

    def failed(self, error: PenstockError) -> None:
        attempts, router = self.attempts, self._inlet.router
        assert attempts is not None and self._transport is not None
        self._connection = None
        if (
            isinstance(error, ConnectionLost)
            and error.reused
            and not error.response_started
            and not self._resent
            and self.whole
        ):
            self._resent = True  # closed by the engine while it was idle: the request was not read
            self._spawn(attempts.endpoint, fresh=True)
            return
        counts = self._transport.counts
        counts.transport_errors += 1
        self._held = self._out = None
        if attempts.failed(error, final=self.begun or not self.whole):
            counts.retries += 1
            self._spawn(None)
        elif self.begun:
            router.statistics.broken += 1
            self._break_off(error)
        else:
            self._give_up(error)

    def stop_sending(self) -> None:
        self._inlet.steer()

    def go_on_sending(self) -> None:
        self._inlet.steer()

    # -- the client's side ------------------------------------------------------------------------

    def _write(self, data: bytes, *, complete: bool) -> None:
        """Writes what there is, in one piece where it is small."""
        head, self._out = self._out, None
        self.begun = True
        mode, write = self._mode, self._inlet.write
        if mode == BODYLESS:
            if head is not None:
                write(head)
            return
        if data:
            self._last = data
        if mode == CHUNKED:
            if len(data) >= LARGE:
                write((head or b"") + b"%x\r\n" % len(data))
                write(data)
                write(b"\r\n0\r\n\r\n" if complete else b"\r\n")
                return
            end = b"0\r\n\r\n" if complete else b""
            if data:
                data = b"%x\r\n%s\r\n%s" % (len(data), data, end)
            else:
                data = end
        if head is None:
            if data:
                write(data)
        elif len(data) < LARGE:
            write(head + data)
        else:
            write(head)
            write(data)

    def _break_off(self, error: PenstockError) -> None:
        """Ends a response that has begun so that nobody can take it for complete."""
        event = b""
        if self._mode == CHUNKED and self._events:
            body = error_body(HTTPStatus.BAD_GATEWAY, str(error), "engine_lost")
            gap = b"" if not self._last or self._last.endswith((b"\n\n", b"\r\n\r\n")) else b"\n\n"
            event = b"%sevent: error\ndata: %s\n\n" % (gap, body)
            event = b"%x\r\n%s\r\n" % (len(event), event)
        self.done = True
        self._account(HTTPStatus.BAD_GATEWAY)
        self._inlet.break_off(self, event)

    def _give_up(self, error: PenstockError) -> None:
        """No attempt is left, and the client has been given nothing."""
        self._inlet.router.statistics.given_up += 1
        refused = refused_for(error)
        self._answer(refused.status, str(refused), refused.retry_after)

    def _answer(self, status: int, message: str, retry_after: int | None) -> None:
        """The router's own error response."""
        self.status, self.begun = status, True
        close = self._inlet.closes_after(self)
        body = error_body(status, message)
        head = b"%scontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: %s\r\n%s%s\r\n" % (
            status_line(status),
            len(body),
            self.id,
            b"" if retry_after is None else b"retry-after: %d\r\n" % retry_after,
            b"connection: close\r\n" if close else b"",
        )
        self._inlet.write(head if self.head.method == b"HEAD" else head + body)
        self._finished(status)

    def abandon(self) -> None:
        """The rest of the request cannot be read: the engine never gets a whole one."""
        if self.attempts is not None and not self.done:
            self.done = True
            self._let_go()
            self._account(400)

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if self._task is not None:
            self._task.cancel()
        if connection is not None:
            connection.release()
            assert self.attempts is not None
            self.attempts.failed(asyncio.CancelledError())

    def _finished(self, status: int) -> None:
        self.done = True
        self._account(status)
        self._inlet.ended(self)

    def _account(self, status: int) -> None:
        log = self._inlet.router.access_log
        if log is not None:
            log(self, status, self._answered_bytes, self._arrived_at)

    @property
    def client(self) -> str:
        """The client's address, while there is an access log."""
        return self._inlet.peer

    @property
    def id(self) -> bytes:
        """What the client knows it by."""
        if self.request_id is not None:
            return self.request_id
        attempts = self.attempts
        if attempts is None:
            return b"-"
        return f"{self._inlet.router.prefix}{attempts.serial:x}".encode("ascii")
