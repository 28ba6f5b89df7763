"""One request, sent and timed: on bare connections, or through the client.

Both ask the same: the body is made of the same fields, and a test compares the bytes. A stream counts as
answered when it came whole, up to its [DONE].

On bare connections a chunk costs a look at the clock and a search in its bytes: the time is taken where the
socket is read, nothing is parsed but the last few events, and of the body no more than these is kept.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import Final, Protocol, Self

import httptools
import msgspec

from penstock import __version__
from penstock.client import Client
from penstock.continuation import CHAT
from penstock.errors import ConnectionLost, MalformedResponse, PenstockError, ResponseError
from penstock.fleet.fleet import Fleet
from penstock.loadtest.plan import Target
from penstock.loadtest.workload import Workload
from penstock.wire.address import Address
from penstock.wire.connection import Connection, Owner, Response
from penstock.wire.openai import UNREADABLE, UsageBody, chat_fields, encode, response_error, usage_of
from penstock.wire.openai_stream import DONE, Chunk
from penstock.wire.pool import Pool
from penstock.wire.sse import EventParser

TAIL: Final = 8
"""Pieces kept of a streamed body: more than the last events are cut into."""
EVENT: Final = b"data: {"
"""How an event begins that is not [DONE]. Inside an event it could only be text of the model."""
OK: Final = 200
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


class Askers(Protocol):
    """Sends numbered requests. `async with` owns the connections."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *ended: object) -> None: ...

    async def ask(self, number: int) -> Answered:
        """Never raises a PenstockError: what went wrong is the answer's error."""
        ...

    def connections(self) -> tuple[int, int, int]:
        """Connections opened, requests resent because a kept connection had died, and retries, so far."""
        ...


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


class StampedConnection(Connection):
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


class RawAskers:
    """Asks without retries, of each URL in turn."""

    def __init__(self, target: Target, workload: Workload, run: str) -> None:
        self._target = target
        self._workload = workload
        self._run = run
        self._pools: list[Pool] = []
        self._heads: list[bytes] = []

    async def __aenter__(self) -> Self:
        key = self._target.api_key
        bearer = f"authorization: Bearer {key}\r\n" if key is not None else ""
        for url in self._target.urls:
            address = Address.parse(url)
            kind = StampedConnection if self._target.stream else Connection
            self._pools.append(
                Pool(address, connection_type=kind, source_addresses=self._target.source_addresses)
            )
            head = (
                f"POST {address.api}{CHAT} HTTP/1.1\r\nhost: {address.authority}\r\n"
                f"user-agent: penstock/{__version__}\r\n{bearer}content-type: application/json\r\n"
                f"x-request-id: {self._run}."
            )
            self._heads.append(head.encode("ascii"))
        return self

    async def __aexit__(self, *ended: object) -> None:
        for pool in self._pools:
            await pool.close()

    async def ask(self, number: int) -> Answered:
        workload, target = self._workload, self._target
        which = number % len(self._pools)
        extra = STREAMED if target.stream else None
        fields = chat_fields(workload.messages(number), workload.params(number), target.model, extra)
        try:
            response = await self._pools[which].request(
                b"%s%d\r\n" % (self._heads[which], number), encode(fields)
            )
            if response.status != OK:
                raise response_error(response)
            end = monotonic()
            if isinstance(response, StampedResponse):
                return of_stream(response.body, response.times, end)
            usage = usage_of(_decode_usage(response.body).usage)
        except PenstockError as error:
            return Answered(monotonic(), error=kind_of(error))
        except UNREADABLE:
            return Answered(monotonic(), error=MalformedResponse.__name__)
        return Answered(end, (), usage.prompt_tokens, usage.completion_tokens)

    def connections(self) -> tuple[int, int, int]:
        statistics = [pool.statistics() for pool in self._pools]
        return sum(one.opened for one in statistics), sum(one.resent for one in statistics), 0


class ClientAskers:
    """Asks through a Client, which retries as it always does."""

    def __init__(self, target: Target, workload: Workload, run: str) -> None:
        self._target = target
        self._workload = workload
        self._run = run
        self._pools: list[Pool] = []
        self._fleet = Fleet(
            list(target.urls),
            api_key=target.api_key,
            source_addresses=target.source_addresses,
            transport=self._pool,
        )
        self._client = Client(self._fleet, model=target.model)

    def _pool(self, address: Address) -> Pool:
        pool = Pool(address, source_addresses=self._target.source_addresses)
        self._pools.append(pool)
        return pool

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *ended: object) -> None:
        await self._client.__aexit__(None, None, None)

    async def ask(self, number: int) -> Answered:
        messages, params = self._workload.messages(number), self._workload.params(number)
        name = f"{self._run}.{number}"
        times: list[float] = []
        try:
            if self._target.stream:
                async with self._client.stream(messages, params, request_id=name) as stream:
                    times = [
                        monotonic()
                        async for delta in stream
                        if delta.text or delta.reasoning or delta.token_ids
                    ]
                end, usage = monotonic(), stream.sample.usage
            else:
                sample = await self._client.chat(messages, params, request_id=name)
                end, usage = monotonic(), sample.usage
        except PenstockError as error:
            return Answered(monotonic(), error=kind_of(error))
        return Answered(end, times, usage.prompt_tokens, usage.completion_tokens or len(times))

    def connections(self) -> tuple[int, int, int]:
        statistics = [pool.statistics() for pool in self._pools]
        opened, resent = sum(one.opened for one in statistics), sum(one.resent for one in statistics)
        return opened, resent, self._fleet.retries


ASKERS: Final[dict[str, type[RawAskers] | type[ClientAskers]]] = {"raw": RawAskers, "client": ClientAskers}


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


__all__ = ["ASKERS", "Answered", "Askers", "ClientAskers", "RawAskers", "kind_of", "of_stream"]
