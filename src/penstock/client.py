"""The client: prompts in, samples out, over one endpoint, several, or a fleet that changes while in use.

It guarantees:
- a request ends with its samples or with one typed error;
- a cancelled request, or one whose time is over, closes its connection, so that the engine stops generating;
- `async with` owns every socket and the one task; a client pickles without them and belongs, while open, to
  one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, TypedDict, Unpack, overload

import msgspec

from penstock.continuation import CHAT, TEXT, Request
from penstock.errors import ConfigError, PenstockError, ResponseError, TransportError
from penstock.fleet.attempts import Attempts, within
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.fleet import Fleet, FleetOptions, FleetStatistics
from penstock.fleet.monitor import ask, health
from penstock.fleet.policy import session_key
from penstock.sample import Sample, SamplingParams
from penstock.stream import SampleStream
from penstock.wire.openai import (
    Origin,
    chat_fields,
    chat_samples,
    detokenized,
    encode,
    model_names,
    response_error,
    text_fields,
    text_samples,
    token_ids,
    with_rid,
)

Messages = Sequence[Mapping[str, Any]]
"""A conversation: mappings with `role` and `content`."""
Prompt = str | Sequence[int]
"""A text or its token ids."""


class RequestOptions(TypedDict, total=False):
    """What may be said of a single request, besides its sampling parameters."""

    model: str | None
    """The client's own where it is not given."""
    session_id: str | None
    """Requests of a session go to one endpoint while it is not too busy; also sent as X-Session-ID."""
    priority: int
    """Order among the requests that wait for a slot: lower is earlier. An engine that schedules by priority
    is told with `extra_body={"priority": …}`; others would reject the field."""
    timeout: float | None
    """Seconds for everything: waiting, all attempts. Also sent, as what is left, as X-Request-Timeout."""
    return_token_ids: bool
    """Ask for the token ids of prompt and completion (vLLM's field)."""
    resume_streams: bool
    """Continue on another endpoint what one has begun; the client's own where it is not given."""
    extra_body: Mapping[str, Any] | None
    """Merged into the request's JSON: anything an engine knows and this client does not."""
    request_id: str | None
    """Sent as X-Request-Id; a further attempt gets its number behind it."""


class _Options(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    model: str | None = None
    session_id: str | None = None
    priority: int = 0
    timeout: float | None = None
    return_token_ids: bool = False
    resume_streams: bool | None = None
    extra_body: Mapping[str, Any] | None = None
    request_id: str | None = None


_DEFAULT: Final = _Options()
OK: Final = 200
_OWN_ARGUMENTS: Final = frozenset({"n", "stream"})

Decode = Callable[[bytes, Origin, int], list[Sample]]


class Client:
    """Client of the OpenAI API as vLLM, SGLang and others serve it.

    fleet: base URLs, as `penstock.fleet.fleet.Fleet` takes them, or a Fleet; one that is not open yet is
    opened and closed with the client. model: sent with each request that names none. resume_streams: what one
    endpoint has begun is continued on another when it dies; `chat` and `complete` are then streamed
    underneath. options: those of Fleet. Raises ConfigError when one of them cannot be used.
    """

    def __init__(
        self,
        fleet: str | Sequence[str] | Fleet,
        *,
        model: str | None = None,
        resume_streams: bool = False,
        **options: Unpack[FleetOptions],
    ) -> None:
        if isinstance(fleet, Fleet):
            if options:
                raise ConfigError(f"the fleet has its own {', '.join(options)}: give them to it")
            self.fleet = fleet
        else:
            self.fleet = Fleet(fleet, **options)
            if not self.fleet.addresses:
                raise ConfigError("a client needs at least one base URL")
        self.model = model
        self.resume_streams = resume_streams
        self._open = False
        self._owner = False

    def __repr__(self) -> str:
        return f"<Client {self.fleet}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": False, "_owner": False}

    async def __aenter__(self) -> Client:
        if self._open:
            raise ConfigError("the client is already open")
        if self.fleet.closed:
            await self.fleet.__aenter__()
            self._owner = True
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        if self._owner:
            self._owner = False
            await self.fleet.__aexit__(kind, error, trace)

    @property
    def is_open(self) -> bool:
        """Whether it is inside its `async with`."""
        return self._open

    # -- generation -------------------------------------------------------------------------------

    @overload
    async def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        n: None = None,
        **options: Unpack[RequestOptions],
    ) -> Sample: ...

    @overload
    async def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        n: int,
        **options: Unpack[RequestOptions],
    ) -> list[Sample]: ...

    async def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        **options: Unpack[RequestOptions],
    ) -> Sample | list[Sample]:
        """A completion of a conversation; with `n`, a list of so many, from one request.

        Raises TransportError or ResponseError once no retry is left, DeadlineExceeded, and ConfigError when
        it cannot be sent.
        """
        given = _options(options) if options else _DEFAULT
        fields = chat_fields(messages, params, given.model or self.model, given.extra_body)
        return await self._complete(CHAT, fields, chat_samples, n, given)

    @overload
    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: None = None,
        **options: Unpack[RequestOptions],
    ) -> Sample: ...

    @overload
    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int,
        **options: Unpack[RequestOptions],
    ) -> list[Sample]: ...

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        **options: Unpack[RequestOptions],
    ) -> Sample | list[Sample]:
        """A completion of a text or of token ids. Otherwise as `chat`."""
        given = _options(options) if options else _DEFAULT
        fields = text_fields(prompt, params, given.model or self.model, given.extra_body)
        return await self._complete(TEXT, fields, text_samples, n, given)

    def stream(
        self,
        prompt: Prompt | Messages,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> SampleStream:
        """A completion as it is generated; of messages as `chat`, of text or token ids as `complete`.

        async with client.stream(messages) as stream:
            async for delta in stream:
                print(delta.text, end="")
        sample = stream.sample
        """
        given = _options(options) if options else _DEFAULT
        model = given.model or self.model
        if _is_conversation(prompt):
            request = Request(CHAT, chat_fields(prompt, params, model, given.extra_body))  # type: ignore[arg-type]
        else:
            request = Request(TEXT, text_fields(prompt, params, model, given.extra_body))  # type: ignore[arg-type]
        return self._stream(request, given, restart=False)

    async def _complete(
        self, route: str, fields: dict[str, Any], decode: Decode, n: int | None, given: _Options
    ) -> Sample | list[Sample]:
        if n is not None:
            if n < 1:
                raise ConfigError(f"n must be at least 1, not {n}")
            fields["n"] = n
        if given.return_token_ids:
            fields["return_token_ids"] = True
        resume = self.resume_streams if given.resume_streams is None else given.resume_streams
        if resume and n is None:
            async with self._stream(Request(route, fields), given, restart=True) as stream:
                async for _ in stream:
                    pass
            return stream.sample
        attempts = self._attempts(given)
        work = self._generate(attempts, route, encode(fields), decode, n or 1, given)
        if given.timeout is None:
            samples = await work
        else:
            samples = await within(self.fleet.loop.time() + given.timeout, attempts, work)
        return samples[0] if n is None else samples

    async def _generate(
        self, attempts: Attempts, route: str, body: bytes, decode: Decode, count: int, given: _Options
    ) -> list[Sample]:
        """Sends until there are samples or a final error: the retry loop."""
        clock = self.fleet.clock
        started = began = clock()
        while True:
            endpoint = attempts.take()
            if endpoint is None:
                endpoint = await attempts.begin()
                began = clock()
            try:
                head = self._head(endpoint, route, attempts, given)
                named = with_rid(body, attempts.request_id) if endpoint.takes_rid else body
                response = await endpoint.transport.request(head, named)
                if response.status != OK:
                    raise response_error(response)
                now = clock()
                samples = decode(response.body, Origin(endpoint.name, attempts.number, now - started), count)
            except BaseException as error:
                if isinstance(error, PenstockError):
                    error.attempts = attempts.number
                if not attempts.failed(error):
                    raise
            else:
                tokens = samples[0].usage.completion_tokens
                if count > 1:
                    tokens = sum([sample.usage.completion_tokens for sample in samples])
                attempts.succeeded(tokens, now - began)
                return samples

    def _stream(self, request: Request, given: _Options, *, restart: bool) -> SampleStream:
        attempts = self._attempts(given)
        resume = self.resume_streams if given.resume_streams is None else given.resume_streams
        if given.return_token_ids:
            request = Request(request.route, {**request.fields, "return_token_ids": True})
        return SampleStream(
            self.fleet,
            attempts,
            request,
            lambda endpoint, route: self._head(endpoint, route, attempts, given),
            resume=resume,
            restart=restart,
            deadline=None if given.timeout is None else self.fleet.loop.time() + given.timeout,
        )

    # -- questions --------------------------------------------------------------------------------

    async def tokenize(self, prompt: str | Messages, *, model: str | None = None) -> tuple[int, ...]:
        """The token ids of a text, or of a conversation as the chat template renders it. Asks any
        endpoint."""
        what = "prompt" if isinstance(prompt, str) else "messages"
        fields = {what: prompt, **_named(model or self.model)}
        return token_ids(await self._first(lambda end: end.address.root + "/tokenize", encode(fields)))

    async def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """The text of token ids, special tokens included. Asks any endpoint."""
        fields = {"tokens": tokens, **_named(model or self.model)}
        return detokenized(await self._first(lambda end: end.address.root + "/detokenize", encode(fields)))

    async def models(self) -> list[str]:
        """The models the first endpoint that answers offers."""
        return model_names(await self._first(lambda endpoint: endpoint.address.api + "/models"))

    async def health(self) -> dict[str, PenstockError | None]:
        """What each endpoint's /health says now: None when it is well, else what is wrong. Not retried.

        A server without that route counts as well: it has answered.
        """
        self._check()
        endpoints = self.fleet.endpoints
        outcomes = await asyncio.gather(
            *(health(self.fleet, endpoint) for endpoint in endpoints), return_exceptions=True
        )
        report: dict[str, PenstockError | None] = {}
        for endpoint, outcome in zip(endpoints, outcomes, strict=True):
            if outcome is not None and not isinstance(outcome, PenstockError):
                raise outcome
            report[endpoint.name] = outcome
        return report

    def statistics(self) -> FleetStatistics:
        self._check()
        return self.fleet.statistics()

    async def _first(self, path: Callable[[Endpoint], str], body: bytes | None = None) -> bytes:
        """What the first endpoint that answers with success says. Raises what the last one said instead."""
        self._check()
        failure: PenstockError = ConfigError("the fleet has no endpoint to ask")
        for endpoint in sorted(self.fleet.endpoints, key=lambda endpoint: not endpoint.up):
            try:
                response = await ask(self.fleet, endpoint, path(endpoint), body)
                if response.status == 200:
                    return response.body
                failure = response_error(response)
            except (TransportError, ResponseError) as error:
                failure = error
        raise failure

    # -- inside -----------------------------------------------------------------------------------

    def _check(self) -> None:
        if not self._open:
            raise ConfigError("the client is not open: use it inside `async with`")
        self.fleet.check_open()

    def _attempts(self, given: _Options) -> Attempts:
        self._check()
        if given is _DEFAULT:
            return Attempts(self.fleet)
        deadline = None if given.timeout is None else self.fleet.clock() + given.timeout
        session = None if given.session_id is None else session_key(given.session_id)
        for name, value in (("request id", given.request_id), ("session id", given.session_id)):
            if value is not None and not (value.isascii() and value.isprintable()):
                raise ConfigError(f"the {name} {value!r} cannot be sent in a header")
        return Attempts(
            self.fleet, name=given.request_id, priority=given.priority, session=session, deadline=deadline
        )

    def _head(self, endpoint: Endpoint, route: str, attempts: Attempts, given: _Options) -> bytes:
        """The head of a POST to a route of the OpenAI API."""
        head = endpoint.heads.get(route)
        if head is None:
            head = self.fleet.head(endpoint, "POST", endpoint.address.api + route)
            head = endpoint.heads[route] = b"%sx-request-id: %s" % (head, self.fleet.prefix.encode())
        if attempts.plain:
            head = b"%s%x\r\n" % (head, attempts.serial)
        else:
            head = b"%s%s\r\n" % (head.removesuffix(self.fleet.prefix.encode()), attempts.request_id.encode())
        if given is _DEFAULT:
            return head
        if given.session_id is not None:
            head = b"%sx-session-id: %s\r\n" % (head, given.session_id.encode())
        left = attempts.time_left()
        return head if left is None else b"%sx-request-timeout: %.3f\r\n" % (head, left)


def _options(given: RequestOptions) -> _Options:
    options = _Options(**given)
    if options.timeout is not None and not options.timeout > 0:
        raise ConfigError(f"the timeout of a request must be positive, not {options.timeout}")
    if options.extra_body is not None and not _OWN_ARGUMENTS.isdisjoint(options.extra_body):
        raise ConfigError("give n as an argument and stream by calling stream(), not in extra_body")
    return options


def _named(model: str | None) -> dict[str, str]:
    return {} if model is None else {"model": model}


def _is_conversation(prompt: Prompt | Messages) -> bool:
    if not prompt:
        raise ConfigError("the prompt is empty")
    return not isinstance(prompt, str) and isinstance(prompt[0], Mapping)
