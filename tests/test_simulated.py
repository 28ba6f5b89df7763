"""Client, fleet and monitor, unchanged, on virtual time against simulated engines and faults from a seed."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Any

import pytest

from penstock.client import Client, RequestOptions
from penstock.errors import FleetDown, PenstockError
from penstock.fleet.fleet import Fleet, FleetOptions
from penstock.fleet.health import Breaker
from penstock.fleet.limit import POLL
from penstock.fleet.monitor import MIN_WAIT, Monitor
from penstock.fleet.policy import POLICIES
from penstock.fleet.retry import Retry
from penstock.sample import Sample
from tests.virtual import Plan, VirtualLoop, World, run

HELLO = [{"role": "user", "content": "hello"}]
SEEDS = 400
BATCH = 25

Outcome = Sample | PenstockError | None
"""None: cancelled."""


def plan_of(dice: random.Random) -> Plan:
    """An engine of the worse sort."""

    def share() -> float:
        return dice.choice([0.0, 0.0, 0.05, 0.2])

    def spans(longest: float) -> tuple[tuple[float, float], ...]:
        return tuple((dice.uniform(0, 60), dice.uniform(1, longest)) for _ in range(dice.choice([0, 0, 1])))

    return Plan(
        slots=dice.choice([2, 8, 1000]),
        seconds=dice.choice([0.05, 1.0, 10.0]),
        metrics=dice.random() < 0.9,
        refused=share() / 4,
        reset_before=share(),
        reset_after=share(),
        error_500=share(),
        error_503=share() / 2,
        error_429=share(),
        lost=share() / 10,
        outages=spans(40),
        stalls=spans(200),
    )


def simulated(world: World, loop: VirtualLoop, seed: int) -> FleetOptions:
    """What a simulation replaces."""
    dice = random.Random(seed)
    return {"clock": loop.time, "random": dice.random, "transport": world.transport}


class Scenario:
    """Some engines, some requests, and what becomes of them: all from the seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.dice = random.Random(seed)
        self.plans = [plan_of(self.dice) for _ in range(self.dice.randint(1, 5))]
        self.limit = self.dice.choice([None, 1, 4, 16])
        self.adaptive = self.dice.random() < 0.3
        self.retry = Retry(attempts=self.dice.choice([3, 8]), outage=self.dice.choice([10.0, 300.0]))
        self.policy = self.dice.choice(sorted(POLICIES))
        self.count = self.dice.randint(20, 60)
        self.outcomes: list[Outcome] = []
        self.log: list[tuple[Any, ...]] = []
        self.ended = 0.0

    async def main(self, loop: VirtualLoop) -> None:
        world = World(loop, self.seed, self.plans)
        # An engine without metrics that loses requests needs a bound on the wait for the first byte.
        bounded = any(plan.lost or plan.stalls for plan in self.plans)
        options: FleetOptions = {
            "max_in_flight": self.limit,
            "adaptive": self.adaptive,
            "retry": self.retry,
            "policy": self.policy,
            "breaker": Breaker(failure_threshold=3, timeout=2.0),
            **simulated(world, loop, self.seed),
        }
        async with Client(world.urls, **options) as client:
            tasks = [
                loop.create_task(self.request(client, number, bounded=bounded))
                for number in range(self.count)
            ]
            self.outcomes = list(await asyncio.gather(*tasks))
            statistics = client.statistics()
            assert set(statistics.in_flight.values()) == {0}, statistics
            assert statistics.waiting == 0 and client.fleet.dispatch.in_flight == 0
        world.stop()
        self.ended, self.log = loop.time(), world.log
        self.generated = sum((engine.generated for engine in world.engines), Counter[str]())
        self.most = max(engine.most_in_flight for engine in world.engines)

    async def change(self, fleet: Fleet, urls: list[str]) -> None:
        """Endpoints drain, leave, and join again."""
        dice = random.Random(f"{self.seed} changes")
        for _ in range(dice.choice([0, 0, 1, 4])):
            url = dice.choice(urls)
            await asyncio.sleep(dice.uniform(0, 20))
            if dice.random() < 0.5:
                await fleet.remove(url)
            else:
                await fleet.drain(url, timeout=dice.choice([0.5, 5.0]))
            await asyncio.sleep(dice.choice([0.0, 5.0]))
            fleet.add(url)

    async def request(self, client: Client, number: int, *, bounded: bool) -> Outcome:
        dice = random.Random(f"{self.seed} {number}")
        await asyncio.sleep(dice.choice([0.0, dice.uniform(0, 30)]))
        options: RequestOptions = {"request_id": f"r{number}", "priority": dice.choice([0, 0, 1])}
        if dice.random() < 0.3:
            options["session_id"] = f"s{dice.randrange(5)}"
        if bounded or dice.random() < 0.1:
            options["timeout"] = dice.choice([1.0, 30.0, 2000.0])
        task = asyncio.ensure_future(client.chat(HELLO, **options))
        if dice.random() < 0.1:
            asyncio.get_running_loop().call_later(dice.uniform(0, 20), task.cancel)
        try:
            return await task
        except PenstockError as error:
            return error
        except asyncio.CancelledError:
            return None

    def check(self) -> None:
        assert len(self.outcomes) == self.count
        per_request = Counter(id.partition("-")[0] for id in self.generated.elements())
        assert max(self.generated.values(), default=0) <= 1, "one attempt was generated twice"
        for number, outcome in enumerate(self.outcomes):
            made = per_request[f"r{number}"]
            assert made <= self.retry.attempts
            if isinstance(outcome, Sample):
                assert outcome.text == "hello" and 1 <= made <= outcome.attempts
        if self.limit is not None:
            assert self.most <= self.limit


def ran(seed: int) -> Scenario:
    scenario = Scenario(seed)
    run(scenario.main)
    scenario.check()
    return scenario


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_every_request_ends_once_whatever_happens(first: int) -> None:
    kinds: Counter[str] = Counter()
    for seed in range(first, first + BATCH):
        try:
            kinds.update(type(outcome).__name__ for outcome in ran(seed).outcomes)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert kinds["Sample"] > 0.5 * kinds.total(), kinds


@pytest.mark.parametrize("seed", [3, 17, 40, 81])
def test_the_same_seed_gives_the_same_trace(seed: int) -> None:
    one, two = ran(seed), ran(seed)
    assert one.log == two.log and len(one.log) > 20
    assert one.ended == two.ended
    shown = [[repr(outcome) for outcome in scenario.outcomes] for scenario in (one, two)]
    assert shown[0] == shown[1]
    assert ran(seed + 1).log != one.log


def test_a_fleet_without_members_gives_up_in_time_though_time_begins_at_zero() -> None:
    async def main(loop: VirtualLoop) -> None:
        world = World(loop, 1, [])
        fleet = Fleet(retry=Retry(outage=30.0), **simulated(world, loop, 1))
        async with Client(fleet) as client:
            with pytest.raises(FleetDown, match="waited 30 s for an endpoint to join"):
                await client.chat(HELLO, timeout=100.0)
            assert 29.9 < loop.time() < 31.0

    run(main)


def test_a_thousand_failures_do_not_make_the_monitor_look_a_thousand_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[float] = []
    look = Monitor._look

    def counted(self: Monitor, endpoint: Any, now: float, start: Any) -> float:
        looks.append(now)
        return look(self, endpoint, now, start)

    monkeypatch.setattr(Monitor, "_look", counted)

    async def main(loop: VirtualLoop) -> None:
        world = World(loop, 1, [Plan(seconds=0.5, reset_after=1.0, metrics=False)])
        options: FleetOptions = {
            "retry": Retry(attempts=1),
            "breaker": Breaker(failure_threshold=10_000),
            **simulated(world, loop, 1),
        }
        async with Client(world.urls, **options) as client:
            await asyncio.gather(*[client.chat(HELLO) for _ in range(1000)], return_exceptions=True)
        assert len(set(looks)) == len(looks) <= loop.time() / MIN_WAIT + 2
        assert len(looks) > 0.3 / POLL

    run(main)


# -- many -------------------------------------------------------------------------------------------


async def many(loop: VirtualLoop, engines: int, requests: int) -> tuple[int, float]:
    """All requests at once on as many slots; how many were in flight, and seconds of the virtual day."""
    plan = Plan(seconds=1800.0, spread=0.3, reset_before=0.02, metrics=False, outages=((600.0, 60.0),))
    calm = Plan(seconds=1800.0, spread=0.3, reset_before=0.02, metrics=False)
    world = World(loop, 1, [plan if number % 20 == 0 else calm for number in range(engines)])
    options: FleetOptions = {
        "max_in_flight": requests // engines,
        "retry": Retry(base=0.01),
        **simulated(world, loop, 1),
    }
    async with Client(world.urls, **options) as client:
        tasks = [loop.create_task(client.chat(HELLO, request_id=f"r{n}")) for n in range(2 * requests)]
        await asyncio.sleep(60.0)
        in_flight = client.fleet.dispatch.in_flight
        samples = await asyncio.gather(*tasks)
        assert len(samples) == 2 * requests and client.fleet.dispatch.in_flight == 0
        assert max(engine.most_in_flight for engine in world.engines) <= requests // engines
    world.stop()
    return in_flight, loop.time()


def timed(engines: int, requests: int) -> tuple[float, int, float]:
    """Seconds of CPU, requests in flight, virtual seconds."""
    started = time.process_time()
    in_flight, ended = run(lambda loop: many(loop, engines, requests))
    return time.process_time() - started, in_flight, ended


@pytest.mark.slow
def test_twice_the_requests_take_twice_the_time() -> None:
    half, few, _ = timed(50, 1000)
    whole, many_, _ = timed(50, 2000)
    assert (few, many_) == (1000, 2000)
    assert whole < 2.5 * half + 0.3, f"{half:.2f} s, then {whole:.2f} s"


@pytest.mark.slow
def test_twenty_thousand_in_flight_on_two_hundred_engines_for_an_hour() -> None:
    half, _, _ = timed(200, 10_000)
    whole, in_flight, ended = timed(200, 20_000)
    assert in_flight == 20_000 and ended > 3600
    assert whole < 2.5 * half, f"{half:.2f} s, then {whole:.2f} s"
    print(f"\n20,000 in flight: {whole:.1f} s for {ended:.0f} s; 10,000: {half:.1f} s")  # noqa: T201


# -- an adaptive limit ------------------------------------------------------------------------------


def test_an_adaptive_limit_settles_at_the_knee_and_follows_it() -> None:
    async def main(loop: VirtualLoop) -> None:
        world = World(loop, 1, [Plan(slots=100, seconds=0.6, spread=0.3, tokens=30)])
        (engine,) = world.engines
        options: FleetOptions = {"adaptive": True, "max_in_flight": 1000, **simulated(world, loop, 1)}
        async with Client(world.urls, **options) as client:

            async def busy() -> None:
                while True:
                    await client.chat(HELLO)

            tasks = [loop.create_task(busy()) for _ in range(1200)]

            async def mean(seconds: float) -> float:
                looks = []
                for _ in range(int(seconds / 0.1)):
                    await asyncio.sleep(0.1)
                    looks.append(engine.in_flight)
                return sum(looks) / len(looks)

            means = []
            for slots in (100, 50, 100):
                engine.resize(slots)
                await asyncio.sleep(15.0)
                means.append(await mean(10.0))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        world.stop()
        full, halved, again = means
        assert 95 <= full <= 110 and 47 <= halved <= 55 and 90 <= again <= 110, means

    run(main)
