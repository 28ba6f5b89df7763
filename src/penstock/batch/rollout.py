"""The client a rollout function gets: bound to the job's model and sampling, and to the journal.

Invariants:
1. Each answer is handed to the journal before the function sees it, and is on disk within a second. Run
   again after a crash, the function gets those that are there without anything being asked; see
   `penstock.batch.steps` for which.
2. Where the job has a seed every request has its own, which follows from it, the row, the sample and the
   request: what is asked twice is sampled twice.
3. The requests of one sample are one session: they prefer the engine whose prefix cache holds it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from difflib import get_close_matches
from hashlib import blake2b
from inspect import isawaitable
from typing import Any, Final, TypedDict, Unpack

import msgspec

from penstock.batch.asking import Asker, Question
from penstock.batch.lengthening import asked_for, continuation, joined
from penstock.batch.steps import Recorder, request_hash
from penstock.client import Messages
from penstock.client import Prompt as Text
from penstock.continuation import CHAT, TEXT
from penstock.errors import ConfigError, RequestRejected
from penstock.prompt import Message, Prompt
from penstock.sample import Sample, SamplingParams

CALL: Final = "call"
"""The kind of a step that is no request."""
TOKEN_IDS: Final = "return_token_ids"
INVALID: Final = frozenset({400, 422})
"""Statuses of a request with a field that the server does not take."""
SAMPLING: Final = frozenset(SamplingParams.__struct_fields__)
OPTIONS: Final = frozenset({"model", "priority", "timeout", "session_id", "return_token_ids", "extra_body"})


class Overrides(TypedDict, total=False):
    """What may be said of one request of a rollout: sampling parameters, over the job's own (None: not sent),
    and options of `penstock.client.RequestOptions`."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    stop: tuple[str, ...] | None
    stop_token_ids: tuple[int, ...] | None
    max_tokens: int | None
    min_tokens: int | None
    ignore_eos: bool | None
    logprobs: int | None
    model: str | None
    priority: int
    timeout: float | None
    session_id: str | None
    return_token_ids: bool
    extra_body: Mapping[str, Any] | None


class Tally:
    """What the requests of one try have taken together."""

    __slots__ = ("attempts", "cached", "completion", "last", "max_tokens", "prompt", "requests", "seed")

    def __init__(self) -> None:
        self.requests = self.attempts = self.prompt = self.completion = self.cached = 0
        self.last: Sample | None = None
        self.max_tokens: int | None = None
        self.seed: int | None = None
        """That of the last request."""

    def add(self, sample: Sample) -> None:
        self.requests += 1
        self.attempts += sample.attempts
        self.prompt += sample.usage.prompt_tokens
        self.completion += sample.usage.completion_tokens
        self.cached += sample.usage.cached_tokens
        self.last = sample


class _Recorded(msgspec.Struct, frozen=True, omit_defaults=True):
    """A step's answer, as the journal holds it."""

    sample: Sample
    max_tokens: int | None = None


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(_Recorded).decode


class RolloutClient:
    """Asks for the completions of one sample. `chat` and `complete` take what those of `penstock.Client`
    take, but `n`: ask several times, with `asyncio.gather` at once.

    Its attributes say which sample it is: `prompt`, and `index` in the row.
    """

    def __init__(
        self,
        asker: Asker,
        params: SamplingParams,
        prompt: Prompt,
        index: int,
        recorder: Recorder,
        *,
        seed: int | None = None,
        max_continues: int = 0,
    ) -> None:
        self._asker = asker
        self.params = params
        """The job's sampling parameters, without its seed."""
        self.prompt = prompt
        self.index = index
        self.tally = Tally()
        self._recorder = recorder
        self._seed = seed
        """The sample's own."""
        self._max_continues = max_continues
        self._session = f"{prompt.hash:x}-{prompt.occurrence}-{index}"
        self._ended = False

    def __repr__(self) -> str:
        return f"<RolloutClient row {self.prompt.position} sample {self.index}>"

    @property
    def messages(self) -> list[Message]:
        """The conversation that the row is, by the job's prompt column, template and system prompt."""
        return [dict(message) for message in self.prompt.messages]

    @property
    def model(self) -> str | None:
        return self._asker.model

    async def chat(
        self, messages: Messages, params: SamplingParams | None = None, **overrides: Unpack[Overrides]
    ) -> Sample:
        """A completion of a conversation.

        params: over the job's, field by field. Raises TransportError, ResponseError, DeadlineExceeded.
        """
        return await self._ask(CHAT, messages, params, overrides)

    async def complete(
        self, prompt: Text, params: SamplingParams | None = None, **overrides: Unpack[Overrides]
    ) -> Sample:
        """A completion of a text or of token ids. Otherwise as `chat`."""
        return await self._ask(TEXT, prompt, params, overrides)

    async def step(self, name: str, function: Callable[..., Awaitable[Any] | Any], *arguments: Any) -> Any:
        """What `function(*arguments)` returns, journalled as a step: a run that goes on gets it from there.

        For what is dear or has an effect, such as a search or a sandbox. `name` and `arguments` make the step
        known again; they and the result must be JSON, else TypeError.
        """
        self._check()
        key = request_hash(f"{CALL} {name}", arguments)
        nth = self._recorder.next(key)
        if (found := self._recorder.find(key, nth)) is not None:
            return msgspec.json.decode(found)
        result = function(*arguments)
        if isawaitable(result):
            result = await result
        self._check()
        encoded = _encode(result)
        self._recorder.add(key, nth, encoded)
        return msgspec.json.decode(encoded)  # as a replay gives it: a tuple is a list, a key is text

    async def tokenize(self, prompt: str | Messages) -> tuple[int, ...]:
        """As `penstock.Client.tokenize`."""
        return await self._asker.client.tokenize(prompt, model=self.model)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """As `penstock.Client.detokenize`."""
        return await self._asker.client.detokenize(tokens, model=self.model)

    def end(self) -> None:
        """The sample is there, or has failed: what a forgotten task still asks is no step of it."""
        self._ended = True

    # -- inside -----------------------------------------------------------------------------------

    async def _ask(
        self, route: str, content: Any, params: SamplingParams | None, overrides: Overrides
    ) -> Sample:
        sampling, options = _split(overrides)
        extra = options.pop("extra_body", None)
        model = options.pop("model", None)
        if wants_ids := options.pop("return_token_ids", False):
            extra = {**(extra or {}), TOKEN_IDS: True}
        options.setdefault("session_id", self._session)
        merged = _merged(self.params, params, sampling)
        question = Question(route=route, content=content, params=merged, extra=extra, model=model)
        if self._max_continues and not wants_ids and self._asker.gives_token_ids:
            sample = await self._with_ids(question, options)
        else:
            sample = await self._answer(question, options)
        if self._max_continues and merged.max_tokens is not None:
            sample = await self._continued(question, options, sample, merged.max_tokens)
        self.tally.add(sample)
        return sample

    async def _with_ids(self, question: Question, options: Mapping[str, Any]) -> Sample:
        """The answer with its token ids, to go on from; without them where the engine refuses the field."""
        extra = {**(question.extra or {}), TOKEN_IDS: True}
        try:
            return await self._answer(msgspec.structs.replace(question, extra=extra), options)
        except RequestRejected as error:
            if error.status not in INVALID:
                raise
        sample = await self._answer(question, options)
        self._asker.gives_token_ids = False
        return sample

    async def _continued(
        self, question: Question, options: Mapping[str, Any], sample: Sample, budget: int
    ) -> Sample:
        """The sample gone on with, `budget` tokens at a time."""
        params = question.params or SamplingParams()
        fields = {**params.as_dict(), **(question.extra or {})}
        if sample.token_ids:
            fields[TOKEN_IDS] = True
        if params.logprobs is not None and question.route == CHAT:
            fields |= {"logprobs": True, "top_logprobs": params.logprobs}
        request = asked_for(question.route, question.content, fields)
        for _ in range(self._max_continues):
            sample = await self._asker.whole_tokens(sample) if sample.finish_reason == "length" else sample
            rest = continuation(request, sample, budget)
            if rest is None:
                return sample
            extra = {
                k: v for k, v in rest.fields.items() if k not in ("prompt", "messages", "max_tokens", "model")
            }
            again = Question(
                route=rest.route,
                content=rest.fields["messages" if rest.route == CHAT else "prompt"],
                params=SamplingParams(max_tokens=rest.fields["max_tokens"]),
                extra=extra,
                model=question.model,
            )
            try:
                more = await self._answer(again, options)
            except RequestRejected:  # the context is full, or the engine cannot go on with a text
                return sample
            sample = joined(request, sample, more)
            self.tally.requests += 1
        return sample

    async def _answer(self, question: Question, options: Mapping[str, Any]) -> Sample:
        """One request: out of the journal, or asked and journalled."""
        params = question.params or SamplingParams()
        key = request_hash(
            question.route, [question.content, params.as_dict(), question.extra, question.model]
        )
        self._check()
        nth = self._recorder.next(key)
        recorded = self._replayed(key, nth)
        if recorded is None:
            if params.seed is None and self._seed is not None:
                self.tally.seed = seed = _derived(self._seed, key, nth)
                params = msgspec.structs.replace(params, seed=seed)
            asked = msgspec.structs.replace(question, params=params)
            recorded = _Recorded(*await self._asker.ask(asked, **options))
            self._check()
            self._recorder.add(key, nth, _encode(recorded))
        if recorded.max_tokens is not None:
            self.tally.max_tokens = recorded.max_tokens
        return recorded.sample

    def _check(self) -> None:
        if self._ended:
            raise ConfigError("the rollout has ended: its client asks for nothing more")

    def _replayed(self, key: str, nth: int) -> _Recorded | None:
        found = self._recorder.find(key, nth)
        if found is None:
            return None
        try:
            recorded = _decode(found)
        except msgspec.MsgspecError:
            return None
        self._recorder.replayed += 1
        return recorded


def _split(overrides: Overrides) -> tuple[dict[str, Any], dict[str, Any]]:
    """(sampling parameters, request options). Raises ConfigError for an unknown name."""
    sampling: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in overrides.items():
        if name in SAMPLING:
            sampling[name] = value
        elif name in OPTIONS:
            options[name] = value
        else:
            raise ConfigError(_unknown(name))
    return sampling, options


def _unknown(name: str) -> str:
    if name == "n":
        return "a rollout asks for one completion at a time: for several, asyncio.gather so many calls"
    near = get_close_matches(name, SAMPLING | OPTIONS, n=1, cutoff=0.0)[0]
    return f"there is no request option {name!r}; did you mean {near!r}?"


def _merged(base: SamplingParams, over: SamplingParams | None, named: Mapping[str, Any]) -> SamplingParams:
    changes = {} if over is None else over.as_dict()
    if "stop" in changes:
        changes["stop"] = tuple(changes["stop"])
    return msgspec.structs.replace(base, **{**changes, **named}) if changes or named else base


def _derived(seed: int, key: str, nth: int) -> int:
    """A seed of 31 bits for the nth request of this content."""
    return int.from_bytes(blake2b(f"{seed}/{key}/{nth}".encode(), digest_size=4).digest(), "little") >> 1
