"""Control calls to every engine of a fleet, over real sockets, while engines fail in all ways they can."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from penstock.client import Client
from penstock.control import readmission
from penstock.control.control import Control
from penstock.control.engine import Engine
from penstock.control.readmission import CatchUp
from penstock.control.transport import DiskReload
from penstock.errors import (
    ConfigError,
    ConnectFailed,
    ConnectionLost,
    ControlFailed,
    EngineError,
    FleetDown,
    PenstockError,
    PhaseTimeout,
    RequestRejected,
    ServerFailed,
)
from penstock.fleet.fleet import Fleet
from penstock.fleet.health import Breaker, State
from penstock.fleet.retry import Retry
from tests.control_engines import ControlledEngine, SGLangEngine
from tests.scripted import Call, Step, hang_up, http, raw, refuse, run, stall, until

QUICK = Retry(base=0.01, cap=0.02)
HELLO = [{"role": "user", "content": "hello"}]
FAULTS: list[tuple[Step, type[PenstockError]]] = [
    (refuse(404), RequestRejected),
    (refuse(500), ServerFailed),
    (stall(), PhaseTimeout),
    (hang_up(), ConnectionLost),
    (raw(http(200, b'{"success": false, "message": "busy"}')), EngineError),
]


class Site:
    """Three engines, their fleet, a client and the control plane."""

    def __init__(
        self, engines: list[ControlledEngine], fleet: Fleet, client: Client, control: Control
    ) -> None:
        self.engines = engines
        self.fleet = fleet
        self.client = client
        self.control = control

    def names(self) -> list[str]:
        return [engine.url for engine in self.engines]

    async def texts(self, count: int = 12) -> set[str]:
        """What engines that get requests answer: the weights they have."""
        samples = await asyncio.gather(*(self.client.chat(HELLO) for _ in range(count)))
        return {sample.text for sample in samples}

    def paused(self) -> list[bool]:
        return [engine.paused for engine in self.engines]

    def versions(self) -> list[int | None]:
        return [endpoint.policy_version for endpoint in self.fleet.endpoints]

    def current(self) -> list[bool]:
        return [endpoint.current for endpoint in self.fleet.endpoints]


@asynccontextmanager
async def site(
    *kinds: type[ControlledEngine], timeout: float = 0.3, catch_up: CatchUp | None = None, **options: Any
) -> AsyncIterator[Site]:
    engines = [kind() for kind in kinds or (ControlledEngine,) * 3]
    for engine in engines:
        await engine.listen()
    try:
        async with Fleet([engine.url for engine in engines], retry=QUICK, **options) as fleet:
            control = Control(fleet, timeout=timeout, update_timeout=timeout, catch_up=catch_up)
            async with control, Client(fleet) as client:
                yield Site(engines, fleet, client, control)
    finally:
        for engine in engines:
            await engine.kill()


# -- calls ----------------------------------------------------------------------------------------


def test_a_call_reaches_every_engine_and_each_has_an_outcome() -> None:
    async def main() -> None:
        async with site() as here:
            control = here.control
            assert set(await control.pause("abort", clear_cache=False)) == set(here.names())
            assert all(engine.paused for engine in here.engines)
            await control.resume()
            await control.sleep(1)
            assert [engine.asleep for engine in here.engines] == [1, 1, 1]
            await control.wake_up(["weights", "kv_cache"])
            await control.reset_prefix_cache()
            await control.abort()
            outcomes = await control.call("GET", "/is_paused")
            assert [one.value for one in outcomes.values()] == [{"is_paused": False}] * 3
            versions = await control.weight_versions()
            assert [one.value for one in versions.values()] == [None] * 3
            for engine in here.engines:
                assert engine.paths == [
                    "/version",  # once
                    "/pause?mode=abort&clear_cache=false",
                    "/resume",
                    "/sleep?level=1",
                    "/wake_up?tags=weights&tags=kv_cache",
                    "/reset_prefix_cache",
                    "/abort_requests",
                    "/is_paused",
                    "/weight_info",
                ]

    run(main())


def test_sglang_is_spoken_to_in_its_own_words() -> None:
    async def main() -> None:
        async with site(SGLangEngine, ControlledEngine) as here:
            control, (sglang, vllm) = here.control, here.engines
            waited = await control.pause("wait")
            assert isinstance(waited[sglang.url].error, ConfigError) and waited[vllm.url].ok
            assert (await control.pause("keep"))[sglang.url].ok and here.paused() == [True, True]
            await control.resume()
            assert here.paused() == [False, False]
            await control.sleep(1)
            assert [engine.asleep for engine in here.engines] == [1, 1]
            assert (await control.wake_up())[sglang.url].value == {"status": "ok"}
            assert [engine.asleep for engine in here.engines] == [None, None]
            assert isinstance((await control.wake_up())[sglang.url].error, ConfigError)
            await control.abort()
            update = await control.reload_weights("new")
            assert (sglang.weights, sglang.label, vllm.weights, vllm.label) == ("new", "1", "new", "1")
            assert update.outcomes[sglang.url].ok and await here.texts() == {"new"}
            assert [one.value for one in (await control.weight_versions()).values()] == [1, 1]
            bodies = [call.json for call in sglang.calls if call.path == "/pause_generation"]
            assert [body["mode"] for body in bodies] == ["retract", "abort", "retract"]
            assert [path for path in sglang.paths if "info" in path or path == "/version"] == [
                "/version",
                "/model_info",  # the kind, then the presence, then the version
                "/model_info",
                "/model_info",
            ]

    run(main())


@pytest.mark.parametrize(("fault", "error"), FAULTS)
def test_one_engine_that_fails_is_data_and_does_not_hold_up_the_others(
    fault: Step, error: type[PenstockError]
) -> None:
    async def main() -> None:
        async with site() as here:
            here.engines[1].faults["/pause"] = fault
            started = time.monotonic()
            outcomes = await here.control.pause()
            assert time.monotonic() - started < 1.0
            assert [outcomes[name].ok for name in here.names()] == [True, False, True]
            assert isinstance(outcomes[here.names()[1]].error, error)
            assert all(outcomes[name].value == {"status": "paused"} for name in here.names()[::2])

    run(main())


@pytest.mark.parametrize(("fault", "error"), FAULTS)
def test_all_or_nothing_brings_the_others_back(fault: Step, error: type[PenstockError]) -> None:
    async def main() -> None:
        async with site() as here:
            here.engines[1].faults["/pause"] = fault
            with pytest.raises(ControlFailed, match="pause") as failed:
                await here.control.pause(all_or_nothing=True)
            assert isinstance(failed.value.outcomes[here.names()[1]].error, error)
            assert not any(engine.paused for engine in here.engines)
            resumed = ["/resume" in engine.paths for engine in here.engines]
            # Where there was no answer it may be paused all the same; a 4xx says that it is not.
            assert resumed == [True, error is not RequestRejected, True]
            here.engines[1].faults = {"/wake_up": fault}
            await here.control.sleep(1)
            with pytest.raises(ControlFailed):
                await here.control.wake_up(all_or_nothing=True)
            assert [engine.asleep for engine in here.engines] == [1, 1, 1]

    run(main())


def test_what_could_not_be_undone_is_said() -> None:
    async def main() -> None:
        async with site() as here:
            first, second, _ = here.engines
            first.faults["/resume"] = refuse(500, "stuck")
            second.faults["/pause"] = refuse(404)
            with pytest.raises(ControlFailed, match=f"could not be undone on {first.url}: 500: stuck"):
                await here.control.pause(all_or_nothing=True)
            second.faults["/reset_prefix_cache"] = refuse(500)
            with pytest.raises(ControlFailed, match="cannot be undone on the others"):
                await here.control.reset_prefix_cache(all_or_nothing=True)
            with pytest.raises(ControlFailed, match="GET /nothing"):
                await here.control.call("GET", "/nothing", all_or_nothing=True)

    run(main())


def test_an_engine_that_is_not_there_is_an_outcome() -> None:
    async def main() -> None:
        async with site() as here:
            await here.engines[2].kill()
            outcomes = await here.control.pause()
            assert isinstance(outcomes[here.names()[2]].error, ConnectFailed)
            assert sum(one.ok for one in outcomes.values()) == 2

    run(main())


def test_what_cannot_be_asked_is_refused_in_one_sentence() -> None:
    async def main() -> None:
        async with site() as here:
            control = here.control
            calls: list[tuple[Any, str]] = [
                (lambda: control.pause("stop"), "pause mode"),  # type: ignore[arg-type]
                (lambda: control.sleep(3), "sleep level"),
                (lambda: control.wake_up(["gpu"]), "'gpu'"),
                (lambda: control.call("GET", "/a b"), "path"),
                (lambda: control.call("GET", "/a\r\nx: y"), "path"),
                (lambda: control.call("BREW", "/a"), "method"),
                (lambda: control.call("GET", "/a", timeout=0), "timeout"),
                (lambda: control.reload_weights("x", version=0), "does not come after"),
            ]
            for call, message in calls:
                with pytest.raises(ConfigError, match=message):
                    await call()
            assert not any(engine.paths for engine in here.engines)
            closed = Control(here.fleet)
            with pytest.raises(ConfigError, match="async with"):
                await closed.pause()
            with pytest.raises(ConfigError, match="bound"):
                Control(here.fleet, timeout=0)

    run(main())


def test_requests_in_flight_survive_a_pause_that_keeps_them() -> None:
    async def main() -> None:
        async with site() as here:
            await here.control.pause("keep")
            tasks = [asyncio.create_task(here.client.chat(HELLO)) for _ in range(30)]
            await until(lambda: sum(engine.completions for engine in here.engines) == 30)
            update = await here.control.reload_weights("new", pause=None)
            assert update.version == 1 and not any(task.done() for task in tasks)
            await here.control.resume()
            samples = await asyncio.gather(*tasks)
            assert {(sample.text, sample.attempts) for sample in samples} == {("new", 1)}

    run(main())


# -- weight updates -------------------------------------------------------------------------------


def test_an_update_moves_the_fleet_by_one_and_says_how_long_each_phase_took() -> None:
    async def main() -> None:
        async with site() as here:
            assert (here.fleet.policy_version, here.versions()) == (0, [0, 0, 0])
            update = await here.control.reload_weights("one")
            assert (update.version, here.fleet.policy_version, here.versions()) == (1, 1, [1, 1, 1])
            assert list(update.seconds) == ["prepare", "transfer", "pause", "commit", "resume"]
            assert all(0 <= seconds < 1 for seconds in update.seconds.values())
            assert all(one.ok for one in update.outcomes.values())
            for engine in here.engines:
                assert engine.paths == [
                    "/version",
                    "/health",
                    "/pause?mode=keep&clear_cache=true",
                    "/collective_rpc",
                    "/weight_checker",  # it has none, and gives no checksum
                    "/reset_prefix_cache?reset_running_requests=true",
                    "/update_weight_version",
                    "/resume",
                ]
            update = await here.control.reload_weights("ten", 10, pause=None)
            assert (update.version, here.versions()) == (10, [10, 10, 10])
            assert list(update.seconds) == ["prepare", "transfer", "commit"]
            assert await here.texts() == {"ten"}

    run(main())


@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"])
@pytest.mark.parametrize(("fault", "error"), FAULTS[1:4])
def test_an_engine_that_fails_to_commit_gets_nothing_until_it_has_caught_up(
    path: str, fault: Step, error: type[PenstockError]
) -> None:
    async def main() -> None:
        async with site() as here:
            bad = here.engines[1]
            bad.faults[path] = fault
            update = await here.control.reload_weights("new")
            assert [update.outcomes[name].ok for name in here.names()] == [True, False, True]
            assert update.outcomes[bad.url].phase == "commit"
            failure = update.outcomes[bad.url].error
            # The time of the phase is that of the request here: whichever is noticed first.
            assert isinstance(failure, error | EngineError | PhaseTimeout)
            assert here.versions() == [1, None, 1] and here.current() == [True, False, True]
            bad.completions = 0
            assert await here.texts() == {"new"} and bad.completions == 0
            bad.faults.clear()
            await until(lambda: all(here.current()))
            assert (bad.weights, bad.label, bad.paused) == ("new", "1", False)
            assert await here.texts(30) == {"new"} and bad.completions > 0

    run(main())


def test_a_refused_commit_leaves_the_engine_where_it_was() -> None:
    async def main() -> None:
        async with site() as here:
            for engine in here.engines:
                engine.faults["/collective_rpc"] = refuse(400, "no such folder")
            with pytest.raises(ControlFailed, match="no engine has the weights of version 1"):
                await here.control.reload_weights("nowhere")
            assert (here.fleet.policy_version, here.versions()) == (0, [0, 0, 0])
            assert not any(engine.paused for engine in here.engines)
            assert await here.texts() == {"start"}
            here.engines[0].faults.clear()
            await here.control.reload_weights("new")
            assert here.versions() == [1, 0, 0] and await here.texts() == {"new"}

    run(main())


@pytest.mark.parametrize("path", ["/version", "/health", "/pause"])
def test_all_or_nothing_gives_up_before_anything_has_changed(path: str) -> None:
    async def main() -> None:
        async with site() as here:
            here.engines[1].faults[path] = refuse(500)
            with pytest.raises(ControlFailed, match="keeps the weights it had"):
                await here.control.reload_weights("new", all_or_nothing=True)
            assert (here.fleet.policy_version, here.versions()) == (0, [0, 0, 0])
            assert [engine.weights for engine in here.engines] == ["start"] * 3
            assert not any(engine.paused for engine in here.engines)
            await here.engines[2].kill()
            here.engines[1].faults.clear()
            for pause in ("keep", None):
                with pytest.raises(ControlFailed):
                    await here.control.reload_weights("new", pause=pause, all_or_nothing=True)
                assert [engine.weights for engine in here.engines[:2]] == ["start"] * 2
            assert here.versions() == [0, 0, 0]

    run(main())


def test_a_commit_that_fails_on_one_cannot_be_undone_and_that_is_said() -> None:
    async def main() -> None:
        async with site() as here:
            here.engines[0].faults["/collective_rpc"] = refuse(500)
            with pytest.raises(ControlFailed, match="at version 1, which cannot be undone") as failed:
                await here.control.reload_weights("new", all_or_nothing=True)
            assert [one.ok for one in failed.value.outcomes.values()].count(True) == 2
            assert here.versions() == [None, 1, 1]

    run(main())


def test_an_engine_that_dies_between_two_phases_catches_up_when_it_is_back() -> None:
    async def main() -> None:
        async with site() as here:
            await here.control.reload_weights("one")
            victim = here.engines[1]

            async def die(call: Call) -> None:
                call.reset()
                asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(victim.kill()))

            victim.faults["/pause"] = die
            update = await here.control.reload_weights("two")
            assert update.outcomes[victim.url].phase == "pause"
            assert here.fleet.policy_version == 2 and here.current() == [True, False, True]
            assert await here.texts() == {"two"}
            victim.restart()
            victim.completions = 0
            await victim.listen()
            await until(lambda: all(here.current()))
            assert (victim.weights, victim.label) == ("two", "2")
            assert await here.texts(30) == {"two"} and victim.completions > 0

    run(main())


def test_an_engine_that_was_only_out_of_reach_comes_back_without_an_update() -> None:
    async def main() -> None:
        async with site() as here:
            await here.control.reload_weights("one")
            away = here.engines[0]
            await away.kill()
            assert await here.texts(30) == {"one"}
            await until(lambda: not here.fleet.endpoints[0].up)
            away.paths.clear()
            await away.listen()
            await until(lambda: here.fleet.endpoints[0].up and here.current()[0])
            assert away.paths == ["/health", "/version", "/weight_info"]

    run(main())


def test_an_engine_restarted_unseen_is_found_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readmission, "VERSION_POLL", 0.05)

    async def main() -> None:
        async with site() as here:
            await here.control.reload_weights("one")
            here.engines[2].restart()
            here.engines[2].faults["/collective_rpc"] = stall()
            await until(lambda: not here.current()[2])
            here.engines[2].completions = 0
            assert await here.texts() == {"one"} and not here.engines[2].completions
            here.engines[2].faults.clear()
            await until(lambda: all(here.current()))
            assert here.engines[2].weights == "one"

    run(main())


def test_an_engine_whose_breaker_opened_is_asked_for_its_version_before_its_trial() -> None:
    async def main() -> None:
        breaker = Breaker(failure_threshold=1, timeout=0.1)
        async with site(ControlledEngine, ControlledEngine, breaker=breaker) as here:
            await here.control.reload_weights("one")
            bad = here.engines[0]
            bad.faults["/v1/chat/completions"] = refuse(500)
            await here.texts(4)
            assert here.fleet.endpoints[0].health.state is State.OPEN
            bad.restart()
            bad.faults["/collective_rpc"] = stall()
            bad.completions = 0
            began = time.monotonic()
            await until(lambda: "/collective_rpc" in bad.paths[-2:])
            assert time.monotonic() - began < 2.0, "only found by asking now and then"
            assert await here.texts() == {"one"} and not bad.completions
            bad.faults.clear()
            await until(lambda: here.current() == [True, True])
            assert await here.texts(20) == {"one"} and here.fleet.endpoints[0].up

    run(main())


def test_an_engine_that_has_left_is_let_go_of() -> None:
    async def main() -> None:
        async with site() as here:
            await here.control.pause()
            gone = here.engines[2]
            await here.fleet.remove(gone.url)
            assert set(await here.control.resume()) == {engine.url for engine in here.engines[:2]}
            assert gone.paused
            await until(lambda: not gone.open)
            assert (await here.control.reload_weights("new")).outcomes.keys() == {*here.names()[:2]}

    run(main())


def test_one_that_joins_late_catches_up_first() -> None:
    async def main() -> None:
        async with site() as here, ControlledEngine() as late:
            await here.control.reload_weights("one")
            here.fleet.add(late.url)
            assert here.current() == [True, True, True, False] and here.versions()[3] is None
            await until(lambda: all(here.current()))
            assert (late.weights, late.label) == ("one", "1")

    run(main())


def test_catching_up_is_by_what_the_caller_gives() -> None:
    asked: list[int] = []

    def catch_up(version: int) -> DiskReload:
        asked.append(version)
        return DiskReload(f"kept/{version}")

    async def main() -> None:
        async with site(catch_up=catch_up) as here:
            here.engines[0].faults["/collective_rpc"] = refuse(500)
            await here.control.reload_weights("delta", 5)
            here.engines[0].faults.clear()
            await until(lambda: all(here.current()))
            assert here.engines[0].weights == "kept/5" and set(asked) == {5}

    run(main())


def test_weights_that_sleep_has_dropped_have_to_come_anew() -> None:
    async def main() -> None:
        async with site() as here:
            await here.control.reload_weights("one")
            here.engines[2].faults["/sleep"] = refuse(404)
            await here.control.sleep(2)
            assert here.current() == [False, False, True]
            await here.control.wake_up(["weights"])
            update = await here.control.reload_weights("two", pause=None)
            assert update.version == 2 and all(here.current())
            await here.control.wake_up()
            assert await here.texts() == {"two"}

    run(main())


def test_requests_wait_while_no_engine_has_the_weights_and_not_for_ever() -> None:
    async def main() -> None:
        async with site(ControlledEngine) as here:
            (engine,) = here.engines
            engine.faults["/collective_rpc"] = refuse(500, "broken")
            with pytest.raises(ControlFailed):
                await here.control.reload_weights("new")
            assert here.current() == [False]
            task = asyncio.create_task(here.client.chat(HELLO))
            await asyncio.sleep(0.05)
            assert not task.done() and not engine.completions
            engine.faults.clear()
            await here.control.reload_weights("new")
            assert (await task).text == "new"

    async def bounded() -> None:
        engine = ControlledEngine()
        async with engine, Fleet(engine.url, retry=Retry(outage=0.3)) as fleet, Control(fleet) as control:
            engine.faults["/collective_rpc"] = refuse(500, "broken")
            with pytest.raises(ControlFailed):
                await control.reload_weights("new")
            async with Client(fleet) as client:
                with pytest.raises(FleetDown, match="are of version unknown"):
                    await client.chat(HELLO)

    run(main())
    run(bounded())


def test_one_update_at_a_time_and_a_cancelled_one_resumes_what_it_paused() -> None:
    async def main() -> None:
        async with site(timeout=5.0) as here:
            here.engines[1].faults["/collective_rpc"] = stall()
            task = asyncio.create_task(here.control.reload_weights("new"))
            await until(lambda: "/collective_rpc" in here.engines[1].paths)
            with pytest.raises(ConfigError, match="one at a time"):
                await here.control.reload_weights("newer")
            await until(lambda: here.fleet.policy_version == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not any(engine.paused for engine in here.engines)
            assert here.versions() == [1, None, 1]
            here.engines[1].faults.clear()
            await until(lambda: all(here.current()))
            assert here.engines[1].weights == "new"

    run(main())


def test_an_update_waits_for_no_engine_that_is_catching_up() -> None:
    async def main() -> None:
        async with site(timeout=20.0) as here:
            slow = here.engines[0]
            slow.faults["/collective_rpc"] = refuse(500)
            await here.control.reload_weights("one")
            slow.faults["/collective_rpc"] = stall()
            slow.paths.clear()
            await until(lambda: "/collective_rpc" in slow.paths)
            slow.faults.clear()
            began = time.monotonic()
            update = await here.control.reload_weights("two")
            assert time.monotonic() - began < 2.0
            assert all(one.ok for one in update.outcomes.values()) and here.versions() == [2, 2, 2]
            assert await here.texts() == {"two"}

    run(main())


class Slow(DiskReload):
    """Knows no bounds of its own."""

    async def transfer(self, engine: Engine, version: int) -> None:
        await asyncio.Event().wait()


def test_a_transport_that_hangs_is_bounded_and_changes_nothing() -> None:
    async def main() -> None:
        async with site() as here:
            with pytest.raises(ControlFailed, match="did not end 'transfer' within 0.3 s"):
                await here.control.update_weights(Slow("new"))
            assert here.versions() == [0, 0, 0] and await here.texts() == {"start"}

    run(main())
