"""How one sample of a row is made: what a job calls for each sample that is owed.

Invariants:
1. A generation ends with a trace, or with an error that concerns this sample alone (ResponseError,
   TransportError, SampleFailed). Whatever else it raises ends the job: a cancellation, a mistake of ours.
2. It keeps nothing between samples: what a sample needs of an earlier run it gets as its `steps`.
3. The samples of a row differ: each has its own requests and, where a seed was given, its own seeds.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from inspect import iscoroutinefunction
from typing import Any, Literal, Protocol

import msgspec
import orjson

from penstock.batch.asking import Asker, Question
from penstock.batch.function import Function, load, name_of
from penstock.batch.lengthening import LENGTH
from penstock.batch.outcome import call, reason_of, trace_of
from penstock.batch.rollout import RolloutClient
from penstock.batch.steps import Recorder, Steps
from penstock.batch.trace import Provenance, Trace
from penstock.client import Client, RequestOptions
from penstock.continuation import CHAT
from penstock.errors import ConfigError, RequestRejected, SampleRejected
from penstock.prompt import Prompt
from penstock.sample import Sample, SamplingParams

LengthPolicy = Literal["keep", "continue", "drop"]
"""What becomes of a sample that was cut off at `max_tokens`: it is kept, gone on with, or left out of its
row."""

Rollout = Callable[[dict[str, Any], RolloutClient], Awaitable[Any]]
"""`async def rollout(row, client)`: the text, the Sample, or a mapping with `text` and further columns."""

Validate = Callable[[Any, dict[str, Any]], "bool | str | Awaitable[bool | str]"]
"""`validate(result, row)`: True, False, or the reason of a rejection. The result is the Sample, or what the
rollout returned."""


class Generation(Protocol):
    """Makes samples."""

    async def __call__(self, prompt: Prompt, index: int, steps: Steps) -> Trace: ...


class GenerationSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the samples of a job are made."""

    model: str | None = None
    """As requests name it."""
    params: SamplingParams = SamplingParams()
    """With a seed, every sample has its own, which follows from it, the row and the index."""
    rollout: str | Function | None = None
    """A function, or `module:function`; None: one chat completion of the row's messages."""
    validate: str | Function | None = None
    max_validate_attempts: int = 3
    """Samples made until one is accepted; after so many it has failed."""
    length_policy: LengthPolicy = "keep"
    max_continues: int = 3
    """Times a sample is gone on with, `max_tokens` more each time, where the policy is to continue."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What makes the text: a resume must agree in it. Functions are known by their names."""
        found: dict[str, Any] = {"model": self.model, **self.params.as_dict()}
        if self.rollout is not None:
            found["rollout"] = name_of(self.rollout)
        if self.validate is not None:
            found["validate"] = name_of(self.validate)
        if self.length_policy != "keep":
            found["length_policy"] = self.length_policy
        if self.length_policy == "continue":
            found["max_continues"] = self.max_continues
        return found

    def check(self) -> None:
        """Raises ConfigError for what cannot work, a function that cannot be found included."""
        if self.max_validate_attempts < 1 or self.max_continues < 1:
            raise ConfigError("--max-validate-attempts and --max-continues must be at least 1.")
        if self.length_policy == "continue" and self.params.max_tokens is None:
            raise ConfigError(
                "--length-policy continue needs --max-tokens: the budget that is added each time."
            )
        if self.rollout is not None and not _is_async(load(self.rollout, "The rollout")):
            raise ConfigError(
                f"The rollout {name_of(self.rollout)} must be `async def`: it waits for engines."
            )
        if self.validate is not None:
            load(self.validate, "validate")

    def generation(self, client: Client) -> Generation:
        """Makes samples with an open client. Raises ConfigError, as `check`."""
        self.check()
        return ChatGeneration(client, self) if self._is_plain else RolloutGeneration(client, self)

    @property
    def _is_plain(self) -> bool:
        return self.rollout is None and self.validate is None and self.length_policy != "continue"


class ChatGeneration:
    """One chat completion a sample, of the row's messages as they are."""

    def __init__(self, client: Client, settings: GenerationSettings) -> None:
        self._asker = Asker(client, settings.model)
        self._client = client
        self._options: RequestOptions = {}
        if settings.model not in (None, client.model):
            self._options["model"] = settings.model
        self._params = settings.params
        self._seed = settings.params.seed
        self._drops = settings.length_policy == "drop"

    async def __call__(self, prompt: Prompt, index: int, steps: Steps) -> Trace:
        params, seed, fitted = self._params, self._seed, None
        if seed is not None:
            seed = sample_seed(seed, prompt, index)
            params = msgspec.structs.replace(params, seed=seed)
        if self._asker.may_fit(params):
            try:
                sample = await self._client.chat(prompt.messages, params, **self._options)
            except RequestRejected as error:
                sample, fitted = await self._fit(prompt, params, error)
        else:
            sample, fitted = await self._fit(prompt, params, None)
        provenance = Provenance(
            finished=round(time.time(), 3),
            seed=seed,
            max_tokens=fitted,
            cached_tokens=sample.usage.cached_tokens,
        )
        return Trace.of(sample, provenance, dropped=self._drops and sample.finish_reason == LENGTH)

    async def _fit(
        self, prompt: Prompt, params: SamplingParams, refusal: RequestRejected | None
    ) -> tuple[Sample, int | None]:
        question = Question(route=CHAT, content=prompt.messages, params=params)
        return await self._asker.fitted(question, refusal)


class RolloutGeneration:
    """What a function makes of a row, tried again until it is accepted.

    Without a function: one chat completion, validated or gone on with.
    """

    def __init__(self, client: Client, settings: GenerationSettings) -> None:
        self._asker = Asker(client, settings.model)
        self._rollout: Rollout = _chat if settings.rollout is None else load(settings.rollout, "The rollout")
        self._validate = None if settings.validate is None else load(settings.validate, "validate")
        self._tries = settings.max_validate_attempts
        self._seed = settings.params.seed
        self._params = msgspec.structs.replace(settings.params, seed=None)
        self._drops = settings.length_policy == "drop"
        self._max_continues = settings.max_continues if settings.length_policy == "continue" else 0

    async def __call__(self, prompt: Prompt, index: int, steps: Steps) -> Trace:
        recorder = Recorder(steps)
        seed = None if self._seed is None else sample_seed(self._seed, prompt, index)
        reason = ""
        for number in range(1, self._tries + 1):
            client = RolloutClient(
                self._asker,
                self._params,
                prompt,
                index,
                recorder,
                seed=seed,
                max_continues=self._max_continues,
            )
            started = time.monotonic()
            try:
                result = await call(self._rollout, orjson.loads(prompt.fields), client)
            finally:
                client.end()
            seconds = time.monotonic() - started
            row = orjson.loads(prompt.fields)  # the function may have changed its own
            trace = trace_of(result, client.tally, row, seconds, number)
            if self._drops and trace.finish_reason == LENGTH:
                return msgspec.structs.replace(trace, dropped=True)
            if self._validate is None:
                return trace
            verdict = await call(self._validate, result, row)
            if verdict is True:
                return trace
            reason = reason_of(verdict)
        raise SampleRejected(f"validate refused all {self._tries} tries{f': {reason}' if reason else ''}")


async def _chat(row: dict[str, Any], client: RolloutClient) -> Sample:
    return await client.chat(client.messages)


def _is_async(function: Function) -> bool:
    inner = getattr(function, "func", function)  # functools.partial
    return iscoroutinefunction(inner) or iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


def sample_seed(seed: int, prompt: Prompt, index: int) -> int:
    """A seed of 31 bits for sample `index` of a prompt: reproducible, and other for every sample.

    It follows from the prompt's hash, its occurrence and the index, so that it is the same wherever the row
    stands in the input.
    """
    text = f"{seed}/{prompt.hash}/{prompt.occurrence}/{index}".encode()
    return int.from_bytes(blake2b(text, digest_size=4).digest(), "little") >> 1
