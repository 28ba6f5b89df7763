"""Responses read while they arrive: framing, backpressure, loss, cancellation."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError, ConnectionLost, MalformedResponse, PenstockError, PhaseTimeout
from penstock.wire.address import Address
from penstock.wire.connection import MAX_HEAD, Timeouts
from penstock.wire.pool import Pool
from penstock.wire.stream import MAX_UNREAD, Stream
from tests.scripted import (
    Call,
    ScriptedEngine,
    Step,
    answer,
    chat_body,
    hang_up,
    http,
    raw,
    reset,
    run,
    stall,
    until,
)
from tests.wire.test_connection import HEAD, Bench, bodies, cuts, framed, loop

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Some: thing\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def take(stream: Stream) -> bytes | None:
    """One read; None where it would wait. The read is then given up, as a cancelled one."""
    reading = stream.read()
    try:
        reading.send(None)
    except StopIteration as end:
        return bytes(end.value)
    reading.close()
    return None


async def rest_of(stream: Stream) -> bytes:
    parts = []
    while data := await stream.read():
        parts.append(data)
    return b"".join(parts)


def with_pool(
    script: list[Step], body: Callable[[Pool, ScriptedEngine], Awaitable[None]], **bounds: float
) -> None:
    """Runs `body`; asserts that pool and engine are left without a connection."""

    async def main() -> None:
        async with ScriptedEngine(script) as engine:
            pool = Pool(Address.parse(engine.url), timeouts=Timeouts(**bounds))
            await body(pool, engine)
            await pool.close()
            assert pool.statistics().connections == 0
            await asyncio.wait_for(engine.drained(), 5)

    run(main())


# -- the parser's side ----------------------------------------------------------------------------


@given(st.data(), bodies, cuts, st.randoms(use_true_random=False))
def test_a_body_is_the_same_however_it_is_split_and_read(
    data: st.DataObject, body: bytes, cuts: list[int], dice: random.Random
) -> None:
    whole, until_close = data.draw(framed(body))
    with loop() as made:
        bench = Bench(made)
        stream = bench.connection.stream(HEAD, b"{}")
        read = b""
        bounds = sorted({0, len(whole), *(cut % (len(whole) + 1) for cut in cuts)})
        for start, end in zip(bounds, bounds[1:], strict=False):
            bench.feed(whole[start:end])
            if dice.random() < 0.5:
                piece = take(stream)
                assert piece != b"" or stream.complete
                read += piece or b""
        assert stream.complete == (not until_close)
        if until_close:
            bench.lose()
        assert read + (take(stream) or b"") == body
        assert (stream.complete, take(stream), stream.status, stream.header(b"x-some")) == (
            True,
            b"",
            200,
            b"thing",
        )
        assert bench.releases == bench.connection.served == (0 if until_close else 1)


@given(st.data(), bodies, cuts, st.integers(0, 2000))
def test_a_body_cut_anywhere_is_a_prefix_and_an_error(
    data: st.DataObject, body: bytes, cuts: list[int], at: int
) -> None:
    whole, _ = data.draw(framed(body).filter(lambda it: not it[1]))
    with loop() as made:
        bench = Bench(made)
        stream = bench.connection.stream(HEAD, b"{}")
        part = whole[: at % len(whole)]
        bench.feed(part, cuts)
        before = take(stream) if at % 2 else b""
        bench.lose()
        with pytest.raises(ConnectionLost) as caught:
            read = before or b""
            while True:
                piece = take(stream)
                assert piece
                read += piece
        assert body.startswith(read) and not stream.complete
        assert caught.value.response_started == bool(part)
        assert (bench.releases, bench.losses) == (0, 1)


@given(st.binary(min_size=1, max_size=200), cuts)
def test_any_bytes_end_in_one_outcome(whole: bytes, cuts: list[int]) -> None:
    with loop() as made:
        bench = Bench(made)
        stream = bench.connection.stream(HEAD, b"")
        bench.feed(whole, cuts)
        bench.lose()
        try:
            while take(stream):
                pass
            assert stream.complete
        except (MalformedResponse, ConnectionLost):
            assert not stream.complete


@given(st.lists(st.tuples(st.booleans(), bodies), min_size=1, max_size=6), st.data(), cuts)
def test_one_connection_serves_streams_and_requests(
    many: list[tuple[bool, bytes]], data: st.DataObject, cuts: list[int]
) -> None:
    with loop() as made:
        bench = Bench(made)
        streams = []
        for streamed, body in many:
            whole = data.draw(framed(body).filter(lambda it: not it[1]))[0]
            if streamed:
                stream = bench.connection.stream(HEAD, b"")
                bench.feed(whole, cuts)
                streams.append((stream, body))
            else:
                waiter = bench.connection.send(HEAD, b"")
                bench.feed(whole, cuts)
                assert waiter.result().body == body
        assert bench.releases == len(many)
        for stream, body in streams:  # what lay unread outlives the connection's later work
            assert (take(stream) if body else b"") == body


def test_reading_from_the_socket_pauses_and_goes_on() -> None:
    with loop() as made:
        bench = Bench(made)
        timeouts = Timeouts(idle=1.0)
        stream = bench.connection.stream(HEAD, b"")
        bench.feed(CHUNKED + chunk(b"x" * (MAX_UNREAD - 1000)))
        assert bench.wire.reading
        bench.feed(chunk(b"y" * 2000))
        assert (stream.paused, bench.wire.reading) == (True, False)
        bench.connection.sweep(bench.connection.since + 1e6, timeouts)  # the silence is ours
        time.sleep(0.002)
        before = bench.connection.since
        piece = take(stream)
        assert piece is not None and len(piece) == MAX_UNREAD + 1000
        assert (stream.paused, bench.wire.reading) == (False, True)
        assert bench.connection.since > before  # the idle time counts from here
        bench.connection.sweep(bench.connection.since + 0.9, timeouts)
        assert take(stream) is None
        bench.connection.sweep(bench.connection.since + 1.1, timeouts)
        with pytest.raises(PhaseTimeout, match="stopped in the middle"):
            take(stream)


def test_a_response_that_ends_while_paused_leaves_the_connection_reading() -> None:
    with loop() as made:
        bench = Bench(made)
        stream = bench.connection.stream(HEAD, b"")
        bench.feed(CHUNKED + chunk(b"x" * (MAX_UNREAD + 1)))
        assert (stream.paused, bench.wire.reading) == (True, False)
        bench.feed(b"0\r\n\r\n")  # TLS may still hold decrypted bytes
        assert stream.complete and bench.wire.reading and bench.releases == 1
        assert len(take(stream) or b"") == MAX_UNREAD + 1


def test_framing_alone_never_pauses() -> None:
    with loop() as made:
        bench = Bench(made)
        stream = bench.connection.stream(HEAD, b"")
        bench.feed(CHUNKED + b"1;")
        for _ in range(20):
            bench.feed(b"e" * (MAX_UNREAD // 10))
        assert bench.wire.reading and not stream.paused
        bench.feed(b"\r\nz\r\n0\r\n\r\n")
        assert take(stream) == b"z"


@pytest.mark.parametrize("after", [b"HTT", b"}}", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno"])
@pytest.mark.parametrize("before", [CHUNKED + chunk(b"ok") + b"0\r\n\r\n", http(200, b"ok")])
def test_what_follows_the_body_ends_the_connection_not_the_stream(before: bytes, after: bytes) -> None:
    with loop() as made:
        bench = Bench(made)
        stream = bench.connection.stream(HEAD, b"")
        bench.feed(before + after)
        assert (stream.complete, take(stream), take(stream)) == (True, b"ok", b"")
        assert bench.releases == 0 and bench.wire.closed


@pytest.mark.parametrize(
    "whole",
    [
        CHUNKED + chunk(b"ok") + b"nonsense\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * MAX_HEAD,
    ],
)
def test_what_is_not_http_is_malformed(whole: bytes) -> None:
    with loop() as made:
        bench = Bench(made)
        stream = bench.connection.stream(HEAD, b"")
        bench.feed(whole, [len(whole) - 5])
        if whole.startswith(CHUNKED):
            assert take(stream) == b"ok"
        for _ in range(2):
            with pytest.raises(MalformedResponse):
                take(stream)
        assert bench.wire.closed and not stream.complete


@pytest.mark.parametrize(
    ("head", "response"),
    [
        (HEAD, b"HTTP/1.1 204 X\r\n\r\n"),
        (HEAD, b"HTTP/1.1 304 X\r\nContent-Length: 5\r\n\r\n"),
        (HEAD, b"HTTP/1.1 103 E\r\nlink: x\r\n\r\nHTTP/1.1 200 X\r\nContent-Length: 0\r\n\r\n"),
        (b"HEAD / HTTP/1.1\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n"),
    ],
)
def test_responses_without_a_body(head: bytes, response: bytes) -> None:
    with loop() as made:
        bench = Bench(made)
        stream = bench.connection.stream(head, b"")
        bench.feed(response, list(range(len(response))))
        assert stream.complete and stream.status in (200, 204, 304) and take(stream) == b""
        assert stream.header(b"link") is None
        assert bench.releases == (0 if head.startswith(b"HEAD") else 1)


# -- over sockets ---------------------------------------------------------------------------------


def test_pieces_are_read_as_they_are_sent() -> None:
    turn = asyncio.Semaphore(0)

    async def step(call: Call) -> None:
        await call.write(CHUNKED)
        for number in range(5):
            await turn.acquire()
            await call.write(chunk(b"piece %d" % number))
        await turn.acquire()
        await call.write(b"0\r\n\r\n")

    async def body(pool: Pool, engine: ScriptedEngine) -> None:
        async with await pool.stream(HEAD, b"{}") as stream:
            assert (stream.status, stream.header(b"x-some"), stream.complete) == (200, b"thing", False)
            for number in range(5):
                turn.release()
                assert await stream.read() == b"piece %d" % number
            turn.release()
            assert await stream.read() == b"" and stream.complete
        assert pool.statistics().idle == 1
        assert (await pool.request(HEAD, b"{}")).body == chat_body()
        assert await rest_of(await pool.stream(HEAD, b"{}")) == chat_body()
        assert engine.accepted == 1

    with_pool([step], body)


def test_a_reused_connection_that_dies_unanswered_is_replaced_once() -> None:
    async def body(pool: Pool, engine: ScriptedEngine) -> None:
        await pool.request(HEAD, b"1")
        assert await rest_of(await pool.stream(HEAD, b"2")) == chat_body("again")
        assert [call.body for call in engine.calls] == [b"1", b"2", b"2"]
        assert pool.statistics().resent == 1
        with pytest.raises(ConnectionLost) as caught:
            await pool.stream(HEAD, b"3")
        assert not caught.value.reused and len(engine.calls) == 5

    with_pool([answer(), hang_up(), answer("again"), hang_up(), reset()], body)


def test_a_stream_that_breaks_off_gives_what_came_then_the_error() -> None:
    async def body(pool: Pool, engine: ScriptedEngine) -> None:
        for _ in range(3):
            stream = await pool.stream(HEAD, b"{}")
            assert await stream.read() == b"some"
            for _ in range(2):
                with pytest.raises(ConnectionLost, match="in the middle") as caught:
                    await stream.read()
                assert caught.value.response_started
            stream.close()
        assert len(engine.calls) == 3

    begun = CHUNKED + chunk(b"some")
    until_close = b"HTTP/1.1 200 OK\r\n\r\nsome"
    with_pool([raw(begun, close=True), reset(begun), reset(until_close)], body)


def test_a_body_ended_by_the_connection() -> None:
    async def body(pool: Pool, engine: ScriptedEngine) -> None:
        stream = await pool.stream(HEAD, b"{}")
        assert await rest_of(stream) == b"all of it" and stream.complete
        assert await rest_of(await pool.stream(HEAD, b"{}")) == b"ok"
        assert engine.accepted == 2

    steps = [raw(b"HTTP/1.1 200 OK\r\n\r\nall of it", close=True), raw(http(200, b"ok"), close=True)]
    with_pool(steps, body)


def test_an_error_status_is_a_response() -> None:
    async def body(pool: Pool, engine: ScriptedEngine) -> None:
        stream = await pool.stream(HEAD, b"{}")
        assert (stream.status, await rest_of(stream)) == (429, b"slower")

    with_pool([raw(http(429, b"slower"))], body)


def test_closing_frees_the_engine() -> None:
    async def body(pool: Pool, engine: ScriptedEngine) -> None:
        stream = await pool.stream(HEAD, b"{}")
        assert await stream.read() == b"some"
        reader = asyncio.create_task(stream.read())
        await asyncio.sleep(0)
        stream.close()
        stream.close()
        with pytest.raises(ConnectionLost, match="closed before its end") as caught:
            await reader
        assert caught.value.response_started
        await asyncio.wait_for(engine.drained(), 5)
        assert pool.statistics().connections == 0

    with_pool([stall(CHUNKED + chunk(b"some"))], body)


def test_a_cancelled_read_has_taken_nothing() -> None:
    go_on = asyncio.Event()

    async def step(call: Call) -> None:
        await call.write(CHUNKED)
        await go_on.wait()
        await call.write(chunk(b"late") + b"0\r\n\r\n")

    async def body(pool: Pool, engine: ScriptedEngine) -> None:
        stream = await pool.stream(HEAD, b"{}")
        for turns in range(4):
            reader = asyncio.create_task(stream.read())
            for _ in range(turns):
                await asyncio.sleep(0)
            if turns == 3:
                with pytest.raises(RuntimeError, match="another task"):
                    await stream.read()
            reader.cancel()
            await asyncio.wait([reader])
        go_on.set()
        await until(lambda: stream.complete)
        assert await rest_of(stream) == b"late" and pool.statistics().idle == 1

    with_pool([step], body)


def test_cancelling_before_the_head_frees_the_engine() -> None:
    async def body(pool: Pool, engine: ScriptedEngine) -> None:
        tasks = [asyncio.create_task(pool.stream(HEAD, b"{}")) for _ in range(10)]
        await engine.arrived(10)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(engine.drained(), 5)
        assert pool.statistics().connections == 0

    with_pool([stall()] * 10, body)


def test_cancelling_the_resend_frees_the_engine() -> None:
    async def body(pool: Pool, engine: ScriptedEngine) -> None:
        await pool.request(HEAD, b"1")
        task = asyncio.create_task(pool.stream(HEAD, b"2"))
        await engine.arrived(3)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.wait_for(engine.drained(), 5)
        assert (pool.statistics().connections, pool.statistics().resent) == (0, 1)

    with_pool([answer(), hang_up(), stall()], body)


def test_closing_the_pool_ends_open_streams() -> None:
    async def body(pool: Pool, engine: ScriptedEngine) -> None:
        streams = [await pool.stream(HEAD, b"{}") for _ in range(3)]
        assert [await stream.read() for stream in streams[:2]] == [b"some", b"some"]
        reader = asyncio.create_task(streams[0].read())
        await asyncio.sleep(0)
        await pool.close()
        with pytest.raises(ConnectionLost):
            await reader
        for stream in streams:  # of the last one a piece lay unread
            with pytest.raises(ConnectionLost) as caught:
                await stream.read()
            assert caught.value.response_started and not stream.complete
        with pytest.raises(ConfigError, match="closed"):
            await pool.stream(HEAD)

    with_pool([stall(CHUNKED + chunk(b"some")), stall(b"HTTP/1.1 200 OK\r\n\r\nsome")] * 2, body)


def test_timeouts_name_their_phase() -> None:
    async def body(pool: Pool, engine: ScriptedEngine) -> None:
        with pytest.raises(PhaseTimeout) as first:
            await pool.stream(HEAD, b"{}")
        with pytest.raises(PhaseTimeout) as second:
            await pool.stream(HEAD, b"{}")
        stream = await pool.stream(HEAD, b"{}")
        await asyncio.sleep(0.3)  # not reading does not hide that the server is silent
        assert await stream.read() == b"some"
        with pytest.raises(PhaseTimeout) as third:
            await stream.read()
        assert [caught.value.phase for caught in (first, second, third)] == ["first_byte", "idle", "idle"]

    steps = [stall(), stall(b"HTTP/1.1 200 OK\r\n"), stall(CHUNKED + chunk(b"some"))]
    with_pool(steps, body, first_byte=0.1, idle=0.1)


def test_a_slow_reader_stops_the_server_and_loses_nothing() -> None:
    size, piece = 48 << 20, 64 << 10
    sent = 0

    async def step(call: Call) -> None:
        nonlocal sent
        await call.write(CHUNKED)
        while sent < size:
            await call.write(chunk(b"%08d" % sent + b"x" * (piece - 8)))
            sent += piece
        await call.write(b"0\r\n\r\n")

    async def body(pool: Pool, engine: ScriptedEngine) -> None:
        stream = await pool.stream(HEAD, b"{}")
        await until(lambda: stream.paused)
        await asyncio.sleep(0.3)  # three times the idle timeout
        held = sent
        assert held < size // 2
        await asyncio.sleep(0.1)
        assert sent == held and stream.paused
        received = 0
        while data := await stream.read():
            received += len(data)
            assert len(data) <= 3 * MAX_UNREAD
        assert received == size and stream.complete
        assert (await pool.request(HEAD, b"{}")).status == 200 and engine.accepted == 1

    with_pool([step], body, idle=0.1)


def test_streams_given_up_at_any_moment_leave_nothing() -> None:
    dice = random.Random(3)

    async def step(call: Call) -> None:
        await call.write(CHUNKED)
        for number in range(4):
            await asyncio.sleep(0)
            await call.write(chunk(b"%d" % number))
        await call.write(b"0\r\n\r\n")

    async def one(pool: Pool) -> None:
        async with await pool.stream(HEAD, b"{}") as stream:
            assert await rest_of(stream) == b"0123"

    async def body(pool: Pool, engine: ScriptedEngine) -> None:
        engine.default = step
        whole = 0
        for _ in range(30):
            tasks = [asyncio.create_task(one(pool)) for _ in range(8)]
            for task in tasks:
                if dice.random() < 0.5:
                    for _ in range(dice.randrange(15)):
                        await asyncio.sleep(0)
                    task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert not [it for it in outcomes if isinstance(it, PenstockError | AssertionError)]
            whole += outcomes.count(None)
            statistics = pool.statistics()
            await until(lambda: pool.statistics().connections == pool.statistics().idle)
            assert statistics.resent == 0
        assert whole > 100

    with_pool([], body)
