"""What the router does not let through: keys, sizes, malformed and ambiguous requests, slow ones."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.router import inlet, server
from penstock.router.server import RouterServer
from penstock.wire import accepted
from tests.router.front import Peer, engine, instead, scenario
from tests.scripted import http, raw, until

BAD = [
    b"hello\r\n\r\n",
    b"GET / HTTP/1.1\nhost: a\n\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
    b"GET / HTTP/2.0\r\nhost: a\r\n\r\n",
    b"GET / HTTP/1.2\r\nhost: a\r\n\r\n",
    b"BREW / HTTP/1.1\r\nhost: a\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET ftp://a/b HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /\x01 HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /\x80 HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\n folded\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost : a\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\nx(y: z\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\nx: a\x00b\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\nx: a\rb\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\nx: a\nb: c\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\n: empty\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3, 3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0x3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1_0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length:\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999999\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    b"POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3 \r\nabc\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n-3\r\nabc\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
]


@pytest.mark.parametrize("data", BAD)
def test_a_bad_request_gets_400_and_reaches_no_engine(data: bytes) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        assert (await peer.ask(path="/first"))[0] == 200
        peer.send(data + b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n")
        status, headers, _ = await peer.response()
        assert (status, headers["connection"]) == (400, "close")
        assert await peer.rest() == b""
        assert [call.path for call in one.calls] == ["/first"]

    one = engine()
    scenario(body, one)


@settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from(
            [b"GET ", b"POST ", b"/", b"/workers", b" HTTP/1.1", b"\r\n", b"\n", b"\r", b"host: a",
             b"content-length: ", b"transfer-encoding: chunked", b"5", b"0", b":", b" ", b"\t", b"\x00",
             b"expect: 100-continue", b"connection: close, content-length", b"abc"]
        ) | st.binary(max_size=8),
        max_size=24,
    )
)  # fmt: skip
def test_any_bytes_leave_the_router_well(pieces: list[bytes]) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        for piece in pieces:
            peer.send(piece)
        peer.writer.write_eof()
        left = await peer.rest()
        assert left == b"" or left.startswith(b"HTTP/1.1 ")
        other = await Peer.to(server)
        assert (await other.ask())[0] == 200
        other.close()
        for call in one.calls:
            assert call.headers["host"] == one.url.removeprefix("http://")

    one = engine(default=raw(http(200, b"ok")))
    scenario(body, one)


def test_a_chunk_gone_wrong_on_the_way_up_never_becomes_a_whole_request() -> None:
    got: list[bytes] = []

    async def listening(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read())

    async def body(server: RouterServer, peer: Peer) -> None:
        async with instead(server, one, listening):
            peer.send(b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(3):
                peer.send(b"80000\r\n%s\r\n" % bytes(0x80000))
            await until(lambda: server.router.fleet.dispatch.in_flight == 1)
            await asyncio.sleep(0.05)
            peer.send(b"zz\r\n")
            assert (await peer.response())[0] == 400
            assert await peer.rest() == b""
            await until(lambda: any(data.startswith(b"POST /x") for data in got))
        whole = [data for data in got if data.startswith(b"POST")]
        assert len(whole) == 1 and not whole[0].endswith(b"0\r\n\r\n")

    one = engine()
    scenario(body, one)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 300 + b"\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 200_000,
    ],
)
def test_a_head_over_the_bounds_gets_431(data: bytes) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.send(data)
        assert (await peer.response())[0] == 431
        assert one.calls == []

    one = engine()
    scenario(body, one)


@pytest.mark.parametrize(
    "framing", [b"content-length: 3000000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"]
)
def test_a_body_over_the_bound_gets_413(framing: bytes) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.send(b"POST /x HTTP/1.1\r\nhost: a\r\n" + framing)
        for _ in range(3):
            peer.send(b"100000\r\n%s\r\n" % bytes(1 << 20) if b"chunked" in framing else bytes(1 << 20))
        assert (await peer.response())[0] == 413
        assert all("content-length" not in call.headers for call in one.calls)  # begun at most

    one = engine()
    scenario(body, one, max_payload_size=2_000_000)


def test_keys_of_clients_admin_and_workers_are_three() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        client, admin = b"Authorization: Bearer client\r\n", b"authorization: Bearer admin\r\n"
        for fields in (b"", b"authorization: Bearer clien\r\n", admin, b"authorization: client\r\n"):
            assert (await peer.ask(fields=fields))[0] == 401
        assert (await peer.ask(fields=client))[0] == 200
        assert one.calls[0].headers["authorization"] == "Bearer worker" and len(one.calls) == 1
        for path in ("/workers", "/list_workers", "/get_loads"):
            assert (await peer.get(path, client))[0] == 401
            assert (await peer.get(path, admin))[0] == 200
        assert (await peer.get("/v1/models"))[0] == 401
        for path in ("/health", "/liveness", "/metrics"):
            assert (await peer.get(path))[0] == 200
        shown = (await peer.get("/workers", admin))[2]
        assert not any(secret in shown for secret in (b'"client"', b'"admin"', b'"worker"', b"api_key"))

    one = engine()
    scenario(body, one, api_key="client", admin_api_key="admin", worker_api_key="worker")


def test_without_a_key_a_large_body_is_not_even_asked_for() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.send(b"POST /x HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 9\r\n\r\n")
        assert (await peer.response())[0] == 401
        assert await peer.rest() == b""

    scenario(body, engine(), api_key="k")


def test_a_path_that_only_looks_like_an_admin_route_is_relayed() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        for path in ("//workers", "/workers2"):
            assert (await peer.get(path))[0] == 200
        assert [call.path for call in one.calls] == ["//workers", "/workers2"]

    one = engine()
    scenario(body, one)


@pytest.mark.parametrize(
    "part", [b"POST / HT", b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nabc"]
)
def test_a_slow_request_gets_408(part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.send(part)
        assert (await peer.response())[0] == 408
        assert await peer.rest() == b"" and one.calls == []

    monkeypatch.setattr(inlet, "SLOW_BODY", 0.2)
    monkeypatch.setattr(server, "SLOW_HEAD", 0.2)
    one = engine()
    scenario(body, one)


def test_a_connection_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        assert await peer.rest() == b""

    monkeypatch.setattr(server, "SLOW_HEAD", 0.2)
    scenario(body, engine())


def test_a_client_that_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async def pour(call: Any) -> None:
        await call.write(b"HTTP/1.1 200 OK\r\ncontent-length: 50000000\r\n\r\n")
        await call.write(bytes(50_000_000))

    async def body(server: RouterServer, peer: Peer) -> None:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        peer.post()
        await one.arrived(1)
        await asyncio.sleep(0.1)

    monkeypatch.setattr(accepted, "WRITE_STALL", 0.2)
    monkeypatch.setattr(server, "SLOW_HEAD", 0.4)  # the sweeper looks four times in it
    one = engine(pour)
    scenario(body, one)
