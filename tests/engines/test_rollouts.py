"""Rollouts and weight updates with a real engine: a few steps of a trainer; the engine is killed once.

The engines compute in float32, so their logprobs are those of transformers within 1e-3.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.control.files import TensorFiles
from penstock.fleet.fleet import Fleet
from penstock.learner.checkpoint import save_checkpoint
from penstock.learner.grpo import Objective
from penstock.learner.learner import Learner, Optimization
from penstock.learner.training import Tally, Training
from penstock.models import ARITHMETIC
from penstock.prompt import Prompt
from penstock.rollout.group import Group, Rollout
from penstock.rollout.rollouts import Rollouts
from penstock.sample import Sample, SamplingParams
from penstock.servers.launched import LifeCycle
from penstock.servers.replicas import LaunchedFleet, launch
from penstock.servers.restart import Restart
from tests.engines.engines import START_LIMIT, Engine
from tests.servers.fakes import TAG, nothing_left, processes

pytestmark = pytest.mark.engines

TOLERANCE = 1e-3
"""Largest difference of two logprobs that are the same, in float32."""
STEPS = 5
KILLED_AFTER = 2
"""Steps."""
ASYNC_STEPS = 1
QUESTIONS = [f"What is {a} + {b}?" for a in range(3, 60, 7) for b in range(5, 50, 9)]
FLOAT32 = {"sglang": {"dtype": "float32"}}
"""What the others are told already."""


async def reward(prompt: Prompt, sample: Sample) -> float:
    """Of no meaning, and another for each text: there is always something to learn."""
    return crc32(sample.text.encode()) / (1 << 32)


@cache
def reference(folder: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32)


def scores(folder: Path, rollout: Rollout) -> list[float]:
    """What the weights in a folder give each sampled token, by transformers."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.token_ids]])
    with torch.inference_mode():
        logprobs = reference(folder)(ids).logits[0].log_softmax(-1)
    start = len(rollout.prompt_ids)
    return [float(logprobs[start + at - 1, token]) for at, token in enumerate(rollout.token_ids)]


class Seen:
    """The groups a learner was given, each with the trainer's version then."""

    def __init__(self) -> None:
        self.rollouts: Rollouts | None = None
        self.groups: list[tuple[int, Group]] = []

    def __call__(self, group: Group) -> Group:
        assert self.rollouts is not None
        self.groups.append((self.rollouts.version, group))
        return group


async def caught_up(fleet: Fleet, version: int) -> None:
    """Until the engine is back: it is sent nothing before it has the weights of this version."""
    async with asyncio.timeout(START_LIMIT):
        while not (fleet.endpoints and fleet.endpoints[0].current):  # noqa: ASYNC110 - bounded above
            await asyncio.sleep(0.05)
    assert fleet.endpoints[0].policy_version == version


async def trained(launched: LaunchedFleet, folder: Path, seen: Seen, *, streamed: bool) -> dict[int, Path]:
    """Trains, and kills the engine on the way; the checkpoint of each version."""
    learner = Learner(ARITHMETIC, Objective(), Optimization(learning_rate=2e-4))
    saved = {0: ARITHMETIC}
    publish = partial(TensorFiles, folder=folder / "weights", model=ARITHMETIC)
    async with (
        launched.client() as client,
        Rollouts(
            client,
            prompts=QUESTIONS,
            reward=reward,
            params=SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True),
            group_size=4,
            batch_groups=4,
            async_steps=ASYNC_STEPS,
            seed=None,  # vLLM on a CPU dies of seeds
            streamed=streamed,
        ) as rollouts,
    ):
        seen.rollouts = rollouts
        training = Training(learner, rollouts, publish, folder / "checkpoints", Tally(), seen)
        for step in range(STEPS):
            figures = await training.step()
            assert figures is not None and figures["staleness_max"] in (0.0, 1.0)
            assert rollouts.version == step + 1, "it has learned something"
            saved[rollouts.version] = save_checkpoint(folder / "saved", learner, keep=STEPS)
            if step + 1 == KILLED_AFTER:
                server = launched.replicas[0].server
                assert server is not None and server.pid is not None
                os.kill(server.pid, signal.SIGKILL)
                await asyncio.wait_for(server.ended.wait(), 10)
                await caught_up(client.fleet, rollouts.version)
        assert rollouts.version == STEPS and client.fleet.policy_version == STEPS
        assert [end.policy_version for end in client.fleet.endpoints] == [STEPS]
    return saved


def test_a_trainer_with_a_real_engine_that_dies_once(engine: Engine, life: LifeCycle, tmp_path: Path) -> None:
    seen = Seen()

    async def scenario(tag: str) -> dict[int, Path]:
        spec = engine.make(extra_args=FLOAT32.get(engine.name, {})).spec
        spec = replace(spec, env={**spec.env, TAG: tag})
        async with (
            asyncio.timeout(3 * START_LIMIT),
            launch(spec, devices=(), restart=Restart(base=0.1), life=life) as launched,
        ):
            saved = await trained(
                launched, tmp_path, seen, streamed=engine.name != "sglang"
            )  # it streams no ids of a chat
            assert launched.replicas[0].restarts.total == 1
        assert processes(tag) == []
        return saved

    with nothing_left() as tag:
        saved = asyncio.run(scenario(tag))
    assert list((tmp_path / "weights").iterdir()) == []
    judge(saved, seen)


def judge(saved: dict[int, Path], seen: Seen) -> None:
    """Every group has what was asked for, and each token the logprob its version's weights give it."""
    assert len(seen.groups) == STEPS * 4 and len({group.position for _, group in seen.groups}) == STEPS * 4
    worst, others, judged, tokens = 0.0, 0.0, 0, 0
    for version, group in seen.groups:
        assert len(group.rollouts) == 4 and (group.staleness or 0) <= ASYNC_STEPS
        for one in group.rollouts:
            assert one.prompt_ids and len(one.token_ids) == len(one.logprobs) == len(one.mask) > 0
            assert sum(count for _, count in one.versions) == len(one.token_ids)
            assert all(version - ASYNC_STEPS <= made_by <= version for made_by, _ in one.versions)
            tokens += len(one.token_ids)
            if not one.versions_exact:  # tokens may be newer than said
                continue
            start = 0
            for made_by, count in one.versions:
                span = slice(start, start + count)
                said, expected = one.logprobs[span], scores(saved[made_by], one)[span]
                worst = max([worst, *(abs(a - b) for a, b in zip(said, expected, strict=True))])
                other = scores(saved[made_by + 1 if made_by < STEPS else 0], one)[span]
                others = max([others, *(abs(a - b) for a, b in zip(said, other, strict=True))])
                judged += count
                start += count
    assert worst < TOLERANCE, (worst, others)
    assert others > 10 * TOLERANCE, "other weights would have shown"
    assert judged > 0.3 * tokens, "of those that were in flight while weights changed it is not known"
    spans = [span for _, group in seen.groups for one in group.rollouts for span in one.versions]
    assert len({made_by for made_by, _ in spans}) >= 3
