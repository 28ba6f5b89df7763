"""A run with async_steps=0 is a plain loop that asks, waits, trains and updates: same groups, same losses."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import orjson
import pytest

from penstock.cli.training_task import credit, prompts, reward
from penstock.client import Client
from penstock.control.control import Control
from penstock.control.staged import HttpChunks
from penstock.learner.grpo import Objective
from penstock.learner.learner import Learner, Optimization, StepFigures
from penstock.learner.training import Tally, Training
from penstock.models import ARITHMETIC
from penstock.prompt import Prompt
from penstock.rollout.group import Group, Timings, VersionSpan
from penstock.rollout.rollouts import Rollouts
from penstock.rollout.sampling import seed_of
from penstock.rollout.source import FORMAT
from penstock.rollout.trajectory import Trajectory
from penstock.sample import SamplingParams
from penstock.servers.embedded import EmbeddedServer
from tests.scripted import run

STEPS, GROUPS, SIZE, SEED = 3, 3, 4, 5
PARAMS = SamplingParams(max_tokens=100, temperature=1.0, logprobs=0)

Tokens = list[tuple[int, ...]]
Learnt = tuple[list[float], list[Tokens]]
"""The loss of each step, and the tokens of its samples."""


def learner() -> Learner:
    return Learner(ARITHMETIC, Objective(), Optimization(learning_rate=3e-4), credit=credit)


def tokens_of(groups: Sequence[Group]) -> Tokens:
    return [one.token_ids for group in groups for one in group.rollouts]


@asynccontextmanager
async def engine() -> AsyncIterator[Client]:
    arguments = ["--threads", "1"]
    async with EmbeddedServer(ARITHMETIC, arguments) as server, Client(server.base_url) as client:
        yield client


async def as_rollouts(folder: Path) -> Learnt:
    losses, tokens = [], []
    policy = learner()

    def noted(groups: Sequence[Group]) -> None:
        tokens.append(tokens_of(groups))

    async with (
        engine() as client,
        Rollouts(
            client,
            reward=reward,
            prompts=itertools.islice(prompts(SEED), STEPS * GROUPS),
            group_size=SIZE,
            batch_groups=GROUPS,
            async_steps=0,
            params=PARAMS,
            seed=SEED,
        ) as r,
    ):
        loop = Training(noting(policy, noted), r, HttpChunks, folder, Tally())
        while figures := await loop.step():
            assert figures["loss"] is not None and figures["staleness_max"] == 0
            losses.append(figures["loss"])
    return losses, tokens


def noting(policy: Learner, noted: Callable[[Sequence[Group]], None]) -> Learner:
    """The learner, which tells of each batch."""
    step = policy.step

    def noting_step(groups: Sequence[Group]) -> StepFigures:
        noted(groups)
        return step(groups)

    policy.step = noting_step  # type: ignore[method-assign]
    return policy


async def in_turns() -> Learnt:
    losses, tokens = [], []
    policy = learner()
    rows = prompts(SEED)
    async with engine() as client, Control(client.fleet) as control:
        for step in range(STEPS):
            groups = []
            for position in range(step * GROUPS, (step + 1) * GROUPS):
                prompt = FORMAT.prompt(position, "a prompt", orjson.dumps(next(rows)))
                groups.append(await group_of(client, prompt, position))
            losses.append(policy.step(groups).loss)
            tokens.append(tokens_of(groups))
            await control.update_weights(HttpChunks(policy.weights()))
    return losses, tokens


async def group_of(client: Client, prompt: Prompt, position: int) -> Group:
    """One sample after the other."""
    rollouts = []
    for index in range(SIZE):
        trajectory = Trajectory()
        params = msgspec.structs.replace(PARAMS, seed=seed_of(SEED, position, index))
        sample = await client.chat(prompt.messages, params, return_token_ids=True)
        trajectory.add(sample, [VersionSpan(0, len(sample.token_ids or ()))])
        score = await reward(prompt, sample)
        rollouts.append(trajectory.rollout(index, sample.finish_reason, score, Timings()))
    return Group(key=str(position), position=position, prompt=prompt, rollouts=tuple(rollouts))


@pytest.mark.slow
def test_a_run_without_staleness_is_a_plain_loop(tmp_path: Path) -> None:
    losses, tokens = run(as_rollouts(tmp_path), bound=120)
    plain, expected = run(in_turns(), bound=120)
    assert tokens == expected
    assert losses == pytest.approx(plain, abs=1e-5)
    assert len(losses) == STEPS and len(set(losses)) == STEPS
