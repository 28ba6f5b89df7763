"""The listening server over real sockets, spoken to byte by byte."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.wire.server import Exchange, HttpServer
from tests.scripted import run, until
from tests.wire.peer import Peer, mirror, scenario


def test_requests_and_keep_alive() -> None:
    async def body(server: HttpServer, peer: Peer) -> None:
        for _ in range(3):
            status, headers, answer = await peer.ask(b"GET /a%20b/c?x=%20y HTTP/1.1\r\nHost: h\r\n\r\n")
            assert (status, headers["content-type"]) == (200, "application/json")
            assert orjson.loads(answer) == {"method": "GET", "path": "/a b/c", "query": "x=%20y", "size": 0}
        _, _, answer = await peer.ask(b"POST http://h:1/p HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc")
        assert orjson.loads(answer) == {"method": "POST", "path": "/p", "query": "", "size": 3}
        _, _, answer = await peer.ask(b"OPTIONS * HTTP/1.1\r\n\r\n")
        assert orjson.loads(answer)["path"] == "*"
        assert server.connections == 1

    scenario(mirror, body)


def test_accepted_sockets_do_not_delay_small_writes() -> None:
    seen: list[int] = []

    def handler(exchange: Exchange) -> None:
        connection: Any = exchange._connection
        peer = connection._transport.get_extra_info("socket")
        seen.append(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        exchange.respond(200, b"")

    async def body(server: HttpServer, peer: Peer) -> None:
        await peer.ask(b"GET / HTTP/1.1\r\n\r\n")
        assert seen == [1]

    scenario(handler, body)


@settings(max_examples=25)
@given(st.lists(st.binary(max_size=60), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_pipelined_requests_split_anywhere(bodies: list[bytes], dice: random.Random) -> None:
    async def body(server: HttpServer, peer: Peer) -> None:
        stream = b""
        for data in bodies:
            if dice.random() < 0.5:
                stream += b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)
            else:
                chunk = b"%x\r\n%s\r\n" % (len(data), data) if data else b""
                stream += b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n%s0\r\n\r\n" % chunk
        cuts = sorted({0, len(stream), *(dice.randrange(len(stream)) for _ in range(5))})
        for start, end in zip(cuts, cuts[1:], strict=False):
            peer.writer.write(stream[start:end])
            await asyncio.sleep(0)
        for data in bodies:
            assert (await peer.response())[2] == data

    scenario(lambda exchange: exchange.respond(200, exchange.request.body), body)


def test_the_next_request_waits_for_the_response_before() -> None:
    waiting: list[Exchange] = []

    async def body(server: HttpServer, peer: Peer) -> None:
        peer.writer.write(b"".join(b"GET /%d HTTP/1.1\r\n\r\n" % number for number in range(5)))
        for number in range(5):
            await until(lambda: waiting)
            await asyncio.sleep(0.005)
            exchange = waiting.pop()
            assert not waiting and server.in_flight == 1
            assert exchange.request.path == f"/{number}"
            exchange.respond(200, b"%d" % number)
            assert (await peer.response())[2] == b"%d" % number

    scenario(waiting.append, body)


def test_a_flood_of_pipelined_requests_is_answered_in_order_in_bounded_memory() -> None:
    async def main() -> None:
        queued: list[int] = []

        def handler(exchange: Exchange) -> None:
            connection: Any = exchange._connection
            queued.append(len(connection._queue))
            loop.call_soon(exchange.respond, 200, exchange.request.path.encode())

        loop = asyncio.get_running_loop()
        async with HttpServer(handler) as server:
            peer = await Peer.to(server)
            count = 20_000

            async def flood() -> None:
                for number in range(count):
                    peer.writer.write(b"GET /%d HTTP/1.1\r\n\r\n" % number)
                    if number % 100 == 0:
                        await peer.writer.drain()

            async with asyncio.TaskGroup() as group:
                group.create_task(flood())
                for number in range(count):
                    assert (await peer.response())[2] == b"/%d" % number
            assert max(queued) < 256 * 1024 // len(b"GET /0 HTTP/1.1\r\n\r\n") + 1
            peer.close()

    run(main())


def test_streams_are_chunked_and_the_connection_lives_on() -> None:
    def handler(exchange: Exchange) -> None:
        exchange.start(200, "text/event-stream", {"x-extra": "1"})
        for number in range(3):
            exchange.send(b"data: %d\n\n" % number)
        exchange.send(b"")  # must not end the stream
        exchange.send(b"data: [DONE]\n\n")
        exchange.end()

    async def body(server: HttpServer, peer: Peer) -> None:
        for _ in range(2):
            _, headers, answer = await peer.ask(b"GET / HTTP/1.1\r\n\r\n")
            assert headers["x-extra"] == "1"
            assert answer == b"data: 0\n\ndata: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
        peer.writer.write(b"HEAD / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n")
        await peer.response(head=True)
        assert (await peer.response())[2].endswith(b"[DONE]\n\n")
        _, headers, answer = await peer.ask(b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
        assert headers["connection"] == "close" and answer.startswith(b"data: 0\n\n")

    scenario(handler, body)


def test_head_and_close() -> None:
    async def body(server: HttpServer, peer: Peer) -> None:
        peer.writer.write(b"HEAD / HTTP/1.1\r\n\r\n")
        _, headers, _ = await peer.response(head=True)
        assert int(headers["content-length"]) > 10
        close = b"GET / HTTP/1.1\r\nconnection: close\r\n\r\nGET /ignored HTTP/1.1\r\n\r\n"
        _, headers, _ = await peer.ask(close)
        assert headers["connection"] == "close"
        assert await peer.closed() == b""

    scenario(mirror, body)


def test_a_204_has_no_body_and_keeps_the_connection() -> None:
    async def body(server: HttpServer, peer: Peer) -> None:
        for _ in range(2):
            status, headers, _ = await peer.ask(b"GET / HTTP/1.1\r\n\r\n")
            assert status == 204 and "content-length" not in headers

    scenario(lambda exchange: exchange.respond(204, b""), body)


def test_expect_100_continue() -> None:
    async def body(server: HttpServer, peer: Peer) -> None:
        head = b"POST / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n"
        assert (await peer.ask(head))[0] == 100
        assert orjson.loads((await peer.ask(b"abc"))[2])["size"] == 3

    scenario(mirror, body)


def test_a_failing_handler_is_a_500_and_the_connection_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    def handler(exchange: Exchange) -> None:
        if exchange.request.path == "/late":
            exchange.start(200, "text/plain")
        if exchange.request.path != "/ok":
            raise ValueError("broken")
        mirror(exchange)

    async def body(server: HttpServer, peer: Peer) -> None:
        status, _, answer = await peer.ask(b"GET /bad HTTP/1.1\r\n\r\n")
        assert (status, orjson.loads(answer)["error"]["type"]) == (500, "internal_server_error")
        assert b"broken" not in answer
        assert (await peer.ask(b"GET /ok HTTP/1.1\r\n\r\n"))[0] == 200
        peer.writer.write(b"GET /late HTTP/1.1\r\n\r\n")
        assert not (await peer.closed()).endswith(b"0\r\n\r\n")  # half a response must not look whole

    scenario(handler, body)
    assert "handler failed on GET /bad" in caplog.text


def test_a_response_that_is_broken_off_has_no_end() -> None:
    gone: list[bool] = []

    def handler(exchange: Exchange) -> None:
        exchange.on_disconnect = lambda: gone.append(True)
        exchange.start(200, "text/event-stream")
        exchange.send(b"data: 1\n\n")
        exchange.break_off()
        exchange.send(b"nobody reads this")
        exchange.break_off()
        assert not exchange.disconnected

    async def body(server: HttpServer, peer: Peer) -> None:
        peer.writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert (await peer.closed()).endswith(b"9\r\ndata: 1\n\n\r\n")
        assert gone == [] and server.in_flight == 0

    scenario(handler, body)


def test_two_responses_to_one_request_are_an_error() -> None:
    def handler(exchange: Exchange) -> None:
        with pytest.raises(RuntimeError):
            exchange.send(b"x")
        with pytest.raises(RuntimeError):
            exchange.end()
        exchange.respond(200, b"once")
        with pytest.raises(RuntimeError):
            exchange.respond(200, b"twice")
        with pytest.raises(RuntimeError):
            exchange.start(200, "text/plain")

    async def body(server: HttpServer, peer: Peer) -> None:
        assert (await peer.ask(b"GET / HTTP/1.1\r\n\r\n"))[2] == b"once"

    scenario(handler, body)


def test_a_header_cannot_be_broken_into_two() -> None:
    def handler(exchange: Exchange) -> None:
        exchange.respond(200, b"", headers={"x-request-id": "a\r\nset-cookie: b"})

    async def body(server: HttpServer, peer: Peer) -> None:
        status, headers, _ = await peer.ask(b"GET / HTTP/1.1\r\n\r\n")
        assert status == 500 and "set-cookie" not in headers

    scenario(handler, body)


@pytest.mark.parametrize("goodbye", ["close", "half", "reset"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_goes_away_is_told_once(goodbye: str, streaming: bool) -> None:
    exchanges: list[Exchange] = []
    gone: list[str] = []

    def handler(exchange: Exchange) -> None:
        exchanges.append(exchange)
        exchange.on_disconnect = lambda: gone.append(exchange.request.path)
        if streaming:
            exchange.start(200, "text/event-stream")
            exchange.send(b"data: x\n\n")

    async def body(server: HttpServer, peer: Peer) -> None:
        peer.writer.write(b"GET /mine HTTP/1.1\r\n\r\n")
        await until(lambda: exchanges)
        assert not gone and not exchanges[0].disconnected
        if goodbye == "half":
            peer.writer.write_eof()
        else:
            if goodbye == "reset":
                linger = b"\x01\0\0\0\0\0\0\0"
                peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            peer.close()
        await until(lambda: gone)
        exchange = exchanges[0]
        assert exchange.disconnected and server.in_flight == 0
        if not streaming:
            exchange.start(200, "text/plain")
        exchange.send(b"nobody reads this")
        await exchange.drain()
        exchange.end()
        assert gone == ["/mine"]

    scenario(handler, body)


def test_no_disconnect_is_told_after_the_end() -> None:
    gone: list[str] = []

    def handler(exchange: Exchange) -> None:
        exchange.on_disconnect = lambda: gone.append("gone")
        exchange.respond(200, b"")

    async def body(server: HttpServer, peer: Peer) -> None:
        await peer.ask(b"GET / HTTP/1.1\r\n\r\n")
        peer.close()
        await until(lambda: server.connections == 0)
        assert gone == []

    scenario(handler, body)


def test_drain_waits_for_a_client_that_reads_slowly() -> None:
    sent: list[int] = []

    async def main() -> None:
        tasks = []

        async def pour(exchange: Exchange) -> None:
            exchange.start(200, "application/octet-stream")
            for number in range(400):
                exchange.send(bytes(64 << 10))
                sent.append(number)
                await exchange.drain()
            exchange.end()

        def handler(exchange: Exchange) -> None:
            tasks.append(asyncio.get_running_loop().create_task(pour(exchange)))

        async with HttpServer(handler) as server:
            peer = await Peer.to(server)
            peer.writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await asyncio.sleep(0.3)
            stuck = len(sent)
            assert stuck < 300  # 25 MB would be 400; the kernel's buffers take some
            await asyncio.sleep(0.05)
            assert len(sent) == stuck
            assert len((await peer.response())[2]) == 400 * (64 << 10)
            await asyncio.gather(*tasks)
            peer.close()

    run(main())


def test_a_large_body_both_ways() -> None:
    async def body(server: HttpServer, peer: Peer) -> None:
        data = random.Random(3).randbytes(30 << 20)
        peer.writer.write(b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(data))
        peer.writer.write(data)
        assert (await peer.response())[2] == data

    scenario(lambda exchange: exchange.respond(200, exchange.request.body), body)


def test_close_lets_exchanges_in_flight_end() -> None:
    async def main() -> None:
        def handler(exchange: Exchange) -> None:
            if exchange.request.path == "/slow":
                asyncio.get_running_loop().call_later(0.2, exchange.respond, 200, b"done")
            else:
                exchange.respond(200, b"quick")

        server = HttpServer(handler)
        await server.start()
        idle, busy = await Peer.to(server), await Peer.to(server)
        await idle.ask(b"GET / HTTP/1.1\r\n\r\n")
        busy.writer.write(b"GET /slow HTTP/1.1\r\n\r\n")
        await until(lambda: server.in_flight)
        closing = asyncio.create_task(server.close(grace=5.0))
        assert await idle.closed() == b""
        with pytest.raises(OSError) as refused:
            await Peer.to(server)
        assert refused.value.errno == errno.ECONNREFUSED
        _, headers, answer = await busy.response()
        assert (answer, headers["connection"]) == (b"done", "close")
        await closing
        await server.close()  # again is nothing
        for peer in (idle, busy):
            peer.close()

    run(main())


def test_close_aborts_after_the_grace() -> None:
    async def main() -> None:
        gone: list[bool] = []

        def handler(exchange: Exchange) -> None:
            exchange.on_disconnect = lambda: gone.append(True)

        server = HttpServer(handler)
        await server.start()
        peer = await Peer.to(server)
        peer.writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await until(lambda: server.in_flight)
        loop = asyncio.get_running_loop()
        started = loop.time()
        await server.close(grace=0.1)
        assert 0.09 < loop.time() - started < 1.0
        assert (gone, server.connections, server.in_flight) == ([True], 0, 0)
        peer.close()

    run(main())


def test_an_address_in_use_is_a_config_error() -> None:
    async def body(server: HttpServer, peer: Peer) -> None:
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{server.port}.*in use"):
            await HttpServer(mirror, port=server.port).start()

    scenario(mirror, body)
