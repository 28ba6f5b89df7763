"""The client against a scripted engine: samples, faults, retries, outages, cancellation."""

from __future__ import annotations

import asyncio
import pickle
import random

import pytest
import uvloop

from penstock.client import Client
from penstock.errors import (
    ConfigError,
    ConnectFailed,
    ConnectionLost,
    MalformedResponse,
    Overloaded,
    PenstockError,
    PhaseTimeout,
    RequestRejected,
    ServerFailed,
)
from penstock.fleet.health import Breaker
from penstock.fleet.retry import Retry
from penstock.sample import SamplingParams, Usage
from penstock.wire.connection import Timeouts
from penstock.wire.loop import raise_open_files
from tests.scripted import (
    Call,
    ScriptedEngine,
    Step,
    answer,
    chat_body,
    chunked,
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

QUICK = Retry(base=0.01, cap=0.02)
HELLO = [{"role": "user", "content": "hello"}]


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_chat_and_what_is_sent() -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:
            client = Client(engine.url + "/prefix", model="m", api_key="secret")
            async with client:
                params = SamplingParams(temperature=0.5, max_tokens=7)
                sample = await client.chat(HELLO, params, extra_body={"top_k": 3}, request_id="r-1")
                assert (sample.text, sample.finish_reason, sample.usage) == ("hello", "stop", Usage(3, 2))
                assert (sample.endpoint, sample.attempts) == (engine.url + "/prefix", 1)
                assert 0 < sample.latency < 5
                await client.complete([1, 2], model="other")
            chat, text = engine.calls
            assert (chat.method, chat.path) == ("POST", "/prefix/v1/chat/completions")
            assert chat.headers["authorization"] == "Bearer secret"
            assert chat.headers["x-request-id"] == "r-1"
            assert chat.headers["host"] == f"127.0.0.1:{engine.port}"
            assert chat.json == {
                "model": "m",
                "messages": HELLO,
                "temperature": 0.5,
                "max_tokens": 7,
                "top_k": 3,
            }
            assert text.path == "/prefix/v1/completions"
            assert text.json == {"model": "other", "prompt": [1, 2]}

    run(main())


FAULTS: list[tuple[Step, type[PenstockError]]] = [
    (refuse(429), Overloaded),
    (refuse(503), Overloaded),
    (refuse(500), ServerFailed),
    (raw(http(502, b"<html>Bad Gateway</html>")), ServerFailed),
    (half_body(), ConnectionLost),
    (hang_up(), ConnectionLost),
    (reset(), ConnectionLost),
    (reset(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"), ConnectionLost),
    (raw(http(200, b'{"choices": []}')), MalformedResponse),
    (raw(http(200, b"not json")), MalformedResponse),
    (raw(http(200, b"")), MalformedResponse),
    (raw(b"garbage\r\n\r\n"), MalformedResponse),
    (raw(http(200, chat_body(), length=9999), close=True), ConnectionLost),
    (raw(http(200, chat_body(), length=20)), MalformedResponse),
    (stall(), PhaseTimeout),
    (stall(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"), PhaseTimeout),
]


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
def test_a_fault_is_retried_and_when_it_lasts_it_is_the_error(fault: Step, kind: type[PenstockError]) -> None:
    async def main() -> None:
        async with ScriptedEngine([fault, answer("fine")], default=fault) as engine:
            timeouts = Timeouts(first_byte=0.1, idle=0.1)
            retry = Retry(attempts=2, base=0.01)
            async with Client(engine.url, timeouts=timeouts, retry=retry) as client:
                sample = await client.chat(HELLO)
                assert (sample.text, sample.attempts, len(engine.calls)) == ("fine", 2, 2)
                with pytest.raises(kind) as caught:
                    await client.chat(HELLO)
                assert type(caught.value) is kind
                statistics = client.statistics()
                assert statistics.in_flight == {engine.url: 0}
                assert len(engine.calls) == 4 + statistics.resent
            await asyncio.wait_for(engine.drained(), 5)

    run(main())


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_rejected_request_is_not_sent_again(status: int) -> None:
    async def main() -> None:
        words = "429 rate limit, 503 overloaded, connection reset"  # the words of an error decide nothing
        async with (
            ScriptedEngine(default=refuse(status, words)) as engine,
            Client(engine.url, retry=QUICK) as client,
        ):
            with pytest.raises(RequestRejected) as caught:
                await client.chat(HELLO)
            assert (caught.value.status, caught.value.message, caught.value.param) == (status, words, "p")
            assert len(engine.calls) == 1

    run(main())


def test_one_answer_in_five_a_429_loses_nothing() -> None:
    async def main() -> None:
        dice = random.Random(7)
        good, bad = echo(), refuse(429)

        async def flaky(call: Call) -> None:
            await (bad if dice.random() < 0.2 else good)(call)

        async with ScriptedEngine(default=flaky) as engine, Client(engine.url, retry=QUICK) as client:
            samples = await asyncio.gather(*(client.chat(ask(str(n))) for n in range(400)))
            assert [sample.text for sample in samples] == [str(n) for n in range(400)]
            failed = sum(sample.attempts - 1 for sample in samples)
            assert client.statistics().retries == failed == len(engine.calls) - 400 > 40

    run(main())


def test_retry_after_is_obeyed() -> None:
    async def main() -> None:
        async with (
            ScriptedEngine([refuse(429, retry_after="1")]) as engine,
            Client(engine.url, retry=QUICK) as client,
        ):
            sample = await client.chat(HELLO)
            assert 1.0 <= sample.latency < 2.0

    run(main())


def test_the_slot_is_given_back_before_the_backoff_is_slept() -> None:
    async def main() -> None:
        async with (
            ScriptedEngine([refuse(429, retry_after="0.5")], default=echo()) as engine,
            Client(engine.url, retry=QUICK, max_in_flight=1) as client,
        ):
            first = asyncio.create_task(client.chat(ask("first")))
            await engine.arrived(1)
            second = await client.chat(ask("second"))
            assert second.latency < 0.4 and not first.done()
            assert (await first).text == "first"

    run(main())


def test_the_next_attempt_goes_elsewhere() -> None:
    async def main() -> None:
        async with (
            ScriptedEngine(default=refuse(500)) as bad,
            ScriptedEngine([stall()]) as good,
            Client([bad.url, good.url], retry=QUICK, breaker=Breaker(failure_threshold=100)) as client,
        ):
            busy = asyncio.create_task(client.chat(HELLO))
            await good.arrived(1)
            for _ in range(10):  # the bad one has less in flight: left to the policy, it would be asked again
                sample = await client.chat(HELLO)
                assert (sample.endpoint, sample.attempts) == (good.url, 2)
            busy.cancel()
            await asyncio.gather(busy, return_exceptions=True)

    run(main())


def test_requests_over_the_limit_wait_in_line() -> None:
    async def main() -> None:
        async with (
            ScriptedEngine(default=answer(delay=0.01)) as one,
            ScriptedEngine(default=echo()) as two,
            Client([one.url, two.url], max_in_flight=3) as client,
        ):
            tasks = [asyncio.create_task(client.chat(ask(str(n)))) for n in range(60)]
            await asyncio.sleep(0)
            assert client.statistics().waiting == 54
            await asyncio.gather(*tasks)
            assert one.most_in_flight == 3 and two.most_in_flight <= 3
            assert len(two.calls) > len(one.calls)  # the faster one gets more

        async with ScriptedEngine(default=echo()) as engine, Client(engine.url, max_in_flight=1) as client:
            await asyncio.gather(*(client.chat(ask(str(n))) for n in range(30)))
            assert [call.json["messages"][0]["content"] for call in engine.calls] == [
                str(n) for n in range(30)
            ]
            assert engine.accepted == 1

    run(main())


def test_random_cancellation_leaves_exact_counts_and_a_free_engine() -> None:
    async def main() -> None:
        dice = random.Random(11)
        steps = [answer(delay=0.005), answer(), stall(), refuse(500), hang_up(), reset(), half_body()]

        async def any_of(call: Call) -> None:
            await dice.choice(steps)(call)

        async with ScriptedEngine(default=any_of) as one, ScriptedEngine(default=any_of) as two:
            timeouts = Timeouts(first_byte=0.2)
            async with Client([one.url, two.url], retry=QUICK, max_in_flight=8, timeouts=timeouts) as client:

                async def request(number: int) -> None:
                    task = asyncio.create_task(client.chat(ask(str(number))))
                    await asyncio.sleep(dice.choice([0, 0, 0.001, 0.01, 0.05]))
                    if dice.random() < 0.7:
                        task.cancel()
                    try:
                        await task
                    except (PenstockError, asyncio.CancelledError):
                        pass

                await asyncio.gather(*(request(number) for number in range(250)))
                statistics = client.statistics()
                assert set(statistics.in_flight.values()) == {0}
                assert statistics.waiting == 0
                # an engine may not have seen yet that a request was given up when the next one is there
                assert max(one.most_in_flight, two.most_in_flight) <= 12
                one.default = two.default = echo()
                texts = [sample.text for sample in await asyncio.gather(*map(client.chat, map(ask, "abcd")))]
                assert texts == list("abcd")
            await asyncio.wait_for(asyncio.gather(one.drained(), two.drained()), 5)

    run(main())


def test_models_and_health() -> None:
    async def main() -> None:
        listing = raw(http(200, b'{"data": [{"id": "a"}, {"id": "b"}]}'))
        gone = ScriptedEngine()
        await gone.listen()
        await gone.kill()
        async with (
            ScriptedEngine([refuse(404)], default=listing, side={}) as well,
            ScriptedEngine(default=refuse(500), side={}) as unwell,
            Client([gone.url, unwell.url, well.url]) as client,
        ):
            report = await client.health()
            assert report[well.url] is None  # it has answered, if only to say that it has no such route
            assert isinstance(report[unwell.url], ServerFailed)
            assert isinstance(report[gone.url], ConnectFailed)
            assert await client.models() == ["a", "b"]
            assert (well.calls[-1].method, well.calls[-1].path) == ("GET", "/v1/models")
        async with Client(gone.url) as client:
            with pytest.raises(ConnectFailed, match="refused"):
                await client.models()

    run(main())


def test_a_client_pickles_and_opens_again_in_another_loop() -> None:
    async def main(client: Client) -> None:
        async with ScriptedEngine() as engine:
            client.fleet.addresses = Client(engine.url).fleet.addresses
            async with client:
                assert (await client.chat(HELLO)).text == "hello"
                copy = pickle.loads(pickle.dumps(client))
                with pytest.raises(ConfigError, match="not open"):
                    await copy.chat(HELLO)
                with pytest.raises(ConfigError, match="already open"):
                    await client.__aenter__()
                async with copy:
                    assert (await copy.chat(HELLO)).text == "hello"
                elsewhere = asyncio.to_thread(lambda: uvloop.run(ask_elsewhere(client)))
                with pytest.raises(ConfigError, match="another event loop"):
                    await elsewhere
            first, second = (dict(call.headers) for call in engine.calls)
            assert first.pop("x-request-id") != second.pop("x-request-id") and first == second

    async def ask_elsewhere(client: Client) -> None:
        await client.chat(HELLO)

    client = Client("http://h", api_key="k", retry=QUICK)
    for _ in range(2):
        run(main(client))


def test_leaving_the_block_ends_what_is_under_way() -> None:
    async def main() -> None:
        async with ScriptedEngine(default=stall()) as engine:
            client = Client(engine.url, max_in_flight=1)
            async with client:
                sent = asyncio.create_task(client.chat(HELLO))
                waiting = asyncio.create_task(client.chat(HELLO))
                await engine.arrived(1)
            with pytest.raises(ConnectionLost):
                await sent
            with pytest.raises(ConfigError, match="closed"):
                await waiting
            await asyncio.wait_for(engine.drained(), 5)

    run(main())


@pytest.mark.parametrize("seed", range(3))
def test_chunked_answers(seed: int) -> None:
    async def main() -> None:
        text = "é" * 500 + str(seed)
        async with ScriptedEngine(default=chunked(text, seed)) as engine, Client(engine.url) as client:
            samples = await asyncio.gather(*(client.chat(HELLO) for _ in range(10)))
            assert {sample.text for sample in samples} == {text}

    run(main())


def test_servers_that_close_after_each_answer_or_while_idle() -> None:
    async def main() -> None:
        async with ScriptedEngine(default=answer(close=True)) as engine, Client(engine.url) as client:
            for _ in range(3):
                for sample in await asyncio.gather(*(client.chat(HELLO) for _ in range(20))):
                    assert sample.attempts == 1
        async with ScriptedEngine(idle_close=0.01) as engine, Client(engine.url) as client:
            for _ in range(10):
                assert (await client.chat(HELLO)).attempts == 1
                await asyncio.sleep(0.012)

    run(main())


def test_two_thousand_chats_in_flight() -> None:
    count = 2000
    raise_open_files()

    async def main() -> None:
        full = asyncio.Event()

        async def together(call: Call) -> None:
            if engine.most_in_flight == count:
                full.set()
            await full.wait()
            await echo()(call)

        async with ScriptedEngine(default=together) as engine, Client(engine.url) as client:
            samples = await asyncio.gather(*(client.chat(ask(str(n))) for n in range(count)))
            assert [sample.text for sample in samples] == [str(n) for n in range(count)]
            assert {sample.attempts for sample in samples} == {1}
            assert client.statistics().connections in (count, count + 1)  # one for the metrics

    run(main())


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one base URL"):
        Client([])
    with pytest.raises(ConfigError, match="max_in_flight"):
        Client("http://h", max_in_flight=0)
    with pytest.raises(ConfigError, match="API key"):
        Client("http://h", api_key="a\r\nb")
    assert len(Client(["http://h", "h:80/v1", "h"]).fleet.addresses) == 1

    async def main() -> None:
        async with ScriptedEngine() as engine, Client(engine.url) as client:
            with pytest.raises(ConfigError, match="request id"):
                await client.chat(HELLO, request_id="a\nb")
            with pytest.raises(ConfigError, match="JSON"):
                await client.chat(ask("\ud800"))
            assert engine.calls == [] and client.statistics().in_flight == {engine.url: 0}

    run(main())
