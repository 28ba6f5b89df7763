"""Which groups are worth training on: rules only.

A group is kept, dropped with a reason, or its prompt is begun again. Nothing is dropped without a reason, and
no prompt is begun again more often than `attempts` allows because its samples failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from penstock.errors import ConfigError
from penstock.prompt import Prompt
from penstock.rollout.group import Group, Rollout

ZERO_SPREAD = "zero spread"
SOLVED = "solved before"


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a finished group. Dropped groups are made up for by others: a batch is always full."""

    drop_zero_spread: bool = False
    """Drop a group whose rewards are all alike: its advantages are all 0."""
    spread: float = 1e-6
    """Rewards that differ by no more are alike."""
    oversample: int = 0
    """Samples asked for beyond the group's size: the first that are scored are taken, the others cut off. So
    no group waits for its slowest samples, and short ones are more likely to be in it."""
    min_scored: int = 2
    """A group with fewer scored samples is begun again; of a group of one, one is enough."""
    attempts: int = 3
    """Times a prompt is begun before it is dropped because its samples failed."""
    solved_at: float | None = None
    """A prompt whose samples all score at least this is solved: it is passed over when it comes again."""

    def check(self, group_size: int) -> None:
        """Raises ConfigError."""
        if group_size < 1:
            raise ConfigError(f"group_size must be at least 1, not {group_size}")
        for name, least in (("oversample", 0), ("min_scored", 1), ("attempts", 1), ("spread", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.min_scored > max(group_size, 2):
            raise ConfigError(f"min_scored is {self.min_scored}, but a group has {group_size} samples")
        if self.drop_zero_spread and group_size == 1:
            raise ConfigError("a group of one has no spread: drop_zero_spread would drop all of them")


class Verdict(msgspec.Struct, frozen=True):
    """What is to become of a group."""

    fate: Literal["keep", "drop", "again"]
    reason: str = ""
    solved: bool = False


def judge(
    rollouts: Sequence[Rollout], failures: Sequence[str], attempt: int, size: int, rules: Selection
) -> Verdict:
    """rollouts: those that were generated, scored or not. failures: why others were not. size: of a group."""
    rewards = [one.reward.value for one in rollouts if one.reward.failed is None]
    if len(rewards) < min(rules.min_scored, size):
        reasons = [*failures, *(one.reward.failed for one in rollouts if one.reward.failed is not None)]
        why = f"{len(reasons)} samples failed: {reasons[0]}" if reasons else "too few samples"
        return Verdict("again" if attempt < rules.attempts else "drop", why)
    solved = rules.solved_at is not None and min(rewards) >= rules.solved_at
    if not any(any(one.mask) for one in rollouts):
        return Verdict("drop", "no tokens", solved)
    if rules.drop_zero_spread and max(rewards) - min(rewards) <= rules.spread:
        return Verdict("drop", ZERO_SPREAD, solved)
    return Verdict("keep", solved=solved)


class Curriculum(Protocol):
    """Chooses the order of prompts. Called on the event loop: it must be quick."""

    def choose(self, prompts: Sequence[Prompt]) -> int:
        """Which of these is begun next, by its place; those not chosen are offered again."""
        ...

    def learned(self, group: Group, verdict: Verdict) -> None:
        """A group is finished."""
        ...


class InOrder:
    """The curriculum that is none: first come, first begun."""

    def choose(self, prompts: Sequence[Prompt]) -> int:
        return 0

    def learned(self, group: Group, verdict: Verdict) -> None:
        """Nothing to learn."""
