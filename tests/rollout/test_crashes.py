"""Trainers, engines and rewards that die, from a seed, on virtual time: the ledger's account stays exact.

A kill -9 is a copy of the ledger's files as they are at that moment; what happens afterwards is lost.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections import Counter
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.errors import ControlFailed
from penstock.prompt import Prompt
from penstock.rollout.rollouts import Rollouts
from penstock.rollout.sampling import Bounds
from penstock.rollout.selection import Selection
from penstock.sample import Sample, SamplingParams
from tests.rollout.simulated import Weights, World
from tests.rollout.test_rollouts import check, prompts
from tests.virtual import VirtualLoop, run

PROMPTS = 24
PATIENCE = 3000.0
"""Seconds of virtual time a life may last: far more than it needs."""
MODES = ("keep", "abort", "wait")


class Killed(Exception):
    """The process is no more."""


class Checkpoint(msgspec.Struct, frozen=True):
    """What a trainer saves: its step, and for these tests all it has trained on."""

    step: int = 0
    trained: tuple[int, ...] = ()


class Run:
    """Lives of one trainer with `seed`, until one reaches the end of the prompts."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.folder = folder
        self.lives = 0
        self.saved = self.at_death = Checkpoint()
        self.async_steps = self.dice.randrange(3)
        self.mode = self.dice.choice(MODES)
        self.old_version = 0
        self.dropped: dict[str, int] = {}
        self.counts: Any = None

    @property
    def ledger(self) -> Path:
        return self.folder / f"ledger{self.lives}.db"

    def live(self) -> bool:
        """One life; whether it was the last."""
        try:
            run(self._life)
        except Killed:
            return False
        return True

    async def _life(self, loop: VirtualLoop) -> None:
        world = World(loop, engines=2, slots=6)
        for engine in world.engines:  # it may have outlived the trainer
            engine.version = self.old_version
            engine.label = str(self.old_version)
        lives = self.lives < 5
        async with world.client() as client:
            r = Rollouts(
                client,
                reward=self._reward,
                prompts=prompts(PROMPTS),
                params=SamplingParams(max_tokens=40, temperature=1.0),
                group_size=3,
                batch_groups=3,
                async_steps=self.async_steps,
                ledger=self.ledger,
                step=self.saved.step,
                in_flight=self.mode,  # type: ignore[arg-type]
                selection=Selection(drop_zero_spread=True, spread=0.1, attempts=50),
                bounds=Bounds(turn=60.0, reward=1.0),
            )
            async with r:
                others = [asyncio.ensure_future(self._faults(world))]
                if lives:
                    others.append(asyncio.ensure_future(self._kill(loop, self.dice.uniform(0.01, 2.5))))
                try:
                    await self._until_killed(self._train(r, world), others)
                finally:
                    for one in others:
                        one.cancel()
                    await asyncio.wait(others)

    async def _until_killed(self, work: Coroutine[Any, Any, None], others: list[asyncio.Task[None]]) -> None:
        training = asyncio.ensure_future(work)
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait([training, *others[1:]], return_when=asyncio.FIRST_COMPLETED)
        if not training.done():
            training.cancel()
            await asyncio.wait([training])
            self.saved = self.at_death
            raise Killed
        training.result()

    async def _kill(self, loop: VirtualLoop, after: float) -> None:
        await asyncio.sleep(after)
        before, self.at_death = self.ledger, self.saved
        self.lives += 1
        for end in ("", "-wal"):
            with suppress(FileNotFoundError):
                shutil.copyfile(f"{before}{end}", f"{self.ledger}{end}")

    async def _train(self, r: Rollouts, world: World) -> None:
        trained = list(self.saved.trained)
        if r.version:
            await self._update(r, r.version)
        while batch := await r.batch(timeout=PATIENCE):
            check(batch)
            for group in batch:
                assert group.staleness is not None and 0 <= group.staleness <= self.async_steps
                assert group.newest is not None and group.newest <= r.version, "weights that are no more"
            await asyncio.sleep(self.dice.uniform(0.0, 0.2))
            step = await r.trained(batch)
            trained += [group.position for group in batch]
            if self.dice.random() < 0.6:
                self.saved = Checkpoint(step, tuple(trained))
            await self._update(r, r.version + 1)
        self.saved = Checkpoint(r.step, tuple(trained))
        self.dropped, self.counts = r.dropped(), r.counts()

    async def _update(self, r: Rollouts, version: int) -> None:
        self.old_version = version
        while True:
            try:
                await r.update(Weights(version))
                return
            except ControlFailed:
                await asyncio.sleep(1.0)

    async def _faults(self, world: World) -> None:
        """Engines die and come back with the first weights."""
        while True:
            await asyncio.sleep(self.dice.expovariate(1.5))
            engine = self.dice.choice(world.engines)
            if not engine.down:
                engine.die()
                await asyncio.sleep(self.dice.uniform(0.0, 3.0))
                engine.restart()

    async def _reward(self, prompt: Prompt, sample: Sample) -> float:
        luck = self.dice.random()
        if luck < 0.05:
            raise ValueError("the verifier crashed")
        if luck < 0.1:
            await asyncio.sleep(100.0)
        return len(sample.text) / 40


def one_run(folder: Path, seed: int) -> Run:
    subject = Run(folder, seed)
    while not subject.live():
        assert subject.lives < 10
    times = Counter(subject.saved.trained)
    assert not times or max(times.values()) == 1, f"seed {seed}: trained twice: {times}"
    assert set(subject.dropped) <= {"zero spread"}
    assert subject.counts.trained == len(times) and subject.counts.dropped == PROMPTS - len(times)
    assert not subject.counts.leased and not subject.counts.generated
    return subject


def test_whatever_dies_each_prompt_is_trained_on_once_or_dropped_with_a_reason(tmp_path: Path) -> None:
    runs = []
    for seed in range(6):
        (folder := tmp_path / str(seed)).mkdir()
        runs.append(one_run(folder, seed))
    assert sum(one.lives for one in runs) > 10, "trainers were killed"
    assert sum(len(one.saved.trained) for one in runs) > 100


@pytest.mark.slow
def test_the_same_over_many_seeds(tmp_path: Path) -> None:
    for seed in range(1000, 1100):
        (folder := tmp_path / str(seed)).mkdir()
        one_run(folder, seed)
        shutil.rmtree(folder)
