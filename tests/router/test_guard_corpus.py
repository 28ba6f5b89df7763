"""Requests and responses that proxies have been known to read in two ways: here each has one meaning or none.

What the engine is sent is read byte for byte by a recorder that takes HTTP/1.1 at its strictest. Sources of
the corpus: RFC 9112, section 11.2; the families of request smuggling (CL.TE, TE.CL, TE.TE, CL.0, header and
trailer injection); what llhttp, Go's net/http, HAProxy, nginx and uvicorn had to fix.
"""

from __future__ import annotations

import asyncio
from typing import Final

import pytest

from penstock.router import inlet
from penstock.router.server import RouterServer
from tests.router.front import Peer, engine, instead, scenario, settled
from tests.scripted import http

GET: Final = b"GET /x HTTP/1.1\r\nhost: a\r\n"
POST: Final = b"POST /x HTTP/1.1\r\nhost: a\r\n"
CHUNKED: Final = POST + b"transfer-encoding: chunked\r\n\r\n"
FIVE: Final = b"5\r\nabcde\r\n0\r\n\r\n"
SMUGGLED: Final = b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"
OWN: Final = (b"GET /health ", b"GET /v1/models ")
"""What the router asks by itself."""

Sent = tuple[bytes, bytes, bytes]
"""Request line, fields without the router's own and framing, body."""


class Recorder:
    """An engine that answers every request with its number, and keeps what it was sent."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.raw = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            if head.startswith(OWN):
                writer.write(http(404, b""))
                continue
            self.raw += head
            line, *fields = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
            assert b"\n" not in head.replace(b"\r\n", b"") and b"\r" not in head.replace(b"\r\n", b"")
            split = [field.split(b": ", 1) for field in fields]
            lengths = [value for name, value in split if name.lower() == b"content-length"]
            names = [name.lower() for name, _ in split]
            assert len(lengths) <= 1 and b"transfer-encoding" not in names and names.count(b"host") == 1
            assert names.count(b"x-request-id") == 1
            body = await reader.readexactly(int(lengths[0])) if lengths else b""
            own = (b"host", b"x-request-id", b"content-length")
            rest = b"\n".join(b": ".join(field) for field in split if field[0].lower() not in own)
            self.sent.append((line, rest, body))
            writer.write(http(200, b"%d" % len(self.sent)))


def refused(data: bytes, status: int, *, bytewise: bool) -> None:
    """It gets the status and a close; nothing of it, nor what is pipelined behind it, reaches the engine."""

    async def body(server: RouterServer, peer: Peer) -> None:
        recorder = Recorder()
        async with instead(server, one, recorder.serve):
            await send(peer, data + SMUGGLED, bytewise=bytewise)
            got, headers, _ = await peer.response()
            assert (got, headers["connection"]) == (status, "close")
            assert await peer.rest() == b""
            await settled(server)
            assert recorder.raw == b""

    one = engine()
    scenario(body, one)


def passes(data: bytes, *expected: Sent, bytewise: bool = False) -> None:
    """The engine is sent exactly these requests, and each has its answer."""

    async def body(server: RouterServer, peer: Peer) -> None:
        recorder = Recorder()
        async with instead(server, one, recorder.serve):
            await send(peer, data, bytewise=bytewise)
            for number in range(len(expected)):
                head = expected[number][0].startswith(b"HEAD ")
                status, _, got = await peer.response(head=head)
                assert (status, got) == (200, b"" if head else b"%d" % (number + 1))
            assert recorder.sent == list(expected)

    one = engine()
    scenario(body, one)


async def send(peer: Peer, data: bytes, *, bytewise: bool) -> None:
    if not bytewise:
        peer.send(data)
        return
    for index in range(len(data)):
        peer.send(data[index : index + 1])
        await asyncio.sleep(0)


def cases(*data: bytes) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("data", data, ids=[ascii(one)[2:60] for one in data])


BOTH: Final = pytest.mark.parametrize("bytewise", [False, True], ids=["at once", "bytewise"])


@BOTH
@cases(
    *(
        POST + b"transfer-encoding:%s\r\n\r\n" % value + FIVE
        for value in (
            b"", b" ", b" chunk", b" identity", b" xchunked", b" chunked\x0b", b"\x0bchunked",
            b" \x0cchunked", b" chunked,", b" ,chunked", b" chunked, chunked", b" chunked, identity",
            b" identity, chunked", b" gzip, chunked", b" chunked;q=1", b' "chunked"', b" 'chunked'",
            b" chunked\x00", b" chunked\xa0", b" chu\x00nked", b" chunked\t", b" chunked ", b"\r\n chunked",
            b"\n chunked", b" cow\r\nTransfer-Encoding: chunked", b" chunked\r\nTransfer-Encoding: cow",
            b" chunked\r\nTRANSFER-ENCODING: chunked", b" chunked\r\ncontent-length: 15",
            b" chunked\r\nContent-Length: 0",
        )
    ),
    *(
        POST + b"%s: chunked\r\ncontent-length: 15\r\n\r\n" % name + FIVE
        for name in (
            b"Transfer-Encoding", b"transfer-encoding ", b" transfer-encoding", b"\ttransfer-encoding",
            b"transfer-encoding\x00", b"transfer\x00-encoding", b"transfer-encoding\xa0",
            b"\x0btransfer-encoding", b"transfer-encoding\t", b"x\rtransfer-encoding",
            b"x: y\rtransfer-encoding", b"x\ntransfer-encoding", b"x: y\n\ntransfer-encoding",
            b"x: y\r\n\rtransfer-encoding", b"transfer encoding", b"\xfftransfer-encoding",
            b"x: y\ntransfer-encoding", b":transfer-encoding",
        )
    ),
)  # fmt: skip
def test_a_transfer_coding_in_disguise_is_refused(data: bytes, bytewise: bool) -> None:
    refused(data, 400, bytewise=bytewise)


@BOTH
@cases(
    *(
        POST + b"content-length:%s\r\n\r\nabcde" % value
        for value in (
            b"", b" ", b" +5", b" -5", b" -0", b" 5 5", b" 5,5", b" 5, 6", b" 5;", b" 5.0", b" 5e0",
            b" 0x5", b" 1_0", b" \xd9\xa5", b" \x0b5", b" 5\x0b", b" 5\x00", b" five",
            b" 18446744073709551621", b" 99999999999999999999999", b"\r\n 5", b" 5\r\nContent-Length: 5",
            b" 5\r\ncontent-length: 0", b" 0\r\nCONTENT-LENGTH: 5", b" 5\ncontent-length: 0",
            b" 5\rcontent-length: 0",
        )
    ),
    *(
        POST + b"%s: 5\r\n\r\nabcde" % name
        for name in (
            b"content-length ", b" content-length", b"content-length\x00", b"content\x00-length",
            b"\x0bcontent-length", b"x: y\r\n\rcontent-length", b"x: y\ncontent-length",
        )
    ),
)  # fmt: skip
def test_a_length_in_disguise_is_refused(data: bytes, bytewise: bool) -> None:
    refused(data, 400, bytewise=bytewise)


@BOTH
@cases(
    *(
        CHUNKED + chunks
        for chunks in (
            b"\r\nabcde\r\n", b";\r\nabcde\r\n", b"g\r\nabcde\r\n", b"0x5\r\nabcde\r\n", b"+5\r\nabcde\r\n",
            b"-5\r\nabcde\r\n", b" 5\r\nabcde\r\n", b"5 \r\nabcde\r\n", b"5\t\r\nabcde\r\n",
            b"5 ;a\r\nabcde\r\n", b"5\nabcde\r\n", b"5\rabcde\r\n", b"5\r\rabcde\r\n",
            b"5\r\nabcdeXX0\r\n\r\n", b"5\r\nabcde\n0\r\n\r\n", b"5\r\nabcde0\r\n\r\n",
            b"5\r\nabcdef\r\n0\r\n\r\n", b"5;a\nb\r\nabcde\r\n", b"5;a\rb\r\nabcde\r\n",
            b"5;\x00\r\nabcde\r\n", b'5;a="\n"\r\nabcde\r\n', b"5\r\nabcde\r\n0\n\r\n",
            b"5\r\nabcde\r\n0\r\n\n", b"5\r\nabcde\r\n0\r\nx: y\n\r\n", b"5\r\nabcde\r\n0\r\n x: y\r\n\r\n",
            b"5\r\nabcde\r\n0\r\nx : y\r\n\r\n", b"5\r\nabcde\r\n0\r\nContent-Length: 9\r\n\r\n",
            b"10000000000000005\r\nabcde\r\n", b"fffffffffffffffff\r\nabcde\r\n",
            b"5\r\nabcde\r\n\r\n0\r\n\r\n",
        )
    ),
)  # fmt: skip
def test_a_chunk_that_is_none_is_refused(data: bytes, bytewise: bool) -> None:
    refused(data, 400, bytewise=bytewise)


@BOTH
@cases(
    *(
        line + b"\r\nhost: a\r\n\r\n"
        for line in (
            b"GET /x", b"GET", b"get /x HTTP/1.1", b"GeT /x HTTP/1.1", b" GET /x HTTP/1.1",
            b"\tGET /x HTTP/1.1", b"GET\t/x HTTP/1.1", b"GET /x\tHTTP/1.1", b"GET /x HTTP/1.1 ",
            b"GET /x y HTTP/1.1", b"GET /x HTTP/1.10", b"GET /x HTTP/01.1", b"GET /x HTTP/1.2",
            b"GET /x HTTP/2.0", b"GET /x HTTP/0.9", b"GET /x http/1.1", b"GET /x HTTP/1,1",
            b"GET /x HTTP/1", b"GET /x HTTP/", b"GET /x HTTP/1.1\r", b"GET /x HTTP/1.1\rx: y",
            b"GET /x\x00 HTTP/1.1", b"GET /x\x7f HTTP/1.1", b"GET /x\x80 HTTP/1.1", b"GET /x\rHTTP/1.1",
            b"GET /x\nHTTP/1.1", b"GET /x#y HTTP/1.1", b"GET /pause# HTTP/1.1", b"GET x HTTP/1.1",
            b"GET a:80 HTTP/1.1", b"GET ?x HTTP/1.1", b"GET http:///x HTTP/1.1", b"GET http://?x HTTP/1.1",
            b"GET http:/x HTTP/1.1", b"GET ftp://a/x HTTP/1.1", b"GET file:///x HTTP/1.1",
            b"GET unix:///x HTTP/1.1", b"CONNECT a:80 HTTP/1.1", b"CONNECT /x HTTP/1.1",
            b"G\x00ET /x HTTP/1.1", b"G(T /x HTTP/1.1", b"HTTP/1.1 200 OK", b"\x16\x03\x01\x02\x00",
        )
    ),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /x HTTP/1.1\nhost: a\n\n",
    b"GET /x HTTP/1.1\r\nhost: a\n\r\n",
)  # fmt: skip
def test_a_request_line_that_is_none_is_refused(data: bytes, bytewise: bool) -> None:
    refused(data, 400, bytewise=bytewise)


@BOTH
@cases(
    *(
        GET + field + b"\r\n\r\n"
        for field in (
            b"x", b": y", b"x : y", b" x: y", b"\tx: y", b"x\x00: y", b"x\x7f: y", b"x\xa0: y", b"x@: y",
            b'"x": y', b"x(: y", b"x y: z", b"x,: y", b"x: a\x00b", b"x: a\x07b", b"x: a\x7fb",
            b"x: a\r\n b", b"x: a\r\n\tb", b"x: a\rb: c", b"x: a\nb: c", b"x: a\r\r\nb: c",
            b"x: y\r\n\rz: y", b"x-request-id: a\rx-api: b", b"x-request-id: a\nx-api: b",
            b"x-request-id: a\x00", b"x-session-id: a\rb", b"x-session-id: a\r\n b",
            b"authorization: a\nb: c", b"host: a", b"Host: b", b"hOST:",
            b"upgrade: h2c\r\nconnection: upgrade", b"upgrade: websocket\r\nconnection: Upgrade",
            b"upgrade: h2c\r\nhttp2-settings: AAMA\r\nconnection: upgrade, http2-settings",
        )
    ),
    b"GET /x HTTP/1.1\r\n\r\n",
    b"GET /x HTTP/1.1\r\n host: a\r\n\r\n",
)  # fmt: skip
def test_a_field_that_is_none_is_refused(data: bytes, bytewise: bool) -> None:
    refused(data, 400, bytewise=bytewise)


XLINE: Final = b"POST /x HTTP/1.1"
GLINE: Final = b"GET /x HTTP/1.1"
SECOND: Final = (b"GET /smuggled HTTP/1.1", b"", b"")


@BOTH
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (POST + b"content-length:5\r\n\r\nabcde", [(XLINE, b"", b"abcde")]),
        (POST + b"content-length: \t5 \t\r\n\r\nabcde", [(XLINE, b"", b"abcde")]),
        (POST + b"content-length: 0005\r\n\r\nabcde", [(XLINE, b"", b"abcde")]),
        (POST + b"content-length: 0\r\n\r\n" + SMUGGLED, [(XLINE, b"", b""), SECOND]),
        (POST + b"\r\n" + SMUGGLED, [(XLINE, b"", b""), SECOND]),
        (
            POST + b"content-length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED + GET + b"\r\n",
            [(XLINE, b"", SMUGGLED), (GLINE, b"", b"")],
        ),
        (GET + b"content-length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED, [(GLINE, b"", SMUGGLED)]),
        (GET + b"transfer-encoding: chunked\r\n\r\n" + FIVE, [(GLINE, b"", b"abcde")]),
        (b"DELETE" + CHUNKED[4:] + FIVE, [(b"DELETE /x HTTP/1.1", b"", b"abcde")]),
        (b"HEAD" + POST[4:] + b"content-length: 5\r\n\r\nabcde", [(b"HEAD /x HTTP/1.1", b"", b"abcde")]),
        (POST + b"Transfer-Encoding:\tCHUNKED\r\n\r\n" + FIVE, [(XLINE, b"", b"abcde")]),
        (POST + b"tRANSFER-eNCODING:chunked\r\n\r\n" + FIVE + GET + b"\r\n",
         [(XLINE, b"", b"abcde"), (GLINE, b"", b"")]),
        (CHUNKED + b"0005;a=b\r\nabcde\r\n000\r\n\r\n", [(XLINE, b"", b"abcde")]),
        (CHUNKED + b'5;a="b;c";d\r\nabcde\r\nA\r\n0\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n',
         [(XLINE, b"", b"abcde0\r\n\r\n0\r\n\r\n")]),
        (CHUNKED + b"5\r\nabcde\r\n0\r\nx: y\r\nHost: evil\r\nx-request-id: z\r\n\r\n",
         [(XLINE, b"", b"abcde")]),
        (CHUNKED + b"0\r\n\r\n" + SMUGGLED, [(XLINE, b"", b""), SECOND]),
        (POST + b"transfer_encoding: chunked\r\ncontent-length: 5\r\n\r\nabcde",
         [(XLINE, b"transfer_encoding: chunked", b"abcde")]),
        (POST + b"content_length: 9\r\ncontent-length: 5\r\n\r\nabcde",
         [(XLINE, b"content_length: 9", b"abcde")]),
        (POST + b"x-content-length: 9\r\ncontent-length: 5\r\n\r\nabcde",
         [(XLINE, b"x-content-length: 9", b"abcde")]),
        (POST + b"connection: content-length, host, x-request-id\r\ncontent-length: 5\r\n\r\nabcde",
         [(XLINE, b"", b"abcde")]),
        (CHUNKED[:-2] + b"connection: transfer-encoding\r\n\r\n" + FIVE, [(XLINE, b"", b"abcde")]),
        (GET + b"connection: keep-alive, x, close-x\r\nX: 1\r\nclose-x: 2\r\ny: 3\r\n\r\n",
         [(GLINE, b"y: 3", b"")]),
        (GET + b"te: trailers\r\ntrailer: x\r\nproxy-connection: close\r\nkeep-alive: 5\r\n\r\n",
         [(GLINE, b"", b"")]),
        (GET + b"proxy-authorization: a\r\nupgrade: h2c\r\nhttp2-settings: AAMA\r\n\r\n",
         [(GLINE, b"", b"")]),
        (GET + b"x: a\xff\tb\r\n\r\n", [(GLINE, b"x: a\xff\tb", b"")]),
        (GET + b"x:\r\ny:  z  \r\n\r\n", [(GLINE, b"x: \ny: z  ", b"")]),
        (GET + b"x-request-id: \xff\xfe\r\n\r\n", [(GLINE, b"", b"")]),
        (GET + b"x-request-id: a\r\nX-REQUEST-ID: b\r\n\r\n", [(GLINE, b"", b"")]),
        (GET + b"expect: 100-continue\r\n\r\n", [(GLINE, b"", b"")]),
        (b"\r\n\r\n" + GET + b"\r\n", [(GLINE, b"", b"")]),
        (b"GET http://evil/x?y HTTP/1.1\r\nhost: a\r\n\r\n", [(b"GET /x?y HTTP/1.1", b"", b"")]),
        (b"GET HTTP://e@vil:1 HTTP/1.1\r\nhost: a\r\n\r\n", [(b"GET / HTTP/1.1", b"", b"")]),
        (b"GET http://evil?q=/workers HTTP/1.1\r\nhost: a\r\n\r\n",
         [(b"GET /?q=/workers HTTP/1.1", b"", b"")]),
        (b"GET //evil/x HTTP/1.1\r\nhost: a\r\n\r\n", [(b"GET //evil/x HTTP/1.1", b"", b"")]),
        (b"GET /%0d%0ax:y HTTP/1.1\r\nhost: a\r\n\r\n", [(b"GET /%0d%0ax:y HTTP/1.1", b"", b"")]),
        (b"GET /%00%2e%2e/%zz HTTP/1.1\r\nhost: a\r\n\r\n", [(b"GET /%00%2e%2e/%zz HTTP/1.1", b"", b"")]),
        (b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n", [(b"OPTIONS * HTTP/1.1", b"", b"")]),
    ],
)  # fmt: skip
def test_what_is_well_formed_passes_in_its_one_meaning(
    data: bytes, expected: list[Sent], bytewise: bool
) -> None:
    passes(data, *expected, bytewise=bytewise)


@pytest.mark.parametrize(("data", "size"), [(b"content-length: 3\r\n\r\nabcde", 3), (b"\r\nabcde", 0)])
def test_what_is_left_behind_a_body_is_a_request_of_its_own(data: bytes, size: int) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        recorder = Recorder()
        async with instead(server, one, recorder.serve):
            peer.send(POST + data + SMUGGLED)
            assert (await peer.response())[0] == 200
            assert (await peer.response())[0] == 400
            assert await peer.rest() == b""
        assert recorder.sent == [(XLINE, b"", b"abcde"[:size])]

    one = engine()
    scenario(body, one)


@pytest.mark.parametrize(
    "path",
    ["/%70ause", "/p%61use?mode=abort", "/%77orkers", "/workers%2Fhttp%3A%2F%2Fx", "/updat%65_weights"],
)
def test_an_admin_route_in_disguise_needs_the_admin_key(path: str) -> None:
    """Engines decode the path: relayed as it is, it would be the route."""

    async def body(server: RouterServer, peer: Peer) -> None:
        key = b"authorization: Bearer client\r\n"
        assert (await peer.ask(path=path, fields=key))[0] == 401
        assert (await peer.ask(path="/v1/x%2F", fields=key))[0] == 200
        assert [call.path for call in one.calls] == ["/v1/x%2F"]

    one = engine()
    scenario(body, one, api_key="client", admin_api_key="admin")


@pytest.mark.parametrize(
    "piece", [b"5;" + b"a" * 2**20, b"0\r\nx: " + b"a" * 2**20, b"0\r\n" + b"x: y\r\n" * 2**18]
)
def test_trailers_and_chunk_extensions_are_bounded(piece: bytes) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.send(CHUNKED + piece)
        assert (await peer.response())[0] == 431
        assert await peer.rest() == b"" and one.calls == []

    one = engine()
    scenario(body, one)


def test_a_body_that_trickles_is_given_the_time_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.send(POST + b"content-length: 20\r\n\r\n")
        for _ in range(20):
            peer.send(b"x")
            await asyncio.sleep(0.05)
        assert (await peer.response())[0] == 200

    monkeypatch.setattr(inlet, "SLOW_BODY", 0.4)
    scenario(body, engine())


# -- responses --------------------------------------------------------------------------------------

OK: Final = b"HTTP/1.1 200 OK\r\n"
STREAMED: Final = OK + b"transfer-encoding: chunked\r\n\r\n"


def answered(response: bytes) -> tuple[int, dict[str, str], bytes]:
    """What the client gets when the engine sends that; the next request gets its own answer."""
    got: list[tuple[int, dict[str, str], bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            if head.startswith(OWN):
                writer.write(http(404, b""))
            else:
                writer.write(response if b" /bad " in head else http(200, b"next"))

    async def body(server: RouterServer, peer: Peer) -> None:
        async with instead(server, one, serve):
            got.append(await peer.get("/bad"))
            assert (await peer.get("/next"))[2] == b"next"

    one = engine()
    scenario(body, one, retry_max_retries=0)
    return got[0]


@cases(
    OK + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n" + FIVE,
    OK + b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n" + FIVE,
    OK + b"content-length: 3\r\ncontent-length: 5\r\n\r\nabcde",
    OK + b"content-length: +3\r\n\r\nabc",
    OK + b"x: a\rset-cookie: b\r\ncontent-length: 1\r\n\r\na",
    OK + b"x: a\nset-cookie: b\r\ncontent-length: 1\r\n\r\na",
    OK + b"x: a\r\n b\r\ncontent-length: 1\r\n\r\na",
    OK + b"x : a\r\ncontent-length: 1\r\n\r\na",
    OK + b"x: \x00\r\ncontent-length: 1\r\n\r\na",
    OK + b"transfer-encoding: gzip, chunked\r\n\r\n" + FIVE,
    OK + b"transfer-encoding: xchunked\r\n\r\n" + FIVE,
    OK + b"transfer-encoding: gzip\r\n\r\nabc",
    OK + b"transfer-encoding: chunked\r\n\r\n5\nabcde\n0\n\n",
    OK.replace(b"\r\n", b"\n") + b"content-length: 1\n\na",
    b"HTTP/1.1 000 X\r\ncontent-length: 1\r\n\r\na",
    b"HTTP/1.1 99 X\r\ncontent-length: 1\r\n\r\na",
    b"HTTP/1.1 1000 X\r\ncontent-length: 1\r\n\r\na",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nzzz",
    b"<html>",
)
def test_a_response_that_could_be_read_in_two_ways_is_a_502(data: bytes) -> None:
    assert answered(data)[0] == 502


@pytest.mark.parametrize(
    ("response", "status", "body"),
    [
        (STREAMED + b"5\r\nabcde\r\n0\r\nx: y\r\nset-cookie: z\r\n\r\n", 200, b"abcde"),
        (OK + b"content-length: 0\r\n\r\nHTTP/1.1 500 X\r\nx: y\r\ncontent-length: 3\r\n\r\nxyz", 200, b""),
        (OK + b"content-length: 1\r\n\r\naHTTP/1.1 500 X\r\nx: y\r\ncontent-length: 3\r\n\r\nxyz", 200, b"a"),
        (
            STREAMED + FIVE + b"HTTP/1.1 500 X\r\nx: y\r\ntransfer-encoding: chunked\r\n\r\n" + FIVE,
            200,
            b"abcde",
        ),
        (OK + b"content-length: 1\r\n\r\nabcdef", 200, b"a"),
        (b"HTTP/1.1 204 No\r\ncontent-length: 3\r\n\r\nabc", 204, b""),
        (b"HTTP/1.1 100 Continue\r\nx: y\r\n\r\nHTTP/1.1 103 E\r\nx: y\r\n\r\n" + http(200, b"a"), 200, b"a"),
    ],
    ids=["trailer", "two", "two with bodies", "two chunked", "too much", "204", "informational"],
)
def test_one_request_has_one_response(response: bytes, status: int, body: bytes) -> None:
    got, headers, said = answered(response)
    assert (got, said) == (status, body)
    assert "x" not in headers and "set-cookie" not in headers


def test_a_flood_of_informational_responses_is_cut_off() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /bad "):
            writer.write(http(404, b""))
        for _ in range(5000):
            writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: </x>; rel=preload\r\n\r\n")
            await writer.drain()

    async def body(server: RouterServer, peer: Peer) -> None:
        async with instead(server, one, serve):
            assert (await peer.get("/bad"))[0] == 502

    one = engine()
    scenario(body, one, retry_max_retries=0)
