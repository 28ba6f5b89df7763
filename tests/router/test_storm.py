"""Thousands of clients at once, one in ten vanishing, an engine killed and started again: nothing is lost.

Everything is a process of its own: the router (once two), four engines, and this client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import ExitStack

import pytest

from tests.router.storm import Crowd, Engine, RouterProcess, held, settled, within
from tests.scripted import run

ENGINES = 4
VANISHING = 10
"""One in so many goes away."""
PROMPT = 1.0
"""Seconds within which a client that went away has freed its slots."""
HEALTH = ("--health-check-interval-secs", "0.5")

logger = logging.getLogger(__name__)

Storm = Callable[[RouterProcess, list[Engine], Crowd], Coroutine[None, None, None]]


def under(storm: Storm, interval: float, *flags: str) -> None:
    """Runs it with a router before four engines that say something every `interval` seconds."""
    with ExitStack() as stack:
        engines = [stack.enter_context(Engine(interval)) for _ in range(ENGINES)]
        router = stack.enter_context(RouterProcess(engines, *HEALTH, *flags))
        run(storm(router, engines, Crowd(router.port)), bound=55.0)


async def vanish(crowd: Crowd) -> int:
    """One in ten goes away, half of them by RST; how many did."""
    chosen = crowd.live[::VANISHING]
    for index, asker in enumerate(chosen):
        asker.vanish(reset=bool(index % 2))
    await asyncio.sleep(0)
    return sum(asker.vanished for asker in chosen)


async def came_back(engine: Engine, crowd: Crowd, tokens: int, fields: bytes, *, stream: bool) -> None:
    """The engine that was started again gets requests again."""
    async with asyncio.timeout(10):
        while not (await engine.counts())["requests"]:
            await crowd.ask(8, tokens, stream=stream, fields=fields)
            await asyncio.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "resumed"), [(5000, False), (1200, True)])
def test_no_stream_ends_silently_short_and_counts_are_exact(count: int, resumed: bool) -> None:
    interval, tokens = (0.25 if resumed else 0.5), 20
    fields = b"X-Penstock-Resume: 1\r\n" if resumed else b""

    async def storm(router: RouterProcess, engines: list[Engine], crowd: Crowd) -> None:
        await crowd.ask(count, tokens, stream=True, fields=fields)
        await within(20.0, lambda: all(asker.begun for asker in crowd.all), lambda: "not all have begun")
        assert len(crowd.live) == count, "they are not all at once"
        await settled(router, engines, crowd, PROMPT)
        gone = await vanish(crowd)
        await settled(router, engines, crowd, PROMPT)
        victim = engines[1]
        cut = (await victim.counts())["open"]
        assert cut > count // ENGINES // 2
        victim.kill()
        late = await crowd.ask(count // 20, 4, stream=True, fields=fields)
        victim.start()
        await came_back(victim, crowd, 4, fields, stream=True)
        await crowd.ended(40.0)
        memory = router.peak_memory
        outcomes = crowd.outcomes()
        logger.info("%s; the router takes %d MB at most", dict(outcomes), memory >> 20)
        broken = 0 if resumed else cut
        whole = len(crowd.all) - gone - broken
        assert outcomes == {"whole": whole, "vanished": gone} | ({"broken": broken} if broken else {})
        assert {asker.outcome for asker in late} == {"whole"}
        await settled(router, engines, crowd, PROMPT)
        metrics = await router.metrics()
        assert metrics["penstock_router_requests_total"] == len(crowd.all)
        assert metrics["penstock_router_client_gone_total"] == gone
        assert metrics["penstock_router_broken_total"] == broken
        assert metrics["penstock_router_resumed_total"] == (cut if resumed else 0)
        for gauge in ("worker_in_flight", "slots_taken", "queue_depth"):
            assert metrics[f"penstock_router_{gauge}"] == 0
        assert memory < 220 << 20

    under(storm, interval)


@pytest.mark.slow
def test_each_request_is_answered_once() -> None:
    count, tokens = 2000, 8

    async def storm(router: RouterProcess, engines: list[Engine], crowd: Crowd) -> None:
        await crowd.ask(count, tokens, stream=False)
        await settled(router, engines, crowd, 10.0)
        assert await held(engines) == count
        gone = await vanish(crowd)
        await settled(router, engines, crowd, PROMPT)
        engines[2].kill()
        await asyncio.sleep(0.2)
        late = await crowd.ask(count // 10, tokens, stream=False)
        engines[2].start()
        await came_back(engines[2], crowd, tokens, b"", stream=False)
        await crowd.ended(40.0)
        outcomes = crowd.outcomes()
        logger.info("%s", dict(outcomes))
        assert outcomes["vanished"] == gone == count // VANISHING
        assert outcomes["whole"] + outcomes["refused"] == len(crowd.all) - gone
        assert outcomes["refused"] == 0
        assert {asker.outcome for asker in late} == {"whole"}
        await settled(router, engines, crowd, PROMPT)
        metrics = await router.metrics()
        assert metrics["penstock_router_client_gone_total"] == gone
        assert metrics["penstock_router_slots_taken"] == 0

    under(storm, 2.0, "--processes", "2")
