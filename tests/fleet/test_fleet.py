"""A fleet over real sockets: members that come and go, and what a failing one costs."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections import Counter
from typing import Any

import pytest

from penstock.client import Client
from penstock.errors import ConfigError, DeadlineExceeded, FleetDown, PenstockError, RequestRejected
from penstock.fleet.attempts import Attempts
from penstock.fleet.fleet import Fleet
from penstock.fleet.health import Breaker
from penstock.fleet.retry import Budget, Retry
from tests.scripted import (
    Call,
    ScriptedEngine,
    Step,
    aside,
    echo,
    http,
    raw,
    refuse,
    reset,
    run,
    stall,
    until,
)

QUICK = Retry(base=0.01, cap=0.02)
BROKEN = reset(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
"""A connection that dies with the answer begun: before, a reused one would be replaced without a word."""
HELLO = [{"role": "user", "content": "hello"}]


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def texts(engine: ScriptedEngine) -> list[str]:
    return [call.json["messages"][0]["content"] for call in engine.calls]


def gate() -> tuple[asyncio.Event, Step]:
    """A step that answers once the event is set."""
    opened = asyncio.Event()

    async def step(call: Call) -> None:
        await opened.wait()
        await echo()(call)

    return opened, step


def chats(client: Client, count: int) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(client.chat(ask(str(number)))) for number in range(count)]


# -- members ----------------------------------------------------------------------------------------


def test_what_waits_goes_to_an_endpoint_that_joins() -> None:
    async def main() -> None:
        opened, step = gate()
        async with (
            ScriptedEngine(default=step) as busy,
            ScriptedEngine(default=echo()) as fresh,
            Client(busy.url, max_in_flight=1) as client,
        ):
            first, *rest = chats(client, 5)
            await busy.arrived(1)
            assert client.statistics().waiting == 4
            client.fleet.add(fresh.url)
            client.fleet.add(fresh.url)  # again is nothing
            samples = await asyncio.gather(*rest)
            assert {sample.endpoint for sample in samples} == {fresh.url}
            assert texts(fresh) == ["1", "2", "3", "4"]
            opened.set()
            assert (await first).endpoint == busy.url

    run(main())


def test_a_drained_endpoint_finishes_what_it_has_and_gets_no_more() -> None:
    async def main() -> None:
        opened, step = gate()
        async with (
            ScriptedEngine(default=step) as leaving,
            ScriptedEngine(default=echo()) as other,
            Client(leaving.url) as client,
        ):
            there = chats(client, 3)
            await leaving.arrived(3)
            client.fleet.add(other.url)
            draining = asyncio.create_task(client.fleet.drain(leaving.url))
            await asyncio.sleep(0)
            assert [end.name for end in client.fleet.endpoints] == [other.url]
            samples = await asyncio.gather(*chats(client, 5))
            assert {sample.endpoint for sample in samples} == {other.url} and not draining.done()
            opened.set()
            assert await draining is True
            assert {(await task).endpoint for task in there} == {leaving.url}
            await asyncio.wait_for(leaving.drained(), 5)
            assert client.fleet.dispatch.in_flight == 0
            with pytest.raises(ConfigError, match="is not in the fleet"):
                await client.fleet.drain(leaving.url)

    run(main())


def test_what_a_drain_cuts_off_is_tried_elsewhere() -> None:
    async def main() -> None:
        async with (
            ScriptedEngine(default=stall()) as leaving,
            ScriptedEngine(default=echo()) as other,
            Client(leaving.url, retry=QUICK) as client,
        ):
            there = chats(client, 3)
            await leaving.arrived(3)
            client.fleet.add(other.url)
            assert await client.fleet.drain(leaving.url, timeout=0.1) is False
            samples = await asyncio.gather(*there)
            assert [(it.text, it.endpoint, it.attempts) for it in samples] == [
                (str(number), other.url, 2) for number in range(3)
            ]
            await asyncio.wait_for(leaving.drained(), 5)

    run(main())


def test_what_is_in_flight_where_an_endpoint_is_removed_is_tried_elsewhere() -> None:
    async def main() -> None:
        async with (
            ScriptedEngine(default=stall()) as leaving,
            ScriptedEngine(default=echo()) as other,
            Client(leaving.url, retry=QUICK, max_in_flight=300) as client,
        ):
            sent = chats(client, 3)
            await leaving.arrived(3)
            sent += chats(client, 297)
            await asyncio.sleep(0)  # so many that some have no connection yet
            client.fleet.add(other.url)
            await client.fleet.remove(leaving.url)
            samples = await asyncio.gather(*sent)
            assert {sample.endpoint for sample in samples} == {other.url}
            assert client.statistics().in_flight == {other.url: 0}
            assert client.fleet.dispatch.in_flight == 0
            await asyncio.wait_for(leaving.drained(), 5)

    run(main())


def test_without_any_endpoint_requests_wait_as_long_as_an_outage_may_last() -> None:
    async def main() -> None:
        retry = Retry(base=0.01, cap=0.02, outage=0.5)
        async with ScriptedEngine(default=echo()) as engine, Client(engine.url, retry=retry) as client:
            await client.fleet.remove(engine.url)
            task = asyncio.create_task(client.chat(HELLO))
            await until(lambda: client.statistics().waiting == 1)
            client.fleet.add(engine.url)
            assert (await task).attempts == 1
            await client.fleet.remove(engine.url)
            started = time.monotonic()
            with pytest.raises(FleetDown, match=r"waited \d+ s for an endpoint to join the fleet"):
                await client.chat(HELLO)
            assert 0.3 < time.monotonic() - started < 2.0

    run(main())


def test_one_fleet_serves_two_clients() -> None:
    async def main() -> None:
        opened, step = gate()
        async with ScriptedEngine(default=step) as engine, Fleet(engine.url, max_in_flight=2) as fleet:
            async with Client(fleet, model="a") as one, Client(fleet, model="b") as two:
                tasks = chats(one, 2) + chats(two, 2)
                await engine.arrived(2)
                assert one.statistics() == two.statistics() and one.statistics().waiting == 2
                opened.set()
                await asyncio.gather(*tasks)
                assert engine.most_in_flight == 2
                assert {call.json["model"] for call in engine.calls} == {"a", "b"}
            assert not fleet.closed  # it was open before them
            with pytest.raises(ConfigError, match="not open"):
                await one.chat(HELLO)
            async with Client(fleet) as three:
                assert (await three.chat(HELLO)).text == "hello"

    run(main())


def test_a_client_opens_a_fleet_that_is_not_open_and_closes_it() -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:
            fleet = Fleet(engine.url)
            for _ in range(2):
                async with Client(fleet) as client:
                    assert (await client.chat(HELLO)).text == "hello"
                assert fleet.closed
        with pytest.raises(ConfigError, match="max_in_flight"):
            Client(fleet, max_in_flight=3)

    run(main())


def test_a_fleet_pickles_with_the_members_it_has() -> None:
    async def main() -> None:
        async with ScriptedEngine() as one, ScriptedEngine() as two:
            async with Fleet(one.url, max_in_flight=7, policy="round_robin", retry=QUICK) as fleet:
                fleet.add(two.url)
                await fleet.remove(one.url)
                copy = pickle.loads(pickle.dumps(fleet))
                # Nothing of the random numbers' state: copies would all draw the same.
                assert copy.closed and copy.settings == fleet.settings and len(pickle.dumps(fleet)) < 1500
            async with Client(copy) as client:
                assert (await client.chat(HELLO)).endpoint == two.url

    run(main())


def test_a_fleet_that_is_closed_and_opened_at_once_counts_from_zero() -> None:
    async def main() -> None:
        async with ScriptedEngine(default=stall()) as engine:
            fleet = Fleet(engine.url)
            await fleet.__aenter__()
            client = Client(fleet)
            async with client:
                tasks = chats(client, 5)
                await engine.arrived(5)
            await fleet.__aexit__(None, None, None)
            await fleet.__aenter__()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(outcome, PenstockError) for outcome in outcomes)
            assert fleet.dispatch.in_flight == 0
            await fleet.__aexit__(None, None, None)

    run(main())


# -- the breaker ------------------------------------------------------------------------------------


def test_one_of_three_that_fails_is_left_out_and_comes_back_after_one_trial() -> None:
    async def main() -> None:
        breaker = Breaker(failure_threshold=3, timeout=0.3)
        async with (
            ScriptedEngine(default=refuse(500)) as bad,
            ScriptedEngine(default=echo()) as one,
            ScriptedEngine(default=echo()) as two,
            Client([bad.url, one.url, two.url], retry=QUICK, breaker=breaker) as client,
        ):
            samples = [await client.chat(HELLO) for _ in range(20)]
            assert bad.url not in {sample.endpoint for sample in samples}
            assert len(bad.calls) == 3 and client.statistics().states[bad.url] == "open"
            opened, step = gate()
            bad.default = step
            await until(lambda: client.statistics().states[bad.url] == "half_open")
            tasks = chats(client, 20)
            await bad.arrived(4)
            await asyncio.wait(tasks, timeout=0.1)
            assert len(bad.calls) == 4  # a single trial
            opened.set()
            await asyncio.gather(*tasks)
            assert client.statistics().states[bad.url] == "up"
            await asyncio.gather(*chats(client, 30))
            assert len(bad.calls) == 14

    run(main())


def test_no_more_than_half_of_a_fleet_is_left_out() -> None:
    async def main() -> None:
        engines = [ScriptedEngine(default=refuse(500)) for _ in range(4)]
        for engine in engines:
            await engine.listen()
        retry = Retry(attempts=2, base=0.001)
        breaker = Breaker(failure_threshold=2, timeout=60.0)
        async with Client([engine.url for engine in engines], retry=retry, breaker=breaker) as client:
            await asyncio.gather(*chats(client, 40), return_exceptions=True)
            assert Counter(client.statistics().states.values()) == {"open": 2, "up": 2}
            for engine in engines:
                engine.default = echo()
            samples = await asyncio.gather(*chats(client, 10))
            assert {sample.attempts for sample in samples} == {1}
        for engine in engines:
            await engine.kill()

    run(main())


@pytest.mark.parametrize("status", [400, 404, 422, 429])
def test_a_4xx_opens_no_breaker(status: int) -> None:
    async def main() -> None:
        breaker, retry = Breaker(failure_threshold=1), Retry(attempts=2, base=0.001)
        async with (
            ScriptedEngine(default=refuse(status)) as one,
            ScriptedEngine(default=refuse(status)) as two,
            Client([one.url, two.url], breaker=breaker, retry=retry) as client,
        ):
            outcomes = await asyncio.gather(*chats(client, 20), return_exceptions=True)
            assert all(isinstance(outcome, PenstockError) for outcome in outcomes)
            assert set(client.statistics().states.values()) == {"up"}

    run(main())


# -- order and place --------------------------------------------------------------------------------


def test_a_session_stays_at_its_endpoint_which_is_told() -> None:
    async def main() -> None:
        engines = [ScriptedEngine(default=echo()) for _ in range(3)]
        for engine in engines:
            await engine.listen()
        async with Client([engine.url for engine in engines]) as client:
            where: dict[str, set[str | None]] = {}
            for turn in range(4):
                for number in range(12):
                    sample = await client.chat(ask(f"{number}.{turn}"), session_id=f"s{number}")
                    where.setdefault(f"s{number}", set()).add(sample.endpoint)
            assert all(len(places) == 1 for places in where.values())
            assert len({place for places in where.values() for place in places}) == 3
            for engine in engines:
                for call in engine.calls:
                    number = call.json["messages"][0]["content"].split(".")[0]
                    assert call.headers["x-session-id"] == f"s{number}"
            with pytest.raises(ConfigError, match="session id"):
                await client.chat(HELLO, session_id="a\nb")
        for engine in engines:
            await engine.kill()

    run(main())


def test_lower_priority_numbers_go_first() -> None:
    async def main() -> None:
        opened, step = gate()
        async with ScriptedEngine(default=step) as engine, Client(engine.url, max_in_flight=1) as client:
            tasks = chats(client, 1)
            await engine.arrived(1)
            for name, priority in (("late", 5), ("normal", 0), ("first", -1), ("second", -1)):
                tasks.append(asyncio.create_task(client.chat(ask(name), priority=priority)))
            await until(lambda: client.statistics().waiting == 4)
            opened.set()
            await asyncio.gather(*tasks)
            assert texts(engine) == ["0", "first", "second", "normal", "late"]

    run(main())


def test_a_request_cancelled_between_its_slot_and_its_waking_gives_the_slot_back() -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine, Client(engine.url, max_in_flight=1) as client:
            holder = Attempts(client.fleet)
            assert holder.take() is not None
            (task,) = chats(client, 1)
            await until(lambda: client.statistics().waiting == 1)
            holder.succeeded(1, 0.1)  # the slot is the task's, which does not know yet
            assert client.statistics().in_flight == {engine.url: 1}
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() and client.statistics().in_flight == {engine.url: 0}
            assert (await client.chat(HELLO)).attempts == 1

    run(main())


# -- deadlines --------------------------------------------------------------------------------------


def test_the_time_of_a_request_ends_it_where_it_is_and_says_where() -> None:
    async def main() -> None:
        async with ScriptedEngine(default=stall()) as engine, Client(engine.url, max_in_flight=1) as client:
            in_flight = asyncio.create_task(client.chat(HELLO, timeout=0.4))
            await engine.arrived(1)
            left = float(engine.calls[0].headers["x-request-timeout"])
            assert 0.2 < left <= 0.4
            with pytest.raises(DeadlineExceeded, match="attempt 1 waited for a slot"):
                await client.chat(HELLO, timeout=0.1)
            with pytest.raises(DeadlineExceeded, match=f"attempt 1 was in flight at {engine.url}"):
                await in_flight
            await asyncio.wait_for(engine.drained(), 1)  # so that it stops generating
            assert len(engine.calls) == 1 and client.statistics().in_flight == {engine.url: 0}

    run(main())


def test_a_backoff_beyond_the_deadline_is_not_waited_for() -> None:
    async def main() -> None:
        patient = refuse(429, retry_after="5")
        async with ScriptedEngine(default=patient) as engine, Client(engine.url, retry=QUICK) as client:
            started = time.monotonic()
            with pytest.raises(PenstockError, match="429"):
                await client.chat(HELLO, timeout=2.0)
            assert time.monotonic() - started < 1.0
            engine.default = stall()
            engine.script.append(refuse(429))
            with pytest.raises(DeadlineExceeded, match=f"attempt 2 was in flight at {engine.url}"):
                await client.chat(HELLO, timeout=1.0)
            with pytest.raises(ConfigError, match="timeout"):
                await client.chat(HELLO, timeout=0.0)

    run(main())


# -- names of requests ------------------------------------------------------------------------------


def test_each_attempt_has_an_id_of_its_own() -> None:
    async def main() -> None:
        script = [refuse(500), BROKEN, refuse(429)]
        async with ScriptedEngine(script) as engine, Client(engine.url, retry=QUICK) as client:
            await client.chat(HELLO, request_id="job-7")
            await client.chat(HELLO)
            await client.chat(HELLO)
            ids = [call.headers["x-request-id"] for call in engine.calls]
            assert ids[:4] == ["job-7", "job-7-2", "job-7-3", "job-7-4"]
            assert len(set(ids)) == 6

    run(main())


def test_an_attempt_that_was_never_sent_takes_no_number() -> None:
    async def main() -> None:
        engine = ScriptedEngine(default=echo())
        await engine.listen()
        await engine.kill()
        async with Client(engine.url, retry=QUICK) as client:
            task = asyncio.create_task(client.chat(HELLO, request_id="job-7"))
            await until(lambda: client.statistics().states[engine.url] == "down")
            await engine.listen()
            assert (await task).attempts == 1
            assert engine.calls[-1].headers["x-request-id"] == "job-7"
        await engine.kill()

    run(main())


@pytest.mark.parametrize("status", [200, 404])
def test_an_engine_is_told_of_requests_whose_connection_was_lost(status: int) -> None:
    async def main() -> None:
        side = {**aside(), "/abort_requests": raw(http(status, b"{}"))}
        async with (
            ScriptedEngine([BROKEN], side=side) as engine,
            Client(engine.url, retry=QUICK) as client,
        ):

            def told() -> list[Call]:
                return [call for call in engine.side_calls if call.path == "/abort_requests"]

            await client.chat(HELLO, request_id="job-7")
            await until(told)
            (call,) = told()
            assert call.method == "POST"
            assert set(call.json["request_ids"]) == {"job-7", "chatcmpl-job-7", "cmpl-job-7"}
            engine.script.append(BROKEN)
            await client.chat(HELLO, request_id="job-8")
            if status == 200:
                await until(lambda: len(told()) == 2)
            else:
                await asyncio.sleep(0.2)
                assert len(told()) == 1

    run(main())


# -- what failures cost -----------------------------------------------------------------------------


def test_retries_of_what_may_have_been_generated_keep_to_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Budget, "BURST", 20.0)
    monkeypatch.setattr(Budget, "SHARE", 2.0)

    async def main() -> None:
        turns = 0

        async def half(call: Call) -> None:
            nonlocal turns
            turns += 1
            await (BROKEN if turns % 2 else echo())(call)

        never, patient = Breaker(failure_threshold=1000), Retry(attempts=50, base=0.001)
        async with (
            ScriptedEngine(default=half) as engine,
            Client(engine.url, retry=patient, breaker=never, max_in_flight=50) as client,
        ):
            started = time.monotonic()
            samples = await asyncio.gather(*chats(client, 100))
            seconds = time.monotonic() - started
            assert [sample.text for sample in samples] == [str(number) for number in range(100)]
            sent = len(engine.calls)
            assert sent == sum(sample.attempts for sample in samples) >= 190
            assert sent <= 100 * 1.1 + 50 + 100 * seconds + 1

    run(main())


def test_a_rejected_request_is_told_as_it_is() -> None:
    async def main() -> None:
        async with ScriptedEngine(default=refuse(400, "bad")) as engine, Client(engine.url) as client:
            with pytest.raises(RequestRejected, match="bad"):
                await client.chat(HELLO)
            assert client.statistics().retries == 0

    run(main())


def test_sglang_is_told_by_name_of_what_is_given_up() -> None:
    """It is known by its metrics; a request carries its id in the body, and is aborted by that id."""
    metrics = b"\nsglang:num_running_reqs 1.0\nsglang:num_queue_reqs 0.0\n"

    async def main() -> None:
        well = raw(http(200, b""))
        quiet = {"/metrics": raw(http(200, metrics)), "/abort_request": well, "/health": well}
        async with ScriptedEngine(default=stall(), side=quiet) as engine, Client(engine.url) as client:
            first = asyncio.create_task(client.chat(HELLO))
            await engine.arrived(1)
            (endpoint,) = client.fleet.endpoints
            await until(lambda: endpoint.takes_rid)
            second = asyncio.create_task(client.chat(HELLO, request_id="mine"))
            await engine.arrived(2)
            assert engine.calls[1].json["rid"] == "mine"
            for task in (first, second):
                task.cancel()
            await asyncio.gather(first, second, return_exceptions=True)
            await until(lambda: len([c for c in engine.side_calls if c.path == "/abort_request"]) == 2)
            aborts = {call.json["rid"] for call in engine.side_calls if call.path == "/abort_request"}
            assert aborts == {engine.calls[0].headers["x-request-id"], "mine"}

    run(main())
