"""Endpoints that go down and come back, and the requests that wait for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from penstock.client import Client
from penstock.errors import ConnectFailed, FleetDown, PenstockError
from penstock.fleet import monitor, progress
from penstock.fleet.retry import Retry
from tests.scripted import (
    Call,
    ScriptedEngine,
    Step,
    answer,
    aside,
    echo,
    http,
    raw,
    refuse,
    run,
    stall,
    until,
)

QUICK = Retry(base=0.01, cap=0.02)
HELLO = [{"role": "user", "content": "hello"}]


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_request_waits_while_its_only_engine_is_down_and_burns_no_attempt() -> None:
    async def main() -> None:
        told: list[tuple[float, PenstockError | None]] = []
        engine = ScriptedEngine(default=echo())
        await engine.listen()
        await engine.kill()
        client = Client(engine.url, retry=QUICK, on_outage=lambda *it: told.append(it), max_in_flight=50)
        async with client:
            tasks = [asyncio.create_task(client.chat(ask(str(n)))) for n in range(100)]
            await until(lambda: len(told) >= 3)
            assert client.statistics().waiting == 100
            await engine.listen()
            samples = await asyncio.gather(*tasks)
            assert [sample.text for sample in samples] == [str(n) for n in range(100)]
            assert {sample.attempts for sample in samples} == {1}
            await until(lambda: told[-1][1] is None)
            errors = [error for _, error in told[:-1]]
            assert all(isinstance(error, ConnectFailed) for error in errors)
            seconds = [second for second, _ in told[:-1]]
            assert seconds == sorted(seconds) and seconds[-1] > 0.2
        await engine.kill()

    run(main())


def test_an_outage_ends_at_its_bound_and_says_what_was_waited_for() -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        await engine.listen()
        await engine.kill()
        async with Client(engine.url, retry=Retry(outage=0.4)) as client:
            started = time.monotonic()
            tasks = [asyncio.create_task(client.chat(HELLO)) for _ in range(3)]
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(outcome, FleetDown)
                assert f"for {engine.url} to accept connections" in str(outcome)
                assert "refused" in str(outcome)
            assert 0.35 < time.monotonic() - started < 1.5
            with pytest.raises(FleetDown):
                await client.chat(HELLO)
            await engine.listen()  # and when it is back after all, so is the client
            await until(lambda: set(client.statistics().states.values()) == {"up"})
            assert (await client.chat(HELLO)).text == "hello"
        await engine.kill()

    run(main())


def test_an_engine_killed_and_restarted_under_load_loses_nothing() -> None:
    async def main() -> None:
        engine = ScriptedEngine(default=echo())
        await engine.listen()

        async def slow(call: Call) -> None:
            await asyncio.sleep(0.01)
            await echo()(call)

        engine.default = slow
        async with Client(engine.url, retry=QUICK, max_in_flight=20) as client:
            tasks = [asyncio.create_task(client.chat(ask(str(n)))) for n in range(300)]
            for _ in range(2):
                await engine.arrived(len(engine.calls) + 40)
                await engine.kill()
                await asyncio.sleep(0.1)
                await engine.listen()
            samples = await asyncio.gather(*tasks)
            assert [sample.text for sample in samples] == [str(n) for n in range(300)]
            assert client.statistics().in_flight == {engine.url: 0}
        await engine.kill()

    run(main())


def test_one_engine_down_of_two_costs_no_attempt_and_comes_back() -> None:
    async def main() -> None:
        lost = ScriptedEngine()
        await lost.listen()
        await lost.kill()
        async with ScriptedEngine() as good, Client([lost.url, good.url], retry=QUICK) as client:
            samples = await asyncio.gather(*(client.chat(HELLO) for _ in range(20)))
            assert {(sample.endpoint, sample.attempts) for sample in samples} == {(good.url, 1)}
            await lost.listen()
            await until(lambda: any(call.path == "/health" for call in lost.side_calls))
            await until(lambda: set(client.statistics().states.values()) == {"up"})
            await asyncio.gather(*(client.chat(HELLO) for _ in range(20)))
            assert sum(call.method == "POST" for call in lost.calls) == 10
            await lost.kill()

    run(main())


def test_an_engine_that_is_up_but_unwell_stays_down() -> None:
    async def main() -> None:
        engine = ScriptedEngine(default=refuse(503, "loading"), side={})
        await engine.listen()
        await engine.kill()
        async with Client(engine.url, retry=QUICK) as client:
            task = asyncio.create_task(client.chat(HELLO))
            await until(lambda: client.statistics().waiting == 1)
            await engine.listen()
            await engine.arrived(2)
            assert {call.path for call in engine.calls} == {"/health"} and not task.done()
            engine.default = answer("ready")
            assert (await task).attempts == 1
        await engine.kill()

    run(main())


def gate() -> tuple[asyncio.Event, Step]:
    """A step that answers once the event is set."""
    opened = asyncio.Event()

    async def step(call: Call) -> None:
        await opened.wait()
        await echo()(call)

    return opened, step


def chats(client: Client, count: int) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(client.chat(ask(str(number)))) for number in range(count)]


def test_an_endpoint_that_is_not_well_is_waited_for_and_burns_no_attempts() -> None:
    async def main() -> None:
        side = {**aside(), "/health": refuse(503, "engine dead")}
        async with (
            ScriptedEngine(default=refuse(500), side=side) as engine,
            Client(engine.url, retry=Retry(base=0.2, cap=0.2)) as client,
        ):
            tasks = chats(client, 20)
            await until(lambda: client.statistics().states[engine.url] == "down")
            await until(lambda: client.statistics().waiting == 20)
            sent = len(engine.calls)
            await asyncio.sleep(0.5)
            assert len(engine.calls) == sent <= 60
            engine.default, engine.side = echo(), aside()
            samples = await asyncio.gather(*tasks)
            assert [sample.text for sample in samples] == [str(number) for number in range(20)]

    run(main())


# -- engines that stop without an error ---------------------------------------------------------------


def metrics(running: Callable[[], int], tokens: Callable[[], int] = lambda: 7) -> Step:
    async def step(call: Call) -> None:
        body = (
            b"vllm:num_requests_running 0%d\nvllm:num_requests_waiting 0\nvllm:generation_tokens_total %d\n"
        )
        await call.write(http(200, body % (running(), tokens())))

    return step


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "SLOW_POLL", 0.05)
    monkeypatch.setattr(monitor, "POLL", 0.05)
    monkeypatch.setattr(monitor, "TEST_TIMEOUT", 0.2)
    monkeypatch.setattr(monitor, "LOST_AFTER", 0.3)
    monkeypatch.setattr(progress, "LOST_AFTER", 0.3)


@pytest.mark.usefixtures("hasty")
def test_the_requests_of_a_stalled_engine_are_done_elsewhere() -> None:
    async def main() -> None:
        side = {
            **aside(),
            "/metrics": metrics(lambda: 1),
            "/v1/models": raw(http(200, b'{"data": [{"id": "m"}]}')),
            "/v1/completions": stall(),
            "/is_paused": refuse(404),
        }
        async with (
            ScriptedEngine(default=stall(), side=side) as stuck,
            ScriptedEngine(default=echo()) as well,
            Client(stuck.url, retry=QUICK, stall=0.3) as client,
        ):
            tasks = chats(client, 3)
            await stuck.arrived(3)
            client.fleet.add(well.url)
            samples = await asyncio.gather(*tasks)
            assert {(sample.endpoint, sample.attempts) for sample in samples} == {(well.url, 2)}
            assert client.statistics().states[stuck.url] == "down"
            (test,) = [call for call in stuck.side_calls if call.path == "/v1/completions"][:1]
            assert (test.json["model"], test.json["max_tokens"]) == ("m", 1)
            # /health alone does not bring it back: it has to generate.
            await asyncio.sleep(0.4)
            assert client.statistics().states[stuck.url] == "down"
            stuck.side["/v1/completions"] = raw(http(200, b"{}"))
            await until(lambda: client.statistics().states[stuck.url] == "up")

    run(main())


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("has_metrics", [True, False])
def test_the_requests_of_a_server_that_answers_nothing_any_longer_are_done_elsewhere(
    monkeypatch: pytest.MonkeyPatch, has_metrics: bool
) -> None:
    """As of a process that is stopped: its connections are accepted, and nothing ever comes."""
    monkeypatch.setattr(monitor, "ASK_TIMEOUT", 0.1)

    async def main() -> None:
        side = {
            "/metrics": metrics(lambda: 1) if has_metrics else refuse(404),
            "/health": raw(http(200, b"")),
        }
        async with (
            ScriptedEngine(default=stall(), side=side) as stuck,
            ScriptedEngine(default=echo()) as well,
            Client(stuck.url, retry=QUICK, stall=0.5) as client,
        ):
            tasks = chats(client, 3)
            await stuck.arrived(3)
            await asyncio.sleep(0.4)  # it is seen to have metrics, or none
            stuck.side.clear()
            client.fleet.add(well.url)
            samples = await asyncio.gather(*tasks)
            assert {(sample.endpoint, sample.attempts) for sample in samples} == {(well.url, 2)}
            assert client.statistics().states[stuck.url] == "down"
            stuck.side["/health"] = raw(http(200, b""))
            await until(lambda: client.statistics().states[stuck.url] == "up")

    run(main())


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "why", ["paused", "paused and idle", "tokens flow", "the test is answered", "queued"]
)
def test_an_engine_that_only_takes_long_is_left_alone(why: str) -> None:
    async def main() -> None:
        opened, step = gate()
        ticks = iter(range(10**6))
        test_asked = asyncio.Event()

        async def behind_others(call: Call) -> None:
            test_asked.set()
            await stall()(call)

        def tokens() -> int:
            flowing = why == "tokens flow" or (why == "queued" and test_asked.is_set())
            return next(ticks) if flowing else 7

        side = {
            **aside(),
            "/metrics": metrics(lambda: 0 if why == "paused and idle" else 1, tokens),
            "/v1/models": raw(http(200, b'{"data": []}')),
            "/v1/completions": behind_others if why == "queued" else raw(http(200, b"{}")),
            "/is_paused": raw(http(200, b'{"is_paused": true}')) if why.startswith("paused") else refuse(404),
        }
        async with (
            ScriptedEngine(default=step, side=side) as engine,
            Client(engine.url, retry=QUICK, stall=0.2) as client,
        ):
            tasks = chats(client, 2)
            await asyncio.sleep(0.7)
            assert client.statistics().states == {engine.url: "up"}
            asked = {call.path for call in engine.side_calls}
            assert ("/is_paused" in asked) == (why != "tokens flow")
            opened.set()
            assert {sample.attempts for sample in await asyncio.gather(*tasks)} == {1}

    run(main())


@pytest.mark.usefixtures("hasty")
def test_a_request_an_idle_engine_has_lost_is_sent_again() -> None:
    async def main() -> None:
        side = {**aside(), "/metrics": metrics(lambda: 0), "/is_paused": refuse(404)}
        async with (
            ScriptedEngine([stall()], default=echo(), side=side) as engine,
            Client(engine.url, retry=QUICK) as client,
        ):
            sample = await client.chat(HELLO)
            assert (sample.attempts, sample.text) == (2, "hello")
            assert 0.25 < sample.latency < 2.0
            assert client.statistics().states == {engine.url: "up"}

    run(main())
