"""One rollout as it grows: samples of the policy, and between them what the environment has said.

Pure. It guarantees that the ids of a rollout are exactly those the engine read and wrote: the prompt of each
further request is `ids`, what has been so far, and nothing is tokenized twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.errors import ConfigError, MalformedResponse
from penstock.rollout.group import Rollout, Timings, VersionSpan, join_spans
from penstock.rollout.score import Score
from penstock.sample import Sample, SamplingParams, Usage


class Trajectory:
    """Tokens so far."""

    def __init__(self) -> None:
        self.prompt_ids: tuple[int, ...] = ()
        self.token_ids: list[int] = []
        self.turns = 0
        self.text = ""
        """Of the turn under way, or of the last."""
        self.reasoning: str | None = None
        self.versions_exact = True
        self.sample: Sample | None = None
        """The last answer of an engine."""
        self.requests = 0
        self._logprobs: list[float] = []
        self._mask: list[bool] = []
        self._spans: list[VersionSpan] = []
        self._turn_start = 0
        self._turn_open = False

    @property
    def ids(self) -> list[int]:
        """Prompt and all that came behind it."""
        return [*self.prompt_ids, *self.token_ids]

    @property
    def sampled(self) -> int:
        """Tokens of the turn under way."""
        return len(self.token_ids) - self._turn_start

    def add(self, sample: Sample, spans: Sequence[VersionSpan], *, exact: bool = True) -> None:
        """The engine's answer: a turn, or, behind one that was cut off, its rest. Raises MalformedResponse,
        ConfigError."""
        ids, logprobs = _checked(sample)
        if self.sample is None:
            self.prompt_ids = sample.prompt_token_ids or ()
        if not self._turn_open:
            self.turns += 1
            self.text, self.reasoning = "", None
            self._turn_start = len(self.token_ids)
        self._turn_open = sample.finish_reason == "abort"
        self.text += sample.text
        self.token_ids += ids
        self._logprobs += logprobs
        self._mask += [True] * len(ids)
        self._spans += spans
        self.versions_exact = self.versions_exact and exact
        self.requests += sample.attempts
        self.sample = sample

    def drop_last(self, count: int, text: str) -> None:
        """The last tokens of the turn under way are to be sampled again; `text` is what is left of it."""
        keep = len(self.token_ids) - count
        for column in (self.token_ids, self._logprobs, self._mask):
            del column[keep:]
        self.text = text
        spans, left = [], keep
        for version, tokens in self._spans:
            spans.append(VersionSpan(version, min(tokens, left)))
            left -= spans[-1].tokens
        self._spans = [span for span in spans if span.tokens]

    def observe(self, ids: Sequence[int]) -> None:
        """What the environment has said, and the beginning of the next turn, as tokens."""
        if not ids:
            return
        assert self._spans, "an observation comes behind a sample"
        self.token_ids += ids
        self._logprobs += [0.0] * len(ids)
        self._mask += [False] * len(ids)
        self._spans.append(VersionSpan(self._spans[-1].version, len(ids)))

    def turn(self, finish_reason: str | None = None) -> Sample:
        """The turn that is over as one sample, however many requests it took."""
        last = self.sample
        assert last is not None, "there is no turn yet"
        if self.turns == 1 and last.token_ids is not None and len(last.token_ids) == len(self.token_ids):
            whole = last
        else:
            ids = self.token_ids[self._turn_start :]
            prompt = (*self.prompt_ids, *self.token_ids[: self._turn_start])
            whole = msgspec.structs.replace(
                last,
                text=self.text,
                reasoning=None,
                token_ids=tuple(ids),
                prompt_token_ids=prompt,
                logprobs=tuple(self._logprobs[self._turn_start :]),
                usage=Usage(len(prompt), len(ids)),
                weight_versions=None,
                attempts=self.requests,
            )
        return whole if finish_reason is None else msgspec.structs.replace(whole, finish_reason=finish_reason)

    def rollout(self, index: int, finish_reason: str | None, reward: Score, timings: Timings) -> Rollout:
        return Rollout(
            prompt_ids=self.prompt_ids,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self._logprobs),
            mask=tuple(self._mask),
            versions=join_spans(self._spans),
            versions_exact=self.versions_exact,
            finish_reason=finish_reason,
            reward=reward,
            text=self.text,
            turns=self.turns,
            timings=timings,
            index=index,
        )


def spans_of(sample: Sample, assumed: int) -> tuple[tuple[VersionSpan, ...], bool]:
    """The version spans of a sample's tokens as its engine says, and whether it has said any; else all are
    taken to be of version `assumed`."""
    total = len(sample.token_ids or ())
    if sample.weight_versions is None:
        return ((VersionSpan(assumed, total),) if total else ()), False
    spans: list[VersionSpan] = []
    until = total
    for first, version in reversed(sample.weight_versions):
        if first < until:  # of tokens that were made twice the later entry counts
            spans.append(VersionSpan(version, until - first))
            until = first
    if until:  # the beginning is not told of
        spans.append(VersionSpan(assumed, until))
    return join_spans(reversed(spans)), True


def rest_of(params: SamplingParams, tokens: int) -> SamplingParams:
    """What is to be asked for behind so many tokens of a turn."""
    assert params.max_tokens is not None
    changes: dict[str, int] = {"max_tokens": params.max_tokens - tokens}
    if params.min_tokens:
        changes["min_tokens"] = max(0, params.min_tokens - tokens)
    if params.seed is not None:
        changes["seed"] = params.seed + tokens  # the same seed would draw the same numbers again
    return msgspec.structs.replace(params, **changes)


def _checked(sample: Sample) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Token ids and logprobs of an answer, which a trainer cannot do without."""
    ids, logprobs = sample.token_ids, sample.logprobs or ()
    if ids is None or sample.prompt_token_ids is None:
        raise ConfigError(
            f"{sample.endpoint} returns no token ids: a trainer needs an engine that knows return_token_ids"
        )
    if len(logprobs) != len(ids):
        raise MalformedResponse(f"{sample.endpoint} answered {len(ids)} tokens with {len(logprobs)} logprobs")
    return ids, logprobs
