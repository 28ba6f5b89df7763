"""Rewards computed in this process, for they take microseconds: `text.py` applied to prompt and sample.

Those that judge the answer look at what follows the reasoning; one cut off while thinking has none and
scores 0. Each is a Reward; none raises for a sample.
"""

from __future__ import annotations

import msgspec

from penstock.errors import ConfigError
from penstock.prompt import Prompt
from penstock.rollout.rewards import columns
from penstock.rollout.rewards.columns import NoReference
from penstock.rollout.rewards.text import (
    exact_match,
    has_format,
    length_penalty,
    numeric,
    overlong_penalty,
    tokens_of,
    whole_text,
)
from penstock.rollout.score import Score
from penstock.sample import Sample

_NO_COUNT = "the engine did not say how many tokens it generated"


class ExactMatch(msgspec.Struct, frozen=True, kw_only=True):
    """1 when the answer is the reference, but for white space around it, else 0."""

    column: str = "answer"

    async def __call__(self, prompt: Prompt, sample: Sample) -> Score:
        try:
            return Score(float(exact_match(sample.answer, columns.text(prompt, self.column))))
        except NoReference as error:
            return Score.failure(str(error))


class Numeric(msgspec.Struct, frozen=True, kw_only=True):
    """1 when the answer's number is the reference's, else 0; see `penstock.rollout.rewards.text.numeric`."""

    column: str = "answer"
    last_number: bool = False
    """Without a marked answer, take the last number."""

    async def __call__(self, prompt: Prompt, sample: Sample) -> Score:
        try:
            reference = columns.text(prompt, self.column)
            return Score(float(numeric(sample.answer, reference, last_number=self.last_number)))
        except (NoReference, ValueError) as error:
            return Score.failure(str(error))


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """1 for `<think>…</think><answer>…</answer>`, else 0; see `penstock.rollout.rewards.text.has_format`."""

    answer_tags: bool = True

    async def __call__(self, prompt: Prompt, sample: Sample) -> Score:
        return Score(float(has_format(whole_text(sample), answer_tags=self.answer_tags)))


class Length(msgspec.Struct, frozen=True, kw_only=True):
    """-scale · |target - tokens|; see `penstock.rollout.rewards.text.length_penalty`."""

    target: int
    scale: float = 0.0003

    async def __call__(self, prompt: Prompt, sample: Sample) -> Score:
        tokens = tokens_of(sample)
        if tokens is None:
            return Score.failure(_NO_COUNT)
        return Score(length_penalty(tokens, target=self.target, scale=self.scale))


class Overlong(msgspec.Struct, frozen=True, kw_only=True):
    """From 0 to -1 over the last `buffer` of `longest` tokens; see
    `penstock.rollout.rewards.text.overlong_penalty`."""

    longest: int
    buffer: int

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.longest:
            raise ConfigError(
                f"the buffer of `overlong` must be between 1 and longest ({self.longest}), not {self.buffer}"
            )

    async def __call__(self, prompt: Prompt, sample: Sample) -> Score:
        tokens = tokens_of(sample)
        if tokens is None:
            return Score.failure(_NO_COUNT)
        return Score(overlong_penalty(tokens, longest=self.longest, buffer=self.buffer))
