"""A completion that is read while it is generated, and survives the engine that generates it.

It guarantees:
- deltas come in order and each once; together they are the sample;
- leaving the `async with` block, at whatever point, closes the connection and gives the slot back;
- a stream that breaks off before its first delta is simply tried again; later, with `resume_streams`, it is
  continued on another endpoint as `penstock.continuation` says, and without it the error is the caller's:
  what has been given out is never taken back, and never passed off as the whole.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

import orjson

from penstock.continuation import (
    Request,
    Seam,
    Splice,
    asked_tokens,
    by_text,
    by_token_ids,
    count_tokens,
    held_text,
    may_continue,
    stop_strings,
)
from penstock.errors import (
    ConfigError,
    ConnectionLost,
    PenstockError,
    RequestRejected,
    ServerFailed,
    TransportError,
)
from penstock.fleet.attempts import Attempts, within
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.fleet import Fleet
from penstock.fleet.monitor import ask
from penstock.fleet.transport import ByteStream
from penstock.sample import THINK_CLOSE, Delta, Sample, Usage
from penstock.wire.connection import Response
from penstock.wire.openai import Origin, context_length, detokenized, encode, response_error
from penstock.wire.openai_stream import DONE, Partial
from penstock.wire.sse import EventParser

TOKEN_IDS: Final = "return_token_ids"
OK: Final = 200
INVALID: Final = frozenset({400, 422})
"""Statuses of a request with a field that the server does not take."""
MAX_HALF: Final = 4
"""Tokens that may hold a character that is not whole."""
HALF: Final = "\ufffd"
"""What a tokenizer writes for a part of a character."""

Head = Callable[[Endpoint, str], bytes]
"""The head of a POST to a route at an endpoint."""


class _NoWay(Exception):
    """What has come cannot be continued, which is no fault of the endpoint that was to do it."""


class SampleStream:
    """One sample on its way: `async with client.stream(…) as stream: async for delta in stream: …`.

    `restart`: nobody sees the deltas, so that a sample that cannot be continued may be begun anew.
    """

    def __init__(
        self,
        fleet: Fleet,
        attempts: Attempts,
        request: Request,
        head: Head,
        *,
        resume: bool,
        restart: bool = False,
        deadline: float | None = None,
    ) -> None:
        extra: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        self._wants_ids = resume and not request.fields.get(TOKEN_IDS)
        """Token ids are asked for to continue with, not by the caller."""
        if resume:  # where there are no token ids, that tells how many there are
            extra["stream_options"]["continuous_usage_stats"] = True
        if self._wants_ids:
            extra[TOKEN_IDS] = True
        self._fleet = fleet
        self._attempts = attempts
        self._request = Request(request.route, {**request.fields, **extra})
        self._head = head
        self._resume = resume and may_continue(request)
        self._restart = restart
        self._deadline = deadline
        """Loop time."""
        self._partial = Partial()
        self._before = 0
        """Tokens that had come when the request under way was sent."""
        self._sample: Sample | None = None
        self._started = self._began = fleet.clock()
        self._deltas: AsyncGenerator[Delta, None] = self._run()
        self._open = False

    async def __aenter__(self) -> Self:
        self._fleet.check_open()
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        await self._deltas.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """The next piece. Raises TransportError or ResponseError once no retry is left, DeadlineExceeded."""
        if not self._open:
            raise ConfigError("a stream is read inside `async with client.stream(…) as stream`")
        if self._deadline is None:
            return await anext(self._deltas)
        return await within(self._deadline, self._attempts, anext(self._deltas))

    @property
    def sample(self) -> Sample:
        """The whole sample, once the last delta has come. Raises ConfigError before."""
        if self._sample is None:
            raise ConfigError("the sample of a stream is there once all of its deltas have been read")
        return self._sample

    # -- inside -----------------------------------------------------------------------------------

    async def _run(self) -> AsyncGenerator[Delta, None]:
        attempts, endpoint = self._attempts, None
        failure: PenstockError | None = None
        while True:
            endpoint = attempts.take() or await attempts.begin()
            self._began = self._fleet.clock()
            stream: ByteStream | None = None
            try:
                request = await self._next_request(endpoint)
                stream = await self._send(endpoint, request)
                parser = EventParser()
                while not self._partial.cut and (data := await stream.read()):
                    for event in parser.feed(data):
                        delta = self._partial.feed(event) if event != DONE else None
                        if delta is not None:
                            yield await self._trimmed(delta, endpoint) if self._partial.cut else delta
                if not self._partial.finished:
                    raise ConnectionLost("the stream ended before its sample did", response_started=True)
            except BaseException as error:
                if not (isinstance(error, TransportError | ServerFailed) and self._is_whole()):
                    if not attempts.failed(error, final=not self._may_go_on()):
                        if isinstance(error, _NoWay) and failure is not None:
                            raise failure from None
                        raise
                    assert isinstance(error, PenstockError)
                    failure = error
                    self._partial.drop_held()
                    continue
            finally:
                if stream is not None:
                    stream.close()
            self._finish(endpoint)
            return

    async def _send(self, endpoint: Endpoint, request: Request) -> ByteStream:
        """The response to a request, which is a success. Raises TransportError or ResponseError.

        SGLang refuses to stream token ids of a chat. Where only we wanted them, it is asked without.
        """
        head, fields = self._head(endpoint, request.route), request.fields
        optional = self._wants_ids and endpoint.gives_token_ids
        if self._wants_ids and not optional:
            fields = _without_ids(fields)
        if endpoint.takes_rid:
            fields = {**fields, "rid": self._attempts.request_id}
        stream = await endpoint.transport.stream(head, encode(fields))
        try:
            return await _checked(stream)
        except RequestRejected as error:
            if not optional or error.status not in INVALID:
                raise
            stream = await endpoint.transport.stream(head, encode(_without_ids(fields)))
            if stream.status != OK:
                stream.close()
                raise
            endpoint.gives_token_ids = False
            return stream

    def _finish(self, endpoint: Endpoint) -> None:
        partial, attempts = self._partial, self._attempts
        count = count_tokens(partial)
        if partial.usage is None:
            partial.usage = Usage(len(partial.prompt_token_ids or ()), count)
        elif self._before:  # it is that of the last request: of what came before, it has counted the prompt
            partial.usage = Usage(len(partial.prompt_token_ids or ()) or partial.prompt_tokens, count)
        number, now = attempts.number, self._fleet.clock()
        attempts.succeeded(partial.usage.completion_tokens - self._before, now - self._began)
        self._sample = partial.sample(Origin(endpoint.name, number, now - self._started))

    def _is_whole(self) -> bool:
        """Whether nothing is missing, or only the word that all tokens asked for have come."""
        partial = self._partial
        if not partial.finished:
            asked = asked_tokens(self._request)
            if asked is None or count_tokens(partial) < asked:
                return False
            partial.finish_reason = "length"
        return True

    def _may_go_on(self) -> bool:
        """Whether, after a failure, there is a way to the whole sample."""
        if self._restart or not self._partial.chunks:
            return True
        ids_known = self._partial.has_token_ids and self._partial.prompt_token_ids is not None
        return self._resume and (ids_known or by_text(self._request, self._partial) is not None)

    async def _next_request(self, endpoint: Endpoint) -> Request:
        """What is to be asked for now. Raises _NoWay where there is no way."""
        partial = self._partial
        if self._resume and partial.chunks:
            request = await self._continuation(endpoint)
            if request is not None:
                self._before = count_tokens(partial)
                partial.begin_again(self._before)
                return request
        if partial.chunks and not self._restart:
            raise _NoWay
        self._partial, self._before = Partial(), 0
        return self._request

    async def _continuation(self, endpoint: Endpoint) -> Request | None:
        partial, request = self._partial, self._request
        in_reasoning = any(partial.reasoning) and not any(partial.text)
        stops = stop_strings(request.fields)
        held = await self._held(endpoint) if partial.token_ids else None
        if held is not None or not stops:
            context = await self._context(endpoint) if asked_tokens(request) is None else None
            rest = by_token_ids(request, partial, context)
            if rest is not None:
                include_stop = bool(request.fields.get("include_stop_str_in_output"))
                seam = Seam(held, stops, include_stop=include_stop) if held else None
                partial.splice = Splice(seam, in_reasoning=in_reasoning)
                return rest
        partial.splice = None
        if held != "":
            partial.has_token_ids = False  # they hold text that is generated again
        return by_text(request, partial)

    async def _held(self, endpoint: Endpoint) -> str | None:
        """What the engine that died had generated and held back. Tokens of a character that is not whole are
        dropped: they are generated again. None where it cannot be found out."""
        partial = self._partial
        reasoning, text = "".join(partial.reasoning), "".join(partial.text)
        for _ in range(MAX_HALF):
            whole = await self._detokenize(endpoint, partial.token_ids)
            held = None if whole is None else held_text(whole, text, reasoning)
            if not held or not held.endswith(HALF):
                return held
            partial.drop_last_token()
        return None

    async def _trimmed(self, delta: Delta, endpoint: Endpoint) -> Delta:
        """The last delta of a text that was cut at a stop string, without the tokens that came behind it."""
        partial = self._partial
        text, reasoning = "".join(partial.text), "".join(partial.reasoning)
        stop = "" if self._request.fields.get("include_stop_str_in_output") else str(partial.stop_reason)
        size = len(delta.token_ids)
        with suppress(TransportError):
            while size > 1:
                whole = await self._detokenize(endpoint, partial.token_ids[:-1])
                behind = None if whole is None else held_text(whole, text, reasoning)
                if behind is None or not behind.removeprefix(THINK_CLOSE).startswith(stop):
                    break
                partial.drop_last_token()
                size -= 1
        return Delta(delta.text, delta.reasoning, delta.token_ids[:size], delta.logprobs[:size])

    async def _detokenize(self, endpoint: Endpoint, tokens: list[int]) -> str | None:
        body = orjson.dumps({"model": self._request.fields.get("model"), "tokens": tokens})
        response = await ask(self._fleet, endpoint, endpoint.address.root + "/detokenize", body)
        return detokenized(response.body) if response.status == OK else None

    async def _context(self, endpoint: Endpoint) -> int | None:
        response = await ask(self._fleet, endpoint, endpoint.address.api + "/models")
        if response.status != OK:
            return None
        return context_length(response.body, self._request.fields.get("model"))


def _without_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != TOKEN_IDS}


async def _checked(stream: ByteStream) -> ByteStream:
    """The stream, if it is a success. Raises ResponseError, and closes it, if it is not."""
    if stream.status == OK:
        return stream
    try:
        parts = []
        while data := await stream.read():
            parts.append(data)
    finally:
        stream.close()
    raise response_error(Response(stream.status, stream.headers, b"".join(parts)))
