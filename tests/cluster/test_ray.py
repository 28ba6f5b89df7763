"""Engines and rollouts on a real Ray of three nodes, with the embedded engine: what dies is replaced, what
was asked is answered, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import uvloop
from safetensors.torch import load_file

from penstock.client import Client
from penstock.cluster.engines import Engines
from penstock.cluster.follow import find
from penstock.cluster.rollouts import RayRollouts
from penstock.cluster.session import NAMESPACE
from penstock.demo.arithmetic import problems
from penstock.errors import ConfigError
from penstock.fleet.fleet import Fleet
from penstock.models import ARITHMETIC
from penstock.prompt import Prompt
from penstock.sample import Sample, SamplingParams
from penstock.servers.spec import ServerSpec
from tests.cluster.ray_cluster import (
    add_node,
    children,
    here,
    kill_node,
    local_cluster,
    placement_groups,
    until_gone,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

T = TypeVar("T")

BOUND = 240.0
"""Seconds a scenario may take: engines start slowly where many tests share two cores."""
SPEC = ServerSpec(engine="embedded", model=str(ARITHMETIC))
QUESTION = [{"role": "user", "content": "12 + 30?"}]
QUESTIONS = [one.question for one in itertools.islice(problems(1, split="train", level="hard"), 64)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Three nodes; what the head knows is on disk, so that it can be restarted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_gcs_storage", "rocksdb")
        patch.setenv("RAY_gcs_storage_path", str(tmp_path_factory.mktemp("gcs")))
        with local_cluster(3) as found:
            yield found


def run(main: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(BOUND):
            return await main

    return uvloop.run(bounded())


async def until(holds: Any, what: str, limit: float = 120.0) -> float:
    """Waits for something; the seconds it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < limit, what
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def pid_of(actor: Any) -> int:
    return int(await actor.start.remote())


class Load:
    """Requests that never stop: each has to be answered."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.answered = 0
        self.longest = 0.0
        self.running = True

    async def one(self) -> None:
        while self.running:
            began = time.monotonic()
            sample = await self.client.chat(QUESTION, SamplingParams(max_tokens=64, temperature=0.0))
            assert "42" in sample.text
            self.answered += 1
            self.longest = max(self.longest, time.monotonic() - began)


@asynccontextmanager
async def under_load(fleet: Fleet, streams: int = 4) -> AsyncIterator[Load]:
    async with Client(fleet, model=SPEC.name) as client, asyncio.TaskGroup() as group:
        load = Load(client)
        for _ in range(streams):
            group.create_task(load.one())
        yield load
        load.running = False


async def answers_more(load: Load) -> None:
    before = load.answered
    await until(lambda: load.answered > before + 4, "nothing is answered")


def test_engines_that_die_come_back_elsewhere_and_no_request_is_lost(
    cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    async def scenario() -> None:
        import ray

        async with Engines(SPEC, replicas=2) as engines:
            assert set(engines.places.values()) != {here()} and len(set(engines.places.values())) == 2, (
                "spread"
            )
            assert len(placement_groups()) == 2
            async with engines.fleet(ready=2) as fleet, under_load(fleet) as load:
                await answers_more(load)

                # A worker of an actor.
                actor = ray.get_actor(next(iter(engines._lives.values())).replica, namespace=NAMESPACE)
                processes = children("penstock.engine ")
                assert len(processes) == 4, "an engine and its supervisor each"
                os.kill(await pid_of(actor), signal.SIGKILL)
                out = await until(lambda: len(fleet.endpoints) == 1, "it is still in the fleet")
                gone = await until(
                    lambda: len(set(processes) & set(children("penstock.engine "))) == 2,
                    "its engine lives",
                    30,
                )
                back = await until(lambda: len(fleet.endpoints) == 2, "it does not come back")
                told.append(f"actor killed: out {out:.2f} s, engine gone {gone:.2f} s, back {back:.1f} s")
                await answers_more(load)

                # The registry: it is heard of again, nobody notices.
                epoch = (await find("penstock").watch.remote("", 0, 0)).epoch
                ray.kill(find("penstock"), no_restart=False)
                before = {end.name for end in fleet.endpoints}
                began = time.monotonic()
                while True:
                    with contextlib.suppress(ray.exceptions.RayError):
                        snapshot = await find("penstock").watch.remote("", 0, 0)
                        if snapshot.epoch != epoch and len(snapshot.entries) == 2:
                            break
                    assert {end.name for end in fleet.endpoints} == before
                    await asyncio.sleep(0.05)
                told.append(f"registry killed: whole again after {time.monotonic() - began:.1f} s")
                await until(lambda: children("penstock.engine "), "engines")
                assert {end.name for end in fleet.endpoints} == before
                await answers_more(load)

                # The head, for as long as it takes to start it again.
                cluster.head_node.kill_gcs_server()
                await answers_more(load)
                cluster.head_node.start_gcs_server()  # not on a thread, with whose end it would end
                assert {end.name for end in fleet.endpoints} == before
                await answers_more(load)

                # A node.
                node = next(one for one in engines.places.values() if one != here())
                kill_node(cluster, node)
                out = await until(lambda: len(fleet.endpoints) == 1, "it is still in the fleet")
                back = await until(lambda: len(fleet.endpoints) == 2, "it does not come back")
                assert node not in engines.places.values()
                told.append(f"node killed: out {out:.2f} s, back {back:.1f} s")
                await answers_more(load)
                add_node(cluster)

                await engines.scale(1)
                assert engines.count == 1 and len(placement_groups()) == 1
                await until(lambda: len(fleet.endpoints) == 1, "scaled down")
                await answers_more(load)
                with pytest.raises(ConfigError, match="room for"):
                    await engines.scale(99)
            told.append(f"{load.answered} requests answered, the longest took {load.longest:.1f} s")
        assert not placement_groups()
        assert not until_gone(lambda: children("penstock.engine "), 10)

    run(scenario())
    with capsys.disabled():
        print("", *told, sep="\n  ")  # noqa: T201


def test_a_name_is_taken_once_and_a_wrong_flag_is_told_at_once(cluster: Any) -> None:
    async def scenario() -> None:
        bad = ServerSpec(engine="embedded", model=str(ARITHMETIC), extra_args={"no-such-flag": True})
        with pytest.raises(Exception, match="engine ended before it was ready"):
            async with Engines(bad, name="bad"):
                pass
        with pytest.raises(ConfigError, match="No node .* can hold an engine of 64 CPUs"):
            async with Engines(SPEC, name="big", cpus=64):
                pass
        with pytest.raises(ConfigError, match="No engines are registered as 'bad'"):
            find("bad")
        assert not placement_groups()

    run(scenario())


def reward(prompt: Prompt, sample: Sample) -> float:
    return len(sample.text) / 100


def weights(version: int) -> dict[str, torch.Tensor]:
    tensors = load_file(ARITHMETIC / "model.safetensors")
    generator = torch.Generator().manual_seed(version)
    return {
        name: one + 0.02 * version * one.std(correction=0) * torch.randn(one.shape, generator=generator)
        for name, one in tensors.items()
    }


def rollouts(**settings: Any) -> RayRollouts:
    return RayRollouts(
        reward=reward,
        params=SamplingParams(max_tokens=48, temperature=1.0),
        group_size=4,
        batch_groups=8,
        groups=4,
        **{"prompts": iter(QUESTIONS), "async_steps": 1, "start_timeout": 60.0, **settings},
    )


def caught_up(r: RayRollouts) -> bool:
    """Both engines have the trainer's weights."""
    return [one.policy_version for one in r._entries.values()] == [r.version] * 2


class Learner:
    """A trainer that is an actor."""

    async def train(self) -> list[tuple[int, int]]:
        found = []
        async with rollouts(prompts=iter(QUESTIONS[:16])) as r:
            await r.update(weights(1))  # the engines have those of the run before
            while batch := await r.batch(timeout=100):
                found += [(group.position, group.newest or 0) for group in batch]
                await r.trained(batch)
                await r.update(weights(r.version + 1))
        return found


def test_rollouts_are_complete_and_exact_while_nodes_actors_and_the_queue_die(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    times: list[tuple[str, float]] = []

    async def scenario() -> None:
        import ray

        async with Engines(SPEC, replicas=2) as engines:
            async with rollouts(ledger=tmp_path / "run.ledger", ready=2) as r:
                for step in itertools.count():
                    match step:
                        case 1:
                            what = "a node"
                            kill_node(cluster, next(one for one in engines.places.values() if one != here()))
                        case 3:
                            what = "the queue"
                            ray.kill(r._queue, no_restart=False)
                        case 5:
                            await until(lambda: caught_up(r), "the engine comes back and catches up")
                            what = "an actor"
                            actor = ray.get_actor(
                                next(iter(engines._lives.values())).replica, namespace=NAMESPACE
                            )
                            os.kill(await pid_of(actor), signal.SIGKILL)
                        case _:
                            what = "nothing"
                    began = time.monotonic()
                    batch = await r.batch(timeout=100)
                    times.append((what, time.monotonic() - began))
                    if not batch:
                        break
                    for group in batch:
                        assert len(group.rollouts) == 4
                        assert group.staleness is not None and group.staleness <= 1
                        assert (group.newest or 0) <= r.version
                        assert all(one.versions_exact for one in group.rollouts)
                    seen.extend(group.position for group in batch)
                    await r.trained(batch)
                    await r.update(weights(r.version + 1))
                counts = r.counts()
                assert (counts.trained, counts.dropped, counts.leased) == (len(QUESTIONS), 0, 0)
                await until(lambda: caught_up(r), "who has missed updates catches up")
                assert r.version == 8
            assert sorted(seen) == list(range(len(QUESTIONS))), Counter(seen)
            add_node(cluster)

            actor_class: Any = ray.remote(Learner)
            trained = await actor_class.options(num_cpus=0).remote().train.remote()
            assert sorted(position for position, _ in trained) == list(range(16))
            assert {version for _, version in trained} <= {1, 2} and trained[0][1] == 1
        assert not placement_groups()

    run(scenario())
    with capsys.disabled():
        print("", *(f"  batch after the end of {what}: {took:.1f} s" for what, took in times), sep="\n")  # noqa: T201


def serve(address: str, *more: str) -> tuple[subprocess.Popen[str], str]:
    """The command, and the URL it tells."""
    command = [sys.executable, "-m", "penstock", "serve", "--engine", "embedded", "--ray", "--ray-address"]
    process = subprocess.Popen(
        [*command, address, "--ray-name", "served", *more], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("penstock serves"), line
    return process, line.split()[-1]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_command_serves_and_leaves_nothing_behind(cluster: Any, how: signal.Signals) -> None:
    route = ["--route", "--port", "0"] if how is signal.SIGTERM else []
    process, url = serve(cluster.address, "--replicas", "2", *route)
    try:

        async def ask() -> str:
            async with Client(url, model="arithmetic") as client:
                return (await client.chat(QUESTION, SamplingParams(max_tokens=64, temperature=0.0))).text

        assert "42" in run(ask())
        process.send_signal(how)
        assert process.wait(60) == (0 if how is signal.SIGTERM else -how)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert not until_gone(lambda: children("penstock.engine ", "ray::EngineActor", "ray::RegistryActor"), 30)
    assert not until_gone(placement_groups)
