"""What parts use is what they used."""

from __future__ import annotations

import asyncio
import os
import time
from time import monotonic

import pytest

from penstock.loadtest.sending import resident
from penstock.loadtest.stand import StandSpec, own_spec
from penstock.loadtest.watching import Watch, usage
from penstock.scripted.chaos import Chaos, Kill
from penstock.servers.spec import ServerSpec
from tests.scripted import ScriptedEngine, answer, aside, run

SPUN = 0.25
"""Seconds of CPU."""


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_cpu_and_memory_of_processes() -> None:
    cpu, rss = usage([os.getpid(), 2**22 + 1])  # one that there is, and one that there is not
    assert cpu == pytest.approx(time.process_time(), abs=0.1)
    assert rss == pytest.approx(resident(), rel=0.1)
    assert usage([os.getpid()] * 2)[1] == pytest.approx(2 * rss, rel=0.1)
    assert usage([]) == (0.0, 0)


def test_a_part_is_watched_from_begin_to_end_and_the_routers_lag_is_asked() -> None:
    async def scenario() -> tuple[tuple[float, float, int] | None, float | None]:
        side = aside() | {"/liveness": answer(delay=0.05)}
        async with ScriptedEngine(side=side) as router:
            begin = monotonic()
            async with Watch({"engine": [os.getpid()]}, router.url) as watch:
                await asyncio.sleep(0.15)
                await asyncio.to_thread(spin, SPUN)
                await asyncio.sleep(0.15)
            end = monotonic()
            assert watch.used("engine", end, end + 1) is None
            assert watch.used("router", begin, end) is None
            return watch.used("engine", begin, end), watch.lag(begin, end)

    used, lag = run(scenario())
    assert used is not None and lag is not None
    assert used[0] == pytest.approx(SPUN, abs=0.15)
    assert 0.3 < used[1] < 60.0
    assert used[2] == pytest.approx(resident(), rel=0.2)
    assert 0.045 < lag < 30.0


def test_engines_with_chaos_are_killed_one_at_a_time() -> None:
    server = ServerSpec(engine="scripted", model="scripted", extra_args={"itl": "1ms"})

    def chaos(spec: str, engines: int = 2) -> list[str]:
        stand = StandSpec(spec=server, engines=engines, chaos=spec)
        return [str(own_spec(stand, server, number).extra_args.get("chaos")) for number in range(engines)]

    assert chaos("503:0.1,kill:every=20s:down=2s") == [
        "503:0.1,kill:every=20s:down=2s:first=10s",
        "503:0.1,kill:every=20s:down=2s:first=20s",
    ]
    assert chaos("kill:every=20s:first=3s") == ["kill:every=20s:first=3s"] * 2
    assert chaos("kill:every=20s", engines=1) == ["kill:every=20s"]
    assert chaos("") == ["None"] * 2
    assert Chaos.parse("kill:every=20s:first=3s").kill == Kill(every=20.0, first=3.0)
