"""Engines that come and go by themselves: real embedded ones, behind a fleet whose weights change."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from penstock.control.staged import HttpChunks
from penstock.engine.weights import checkpoint_tensors
from penstock.models import ARITHMETIC
from penstock.rollout.balance import Elastic
from penstock.rollout.rollouts import Rollouts
from penstock.sample import Sample, SamplingParams
from penstock.servers.replicas import launch
from penstock.servers.spec import ServerSpec
from tests.scripted import run

MOST = 2


async def constant(prompt: Any, sample: Sample) -> float:
    return 1.0


async def follow() -> list[int]:
    """The numbers of engines while the trainer is fast, and then slow; ends with one."""
    spec = ServerSpec(engine="embedded", model=str(ARITHMETIC), extra_args={"threads": 1, "max-num-seqs": 16})
    tensors = dict(checkpoint_tensors(Path(ARITHMETIC)))
    counts: list[int] = []
    async with (
        launch(spec, replicas=1, adaptive=False, max_in_flight=16) as engines,
        engines.client() as client,
        Rollouts(
            client,
            reward=constant,
            prompts=(f"What is {one} + {one}?" for one in range(100_000)),
            params=SamplingParams(max_tokens=64, temperature=1.0),
            group_size=4,
            batch_groups=4,
            async_steps=1,
            elastic=Elastic(engines=engines, most=MOST, every=1.0),
        ) as r,
    ):

        async def step(seconds: float) -> None:
            batch = await r.batch()
            await asyncio.sleep(seconds)
            await r.trained(batch)
            await r.update(HttpChunks(tensors))
            counts.append(engines.count)

        while engines.count < MOST or not served_by_all(engines):
            await step(0.0)
        assert {one.policy_version for one in engines.fleet.endpoints} == {r.version}
        while engines.count > 1:
            await step(3.0)
        assert len(engines.fleet.endpoints) == len(engines.replicas) == 1
        await step(0.0)
    return counts


def served_by_all(engines: Any) -> bool:
    """Each has answered."""
    return all(one.in_flight or one.admits for one in engines.fleet.endpoints)


@pytest.mark.slow
def test_embedded_engines_are_added_for_a_fast_trainer_and_removed_for_a_slow_one() -> None:
    counts = run(follow(), bound=300)
    assert counts[0] == 1 and max(counts) == MOST and counts[-1] == 1, counts
