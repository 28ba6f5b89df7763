"""Endpoints that go down and come back, and the requests that wait for them."""

from __future__ import annotations

import asyncio
import time

import pytest

from penstock.client import Client, Retry
from penstock.errors import ConnectFailed, FleetDown, PenstockError
from tests.scripted import Call, ScriptedEngine, answer, echo, refuse, run, until

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
            await until(lambda: client._session and client._session.dispatch.endpoints[0].up)
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
            await until(lambda: any(call.path == "/health" for call in lost.calls))
            await until(lambda: client._session and client._session.dispatch.endpoints[0].up)
            await asyncio.gather(*(client.chat(HELLO) for _ in range(20)))
            assert sum(call.method == "POST" for call in lost.calls) == 10
            await lost.kill()

    run(main())


def test_an_engine_that_is_up_but_unwell_stays_down() -> None:
    async def main() -> None:
        engine = ScriptedEngine(default=refuse(503, "loading"))
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
