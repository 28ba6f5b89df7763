"""Requests and responses through the router, over real sockets: byte for byte, in bounded memory."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import random
import resource

import orjson
import pytest

from penstock.router.server import RouterServer
from tests.router.front import Peer, engine, instead, scenario, serves, settled, sse
from tests.scripted import Call, ScriptedEngine, http, raw, until


def test_unknown_fields_and_paths_pass_byte_for_byte() -> None:
    answer = b'{"id": 1,\n  "unknown":[ 1.0, 1e5 ]}'

    async def body(server: RouterServer, peer: Peer) -> None:
        for path in ("/v1/chat/completions", "/generate?x=%20y&z", "/v1/rerank/../x", "/tokenize"):
            sent = b'{"model":"m",  "user":"u", "x_unknown":{"a":[1,2]}, "return_token_ids":true}'
            status, headers, got = await peer.ask(sent, path, b"X-Odd-Case: a\r\nx-odd-case: b\r\n")
            assert (status, got) == (200, answer)
            assert headers["content-type"] == "application/json" and headers["X-Engine"] == "e"
            call = one.calls[-1]
            assert (call.path, call.body) == (path, sent)
            assert call.headers["x-odd-case"] == "b"

    one = engine(default=raw(http(200, answer, {"X-Engine": "e"})))
    scenario(body, one)


def test_repeated_header_fields_and_their_case_pass_both_ways() -> None:
    seen: list[bytes] = []

    async def shouting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"/v1/chat" in head:
                seen.append(head)
            writer.write(
                b"HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nset-cookie: b\r\nConnection: X-Secret\r\n"
                b"X-Secret: hidden\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\n\r\n"
            )

    async def body(server: RouterServer, peer: Peer) -> None:
        async with instead(server, one, shouting) as url:
            peer.send(
                b"GET /v1/chat HTTP/1.1\r\nHOST: a\r\nX-One: 1\r\nAccept-encoding: gzip\r\nx-one: 2\r\n"
                b"Connection: keep-alive, X-Hop\r\nX-Hop: no\r\nTE: trailers\r\nUpgrade-It: 1\r\n\r\n"
            )
            lines = (await peer.reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        assert lines[1:3] == [b"Set-Cookie: a", b"set-cookie: b"]
        assert not any(line.lower().startswith((b"x-secret", b"keep-alive", b"connection")) for line in lines)
        got = seen[0].split(b"\r\n")
        assert got[:2] == [b"GET /v1/chat HTTP/1.1", b"host: " + url.removeprefix("http://").encode()]
        assert got[2:6] == [b"X-One: 1", b"Accept-encoding: gzip", b"x-one: 2", b"Upgrade-It: 1"]
        assert b"x-hop" not in seen[0].lower() and b"TE:" not in seen[0]

    one = engine()
    scenario(body, one)


def test_compressed_and_binary_bodies_pass_untouched() -> None:
    dice = random.Random(1)
    packed = gzip.compress(dice.randbytes(5000))
    fields = {"Content-Encoding": "gzip", "Content-Type": "application/octet-stream"}

    async def body(server: RouterServer, peer: Peer) -> None:
        status, headers, got = await peer.ask(packed, "/x", b"content-encoding: gzip\r\n")
        assert (status, headers["Content-Encoding"], got) == (200, "gzip", packed)
        assert one.calls[0].body == packed and one.calls[0].headers["content-encoding"] == "gzip"

    one = engine(default=raw(http(200, packed, fields)))
    scenario(body, one, policy="prefix_aware")


def test_head_204_and_304_have_no_body_and_keep_the_connection() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        status, headers, _ = await peer.get("/x", method="HEAD")
        assert (status, headers["content-length"]) == (200, "7")
        status, headers, _ = await peer.get("/x")
        assert status == 204 and "content-length" not in headers and "transfer-encoding" not in headers
        assert (await peer.get("/x"))[0] == 304
        assert (await peer.get("/x"))[2] == b"last"

    one = engine(
        raw(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n"),
        raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
        raw(b"HTTP/1.1 304 Not Modified\r\netag: x\r\n\r\n"),
        raw(http(200, b"last")),
    )
    scenario(body, one)


def test_expect_100_continue_is_answered_by_the_router() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.send(b"POST /x HTTP/1.1\r\nhost: a\r\nExpect: 100-continue\r\ncontent-length: 3\r\n\r\n")
        assert (await peer.response())[0] == 100
        peer.send(b"abc")
        assert (await peer.response())[0] == 200
        assert one.calls[0].body == b"abc" and "expect" not in one.calls[0].headers

    one = engine()
    scenario(body, one)


def test_a_chunked_request_of_moderate_size_goes_on_with_its_length() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.send(b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        for piece in (b"3;ext=1\r\nabc\r\n", b"2\r\nde\r\n", b"0\r\nx-trailer: 1\r\n\r\n"):
            peer.send(piece)
            await asyncio.sleep(0.01)
        assert (await peer.response())[0] == 200
        call = one.calls[0]
        assert call.body == b"abcde" and call.headers["content-length"] == "5"
        assert "x-trailer" not in call.headers and "transfer-encoding" not in call.headers

    one = engine()
    scenario(body, one)


def test_events_pass_chunk_by_chunk_as_they_come() -> None:
    events = [b"data: %d\n\n" % number for number in range(5)]

    async def body(server: RouterServer, peer: Peer) -> None:
        peer.post()
        status, headers = await peer.head()
        assert (status, headers["Content-Type"]) == (200, "text/event-stream")
        for event in events:
            assert await asyncio.wait_for(peer.chunk(), 1) == event
        assert await peer.chunk() == b""
        assert (await peer.ask())[0] == 200

    one = engine(sse(*events, gap=0.05))
    scenario(body, one)


def test_a_response_that_ends_with_its_connection_is_whole() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        _, headers, got = await peer.ask()
        assert headers["transfer-encoding"] == "chunked" and got == b"until the end"
        assert (await peer.ask())[2] == b"next"

    one = engine(
        raw(b"HTTP/1.1 200 OK\r\nx: y\r\n\r\nuntil the end", close=True),
        raw(http(200, b"next")),
    )
    scenario(body, one)


def test_an_http_1_0_client_gets_a_response_up_to_the_close() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.send(b"GET /x HTTP/1.0\r\n\r\n")
        _, headers, got = await peer.response()
        assert got == b"data: 1\n\n" and "transfer-encoding" not in headers
        assert headers["connection"] == "close"

    scenario(body, engine(sse(b"data: 1\n\n")))


def test_pipelined_requests_are_answered_in_order() -> None:
    async def echo(call: Call) -> None:
        await asyncio.sleep(0.01 if call.body == b"0" else 0)
        await call.write(http(200, call.body))

    async def body(server: RouterServer, peer: Peer) -> None:
        for number in range(50):
            peer.post(b"%d" % number)
        peer.send(b"GET /liveness HTTP/1.1\r\nhost: a\r\n\r\n")
        peer.post(b"x" * 300_000)
        peer.post(b"end")
        for number in range(50):
            assert (await peer.response())[2] == b"%d" % number
        assert (await peer.response())[0] == 200
        assert len((await peer.response())[2]) == 300_000
        assert (await peer.response())[2] == b"end"

    scenario(body, engine(default=echo), engine(default=echo))


class Digesting(ScriptedEngine):
    """Takes a body of any framing, keeps its digest only, and answers with so many bytes."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.answer = answer
        self.digest = ""
        self.framing = b""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if b"post" not in head:
                    writer.write(http(404, b""))
                    continue
                digest = hashlib.sha256()
                self.framing = head
                if b"chunked" in head:
                    while size := int(await reader.readline(), 16):
                        while size:
                            data = await reader.read(min(size, 1 << 16))
                            digest.update(data)
                            size -= len(data)
                        await reader.readexactly(2)
                    await reader.readexactly(2)
                else:
                    left = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
                    while left:
                        data = await reader.read(min(left, 1 << 16))
                        digest.update(data)
                        left -= len(data)
                self.digest = digest.hexdigest()
                in_chunks = b"chunked" in head
                framing = b"transfer-encoding: chunked" if in_chunks else b"content-length: %d" % self.answer
                writer.write(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % framing)
                for number in range(self.answer >> 20):
                    piece = bytes([number]) * (1 << 20)
                    writer.write(b"100000\r\n%s\r\n" % piece if in_chunks else piece)
                    await writer.drain()
                if in_chunks:
                    writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_64_megabytes_up_and_down_in_bounded_memory(framing: str) -> None:
    size = 64 << 20
    piece = random.Random(2).randbytes(1 << 20)
    expected = hashlib.sha256()
    for number in range(size >> 20):
        expected.update(bytes([number]) * (1 << 20))

    async def body(server: RouterServer, peer: Peer) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if framing == "length":
            peer.send(b"POST /big HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % size)
        else:
            peer.send(b"POST /big HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        digest = hashlib.sha256()
        for _ in range(size >> 20):
            digest.update(piece)
            peer.send(piece if framing == "length" else b"100000\r\n%s\r\n" % piece)
            await peer.writer.drain()
        if framing == "chunked":
            peer.send(b"0\r\n\r\n")
        status, headers = await peer.head()
        assert status == 200
        assert headers.get("content-length") == (str(size) if framing == "length" else None)
        down, left = hashlib.sha256(), size
        while left:
            data = await (peer.chunk() if framing == "chunked" else peer.reader.read(1 << 20))
            down.update(data)
            left -= len(data)
        if framing == "chunked":
            assert await peer.chunk() == b""
        assert down.digest() == expected.digest()
        assert one.digest == digest.hexdigest()
        assert (b"chunked" in one.framing) == (framing == "chunked")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 24 << 10, f"{grown} KiB more"

    one = Digesting(size)
    scenario(body, one)


def test_a_client_that_reads_slowly_slows_its_engine_down() -> None:
    written: list[int] = []

    async def pour(call: Call) -> None:
        await call.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for number in range(400):
            await call.write(b"10000\r\n%s\r\n" % bytes(0x10000))
            written.append(number)
        await call.write(b"0\r\n\r\n")

    async def body(server: RouterServer, peer: Peer) -> None:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        peer.post()
        await asyncio.sleep(0.4)
        stuck = len(written)
        assert 0 < stuck < 300
        await asyncio.sleep(0.1)
        assert len(written) == stuck
        peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert len((await peer.response())[2]) == 400 * 0x10000

    scenario(body, engine(pour))


def test_an_engine_that_reads_slowly_slows_its_client_down() -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"POST" not in await reader.readuntil(b"\r\n\r\n"):
            return
        await go.wait()
        left = 32 << 20
        while left:
            left -= len(await reader.read(1 << 20))
        writer.write(http(200, b"got it"))
        await reader.read()

    go = asyncio.Event()

    async def body(server: RouterServer, peer: Peer) -> None:
        async with instead(server, one, slow):
            peer.send(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (32 << 20))
            sent = 0
            try:
                async with asyncio.timeout(0.5):
                    while sent < 32:
                        peer.send(bytes(1 << 20))
                        sent += 1
                        await peer.writer.drain()
            except TimeoutError:
                pass
            assert sent < 28, "nobody held the client back"
            go.set()
            for _ in range(32 - sent):
                peer.send(bytes(1 << 20))
            assert (await peer.response())[2] == b"got it"

    one = engine()
    scenario(body, one)


def test_an_answer_before_the_body_has_come_is_relayed_and_the_connection_closed() -> None:
    async def hasty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(http(413, b"too large"))
        await asyncio.sleep(5)

    async def body(server: RouterServer, peer: Peer) -> None:
        async with instead(server, one, hasty):
            peer.send(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (8 << 20))
            peer.send(bytes(2 << 20))
            status, headers, got = await peer.response()
            assert (status, headers["connection"], got) == (413, "close", b"too large")
            await settled(server)

    one = engine()
    scenario(body, one)


def test_a_connection_that_was_given_half_a_request_is_not_used_again() -> None:
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
            await reader.readexactly(min(size, 1 << 20))
            writer.write(http(200, b"early" if size > 1 << 20 else b"whole"))
            await reader.readexactly(max(0, size - (1 << 20)))  # what else comes belongs to that body

    async def body(server: RouterServer, peer: Peer) -> None:
        async with instead(server, one, early):
            peer.send(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (8 << 20))
            peer.send(bytes((1 << 20) + 1))
            assert (await peer.response())[2] == b"early"
            other = await Peer.to(server)
            assert (await asyncio.wait_for(other.ask(b"{}", "/x"), 2))[2] == b"whole"
            other.close()

    one = engine()
    scenario(body, one)


def test_request_ids_go_in_and_out() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        _, headers, _ = await peer.ask(fields=b"X-Request-Id: mine-1\r\n")
        assert headers["x-request-id"] == "mine-1" and one.calls[0].headers["x-request-id"] == "mine-1"
        _, headers, _ = await peer.ask()
        assert headers["x-request-id"] == one.calls[1].headers["x-request-id"] != ""

    one = engine(default=raw(http(200, b"{}", {"X-Request-Id": "engine's own"})))
    scenario(body, one)


def test_models_of_all_workers_are_joined_and_requests_go_where_theirs_is_served() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        await until(lambda: all(end.transport.models for end in server.router.fleet.endpoints))  # type: ignore[attr-defined]
        _, _, listing = await peer.get("/v1/models")
        cards = orjson.loads(listing)["data"]
        assert [card["id"] for card in cards] == ["a", "c", "b"] and cards[0]["extra"] == 1
        for model, where in (("a", one), ("b", two), ("a", one), ("b", two)):
            before = len(where.calls)
            assert (await peer.ask(b'{"model": "%s"}' % model.encode()))[0] == 200
            assert len(where.calls) == before + 1
        status, _, said = await peer.ask(b'{"model":"unknown"}')
        assert status == 404 and b"unknown" in said

    one, two = engine(), engine()
    one.side["/v1/models"] = serves("a", "c")
    two.side["/v1/models"] = serves("b", "c")
    scenario(body, one, two)
