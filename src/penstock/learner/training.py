"""The loop of reinforcement learning: groups → step → ledger → engines → checkpoint, over and over.

It guarantees:
- the ledger knows a step before its checkpoint is saved: a run that is killed anywhere goes on from a
  checkpoint, and trains on no prompt twice;
- the event loop stays free while the learner computes, so that generation goes on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any

from torch import Tensor

from penstock.learner.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from penstock.learner.learner import Learner, StepFigures
from penstock.rollout.group import Group
from penstock.rollout.rollouts import Rollouts
from penstock.rollout.score import Score
from penstock.rollout.selection import InOrder, Verdict

Prepare = Callable[[Group], Group]
"""What a group looks like to the learner."""

Transport = Callable[[Mapping[str, Tensor]], Any]
"""Makes a `penstock.control.transport.WeightTransport` of weights, which it copies."""


class Tally(InOrder):
    """A curriculum that changes nothing and counts the rewards of all groups, dropped ones too."""

    def __init__(self) -> None:
        self._scores: list[Score] = []
        self._fates: list[str] = []

    def learned(self, group: Group, verdict: Verdict) -> None:
        """See Curriculum."""
        self._scores += (one.reward for one in group.scored)
        self._fates.append(verdict.fate)

    def take(self) -> dict[str, float | None]:
        """Means of the reward and of its parts, and counts of groups, since they were last taken."""
        found: dict[str, float | None] = {
            "groups": len(self._fates),
            "groups_dropped": self._fates.count("drop"),
            "reward": fmean(score.value for score in self._scores) if self._scores else None,
        }
        for name in sorted({name for score in self._scores for name in score.parts}):
            known = [score.parts[name] for score in self._scores if name in score.parts]
            found[f"reward_{name}"] = fmean(known)
        self._scores, self._fates = [], []
        return found


class Training:
    """Trains `learner` on what `rollouts` collect; both are the caller's, and the rollouts are open.

    folder: of the checkpoints. prepare: changes groups for the learner alone, their masks for instance.
    """

    def __init__(
        self,
        learner: Learner,
        rollouts: Rollouts,
        transport: Transport,
        folder: Path,
        tally: Tally,
        prepare: Prepare = lambda group: group,
    ) -> None:
        self._learner = learner
        self._rollouts = rollouts
        self._transport = transport
        self._folder = folder
        self._tally = tally
        self._prepare = prepare

    async def begin(self) -> None:
        """Give the engines the weights of the checkpoint the run goes on from; nothing for a new run."""
        if self._rollouts.resumed.version:
            await self._publish()

    async def step(self) -> dict[str, float | None] | None:
        """One step, and its figures for the metrics; None when the prompts are used up."""
        began = monotonic()
        groups = await self._rollouts.batch()
        if not groups:
            return None
        waited = monotonic() - began
        ages = ages_of(groups, self._rollouts.version)
        before = self._learner.version
        figures = await asyncio.to_thread(self._learner.step, [self._prepare(group) for group in groups])
        await self._rollouts.trained(groups)
        published = monotonic()
        if self._learner.version != before:
            await self._publish()
        now = monotonic()
        return {
            **figures_of(figures),
            **parts_of(groups),
            **staleness_of(ages),
            "seconds": now - began,
            "trainer_waited": waited,
            "training": figures.seconds,
            "updating": now - published,
            **self._tally.take(),
        }

    async def save(self) -> None:
        """A checkpoint of the last step, whose figures are written already. Raises WriteFailed."""
        state = {"step": self._rollouts.step}
        await asyncio.to_thread(save_checkpoint, self._folder, self._learner, state)

    async def _publish(self) -> None:
        await self._rollouts.update(self._transport(self._learner.weights()))


def resume(folder: Path, learner: Learner) -> int | None:
    """Bring the learner to the latest checkpoint; the step `Rollouts` go on from, None where there is none.

    Raises ResumeRefused, ConfigError.
    """
    saved = checkpoints(folder)
    return int(load_checkpoint(saved[-1], learner)["step"]) if saved else None


def ages_of(groups: Sequence[Group], version: int) -> Counter[int]:
    """Trained tokens by their age: updates between the weights that made them and those of `version`."""
    ages: Counter[int] = Counter()
    for rollout in (one for group in groups for one in group.scored):
        start = 0
        for made_by, count in rollout.versions:
            ages[version - made_by] += sum(rollout.mask[start : start + count])
            start += count
    return +ages


def staleness_of(ages: Mapping[int, int]) -> dict[str, float | None]:
    """Mean and largest age of the tokens of a step."""
    tokens = sum(ages.values())
    return {
        "staleness": sum(age * count for age, count in ages.items()) / tokens if tokens else None,
        "staleness_max": float(max(ages)) if tokens else None,
    }


def parts_of(groups: Sequence[Group]) -> dict[str, float | None]:
    """Means of the parts of the rewards of a step."""
    scores = [one.reward for group in groups for one in group.scored]
    names = sorted({name for score in scores for name in score.parts})
    return {
        f"trained_{name}": fmean(score.parts[name] for score in scores if name in score.parts)
        for name in names
    }


def figures_of(figures: StepFigures) -> dict[str, float | None]:
    """A step's figures by name, without those the loop measures itself."""
    found = asdict(figures)
    found["trained_reward"] = found.pop("reward")
    del found["seconds"]
    return found
