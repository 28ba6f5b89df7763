"""Faults that are planted in one layer are found and laid at that layer, and a healthy stack has none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from penstock.loadtest.bench import Bench, Result, measure
from penstock.loadtest.findings import Finding, findings
from penstock.loadtest.metrics import Point
from penstock.loadtest.plan import Extent, Load
from penstock.loadtest.stand import StandSpec, standing
from penstock.loadtest.tables import headlines
from penstock.loadtest.workload import Item, Workload
from tests.loadtest.faulty_router import FaultyRouter
from tests.scripted import run
from tests.scripted_engine.serving import engine

TOKENS = 8
WORKLOAD = Workload([Item(({"role": "user", "content": f"hello {n}"},), TOKENS) for n in range(9)])


def measured(
    layers: Sequence[str],
    concurrency: int,
    *,
    itl: str = "20ms",
    count: int | None = None,
    duration: float | None = None,
    drain: float = 3.0,
    router: dict[str, int] | None = None,
    max_in_flight: int | None = None,
    **flags: Any,
) -> list[Point]:
    """The layers of a scripted engine with these flags, behind a router with these faults."""

    async def scenario() -> list[Point]:
        async with engine(itl=itl, max_num_seqs=1000, **flags) as one:
            async with FaultyRouter(one.url, **(router or {})) as faulty:
                bench = Bench(
                    workload=WORKLOAD,
                    loads=[Load(concurrency=concurrency)],
                    extent=Extent(count=count, duration=duration, drain=drain),
                    layers=layers,
                    processes=1,
                    max_in_flight=max_in_flight,
                )
                async with standing(StandSpec(urls=[one.url], router=True, router_url=faulty.url)) as stand:
                    points = await measure(bench, stand)
            await asyncio.sleep(0.05)
            return points

    return run(scenario())


def faults(points: Sequence[Point]) -> list[Finding]:
    """What was found but for the cost of a layer, of which a busy machine has much."""
    return [finding for finding in findings(points) if "fewer requests/s" not in finding.what]


def test_a_healthy_stack_has_no_fault() -> None:
    points = measured(("engine", "router", "client"), 10, count=60)
    assert faults(points) == []
    last = headlines(Result(points=points))[-1]
    assert last == "none of 180 generations was lost, duplicated or orphaned"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("loses", "generations lost"),
        ("repeats", "generations done more than once"),
        pytest.param("doubles", "answers nobody had asked for", marks=pytest.mark.slow),
    ],
)
def test_a_router_that_loses_or_doubles_is_named(fault: str, words: str) -> None:
    points = measured(("engine", "router"), 10, count=60, router={fault: 15})
    (finding, *others) = faults(points)
    assert finding.part == "router" and words in finding.what and "10 in flight" in finding.what
    assert not [other for other in others if other.part != "router"]
    found = next(point for point in points if point.layer == "router")
    assert found.account is not None
    assert (found.account.lost, found.account.duplicated) == (
        4 * (fault == "loses"),
        4 * (fault == "repeats"),
    )
    # The connection may be closed before the last one comes.
    assert found.strays in ((3, 4) if fault == "doubles" else (0,))


@pytest.mark.slow
def test_a_router_that_leaks_slots_is_named() -> None:
    points = measured(("engine", "router"), 40, duration=2.2, drain=0.5, router={"pool": 40, "leaks": 8})
    found = faults(points)
    assert {finding.part for finding in found} == {"router"}
    assert any("slots leak" in finding.what for finding in found)
    router = points[1].account
    assert router is not None and router.unanswered["unseen"] >= 10, "no engine has heard of them"


@pytest.mark.slow
def test_a_router_with_a_pool_is_named() -> None:
    points = measured(("engine", "router"), 250, itl="100ms", duration=2.2, router={"pool": 100})
    (finding,) = [finding for finding in faults(points) if finding.part == "router"]
    assert "no more than 100 requests reach the engines" in finding.what
    assert [point.failed for point in points] == [0, 0]


@pytest.mark.slow
def test_a_client_with_a_pool_is_named() -> None:
    points = measured(("router", "client"), 250, itl="100ms", duration=2.2, max_in_flight=100)
    (finding,) = [finding for finding in faults(points) if finding.part == "client"]
    assert "no more than 100 requests reach the engines" in finding.what


def test_an_engine_that_drops_streams_is_named_at_every_layer_above_only_once() -> None:
    points = measured(("engine", "router"), 10, count=60, chaos="half:0.2")
    assert all(point.failed > 3 for point in points)
    (finding,) = [finding for finding in faults(points) if "failed" in finding.what]
    assert finding.part == "engine, on purpose"
    assert all(set(point.account.unanswered) == {"half"} for point in points if point.account is not None)
