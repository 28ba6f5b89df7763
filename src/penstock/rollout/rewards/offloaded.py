"""Rewards that may hang or crash, and therefore run in a pool of workers: mathematics, patterns, functions.

Each is a Reward: a timeout or a crash is a failed score.
"""

from __future__ import annotations

import re

from penstock.errors import ConfigError
from penstock.prompt import Prompt
from penstock.rollout.rewards import columns
from penstock.rollout.rewards.columns import NoReference
from penstock.rollout.rewards.math import check_installed, same_mathematics
from penstock.rollout.rewards.text import whole_text
from penstock.rollout.rewards.workers import Function, Workers, target_of
from penstock.rollout.score import Score
from penstock.sample import Sample

LIMIT = 10.0
"""Seconds for a score unless told otherwise."""


class Math:
    """1 when the answer is mathematically equal to the reference, else 0, by math-verify. Raises ConfigError
    without the extra `rl`."""

    def __init__(self, workers: Workers, *, column: str = "answer", limit: float = LIMIT) -> None:
        check_installed()
        _check_limit(limit)
        self.workers = workers
        self.column = column
        self.limit = limit

    async def __call__(self, prompt: Prompt, sample: Sample) -> Score:
        try:
            reference = columns.text(prompt, self.column)
        except NoReference as error:
            return Score.failure(str(error))
        return await self.workers.score(same_mathematics, sample.answer, reference, limit=self.limit)


class Matches:
    """1 when the pattern is found in the completion, reasoning included, else 0. A dot matches line ends too.
    Raises ConfigError for a pattern that is none."""

    def __init__(self, workers: Workers, *, pattern: str, limit: float = LIMIT) -> None:
        try:
            re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ConfigError(f"the pattern {pattern!r} is no regular expression ({error})") from None
        _check_limit(limit)
        self.workers = workers
        self.pattern = pattern
        self.limit = limit

    async def __call__(self, prompt: Prompt, sample: Sample) -> Score:
        return await self.workers.score(found, self.pattern, whole_text(sample), limit=self.limit)


class InWorker:
    """A function `reward(prompt, sample)` of the user's, which returns a Score, a number or a truth value.

    function: `module:function` or one that pickles. Raises ConfigError for one that cannot be sent.
    """

    def __init__(self, workers: Workers, *, function: Function, limit: float = LIMIT) -> None:
        target_of(function)
        _check_limit(limit)
        self.workers = workers
        self.function = function
        self.limit = limit

    async def __call__(self, prompt: Prompt, sample: Sample) -> Score:
        return await self.workers.score(self.function, prompt, sample, limit=self.limit)


def found(pattern: str, text: str) -> bool:
    """Called in a worker: some patterns take exponential time."""
    return re.search(pattern, text, re.DOTALL) is not None


def _check_limit(limit: float) -> None:
    if not limit > 0:
        raise ConfigError(f"the time limit of a reward must be positive, not {limit}")
