"""A fleet of servers: joined when healthy, gone when dead, started again, nothing left afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from penstock.errors import ConfigError
from penstock.fleet.fleet import Fleet
from penstock.servers.diagnosis import EngineDied, StartFailed
from penstock.servers.keeper import State
from penstock.servers.launched import LaunchedServer, LifeCycle
from penstock.servers.replicas import Replicas
from penstock.servers.restart import Restart
from penstock.servers.spec import ServerSpec
from tests.scripted import run, until
from tests.servers.fakes import TAG, FakeServer, nothing_left, processes

FAST = Restart(base=0.05)
TORN = "RuntimeError: Cannot find any model weights with `/m`"


class Members:
    """A fleet as far as the replicas know one; the log of what joined and left."""

    def __init__(self) -> None:
        self.urls: set[str] = set()
        self.log: list[str] = []

    def add(self, url: str) -> None:
        assert url not in self.urls
        self.urls.add(url)
        self.log.append("+")

    async def remove(self, url: str) -> None:
        if url not in self.urls:
            raise ConfigError("not there")
        self.urls.remove(url)
        self.log.append("-")

    async def drain(self, url: str, timeout: float | None = None) -> bool:
        self.log.append("drain")
        await self.remove(url)
        return True


def fake(
    behave: Callable[[int], dict[str, Any]] = lambda start: {},
) -> Callable[[ServerSpec, LifeCycle], LaunchedServer]:
    """Servers of the fake engine; `behave` says what the n-th start does."""
    starts = iter(range(10_000))

    class Counted(FakeServer):
        async def __aenter__(self) -> Any:
            self.behaviour = behave(next(starts))
            return await super().__aenter__()

    return lambda spec, life: Counted(spec=spec, life=life)


def replicas(tag: str, members: Members, **settings: Any) -> Replicas:
    settings = {"stagger": 0.0, "restart": FAST, "make": fake(), **settings}
    return Replicas(ServerSpec(model="fake", env={TAG: tag}), members, **settings)


def engine(fleet: Replicas, index: int) -> int:
    server = fleet.replicas[index].server
    assert server is not None and server.pid is not None
    return server.pid


def test_each_joins_and_nothing_is_left() -> None:
    members, seen = Members(), []

    async def scenario(tag: str) -> None:
        note = lambda replica: seen.append((replica.index, replica.state.value, replica.stage))  # noqa: E731
        async with replicas(tag, members, replicas=3, on_change=note) as fleet:
            assert members.urls == set(fleet.urls) and fleet.count == 3
            assert len(processes(tag)) == 6  # three engines, three supervisors
        assert members.urls == set()

    with nothing_left() as tag:
        run(scenario(tag))
    assert {index for index, state, _ in seen if state == State.READY.value} == {0, 1, 2}
    assert (0, "starting", "starting") in seen


def test_one_that_dies_leaves_at_once_is_restarted_and_joins_again() -> None:
    members = Members()

    async def scenario(tag: str) -> None:
        async with replicas(tag, members, replicas=2) as fleet:
            first, other = (replica.url for replica in fleet.replicas)
            os.kill(engine(fleet, 0), signal.SIGKILL)
            await until(lambda: first not in members.urls)
            assert members.urls == {other}
            assert fleet.urls == [other]
            await until(lambda: fleet.replicas[0].state is State.DIED)
            assert isinstance(fleet.replicas[0].error, EngineDied)
            await until(lambda: fleet.count == 2)
            assert fleet.replicas[0].restarts.total == 1
            assert members.urls == set(fleet.urls)
        assert members.log.count("+") == members.log.count("-") == 3

    with nothing_left() as tag:
        run(scenario(tag))


def test_the_block_ends_with_the_error_when_none_can_be_started_again() -> None:
    members = Members()

    async def scenario(tag: str) -> None:
        make = fake(lambda start: {} if start < 2 else {"lines": [TORN], "exit": 1})
        with pytest.raises(StartFailed, match="weights"):
            async with replicas(
                tag, members, replicas=2, make=make, restart=Restart(limit=2, base=0)
            ) as fleet:
                for index in range(2):
                    os.kill(engine(fleet, index), signal.SIGKILL)
                async with asyncio.timeout(20):
                    await asyncio.Event().wait()
        assert [replica.restarts.total for replica in fleet.replicas] == [2, 2]
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]

    with nothing_left() as tag:
        run(scenario(tag))
    assert members.urls == set()


def test_one_given_up_does_not_end_the_others() -> None:
    async def scenario(tag: str) -> None:
        make = fake(lambda start: {} if start < 2 else {"exit": 1})
        async with replicas(tag, Members(), replicas=2, make=make, restart=Restart(limit=1, base=0)) as fleet:
            os.kill(engine(fleet, 1), signal.SIGKILL)
            await until(lambda: fleet.replicas[1].state is State.GIVEN_UP)
            assert fleet.count == 1
            assert await fleet.replicas[0].server.is_ready()  # type: ignore[union-attr]

    with nothing_left() as tag:
        run(scenario(tag))


def test_a_first_start_that_fails_ends_the_entering() -> None:
    async def scenario(tag: str) -> None:
        make = fake(lambda start: {"lines": [TORN], "exit": 1} if start == 1 else {"bind_after": 5})
        with pytest.raises(StartFailed, match="weights"):
            async with replicas(tag, Members(), replicas=2, make=make):
                raise AssertionError("one of them cannot have started")

    with nothing_left() as tag:
        run(scenario(tag))


def test_with_one_ready_enough_the_others_follow_and_a_failure_of_theirs_is_mended() -> None:
    members = Members()

    async def scenario(tag: str) -> None:
        make = fake(lambda start: {"exit": 1} if start == 1 else {})
        async with replicas(tag, members, replicas=2, ready=1, stagger=0.5, make=make) as fleet:
            assert fleet.count == 1
            await until(lambda: fleet.count == 2)
            assert fleet.replicas[1].restarts.total == 1

    with nothing_left() as tag:
        run(scenario(tag))


@pytest.mark.parametrize("how", ["error", "cancel"])
def test_an_error_and_a_cancellation_pass_through(how: str) -> None:
    async def scenario(tag: str) -> None:
        async def block() -> None:
            async with replicas(tag, Members(), replicas=2):
                if how == "error":
                    raise LookupError("mine")
                await asyncio.Event().wait()

        task = asyncio.create_task(block())
        if how == "cancel":
            await until(lambda: len(processes(tag)) == 4)
            task.cancel()
        with pytest.raises(LookupError if how == "error" else asyncio.CancelledError):
            await task

    with nothing_left() as tag:
        run(scenario(tag))


def test_one_taken_out_by_somebody_else_ends_in_peace() -> None:
    members = Members()

    async def scenario(tag: str) -> None:
        async with replicas(tag, members) as fleet:
            await members.remove(fleet.urls[0])

    with nothing_left() as tag:
        run(scenario(tag))


def test_one_that_comes_back_waits_for_the_policy_version_of_its_fleet() -> None:
    async def scenario(tag: str) -> None:
        spec = ServerSpec(model="fake", env={TAG: tag})
        async with Fleet() as fleet, Replicas(spec, fleet, restart=FAST, make=fake()) as servers:
            (before,) = fleet.endpoints
            fleet.versions.committed(before, 1)
            fleet.show_versions()
            assert before.admits
            os.kill(engine(servers, 0), signal.SIGKILL)
            await until(lambda: servers.replicas[0].restarts.total == 1 and servers.count == 1)
            (again,) = fleet.endpoints
            assert again is not before and not again.admits
            fleet.versions.committed(again, 1)
            fleet.show_versions()
            assert again.admits

    with nothing_left() as tag:
        run(scenario(tag))


def test_more_are_started_and_fewer_are_drained_first() -> None:
    members = Members()

    async def scenario(tag: str) -> None:
        async with replicas(tag, members) as fleet:
            await fleet.scale(3)
            assert fleet.count == 3 and members.urls == set(fleet.urls)
            assert members.log == ["+"] * 3
            first, kept, last = fleet.replicas
            os.kill(engine(fleet, 0), signal.SIGKILL)
            await until(lambda: first.url is None)
            await fleet.scale(2)
            assert fleet.replicas == [kept, last], "one that does not serve goes first"
            assert "drain" not in members.log
            await fleet.scale(1)
            assert (fleet.replicas, members.log[-2:]) == ([kept], ["drain", "-"])
            assert members.urls == {kept.url}
            assert len(processes(tag)) == 2
            await asyncio.gather(fleet.scale(3), fleet.scale(2))
            assert [one.index for one in fleet.replicas] == [1, 0]
            with pytest.raises(ConfigError, match="at least 1"):
                await fleet.scale(0)
        with pytest.raises(ConfigError, match="inside their block"):
            await fleet.scale(2)

    with nothing_left() as tag:
        run(scenario(tag))
    assert members.urls == set()


def test_one_more_that_cannot_start_is_not_one_of_them() -> None:
    async def scenario(tag: str) -> None:
        make = fake(lambda start: {"lines": [TORN], "exit": 1} if start else {})
        async with replicas(tag, Members(), make=make, restart=Restart(limit=1, base=0)) as fleet:
            with pytest.raises(StartFailed, match="weights"):
                await fleet.scale(2)
            assert fleet.count == len(fleet.replicas) == 1

    with nothing_left() as tag:
        run(scenario(tag))


def test_a_block_that_ends_ends_the_scaling() -> None:
    async def scenario(tag: str) -> None:
        make = fake(lambda start: {"bind_after": 60} if start else {})
        async with replicas(tag, Members(), make=make) as fleet:
            more = asyncio.create_task(fleet.scale(2))
            await until(lambda: len(processes(tag)) == 4)
        with pytest.raises(ConfigError, match="block ended"):
            await more

    with nothing_left() as tag:
        run(scenario(tag))


def test_requests_in_flight_are_finished_before_a_server_goes() -> None:
    """A fleet's, and no GPU is given to two."""
    seen: list[str] = []

    class Dealt(FakeServer):
        def __init__(self, spec: ServerSpec, life: LifeCycle) -> None:
            super().__init__(spec=spec, life=life)
            seen.append(spec.env["CUDA_VISIBLE_DEVICES"])

    async def scenario(tag: str) -> None:
        spec = ServerSpec(model="fake", env={TAG: tag})
        settings: Any = {"devices": range(2), "make": Dealt, "stagger": 0.0}
        async with Fleet() as fleet, Replicas(spec, fleet, **settings) as servers:
            with pytest.raises(ConfigError, match="there are 2"):
                await servers.scale(3)
            assert servers.count == len(servers.replicas) == 1
            await servers.scale(2)
            assert set(seen) == {"0", "1"} and servers.count == 2
            _, leaving = fleet.endpoints
            leaving.in_flight += 1
            fewer = asyncio.create_task(servers.scale(1))
            await until(lambda: len(fleet.endpoints) == 1)
            assert servers.count == 2 and not fewer.done()
            leaving.in_flight -= 1
            await fewer
            assert servers.count == 1

    with nothing_left() as tag:
        run(scenario(tag))


def test_gpus_are_dealt_out() -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def none(spec: ServerSpec, life: LifeCycle) -> Any:
        yield

    def make(spec: ServerSpec, life: LifeCycle) -> Any:
        seen.append(spec.env["CUDA_VISIBLE_DEVICES"])
        return none(spec, life)

    spec = ServerSpec(model="m", tp=2)
    Replicas(spec, Members(), replicas=2, devices=range(4, 8), make=make)
    assert seen == ["4,5", "6,7"]
    with pytest.raises(ConfigError, match="2 servers of 2 GPUs need 4, and there are 3"):
        Replicas(spec, Members(), replicas=2, devices=[0, 1, 2], make=make)


@pytest.mark.parametrize(
    ("fields", "settings", "says"),
    [
        ({}, {"replicas": 0}, "at least 1"),
        ({"port": 65535}, {"replicas": 2}, "no 2 ports"),
        ({"engine": "vlm"}, {}, "choose one of vllm, sglang, embedded"),
        ({"engine": "embedded", "tp": 2}, {}, "one device"),
        ({"extra_args": {"port": 3}}, {}, "not for extra_args"),
    ],
)
def test_what_cannot_be_is_refused(fields: Any, settings: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Replicas(ServerSpec(**{"model": "m", **fields}), Members(), devices=(), **settings)
