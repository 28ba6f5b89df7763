"""One request, sent and timed: on bare connections, or through the client.

Both ask the same: the body is made of the same fields, and a test compares the bytes. A stream counts as
answered when it came whole, up to its [DONE]. An answer that carries the id of another request of the run
(engines answer under the X-Request-Id they were given) is `WrongAnswer`.

On bare connections a chunk costs a look at the clock and a search in its bytes: the time is taken where the
socket is read, nothing is parsed but the last few events, and of the body no more than these is kept.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import ClassVar, Final, NamedTuple, Protocol, Self

import httptools
import msgspec

from penstock import __version__
from penstock.client import Client
from penstock.continuation import CHAT, TEXT
from penstock.errors import ConnectionLost, MalformedResponse, PenstockError, ResponseError
from penstock.fleet.fleet import Fleet
from penstock.loadtest.plan import Target
from penstock.loadtest.workload import Workload
from penstock.wire.address import Address
from penstock.wire.connection import Connection, Owner, Response, Timeouts
from penstock.wire.openai import (
    UNREADABLE,
    UsageBody,
    chat_fields,
    encode,
    response_error,
    text_fields,
    usage_of,
)
from penstock.wire.openai_stream import DONE, Chunk
from penstock.wire.pool import Pool
from penstock.wire.sse import EventParser

TAIL: Final = 8
"""Pieces kept of a streamed body: more than the last events are cut into."""
EVENT: Final = b"data: {"
"""How an event begins that is not [DONE]. Inside an event it could only be text of the model."""
OK: Final = 200
WRONG: Final = "WrongAnswer"
"""The error of an answer to another request."""
STREAMED: Final = {"stream": True, "stream_options": {"include_usage": True}}


class Answered(msgspec.Struct, gc=False):
    """What came of one request. Times are on the clock of `time.monotonic`."""

    end: float
    times: Sequence[float] = ()
    """Of the pieces with text, where it was streamed."""
    input_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    """Why there is no answer: a type of error, and the status where there was one."""


class Connections(NamedTuple):
    """Counts of a process, so far."""

    opened: int = 0
    resent: int = 0
    """Requests sent again because a kept connection had died."""
    retries: int = 0
    strays: int = 0
    """Answers that nobody had asked for."""


class Askers(Protocol):
    """Sends numbered requests. `async with` owns the connections."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *ended: object) -> None: ...

    async def ask(self, number: int) -> Answered:
        """Never raises a PenstockError: what went wrong is the answer's error."""
        ...

    def connections(self) -> Connections: ...


class _Usage(msgspec.Struct, gc=False):
    usage: UsageBody | None = None


_decode_usage: Final = msgspec.json.Decoder(_Usage).decode
_decode_chunk: Final = msgspec.json.Decoder(Chunk).decode


class StampedResponse(Response):
    """A response, of whose body only the end was kept, and when its events arrived."""

    __slots__ = ("times",)

    def __init__(self, response: Response, times: list[float]) -> None:
        super().__init__(response.status, response.headers, response.body)
        self.times = times


class CountedConnection(Connection):
    """Counts the answers that nobody had asked for, those of all connections of this process together."""

    __slots__ = ()
    strays: ClassVar[int] = 0

    def data_received(self, data: bytes) -> None:
        if self._waiter is None and self._stream is None:
            CountedConnection.strays += 1
        super().data_received(data)

    def on_message_begin(self) -> None:
        CountedConnection.strays += self._response is not None  # a second one, behind the first
        super().on_message_begin()


class StampedConnection(CountedConnection):
    """Notes when each event of a streamed response is read from the socket, and keeps only its end."""

    __slots__ = ("_bare", "_times")

    def __init__(self, owner: Owner, loop: asyncio.AbstractEventLoop, peer: str) -> None:
        super().__init__(owner, loop, peer)
        self._times: list[float] = []
        self._bare = False
        """The first event is without text, such as one with the role alone."""
        self._parts = deque(maxlen=TAIL)  # type: ignore[assignment]  # it is only cleared, joined and indexed
        self.on_body = self._parts.append
        self._parser = httptools.HttpResponseParser(self)  # which looks at on_body now, and not again

    def send(self, head: bytes, body: bytes) -> asyncio.Future[Response]:
        self._times = []
        return super().send(head, body)

    def data_received(self, data: bytes) -> None:
        events = data.count(EVENT)
        if events:
            if not self._times:
                self._bare = _is_bare(data)
            if events == 1:
                self._times.append(monotonic())
            else:
                self._times += [monotonic()] * events
        super().data_received(data)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._response is not None:
            self._response = StampedResponse(self._response, self._times[self._bare :])


class _Pools:
    """Pools as a target wants them, and their counts."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._all: list[Pool] = []
        self._strays = CountedConnection.strays

    def add(self, address: Address, kind: type[Connection] = CountedConnection) -> Pool:
        bound = self._target.timeout
        pool = Pool(
            address,
            timeouts=Timeouts() if bound is None else Timeouts(first_byte=bound, idle=bound),
            connection_type=kind,
            source_addresses=self._target.source_addresses,
        )
        self._all.append(pool)
        return pool

    def counts(self, retries: int = 0) -> Connections:
        statistics = [pool.statistics() for pool in self._all]
        return Connections(
            opened=sum(one.opened for one in statistics),
            resent=sum(one.resent for one in statistics),
            retries=retries,
            strays=CountedConnection.strays - self._strays,
        )


class RawAskers:
    """Asks without retries, of each URL in turn."""

    def __init__(self, target: Target, workload: Workload, run: str) -> None:
        self._target = target
        self._workload = workload
        self._run = run
        self._mark = f"{run}.".encode("ascii")
        self._made = _Pools(target)
        self._pools: list[Pool] = []
        self._heads: list[bytes] = []

    async def __aenter__(self) -> Self:
        key = self._target.api_key
        bearer = f"authorization: Bearer {key}\r\n" if key is not None else ""
        for url in self._target.urls:
            address = Address.parse(url)
            self._pools.append(
                self._made.add(address, StampedConnection if self._target.stream else CountedConnection)
            )
            route = CHAT if self._target.api == "chat" else TEXT
            head = (
                f"POST {address.api}{route} HTTP/1.1\r\nhost: {address.authority}\r\n"
                f"user-agent: penstock/{__version__}\r\n{bearer}content-type: application/json\r\n"
                f"x-request-id: {self._run}."
            )
            self._heads.append(head.encode("ascii"))
        return self

    async def __aexit__(self, *ended: object) -> None:
        for pool in self._pools:
            await pool.close()

    async def ask(self, number: int) -> Answered:
        which = number % len(self._pools)
        try:
            response = await self._pools[which].request(
                b"%s%d\r\n" % (self._heads[which], number), self._body(number)
            )
            if response.status != OK:
                raise response_error(response)
            end = monotonic()
            if is_foreign(response.body, self._mark, number):
                return Answered(end, error=WRONG)
            if isinstance(response, StampedResponse):
                return of_stream(response.body, response.times, end)
            usage = usage_of(_decode_usage(response.body).usage)
        except PenstockError as error:
            return Answered(monotonic(), error=kind_of(error))
        except UNREADABLE:
            return Answered(monotonic(), error=MalformedResponse.__name__)
        return Answered(end, (), usage.prompt_tokens, usage.completion_tokens)

    def _body(self, number: int) -> bytes:
        workload, model = self._workload, self._target.model
        params = workload.params(number)
        extra = STREAMED if self._target.stream else None
        if self._target.api == "chat":
            return encode(chat_fields(workload.messages(number), params, model, extra))
        return encode(text_fields(workload.prompt(number), params, model, extra))

    def connections(self) -> Connections:
        return self._made.counts()


class ClientAskers:
    """Asks through a Client, which retries as it always does."""

    def __init__(self, target: Target, workload: Workload, run: str) -> None:
        self._target = target
        self._workload = workload
        self._run = run
        self._made = _Pools(target)
        self._fleet = Fleet(
            list(target.urls),
            api_key=target.api_key,
            max_in_flight=target.max_in_flight,
            source_addresses=target.source_addresses,
            transport=self._made.add,
        )
        self._client = Client(self._fleet, model=target.model, resume_streams=target.resume_streams)

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *ended: object) -> None:
        await self._client.__aexit__(None, None, None)

    async def ask(self, number: int) -> Answered:
        workload, params = self._workload, self._workload.params(number)
        chat = self._target.api == "chat"
        asked = workload.messages(number) if chat else workload.prompt(number)
        name = f"{self._run}.{number}"
        times: list[float] = []
        try:
            if self._target.stream:
                async with self._client.stream(asked, params, request_id=name) as stream:
                    times = [
                        monotonic()
                        async for delta in stream
                        if delta.text or delta.reasoning or delta.token_ids
                    ]
                end, usage = monotonic(), stream.sample.usage
            else:
                ask = self._client.chat if chat else self._client.complete
                sample = await ask(asked, params, request_id=name)  # type: ignore[arg-type]
                end, usage = monotonic(), sample.usage
        except PenstockError as error:
            return Answered(monotonic(), error=kind_of(error))
        return Answered(end, times, usage.prompt_tokens, usage.completion_tokens or len(times))

    def connections(self) -> Connections:
        return self._made.counts(self._fleet.retries)


ASKERS: Final[dict[str, type[RawAskers] | type[ClientAskers]]] = {"raw": RawAskers, "client": ClientAskers}


def is_foreign(body: bytes, mark: bytes, number: int) -> bool:
    """Whether an answer, or its end, carries the id of another request than `number`. mark: what the ids of
    this run begin with."""
    at = body.find(mark)
    if at < 0:
        return False
    begin = at + len(mark)
    own = b"%d" % number
    return not body.startswith(own, begin) or body[begin + len(own) : begin + len(own) + 1].isdigit()


def of_stream(tail: bytes, times: list[float], end: float) -> Answered:
    """The answer that ends in these bytes and whose events were read at these times.

    Events without text at the end (a finish reason, the usage) are no tokens. Raises MalformedResponse when
    it is not whole, ResponseError when its engine says so.
    """
    events = EventParser().feed(b"\n\n" + tail)
    if not events or events[-1] != DONE:
        raise MalformedResponse("the stream ended before its [DONE]")
    usage, textless = None, 0
    for event in reversed(events[:-1]):
        chunk = _chunk(event)
        if chunk is None:
            break  # the first one kept: half of an event
        usage = usage or chunk.usage
        if _has_text(chunk):
            break
        textless += 1
    del times[max(0, len(times) - textless) :]
    counts = usage_of(usage)
    return Answered(end, times, counts.prompt_tokens, counts.completion_tokens or len(times))


def _chunk(event: bytes) -> Chunk | None:
    try:
        chunk = _decode_chunk(event)
    except UNREADABLE:
        return None
    if bytes(chunk.error) not in (b"", b"null"):
        raise response_error(Response(500, {}, event))
    return chunk


def _is_bare(data: bytes) -> bool:
    """The first event in what was read is whole and has no text."""
    begin = data.find(EVENT) + len(EVENT) - 1
    end = data.find(b"\n", begin)
    try:
        return not _has_text(_decode_chunk(data[begin : end if end >= 0 else len(data)].rstrip()))
    except UNREADABLE:
        return False


def _has_text(chunk: Chunk) -> bool:
    for choice in chunk.choices:
        delta = choice.delta
        if choice.text or choice.token_ids:
            return True
        if delta is not None and (delta.content or delta.reasoning or delta.reasoning_content):
            return True
    return False


def kind_of(error: PenstockError) -> str:
    """How an error is counted: by its type, with the status where there is one."""
    name = type(error).__name__
    if isinstance(error, ResponseError):
        return f"{name} {error.status}"
    if isinstance(error, ConnectionLost):
        return f"{name} {'mid-response' if error.response_started else 'before a response'}"
    return name


__all__ = [
    "ASKERS",
    "Answered",
    "Askers",
    "ClientAskers",
    "Connections",
    "RawAskers",
    "is_foreign",
    "kind_of",
    "of_stream",
]
