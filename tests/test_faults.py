"""All faults at once, over real sockets: every request ends in its sample or a typed error, and counts."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import orjson
import pytest

from penstock import Client, PenstockError, Retry, Sample, Timeouts
from tests.scripted import (
    Call,
    ScriptedEngine,
    Step,
    chat_body,
    echo,
    half_body,
    hang_up,
    http,
    raw,
    refuse,
    reset,
    run,
    stall,
)

REQUESTS = 400
RETRY = Retry(base=0.01, cap=0.1)
TIMEOUTS = Timeouts(first_byte=1.5, idle=1.0)


def slow_loris(pause: float) -> Step:
    """An answer that comes byte by byte, slower than anyone would wait for but never silent for long."""

    async def step(call: Call) -> None:
        body = http(200, chat_body(call.json["messages"][-1]["content"]))
        for start in range(0, len(body), 60):
            await call.write(body[start : start + 60])
            await asyncio.sleep(pause)

    return step


FAULTS: list[tuple[float, Step]] = [
    (0.03, reset()),
    (0.03, reset(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{")),
    (0.03, hang_up()),
    (0.03, half_body()),
    (0.03, refuse(429, retry_after="0")),
    (0.02, refuse(429)),
    (0.03, refuse(503)),
    (0.03, refuse(500)),
    (0.02, raw(http(200, chat_body(), length=9999), close=True)),
    (0.02, raw(http(200, chat_body(), length=20))),
    (0.02, raw(b"garbage\r\n\r\n")),
    (0.02, slow_loris(0.02)),
    (0.01, stall()),
    (0.01, stall(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n")),
    (0.01, refuse(400)),
]


class Mixture:
    """What the engines do, by chance, and how often they were asked for each prompt."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.asked: Counter[str] = Counter()
        self.rejected: set[str] = set()
        self.good = echo()

    async def __call__(self, call: Call) -> None:
        prompt = call.json["messages"][-1]["content"]
        self.asked[prompt] += 1
        roll = self.dice.random()
        for share, step in FAULTS:
            roll -= share
            if roll < 0:
                if step is FAULTS[-1][1]:
                    self.rejected.add(prompt)
                await step(call)
                return
        await asyncio.sleep(self.dice.random() * 0.02)
        await self.good(call)


async def ask(client: Client, prompt: str) -> Sample | PenstockError:
    try:
        return await client.chat([{"role": "user", "content": prompt}])
    except PenstockError as error:
        return error


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_each_request_ends_and_is_counted(seed: int) -> None:
    async def main() -> None:
        mixture = Mixture(seed)
        engines = [ScriptedEngine(default=mixture, idle_close=close) for close in (None, 0.05, 0.2)]
        for engine in engines:
            await engine.listen()
        urls = [engine.url for engine in engines]
        async with Client(urls, retry=RETRY, timeouts=TIMEOUTS, max_in_flight=32) as client:
            tasks = [asyncio.create_task(ask(client, str(n))) for n in range(REQUESTS)]
            for engine in engines[:2]:  # killed, and started again on the same port
                await asyncio.sleep(0.3)
                await engine.kill()
                await asyncio.sleep(0.2)
                await engine.listen()
            outcomes = await asyncio.wait_for(asyncio.gather(*tasks), 25)
            statistics = client.statistics()
            assert set(statistics.in_flight.values()) == {0} and statistics.waiting == 0
        failed = {str(n) for n, outcome in enumerate(outcomes) if isinstance(outcome, PenstockError)}
        assert failed == mixture.rejected, "only what an engine rejected is lost"
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, Sample):
                assert outcome.text == str(number)
                assert mixture.asked[str(number)] <= outcome.attempts + statistics.resent
        resent = mixture.asked.total() - sum(o.attempts for o in outcomes if isinstance(o, Sample))
        assert resent <= statistics.resent + len(failed) * RETRY.attempts
        for engine in engines:
            await engine.kill()

    run(main())


@pytest.mark.parametrize("idle_close", [2.0, pytest.param(5.0, marks=pytest.mark.slow)])
def test_idle_closes_between_bursts_cost_nothing(idle_close: float) -> None:
    """Connections that a server closes while they are idle, just when the next burst begins."""

    async def main() -> None:
        async with (
            ScriptedEngine(default=echo(), idle_close=idle_close) as engine,
            Client(engine.url, retry=RETRY) as client,
        ):
            for pause in (idle_close - 0.01, idle_close, idle_close + 0.01, 0.0):
                outcomes = await asyncio.gather(*(ask(client, str(n)) for n in range(100)))
                assert {o.attempts for o in outcomes if isinstance(o, Sample)} == {1}, outcomes
                assert len(outcomes) == 100
                await asyncio.sleep(pause)

    run(main())


def test_a_cancelled_request_leaves_its_engine_within_a_second() -> None:
    async def main() -> None:
        async with ScriptedEngine(default=stall()) as engine, Client(engine.url) as client:
            tasks = [asyncio.create_task(ask(client, str(n))) for n in range(50)]
            await engine.arrived(50)
            for task in tasks:
                task.cancel()
            await asyncio.wait_for(engine.drained(), 1.0)
            await asyncio.gather(*tasks, return_exceptions=True)
            assert client.statistics().in_flight == {engine.url: 0}

    run(main())


def test_a_request_has_an_id_and_each_attempt_its_own() -> None:
    async def main() -> None:
        async with (
            ScriptedEngine([refuse(500), refuse(500)], default=echo()) as engine,
            Client(engine.url, retry=RETRY) as client,
        ):
            assert (await client.chat([{"role": "user", "content": "x"}])).attempts == 3
            first, second, third = (call.headers["x-request-id"] for call in engine.calls)
            assert (second, third) == (f"{first}-2", f"{first}-3")
            assert orjson.loads(engine.calls[0].body) == orjson.loads(engine.calls[2].body)

    run(main())
