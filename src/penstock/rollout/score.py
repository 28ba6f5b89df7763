"""What a reward says of a sample: a number, or that it could not tell.

A score that failed is not a score of 0: the sample may be right. Whoever collects scores looks at `failed`
first; the value of a failed score is NaN, so that one that is used all the same shows in the loss.
"""

from __future__ import annotations

from typing import Final, Protocol

import msgspec

from penstock.prompt import Prompt
from penstock.sample import Sample

NAN: Final = float("nan")


class Score(msgspec.Struct, frozen=True):
    """The reward of one sample."""

    value: float
    """Not to be used, and NaN, when `failed` is set. JSON has no NaN: write only the reason there."""
    parts: dict[str, float] = {}
    """What it is made of, by name, before weights. Also what could still be told when it failed."""
    failed: str | None = None
    """Why there is no score, in a sentence for a person: a timeout, a crash, a service that is down."""

    @classmethod
    def failure(cls, reason: str, parts: dict[str, float] | None = None) -> Score:
        return cls(NAN, parts or {}, reason)


class Reward(Protocol):
    """Scores a sample. What goes wrong with one sample is a failed score; an error that is raised
    (ConfigError) means that no sample can be scored like this."""

    async def __call__(self, prompt: Prompt, sample: Sample) -> Score: ...
