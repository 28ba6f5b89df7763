"""Several rewards as one: gates first, then a weighted sum.

It guarantees: what a part says is kept, unweighted, under its name; a part that failed fails the whole unless
it is optional, and then counts nothing; a sample that a gate turns away scores 0, and the parts behind the
gates are not asked.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import msgspec

from penstock.errors import ConfigError
from penstock.prompt import Prompt
from penstock.rollout.score import Reward, Score
from penstock.sample import Sample


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One of several rewards."""

    name: str
    reward: Reward
    weight: float = 1.0
    optional: bool = False
    """When it fails the sum goes without it, as if it were 0, instead of failing."""
    gate: bool = False
    """Adds nothing to the sum, but where it is not above 0 the whole is 0."""


class Combined:
    """The weighted sum of its parts, which are asked all at once. Raises ConfigError when two have one name,
    or a weight is not finite."""

    def __init__(self, parts: Sequence[Part]) -> None:
        if not any(not part.gate for part in parts):
            raise ConfigError("there must be at least one reward that is not a gate")
        names = [part.name for part in parts]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"two rewards are called {twice[0]!r}")
        for part in parts:
            if not math.isfinite(part.weight):
                raise ConfigError(f"the weight of {part.name!r} must be a number, not {part.weight}")
            if part.gate and part.optional:
                raise ConfigError(f"{part.name!r} cannot be both a gate and optional")
        self.gates = tuple(part for part in parts if part.gate)
        self.terms = tuple(part for part in parts if not part.gate)

    def __repr__(self) -> str:
        terms = " + ".join(f"{part.weight:g} {part.name}" for part in self.terms)
        return f"<Combined {terms}{''.join(f', if {part.name}' for part in self.gates)}>"

    async def __call__(self, prompt: Prompt, sample: Sample) -> Score:
        gates = await _ask(self.gates, prompt, sample)
        kept = _kept(self.gates, gates)
        if (failed := _failed(self.gates, gates)) is not None:
            return Score.failure(failed, kept)
        if any(score.value <= 0.0 for score in gates):
            return Score(0.0, kept)
        scores = await _ask(self.terms, prompt, sample)
        kept |= _kept(self.terms, scores)
        if (failed := _failed(self.terms, scores)) is not None:
            return Score.failure(failed, kept)
        told = [
            part.weight * score.value
            for part, score in zip(self.terms, scores, strict=True)
            if score.failed is None
        ]
        return Score(math.fsum(told), kept)


async def _ask(parts: Sequence[Part], prompt: Prompt, sample: Sample) -> list[Score]:
    if len(parts) == 1:
        return [await parts[0].reward(prompt, sample)]
    tasks = [asyncio.ensure_future(part.reward(prompt, sample)) for part in parts]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _kept(parts: Sequence[Part], scores: Sequence[Score]) -> dict[str, float]:
    """What the parts say, and behind a dot what their own parts do."""
    kept: dict[str, float] = {}
    for part, score in zip(parts, scores, strict=True):
        if score.failed is None:
            kept[part.name] = score.value
        kept |= {f"{part.name}.{name}": value for name, value in score.parts.items()}
    return kept


def _failed(parts: Sequence[Part], scores: Sequence[Score]) -> str | None:
    reasons = [
        f"{part.name}: {score.failed}"
        for part, score in zip(parts, scores, strict=True)
        if score.failed is not None and not part.optional
    ]
    return "; ".join(reasons) or None
