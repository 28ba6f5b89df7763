"""A client that goes away frees what it held within a second, whatever its request was at; counts stay exact.

One that closes only its sending side counts as gone: the process that ends and the one that merely says it
has no more to send look the same on the wire, and a generation nobody reads costs more than an answer to a
client that shut its side. nginx, Go's server and the engines' own (uvicorn) do the same.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from typing import Any

import pytest

from penstock.router.server import RouterServer
from tests.router.front import Peer, endpoints, engine, instead, scenario, settled
from tests.scripted import Call, answer, http, refuse, stall, until

PROMPT = 1.0
"""Seconds."""
MIB = 1 << 20

Leave = Callable[[Peer], None]


def close(peer: Peer) -> None:
    peer.close()


def reset(peer: Peer) -> None:
    peer.reset()


def half(peer: Peer) -> None:
    peer.writer.write_eof()


ALL = pytest.mark.parametrize("leave", [close, reset, half])
GONE = pytest.mark.parametrize("leave", [close, reset])


async def promptly(server: RouterServer, gone: int = 1) -> None:
    """Within a second nothing is in flight, and so many clients have been counted as gone."""
    async with asyncio.timeout(PROMPT):
        await settled(server)
    assert server.router.statistics.cancelled == gone
    assert not any(endpoint.health.outcomes for endpoint in endpoints(server))  # no engine is blamed


@ALL
@pytest.mark.parametrize("limit", [{"max_concurrent_requests": 1}, {"worker_max_in_flight": 1}])
def test_in_the_queue(leave: Leave, limit: dict[str, Any]) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.post()
        await one.arrived(1)
        waiting = [await Peer.to(server) for _ in range(5)]
        for other in waiting:
            other.post()
        dispatch = server.router.fleet.dispatch
        await until(lambda: dispatch.waiting == 5)
        for other in waiting[:4]:
            leave(other)
        await until(lambda: dispatch.waiting == 1)
        assert (dispatch.in_flight, server.router.statistics.cancelled) == (1, 4)
        leave(peer)  # the one that stays gets the slot
        assert (await waiting[4].response())[0] == 200
        assert len(one.calls) == 2
        await promptly(server, 5)
        for other in waiting:
            other.close()

    one = engine(stall())
    scenario(body, one, **limit)


@ALL
def test_while_the_router_connects_to_the_engine(leave: Leave) -> None:
    """A listener whose backlog is full: connecting neither succeeds nor fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        full = [socket.socket() for _ in range(4)]
        for one in full:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())

        async def body(server: RouterServer, peer: Peer) -> None:
            leaver = await Peer.to(server)
            leaver.post()
            await until(lambda: server.router.fleet.dispatch.in_flight == 1)
            leave(leaver)
            await promptly(server)
            leaver.close()

        try:
            scenario(body, worker_urls=(f"http://127.0.0.1:{listener.getsockname()[1]}",))
        finally:
            for one in full:
                one.close()


@ALL
@pytest.mark.parametrize("chunked", [False, True])
def test_while_it_sends_a_body_that_is_passed_on(leave: Leave, chunked: bool) -> None:
    """The engine sees the connection close and never a whole request."""
    got: list[bytes] = []

    async def reading(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read(-1))

    async def body(server: RouterServer, peer: Peer) -> None:
        async with instead(server, one, reading):
            leaver = await Peer.to(server)
            framing = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % (8 * MIB)
            leaver.send(b"POST /x HTTP/1.1\r\nhost: a\r\n%s\r\n\r\n" % framing)
            for _ in range(3):
                leaver.send(b"%x\r\n%s\r\n" % (MIB, bytes(MIB)) if chunked else bytes(MIB))
            await leaver.writer.drain()
            await until(lambda: server.router.fleet.dispatch.in_flight == 1)
            leave(leaver)
            await promptly(server)
            await until(lambda: any(data.startswith(b"POST") for data in got))
            leaver.close()
        posted = next(data for data in got if data.startswith(b"POST"))
        assert len(posted) < 8 * MIB and not posted.endswith(b"0\r\n\r\n")

    one = engine()
    scenario(body, one)


@ALL
def test_while_it_sends_a_body_that_is_held(leave: Leave) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        leaver = await Peer.to(server)
        leaver.send(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n" + bytes(999))
        await asyncio.sleep(0.02)
        leave(leaver)
        async with asyncio.timeout(PROMPT):
            assert await leaver.rest() == b""
            await settled(server)
        assert one.calls == []
        leaver.close()

    one = engine()
    scenario(body, one)


@GONE
def test_while_it_does_not_read_the_response(leave: Leave) -> None:
    async def pour(call: Call) -> None:
        await call.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (64 * MIB))
        for _ in range(64):
            await call.write(bytes(MIB))

    async def body(server: RouterServer, peer: Peer) -> None:
        leaver = await Peer.to(server)
        leaver.writer.transport.pause_reading()  # type: ignore[attr-defined]
        leaver.post()
        await one.arrived(1)
        await asyncio.sleep(0.2)
        assert server.router.fleet.dispatch.in_flight == 1
        leave(leaver)
        await promptly(server)
        await until(lambda: one.open <= 1)

    one = engine(pour)
    scenario(body, one)


@ALL
def test_between_two_attempts(leave: Leave) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        leaver = await Peer.to(server)
        leaver.post()
        await one.arrived(1)
        await asyncio.sleep(0.05)
        leave(leaver)
        async with asyncio.timeout(PROMPT):
            await settled(server)
        calls = len(one.calls)
        await asyncio.sleep(0.3)
        assert len(one.calls) == calls and server.router.statistics.cancelled == 1
        leaver.close()

    one = engine(default=refuse(503, retry_after="1"))
    scenario(body, one)


@ALL
@pytest.mark.parametrize("size", [2, 20_000])
def test_with_requests_pipelined_behind_the_one_in_flight(leave: Leave, size: int) -> None:
    """None of them is begun; also when so many wait that the connection is no longer read."""

    async def body(server: RouterServer, peer: Peer) -> None:
        leaver = await Peer.to(server)
        for _ in range(20):
            leaver.post(bytes(size))
        await one.arrived(1)
        await asyncio.sleep(0.05)
        leave(leaver)
        bound = PROMPT if size < 100 else PROMPT + 0.5  # seen by the sweeper
        async with asyncio.timeout(bound):
            await settled(server)
        await until(lambda: one._in_flight == 0)
        assert len(one.calls) == 1 and server.router.statistics.cancelled == 1
        leaver.close()

    one = engine(default=stall())
    scenario(body, one)


def test_a_half_closed_client_gets_what_was_ready_at_once() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.send(b"GET /liveness HTTP/1.1\r\nhost: a\r\n\r\n")
        peer.writer.write_eof()
        assert (await peer.response())[0] == 200
        assert await peer.rest() == b""

    scenario(body, engine())


def test_one_of_two_clients_leaving_does_not_touch_the_other() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        leaver = await Peer.to(server)
        leaver.post(b'{"who":"leaver"}')
        peer.post(b'{"who":"peer"}')
        await one.arrived(2)
        leaver.close()
        assert (await peer.response())[0] == 200
        await promptly(server)

    one = engine(default=answer(delay=0.2))
    scenario(body, one)


@pytest.mark.parametrize("seed", range(3))
def test_many_that_leave_at_any_moment_leave_exact_counts(seed: int) -> None:
    """Clients that go away after a random time, in whatever their requests are then."""

    dice = random.Random(seed)

    async def slow(call: Call) -> None:
        await asyncio.sleep(dice.random() * 0.05)
        if dice.random() < 0.2:
            call.reset()
        elif dice.random() < 0.2:
            await call.write(http(503, b"", {"retry-after": "0"}))
        else:
            await call.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(3):
                await asyncio.sleep(dice.random() * 0.02)
                await call.write(b"3\r\nabc\r\n")
            await call.write(b"0\r\n\r\n")

    async def one_client(server: RouterServer) -> None:
        peer = await Peer.to(server)
        peer.post()
        await asyncio.sleep(dice.random() * 0.15)
        dice.choice([close, reset, half])(peer)
        await asyncio.sleep(0.01)
        peer.close()

    async def body(server: RouterServer, peer: Peer) -> None:
        await asyncio.gather(*(one_client(server) for _ in range(120)))
        async with asyncio.timeout(PROMPT):
            await settled(server)
        counted = server.router.statistics
        assert counted.requests == 120 and 0 < counted.cancelled <= 120

    scenario(body, engine(default=slow), engine(default=slow), max_concurrent_requests=20)
