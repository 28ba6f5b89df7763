"""The balance of generation and training: equations, advice on rates that are set, engines that follow."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.rollout.balance import PATIENCE, Elastic, Measured, Scaler, balance, engines_wanted, enough
from penstock.rollout.rollouts import Rollouts
from penstock.sample import SamplingParams
from tests.rollout.simulated import Weights, World
from tests.rollout.test_rollouts import length, prompts
from tests.virtual import VirtualLoop, run

SLOTS = 8


class Scaled:
    """Engines of which none are made: only the number is kept."""

    def __init__(self, count: int = 1) -> None:
        self.count = count

    async def scale(self, count: int) -> None:
        self.count = count


def measured(**changes: Any) -> Measured:
    fields: dict[str, Any] = {
        "seconds": 100.0,
        "generated": 10_000,
        "trained": 10_000,
        "batches": 10,
        "trainer_waited": 0.0,
        "engines_idle": 0.0,
        "updating": 0.0,
        "async_steps": 1,
        "engines": 4,
    }
    return Measured(**(fields | changes))


def test_the_rates_and_what_they_ask_for() -> None:
    slow = balance(measured(trainer_waited=50.0))
    assert (slow.generation_rate, slow.required_rate, slow.supply) == (100.0, 200.0, 0.5)
    assert slow.bottleneck == "generation" and enough(slow) == 8
    assert "add engines: 8 in place of 4" in slow.advice
    fast = balance(measured(engines_idle=60.0, async_steps=3))
    assert fast.bottleneck == "training" and enough(fast) == 2
    assert "2 engines in place of 4" in fast.advice and "lower async_steps" in fast.advice
    turns = balance(measured(trainer_waited=50.0, engines_idle=50.0, async_steps=0))
    assert turns.bottleneck == "both" and "async_steps=1" in turns.advice
    assert balance(measured()).bottleneck == "none"
    assert "larger batch" in balance(measured(updating=30.0)).advice
    assert "Nothing" in balance(measured(batches=0)).advice


@given(
    seconds=st.floats(0.001, 1e6),
    waited=st.floats(0, 1),
    idle=st.floats(0, 1),
    engines=st.integers(1, 50),
    least=st.integers(1, 5),
    more=st.integers(0, 50),
)
def test_engines_stay_within_their_bounds_and_do_not_swing(
    seconds: float, waited: float, idle: float, engines: int, least: int, more: int
) -> None:
    found = balance(
        measured(
            seconds=seconds, trainer_waited=waited * seconds, engines_idle=idle * seconds, engines=engines
        )
    )
    rule = Elastic(engines=Scaled(), least=least, most=least + more)
    wanted = engines_wanted(found, rule)
    assert rule.least <= wanted <= rule.most
    if rule.least <= engines <= rule.most:
        if found.bottleneck == "generation":
            assert wanted > engines or engines == rule.most
        else:
            assert wanted in (engines, engines - 1)
        if wanted < engines:
            assert found.supply * wanted / engines > 1, "those that stay are still enough"


def test_one_measurement_takes_no_engine_away() -> None:
    scaler = Scaler(Elastic(engines=Scaled(), most=8))
    idle, busy = balance(measured(engines_idle=80.0)), balance(measured(trainer_waited=50.0))
    asked = [scaler.wanted(found) for found in (idle, busy, idle, balance(measured()), *[idle] * PATIENCE)]
    assert asked == [4, 8, 4, 4, *[4] * (PATIENCE - 1), 3]
    too_many = Scaler(Elastic(engines=Scaled(), most=2))
    assert too_many.wanted(idle) == 2, "more than there may be are too many at once"


def test_rules_that_cannot_be_are_refused() -> None:
    for changes in ({"least": 0}, {"least": 3, "most": 2}, {"every": 0.0}):
        with pytest.raises(ConfigError):
            Elastic(engines=Scaled(), **changes).check()


async def trained(r: Rollouts, world: World, seconds: float, steps: int) -> dict[str, float]:
    """A trainer that takes so long a batch; shares of the time, and of the slots as the engines know them."""
    loop = asyncio.get_running_loop()
    await r.trained(await r.batch())
    await r.update(Weights(1, seconds=0.0))
    start, busy, waited = loop.time(), sum(engine.busy for engine in world.engines), 0.0
    for _ in range(steps):
        asked = loop.time()
        batch = await r.batch()
        waited += loop.time() - asked
        await asyncio.sleep(seconds)
        await r.trained(batch)
        await r.update(Weights(r.version + 1, seconds=0.0))
    elapsed = loop.time() - start
    busy = sum(engine.busy for engine in world.engines) - busy
    return {"idle": 1 - busy / (elapsed * SLOTS * len(world.engines)), "waited": waited / elapsed}


def rates(seconds: float, async_steps: int, *, steps: int = 12) -> tuple[dict[str, float], Any]:
    """Generation of a batch takes about 1 s (16 groups of 4, 8 slots, 12.5 tokens of 0.01 s)."""

    async def scenario(loop: VirtualLoop) -> tuple[dict[str, float], Any]:
        world = World(loop, slots=SLOTS, mean=12.5)
        async with (
            world.client(max_in_flight=SLOTS) as client,
            Rollouts(
                client,
                reward=length,
                prompts=prompts(100_000),
                params=SamplingParams(max_tokens=100, temperature=1.0),
                group_size=4,
                batch_groups=16,
                async_steps=async_steps,
            ) as r,
        ):
            shares = await trained(r, world, seconds, steps)
            return shares, r.balance()

    return run(scenario)


@pytest.mark.parametrize("async_steps", [1, 2])
def test_engines_are_hardly_ever_idle_when_generation_is_the_bottleneck(async_steps: int) -> None:
    shares, found = rates(0.25, async_steps)
    assert shares["idle"] < 0.05, shares
    assert found.bottleneck == "generation", found.advice
    assert found.trainer_waits == pytest.approx(shares["waited"], abs=0.05)
    assert found.generation_rate == pytest.approx(SLOTS / 0.01, rel=0.1)
    assert enough(found) in (3, 4, 5), "a trainer of 0.25 s a batch takes four times what one engine gives"


def test_the_advice_names_the_other_side_when_training_is_the_bottleneck() -> None:
    shares, found = rates(4.0, 2)
    assert shares["waited"] < 0.05 and shares["idle"] > 0.5
    assert found.bottleneck == "training", found.advice
    assert found.engines_wait == pytest.approx(shares["idle"], abs=0.08)
    assert max(found.staleness) == 2 and found.ready == 32


def test_in_turns_both_sides_wait() -> None:
    shares, found = rates(1.0, 0)
    assert found.bottleneck == "both" and "async_steps=1" in found.advice
    assert 0.3 < shares["waited"] < 0.7 and 0.3 < shares["idle"] < 0.7
    both, _ = rates(1.0, 1)
    assert both["waited"] < 0.5 * shares["waited"]


def elastic(trainer: list[tuple[float, int]], *, most: int = 6) -> list[int]:
    """The numbers of engines that follow a trainer of so many seconds a batch, for so many batches.

    One engine takes about 1 s for a batch.
    """

    async def scenario(loop: VirtualLoop) -> list[int]:
        world = World(loop, engines=most, slots=SLOTS, mean=2.5, every=0.05)
        counts = []
        client = world.client(engines=1, max_in_flight=SLOTS)

        class Engines:
            count = 1

            async def scale(self, count: int) -> None:
                for number in range(self.count, count):
                    world.engines[number].down = False
                    client.fleet.add(world.urls[number])
                for number in range(count, self.count):
                    await client.fleet.drain(world.urls[number])
                self.count = count
                counts.append(count)

        async with (
            client,
            Rollouts(
                client,
                reward=length,
                prompts=prompts(100_000),
                params=SamplingParams(max_tokens=100, temperature=1.0),
                group_size=4,
                batch_groups=16,
                async_steps=2,
                elastic=Elastic(engines=Engines(), most=most, every=2.5),
            ) as r,
        ):
            for seconds, batches in trainer:
                for _ in range(batches):
                    batch = await r.batch()
                    await asyncio.sleep(seconds)
                    await r.trained(batch)
                    await r.update(Weights(r.version + 1, seconds=0.0))
        return counts

    return run(scenario)


def test_the_number_of_engines_settles() -> None:
    """It is not changed for ever where the trainer's rate stays what it is."""
    counts = elastic([(0.55, 50)])
    assert counts and len(counts) <= 3, counts


def test_engines_are_added_until_the_trainer_is_kept_busy_and_removed_when_they_are_too_many() -> None:
    """Engines join and leave the fleet as the rule says."""
    counts = elastic([(0.25, 64), (4.0, 8)])
    falling = counts[counts.index(max(counts)) :]
    assert max(counts) in (3, 4, 5, 6), counts
    assert len(falling) > 2 and falling == sorted(falling, reverse=True), counts
