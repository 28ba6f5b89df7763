"""The pool over real sockets: reuse, loss, cancellation, TLS, thousands of connections."""

from __future__ import annotations

import asyncio
import random
import socket
import time

import pytest

from penstock.errors import ConfigError, ConnectFailed, ConnectionLost, MalformedResponse, PhaseTimeout
from penstock.wire.address import Address
from penstock.wire.connection import Timeouts
from penstock.wire.connector import CONNECTING
from penstock.wire.loop import raise_open_files
from penstock.wire.pool import Pool
from tests.scripted import (
    Call,
    ScriptedEngine,
    answer,
    chat_body,
    chunked,
    echo,
    half_body,
    hang_up,
    http,
    raw,
    reset,
    run,
    stall,
)

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\n"


def pool_of(engine: ScriptedEngine, **settings: float) -> Pool:
    keep_alive = settings.pop("keep_alive", 4.0)
    return Pool(Address.parse(engine.url), timeouts=Timeouts(**settings), keep_alive=keep_alive)


def test_a_connection_is_reused_last_in_first_out() -> None:
    async def main() -> None:
        async with ScriptedEngine(default=answer(delay=0.02)) as engine:
            pool = pool_of(engine)
            await asyncio.gather(*(pool.request(HEAD, b"{}") for _ in range(3)))
            assert (engine.accepted, pool.statistics().idle) == (3, 3)
            for _ in range(5):
                assert (await pool.request(HEAD, b"{}")).body == chat_body()
            assert engine.accepted == 3
            await pool.close()
            assert (pool.statistics().connections, pool.statistics().idle) == (0, 0)

    run(main())


def test_who_waits_to_connect_takes_what_has_become_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.wire.connector.CONNECTING", 1)

    async def main() -> None:
        async with ScriptedEngine() as engine:
            pool = Pool(Address.parse(engine.url))
            answers = await asyncio.gather(*(pool.request(HEAD) for _ in range(40)))
            assert {answer.status for answer in answers} == {200}
            assert pool.statistics().opened < 20
            await pool.close()

    run(main())


def test_idle_connections_are_closed_by_the_client_first() -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:
            pool = pool_of(engine, keep_alive=0.08)
            await pool.request(HEAD, b"{}")
            await asyncio.wait_for(engine.drained(), 2)
            assert pool.statistics().connections == 0
            await pool.request(HEAD, b"{}")
            assert (engine.accepted, pool.statistics().resent) == (2, 0)
            await pool.close()

    run(main())


def test_a_connection_the_server_closed_while_idle_is_replaced_unseen() -> None:
    async def main() -> None:
        async with ScriptedEngine(idle_close=0.03) as engine:
            pool = pool_of(engine)
            for _ in range(4):
                await pool.request(HEAD, b"{}")
                await asyncio.sleep(0.06)
            assert engine.accepted == 4
            await pool.close()

    run(main())


def test_a_reused_connection_that_dies_unanswered_is_resent_once() -> None:
    async def main() -> None:
        async with ScriptedEngine([answer(), hang_up(), answer("again")]) as engine:
            pool = pool_of(engine)
            await pool.request(HEAD, b"1")
            assert (await pool.request(HEAD, b"2")).body == chat_body("again")
            assert [call.body for call in engine.calls] == [b"1", b"2", b"2"]
            assert pool.statistics().resent == 1
            engine.script.extend([hang_up(), reset()])
            with pytest.raises(ConnectionLost) as caught:
                await pool.request(HEAD, b"3")
            assert not caught.value.reused
            assert [call.body for call in engine.calls[3:]] == [b"3", b"3"]
            await pool.close()

    run(main())


@pytest.mark.parametrize("step", [hang_up(), reset()])
def test_a_fresh_connection_that_dies_is_not_resent(step: object) -> None:
    async def main() -> None:
        async with ScriptedEngine([step]) as engine:  # type: ignore[list-item]
            pool = pool_of(engine)
            with pytest.raises(ConnectionLost, match="before it sent a response"):
                await pool.request(HEAD, b"{}")
            assert len(engine.calls) == 1
            await pool.close()

    run(main())


def test_a_response_that_breaks_off_is_lost_and_not_resent() -> None:
    async def main() -> None:
        steps = [answer(), half_body(), answer(), reset(http(200, b"12345", length=10))]
        too_long = http(200, chat_body(), length=len(chat_body()) + 1)
        async with ScriptedEngine([*steps, raw(too_long, close=True)]) as engine:
            pool = pool_of(engine)
            for _ in range(2):
                await pool.request(HEAD, b"{}")
                with pytest.raises(ConnectionLost, match="in the middle") as caught:
                    await pool.request(HEAD, b"{}")
                assert caught.value.response_started and caught.value.reused
            with pytest.raises(ConnectionLost, match="in the middle"):
                await pool.request(HEAD, b"{}")
            assert len(engine.calls) == 5
            await pool.close()

    run(main())


def test_a_body_longer_than_its_length_ends_the_connection() -> None:
    async def main() -> None:
        async with ScriptedEngine([raw(http(200, b"ok and more", length=2))]) as engine:
            pool = pool_of(engine)
            assert (await pool.request(HEAD, b"{}")).body == b"ok"
            assert (await pool.request(HEAD, b"{}")).body == chat_body()
            assert engine.accepted == 2
            await pool.close()

    run(main())


@pytest.mark.parametrize("seed", range(5))
def test_chunked_answers_split_anywhere(seed: int) -> None:
    async def main() -> None:
        text = random.Random(seed).randbytes(3000).hex()
        async with ScriptedEngine(default=chunked(text, seed)) as engine:
            pool = pool_of(engine)
            for _ in range(3):
                assert (await pool.request(HEAD, b"{}")).body == chat_body(text)
            assert engine.accepted == 1
            await pool.close()

    run(main())


def test_timeouts_name_their_phase() -> None:
    async def main() -> None:
        async with ScriptedEngine([stall(), stall(b"HTTP/1.1 200 OK\r\n")]) as engine:
            pool = pool_of(engine, first_byte=0.1, idle=0.1)
            for phase in ("first_byte", "idle"):
                started = time.monotonic()
                with pytest.raises(PhaseTimeout) as caught:
                    await pool.request(HEAD, b"{}")
                assert caught.value.phase == phase
                assert 0.09 < time.monotonic() - started < 1.0
            await asyncio.wait_for(engine.drained(), 2)
            await pool.close()

    run(main())


def test_refused_unresolved_and_silent_addresses() -> None:
    async def main() -> None:
        with socket.socket() as taken:  # bound and not listening: refuses
            taken.bind(("127.0.0.1", 0))
            pool = Pool(Address.parse(f"127.0.0.1:{taken.getsockname()[1]}"))
            with pytest.raises(ConnectFailed, match="refused"):
                await pool.request(HEAD)
            await pool.close()
        pool = Pool(Address.parse("http://no-such-host.invalid"))
        with pytest.raises(ConnectFailed, match="cannot be resolved"):
            await pool.request(HEAD)
        await pool.close()
        with socket.socket() as full:  # its queue is full: connections hang
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            with socket.create_connection(full.getsockname()):
                pool = Pool(
                    Address.parse(f"127.0.0.1:{full.getsockname()[1]}"), timeouts=Timeouts(connect=0.2)
                )
                started = time.monotonic()
                requests = [pool.request(HEAD) for _ in range(12 * CONNECTING)]
                outcomes = await asyncio.gather(*requests, return_exceptions=True)
                assert {type(outcome) for outcome in outcomes} == {PhaseTimeout}
                assert time.monotonic() - started < 1.6  # those in line do not each wait in turn
                await pool.close()

    run(main())


def test_cancelling_closes_the_connection_and_frees_the_engine() -> None:
    async def main() -> None:
        async with ScriptedEngine(default=stall(b"HTTP/1.1 200 OK\r\n")) as engine:
            pool = pool_of(engine)
            tasks = [asyncio.create_task(pool.request(HEAD, b"{}")) for _ in range(20)]
            await engine.arrived(20)
            for task in tasks:
                task.cancel()
            await asyncio.wait_for(engine.drained(), 2)
            assert all(task.cancelled() for task in tasks)
            assert pool.statistics().connections == 0
            await pool.close()

    run(main())


def test_cancelling_while_connecting_leaves_nothing() -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:
            pool = pool_of(engine)
            for turn in range(12):
                tasks = [asyncio.create_task(pool.request(HEAD, b"{}")) for _ in range(10)]
                for _ in range(turn):
                    await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            await pool.close()
            await asyncio.wait_for(engine.drained(), 2)

    run(main())


def test_a_cancelled_request_does_not_close_a_connection_already_passed_on() -> None:
    async def main() -> None:
        async with ScriptedEngine(default=echo()) as engine:
            pool = pool_of(engine)
            dice = random.Random(5)

            async def one(number: int) -> None:
                body = b'{"messages": [{"content": "%d"}]}' % number
                task = asyncio.create_task(pool.request(HEAD, body))
                for _ in range(dice.randrange(12)):
                    await asyncio.sleep(0)
                if dice.random() < 0.5:
                    task.cancel()
                try:
                    assert (await task).body == chat_body(str(number))
                except asyncio.CancelledError:
                    pass

            for start in range(0, 300, 10):
                await asyncio.gather(*(one(number) for number in range(start, start + 10)))
            await pool.close()

    run(main())


def test_close_ends_requests_in_flight() -> None:
    async def main() -> None:
        async with ScriptedEngine(default=stall()) as engine:
            pool = pool_of(engine)
            task = asyncio.create_task(pool.request(HEAD, b"{}"))
            await engine.arrived(1)
            await pool.close()
            with pytest.raises(ConnectionLost):
                await task
            with pytest.raises(ConfigError, match="closed"):
                await pool.request(HEAD, b"{}")

    run(main())


def test_a_response_over_the_bound_is_refused() -> None:
    async def main() -> None:
        async with ScriptedEngine(default=raw(http(200, b"x" * 200_000))) as engine:
            pool = Pool(Address.parse(engine.url), max_response=100_000)
            with pytest.raises(MalformedResponse, match="more than 100000 bytes"):
                await pool.request(HEAD, b"{}")
            await pool.close()

    run(main())


def test_a_large_request_and_a_large_response() -> None:
    async def main() -> None:
        async def mirror(call: Call) -> None:
            await call.write(http(200, call.body[::-1]))

        async with ScriptedEngine(default=mirror) as engine:
            pool = pool_of(engine)
            body = random.Random(1).randbytes(20 << 20)
            assert (await pool.request(HEAD, body)).body == body[::-1]
            assert pool.statistics().idle == 1
            await pool.close()

    run(main())


def test_two_thousand_connections() -> None:
    count = 2000
    raise_open_files()

    async def main() -> None:
        ready = asyncio.Event()

        async def together(call: Call) -> None:
            if len(engine.calls) >= count:
                ready.set()
            await ready.wait()
            await call.write(http(200, call.body))

        async with ScriptedEngine(default=together) as engine:
            pool = pool_of(engine)
            started = time.process_time()
            bodies = [b"%d" % number for number in range(count)]
            responses = await asyncio.gather(*(pool.request(HEAD, body) for body in bodies))
            assert [response.body for response in responses] == bodies
            assert (engine.most_in_flight, engine.accepted, pool.statistics().idle) == (count, count, count)
            assert time.process_time() - started < 8.0
            await pool.close()
            assert pool.statistics().connections == 0

    run(main())


def test_plain_http_to_a_tls_port_is_not_a_response() -> None:
    async def main() -> None:
        alert = b"\x15\x03\x01\x00\x02\x02\x46"
        async with ScriptedEngine([raw(alert, close=True)]) as engine:
            pool = pool_of(engine)
            with pytest.raises(MalformedResponse):
                await pool.request(HEAD)
            await pool.close()

    run(main())


def test_tls_to_a_plain_server_fails_in_the_connect_phase() -> None:
    async def main() -> None:
        async with ScriptedEngine(idle_close=0.2) as engine:
            pool = Pool(Address.parse(f"https://127.0.0.1:{engine.port}"), timeouts=Timeouts(connect=2.0))
            with pytest.raises((ConnectFailed, PhaseTimeout)):
                await pool.request(HEAD)
            await pool.close()

    run(main())
