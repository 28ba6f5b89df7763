"""The adaptive limit against simulated engines, in virtual time.

Each is compared with the best of a sweep of fixed limits on the same engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.fleet.limit import OVERLOAD_BURST, PATIENCE, POLL, START, AdaptiveLimit
from penstock.fleet.load import EngineLoad
from tests.fleet.simulated import Client, Settings, Simulation, knee, smooth

CEILING = 1024
LEVELS = (8, 16, 64, 100, 128, 200, 256, 300, 512, 700, 1024)

ENGINES: dict[str, Settings] = {
    "slots": Settings(slots=64, step=smooth(0.02, 0.0001)),
    "few slots": Settings(slots=8, step=smooth(0.02, 0.0001)),
    "lognormal": Settings(slots=256, step=smooth(0.01, 0.00005), tokens=60, spread=0.8, noise=0.1),
    "short answers": Settings(slots=256, step=smooth(0.02, 0.00005), tokens=12),
    "slow front end": Settings(slots=512, step=smooth(0.01, 0.00002), tokens=60, front=0.1, spread=0.5),
    "KV cache": Settings(slots=256, step=smooth(0.01, 0.00005), tokens=80, spread=0.6, kv=6000),
    "shared beyond a knee": Settings(step=knee(100, 0.02)),
    "worse beyond a knee": Settings(step=knee(100, 0.02, 1.4), spread=0.5),
    "worse beyond 300": Settings(step=knee(300, 0.02, 1.4), spread=0.5, noise=0.1),
    "saturates smoothly": Settings(step=smooth(0.02, 0.0001)),
    "seldom gauges": Settings(slots=128, step=smooth(0.02, 0.0001), tokens=60, spread=0.6, stale=40),
}


@cache
def best(engine: str, change: str | None = None) -> float:
    """The throughput of the best fixed limit."""
    settings = replace(ENGINES[engine] if change is None else CHANGING[change][0])
    if change is not None:
        CHANGING[change][1](settings)
    runs = (Simulation(replace(settings), [Client(level)]).run(11.0) for level in LEVELS)
    return max(run.throughput(5.0, 11.0) for run in runs)


def adaptive(settings: Settings, seed: int, until: float, ceiling: int = CEILING) -> Simulation:
    return Simulation(replace(settings), [Client(AdaptiveLimit(ceiling))], seed).run(until)


@pytest.mark.parametrize("engine", ENGINES)
def test_by_metrics(engine: str) -> None:
    """From 15 s on, within 10 % of the best fixed limit, and the queue under 10 % of the running requests."""
    for seed in range(3):
        run = adaptive(ENGINES[engine], seed, 40.0)
        assert run.throughput(15.0, 40.0) >= 0.9 * best(engine), seed
        assert run.queue_share(15.0, 40.0) < 0.1, seed


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_by_metrics_over_many_seeds(engine: str) -> None:
    for seed in range(100, 140):
        run = adaptive(ENGINES[engine], seed, 40.0)
        assert run.throughput(15.0, 40.0) >= 0.9 * best(engine), seed
        assert run.queue_share(15.0, 40.0) < 0.1, seed


@pytest.mark.parametrize("engine", ENGINES)
def test_by_gradient(engine: str) -> None:
    """The same throughput without metrics. A queue left by the first growth takes longer to find."""
    for seed in range(3):
        settings = replace(ENGINES[engine], metrics=False)
        run = adaptive(settings, seed, 60.0)
        assert run.throughput(15.0, 60.0) >= 0.9 * best(engine), seed
        assert run.queue_share(40.0, 60.0) < 0.6, seed


@pytest.mark.parametrize("engine", ["slots", "lognormal", "worse beyond a knee"])
def test_by_gradient_without_usage(engine: str) -> None:
    for seed in range(3):
        run = adaptive(replace(ENGINES[engine], metrics=False, usage=False), seed, 60.0)
        assert run.throughput(20.0, 60.0) >= 0.85 * best(engine), seed


@pytest.mark.parametrize("engine", ["lognormal", "worse beyond a knee"])
def test_by_gradient_without_the_times_of_requests(engine: str) -> None:
    for seed in range(3):
        run = adaptive(replace(ENGINES[engine], metrics=False, timed=False), seed, 60.0)
        assert run.throughput(20.0, 60.0) >= 0.8 * best(engine), seed


Change = Callable[[Settings], None]


def slots(number: int) -> Change:
    return lambda settings: setattr(settings, "slots", number)


def step(seconds: Callable[[int], float]) -> Change:
    return lambda settings: setattr(settings, "step", seconds)


def tokens(number: float) -> Change:
    return lambda settings: setattr(settings, "tokens", number)


NORMAL = smooth(0.02, 0.0001)
WORK = Settings(slots=128, step=NORMAL, spread=0.5, noise=0.05)
OPEN = replace(WORK, slots=10**9)
CHANGING: dict[str, tuple[Settings, Change]] = {
    "half the slots": (replace(WORK, slots=256), slots(128)),
    "twice the slots": (WORK, slots(256)),
    "half the speed": (WORK, step(smooth(0.04, 0.0002))),
    "twice the speed": (WORK, step(smooth(0.01, 0.00005))),
    "half the knee": (replace(OPEN, step=knee(200, 0.02, 1.4)), step(knee(100, 0.02, 1.4))),
    "twice the knee": (replace(OPEN, step=knee(100, 0.02, 1.4)), step(knee(200, 0.02, 1.4))),
    "longer answers": (WORK, tokens(90)),
    "shorter answers": (WORK, tokens(12)),
}


@pytest.mark.parametrize("change", CHANGING)
@pytest.mark.parametrize(("metrics", "within"), [(True, 15.0), (False, 30.0)], ids=["metrics", "gradient"])
def test_follows_a_change(change: str, metrics: bool, within: float) -> None:
    settings, apply = CHANGING[change]
    for seed in range(3):
        run = Simulation(
            replace(settings, metrics=metrics),
            [Client(AdaptiveLimit(CEILING))],
            seed,
            changes=[(30.0, apply)],
        ).run(90.0)
        settled = 30.0 + within
        assert run.throughput(settled, 90.0) >= 0.9 * best("", change), seed
        if metrics:
            assert run.queue_share(settled, 90.0) < 0.1, seed


def test_two_clients_share_an_engine() -> None:
    """Their sum settles; the one that comes later is not starved."""
    settings = Settings(slots=256, step=NORMAL, spread=0.5)
    for seed in range(3):
        clients = [Client(AdaptiveLimit(CEILING)), Client(AdaptiveLimit(CEILING), starts=20.0)]
        run = Simulation(replace(settings), clients, seed).run(100.0)
        looks = run.between(40.0, 100.0)
        assert run.throughput(40.0, 100.0) >= 0.9 * run.throughput(10.0, 20.0), seed
        assert run.queue_share(40.0, 100.0) < 0.1, seed
        assert mean(sum(look.limits) for look in looks) < 256 * 1.15
        assert mean(look.limits[1] for look in looks) > 16, seed


def test_the_ceiling_holds() -> None:
    run = adaptive(ENGINES["saturates smoothly"], 0, 20.0, ceiling=50)
    assert {look.limits[0] for look in run.trace} <= set(range(1, 51))
    assert run.trace[-1].limits[0] >= 45


@pytest.mark.parametrize("metrics", [True, False])
def test_little_work_does_not_move_it(metrics: bool) -> None:
    """While the limit does not bind, throughput says nothing of it."""
    settings = replace(WORK, metrics=metrics)
    client = Client(AdaptiveLimit(CEILING), idle=(30.0, 60.0))
    run = Simulation(settings, [client]).run(80.0)
    idle = {look.limits[0] for look in run.between(35.0, 60.0)}
    assert len(idle) == 1
    assert run.throughput(65.0, 80.0) >= 0.9 * run.throughput(20.0, 30.0)


@pytest.mark.parametrize("metrics", [True, False])
def test_a_minute_of_silence(metrics: bool) -> None:
    run = Simulation(
        replace(WORK, metrics=metrics), [Client(AdaptiveLimit(CEILING))], silent=(30.0, 90.0)
    ).run(140.0)
    assert run.throughput(115.0, 140.0) >= 0.9 * run.throughput(20.0, 30.0)
    assert all(look.limits[0] >= 64 for look in run.between(30.0, 90.0))


def test_lost_looks_do_not_matter() -> None:
    settings = ENGINES["slots"]
    run = Simulation(replace(settings), [Client(AdaptiveLimit(CEILING))], lost_polls=0.3).run(40.0)
    assert run.throughput(15.0, 40.0) >= 0.9 * best("slots")
    assert run.queue_share(15.0, 40.0) < 0.1


@pytest.mark.parametrize("metrics", [True, False])
def test_refusals_bound_it(metrics: bool) -> None:
    """An engine that answers 429 above 100 requests is kept near them."""
    run = Simulation(
        replace(OPEN, step=NORMAL, metrics=metrics), [Client(AdaptiveLimit(CEILING))], refuse_above=100
    ).run(60.0)
    limits = [look.limits[0] for look in run.between(15.0, 60.0)]
    assert 50 <= mean(limits) <= 120
    assert max(limits) <= 256


# -- the state machine by itself ------------------------------------------------------------------


def load(running: float, waiting: float, tokens: float = 0.0) -> EngineLoad:
    return EngineLoad(running=running, waiting=waiting, generation_tokens=tokens)


def test_refusals_of_one_burst_count_once() -> None:
    limit = AdaptiveLimit(1000, start=100)
    for _ in range(50):
        limit.overloaded(10.0)
    assert limit.current == 75
    limit.overloaded(10.0 + OVERLOAD_BURST)
    assert limit.current == 56


def test_it_never_falls_below_one() -> None:
    limit = AdaptiveLimit(10, start=2)
    for second in range(0, 100, 10):
        limit.overloaded(float(second))
    assert limit.current == 1


def test_a_failed_look_changes_nothing_and_many_give_up_the_metrics() -> None:
    limit = AdaptiveLimit(1000)
    limit.tick(0.0, START, True, load(START, 0))
    mode = repr(limit).split(" by ")[1]
    assert PATIENCE > 5
    for look in range(1, PATIENCE):
        limit.tick(look * POLL, START, True, None)
        assert limit.current == START
        assert repr(limit).split(" by ")[1] == mode
    limit.tick(PATIENCE * POLL, START, True, None)
    assert "gradient" in repr(limit)


def test_a_standing_queue_is_cut_in_one_go_to_our_share() -> None:
    limit = AdaptiveLimit(1000, start=400)
    for look in range(8):  # 400 of ours among 800, 200 of which run
        limit.tick(look * POLL, 400, True, load(200, 600))
    assert 90 <= limit.current <= 130


def test_one_look_at_a_queue_is_none() -> None:
    limit = AdaptiveLimit(1000, start=200)
    for look in range(20):
        waiting = 60.0 if look % 4 == 0 else 0.0
        limit.tick(look * POLL, 200, False, load(200 - waiting, waiting))
    assert limit.current == 200


def test_a_full_kv_cache_stops_growth() -> None:
    limit = AdaptiveLimit(1000)
    for look in range(40):
        full = EngineLoad(running=32, waiting=0, kv_usage=0.99, generation_tokens=look * 1000.0)
        limit.tick(look * POLL, START, True, full)
    assert limit.current <= START


def test_without_load_or_answers_it_stays() -> None:
    limit = AdaptiveLimit(1000)
    for look in range(200):
        limit.tick(look * POLL, START, True, None)
    assert limit.current == START


@pytest.mark.parametrize(("ceiling", "start"), [(0, 1), (1, 0)])
def test_a_limit_is_at_least_one(ceiling: int, start: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        AdaptiveLimit(ceiling, start=start)


numbers = st.floats(0.0, 1e6)
loads = st.none() | st.builds(
    EngineLoad,
    running=numbers,
    waiting=numbers,
    kv_usage=st.none() | st.floats(0.0, 1.0),
    preemptions=st.none() | numbers,
    generation_tokens=st.none() | numbers,
)


@settings(max_examples=60)
@given(
    st.integers(1, 2000),
    st.lists(
        st.tuples(
            st.floats(0.0, 3.0), st.integers(0, 3000), st.booleans(), loads, st.integers(0, 40), st.booleans()
        ),
        max_size=60,
    ),
)
def test_whatever_happens_it_stays_within_its_bounds(
    ceiling: int, looks: list[tuple[float, int, bool, EngineLoad | None, int, bool]]
) -> None:
    limit = AdaptiveLimit(ceiling)
    now = 0.0
    for elapsed, in_flight, saturated, seen, answers, refused in looks:
        now += elapsed
        for answer in range(answers):
            limit.finished(answer % 7, elapsed)
        if refused:
            limit.overloaded(now)
        limit.tick(now, in_flight, saturated, seen)
        assert 1 <= limit.current <= ceiling
