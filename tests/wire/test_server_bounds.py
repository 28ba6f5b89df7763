"""What the listening server refuses, and what it does not wait for."""

from __future__ import annotations

import asyncio

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.wire import accepted
from penstock.wire.server import Exchange, HttpServer
from tests.scripted import until
from tests.wire.peer import Peer, mirror, scenario

MALFORMED = [
    b"hello\r\n\r\n",
    b"GET / HTTP/1.1\nhost: x\n\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"BREW / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon here\r\n\r\n",
    b"GET / HTTP/1.1\r\na b: c\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: abc\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
    b"CONNECT h:1 HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"\x00" * 10,
]


@pytest.mark.parametrize("data", MALFORMED)
def test_malformed_requests_get_400_and_a_close(data: bytes) -> None:
    handled: list[str] = []

    def handler(exchange: Exchange) -> None:
        handled.append(exchange.request.path)
        mirror(exchange)

    async def body(server: HttpServer, peer: Peer) -> None:
        assert (await peer.ask(b"GET /first HTTP/1.1\r\n\r\n"))[0] == 200
        status, headers, answer = await peer.ask(data)
        assert (status, headers["connection"]) == (400, "close")
        assert orjson.loads(answer)["error"]["code"] == 400
        assert await peer.closed() == b""
        assert handled == ["/first"]

    scenario(handler, body)


def test_a_malformed_request_behind_a_good_one_waits_its_turn() -> None:
    waiting: list[Exchange] = []

    async def body(server: HttpServer, peer: Peer) -> None:
        peer.writer.write(b"GET /good HTTP/1.1\r\n\r\nrubbish\r\n\r\n")
        await until(lambda: waiting)
        await asyncio.sleep(0.02)
        waiting.pop().respond(200, b"fine")
        assert (await peer.response())[2] == b"fine"
        assert (await peer.response())[0] == 400
        assert await peer.closed() == b""

    scenario(waiting.append, body)


@settings(max_examples=60)
@given(st.binary(max_size=120))
def test_any_bytes_get_whole_responses_and_leave_the_server_well(data: bytes) -> None:
    async def body(server: HttpServer, peer: Peer) -> None:
        peer.writer.write(data)
        peer.writer.write_eof()
        left = await peer.closed()
        assert left == b"" or left.startswith(b"HTTP/1.1 ")
        other = await Peer.to(server)
        assert (await other.ask(b"GET / HTTP/1.1\r\n\r\n"))[0] == 200
        other.close()

    scenario(mirror, body)


@pytest.mark.parametrize(
    "framing", [b"content-length: 2000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n7d0\r\n"]
)
def test_a_body_over_the_bound_gets_413(framing: bytes) -> None:
    async def body(server: HttpServer, peer: Peer) -> None:
        peer.writer.write(b"POST / HTTP/1.1\r\n" + framing)
        peer.writer.write(b"x" * 2000)
        assert (await peer.response())[0] == 413
        assert await peer.closed() == b""

    scenario(mirror, body, max_body=1000)


def test_a_client_that_keeps_sending_can_still_read_its_413() -> None:
    async def body(server: HttpServer, peer: Peer) -> None:
        peer.writer.write(b"POST / HTTP/1.1\r\ncontent-length: 8000000\r\n\r\n")
        peer.writer.write(b"x" * 8_000_000)
        assert (await peer.response())[0] == 413
        assert await peer.closed() == b""

    scenario(mirror, body, max_body=1000)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000,
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 12_000 + b"\r\n",
        b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_a_head_over_the_bound_gets_431(data: bytes) -> None:
    async def body(server: HttpServer, peer: Peer) -> None:
        peer.writer.write(data[:9])
        await asyncio.sleep(0.01)
        peer.writer.write(data[9:])
        assert (await peer.response())[0] == 431
        assert await peer.closed() == b""

    scenario(mirror, body)


@pytest.mark.parametrize("part", [b"GET / HT", b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\nabc"])
def test_a_request_that_does_not_arrive_gets_408(part: bytes) -> None:
    async def body(server: HttpServer, peer: Peer) -> None:
        peer.writer.write(part)
        assert (await peer.response())[0] == 408
        assert await peer.closed() == b""

    scenario(mirror, body, request_timeout=0.1)


def test_idle_and_silent_connections_are_closed() -> None:
    async def body(server: HttpServer, peer: Peer) -> None:
        assert await peer.closed() == b""  # never sent a byte
        other = await Peer.to(server)
        await other.ask(b"GET / HTTP/1.1\r\n\r\n")
        assert await other.closed() == b""
        assert server.connections == 0
        other.close()

    scenario(mirror, body, keep_alive=0.1, request_timeout=0.2)


def test_a_slow_handler_is_not_idle() -> None:
    async def body(server: HttpServer, peer: Peer) -> None:
        assert (await peer.ask(b"GET / HTTP/1.1\r\n\r\n"))[0] == 200

    def handler(exchange: Exchange) -> None:
        asyncio.get_running_loop().call_later(0.4, exchange.respond, 200, b"")

    scenario(handler, body, keep_alive=0.05, request_timeout=0.05)


def test_a_client_that_stops_reading_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepted, "WRITE_STALL", 0.2)
    gone: list[bool] = []

    def handler(exchange: Exchange) -> None:
        exchange.on_disconnect = lambda: gone.append(True)
        exchange.start(200, "application/octet-stream")
        exchange.send(bytes(32 << 20))

    async def body(server: HttpServer, peer: Peer) -> None:
        peer.writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await until(lambda: gone)
        assert server.connections == 0

    scenario(handler, body, keep_alive=0.2)
