"""The loop over the learner, the ledger and the engines, with rollouts that are a list."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
from torch import Tensor

from penstock.learner.grpo import Objective
from penstock.learner.learner import Learner, Optimization
from penstock.learner.training import Tally, Training, ages_of, parts_of, resume, staleness_of
from penstock.rollout.group import Group, VersionSpan
from penstock.rollout.score import Score
from penstock.rollout.selection import Verdict
from tests.learner.groups import group, random_groups, rollout


class Rollouts:
    """What the loop asks of penstock.rollout.Rollouts; `told` is what it was told, in order."""

    def __init__(self, batches: list[list[Group]], *, step: int = 0) -> None:
        self._batches = batches
        self.step = self.version = step
        self.resumed = SimpleNamespace(step=step, version=step)
        self.told: list[Any] = []

    async def batch(self) -> list[Group]:
        return self._batches.pop(0) if self._batches else []

    async def trained(self, groups: list[Group]) -> int:
        self.step += 1
        self.told.append(("trained", len(groups)))
        return self.step

    async def update(self, weights: str) -> None:
        self.version += 1
        self.told.append(weights)


def training(
    folder: Path, model: Path, batches: list[list[Group]], *, step: int = 0
) -> tuple[Training, Rollouts, Learner]:
    learner = Learner(model, Objective(), Optimization(learning_rate=1e-3))

    def transport(weights: Mapping[str, Tensor]) -> str:
        assert weights.keys() == learner.weights().keys()
        return f"weights {learner.version}"

    rollouts = Rollouts(batches, step=step)
    loop = Training(
        learner,
        rollouts,  # type: ignore[arg-type]
        transport,
        folder,
        Tally(),
    )
    return loop, rollouts, learner


def test_the_ledger_is_told_before_the_engines_are_updated(folder: Path, tmp_path: Path) -> None:
    loop, rollouts, _ = training(tmp_path, folder, [random_groups(seed, 3) for seed in range(2)])

    async def run() -> list[dict[str, float | None] | None]:
        await loop.begin()
        return [await loop.step() for _ in range(3)]

    first, second, third = asyncio.run(run())
    assert rollouts.told == [("trained", 3), "weights 1", ("trained", 3), "weights 2"]
    assert first is not None and second is not None and third is None
    assert (first["version"], second["version"]) == (1, 2)
    assert second["staleness"] == 1 and second["staleness_max"] == 1


def test_a_run_goes_on_from_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    loop, _, learner = training(tmp_path, folder, [random_groups(seed, 3) for seed in range(2)])
    assert resume(tmp_path, learner) is None

    async def steps() -> None:
        await loop.step()
        await loop.step()
        await loop.save()

    asyncio.run(steps())
    again, rollouts, second = training(tmp_path, folder, [], step=2)
    assert resume(tmp_path, second) == 2
    asyncio.run(again.begin())
    assert rollouts.told == ["weights 2"]
    assert all((tensor == second.weights()[name]).all() for name, tensor in learner.weights().items())


def test_engines_are_left_alone_when_nothing_was_learnt(folder: Path, tmp_path: Path) -> None:
    alike = [group(rollout([9, 8], 1.0), rollout([3], 1.0))]
    loop, rollouts, _ = training(tmp_path, folder, [alike])
    asyncio.run(loop.step())
    assert rollouts.told == [("trained", 1)]


def test_ages_are_of_trained_tokens_alone() -> None:
    mixed = msgspec.structs.replace(
        rollout([1, 2, 3, 4, 5], 1.0, mask=[True, True, False, True, True]),
        versions=(VersionSpan(3, 2), VersionSpan(4, 2), VersionSpan(5, 1)),
    )
    failed = msgspec.structs.replace(rollout([1], None), versions=(VersionSpan(0, 1),))
    ages = ages_of([group(mixed, failed)], 5)
    assert ages == {2: 2, 1: 1, 0: 1}
    assert staleness_of(ages) == {"staleness": 1.25, "staleness_max": 2}
    assert staleness_of({}) == {"staleness": None, "staleness_max": None}


def test_the_tally_counts_dropped_groups_and_parts() -> None:
    tally = Tally()
    parts = msgspec.structs.replace(rollout([1], 1.0), reward=Score(1.0, {"answer": 1.0}))
    whole = group(parts, rollout([1], 0.0), rollout([1], None))
    assert parts_of([whole]) == {"trained_answer": 1.0}
    tally.learned(whole, Verdict("keep"))
    tally.learned(group(rollout([1], 0.5)), Verdict("drop", "zero spread"))
    assert tally.take() == {"reward": 0.5, "reward_answer": 1.0, "groups": 2, "groups_dropped": 1}
    assert tally.take() == {"reward": None, "groups": 0, "groups_dropped": 0}
