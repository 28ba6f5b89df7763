"""Two replicas of each engine, one of them killed under load: no request is lost, and it comes back."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

import pytest

from penstock.sample import SamplingParams
from penstock.servers.launched import LifeCycle
from penstock.servers.replicas import launch
from penstock.servers.restart import Restart
from tests.engines.engines import START_LIMIT, Engine
from tests.servers.fakes import TAG, nothing_left, processes

pytestmark = pytest.mark.engines

REQUESTS = 64


def test_a_replica_that_is_killed_costs_no_request_and_comes_back(engine: Engine, life: LifeCycle) -> None:
    async def scenario(tag: str) -> None:
        spec = engine.make().spec
        spec = replace(spec, env={**spec.env, TAG: tag})
        async with (
            asyncio.timeout(3 * START_LIMIT),
            launch(spec, replicas=2, devices=(), restart=Restart(base=0.1), life=life) as launched,
            launched.client() as client,
        ):
            first = launched.replicas[0].server
            assert first is not None and first.pid is not None
            params = SamplingParams(max_tokens=200)
            asked = [asyncio.create_task(client.complete("7 + 5 =", params)) for _ in range(REQUESTS)]
            await asyncio.sleep(0.3)
            os.kill(first.pid, signal.SIGKILL)
            async with asyncio.timeout(1.0):  # before its children are gone, let alone before it is back
                await first.ended.wait()
            samples = await asyncio.gather(*asked)
            assert all(sample.usage.completion_tokens for sample in samples)
            assert launched.replicas[0].url is None
            while launched.count < 2:  # noqa: ASYNC110 - bounded above
                await asyncio.sleep(0.1)
            assert launched.replicas[0].restarts.total == 1
            assert {str(end.address) for end in launched.fleet.endpoints} == set(launched.urls)
        assert processes(tag) == []

    with nothing_left() as tag:
        asyncio.run(scenario(tag))
