"""What a client sees of a stream of events whose engine dies, wherever in the stream that is."""

from __future__ import annotations

import asyncio
import gzip

import orjson
import pytest

from penstock.router.server import RouterServer
from tests.router.front import Peer, engine, scenario
from tests.scripted import Call, Step

LARGE_EVENT = b"data: " + b"x" * 150_000 + b"\n\n"


def dying(*pieces: bytes, fields: bytes = b"") -> Step:
    """Sends the head of a stream, these pieces as chunks of their own, and then an RST."""

    async def step(call: Call) -> None:
        await call.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + fields)
        await call.write(b"transfer-encoding: chunked\r\n\r\n")
        for piece in pieces:
            await asyncio.sleep(0.02)
            await call.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        await asyncio.sleep(0.04)
        call.reset()

    return step


async def all_chunks(peer: Peer) -> tuple[bytes, bool]:
    """What comes of a stream, and whether it was complete."""
    data = b""
    try:
        while piece := await peer.chunk():
            data += piece
    except (ValueError, asyncio.IncompleteReadError, ConnectionError):
        return data, False
    return data, True


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (b"data: 1\n\n",),
        (b"data: 1\n\n", b": ping\n\n"),
        (b"data: 1\r\n\r\n",),
        (b'data: {"id', b'":1}\n\n'),
        (LARGE_EVENT,),
        (LARGE_EVENT[:70_000], LARGE_EVENT[70_000:]),
        (b"data: 1\n", b"\n"),
        (b'data: {"id"',),
        (b'data: {"id"', b":"),
    ],
    ids=["head", "event", "comment", "crlf", "split", "large", "cut", "split end", "half", "two halves"],
)
def test_it_ends_with_an_error_event_of_its_own(pieces: tuple[bytes, ...]) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.post()
        status, _ = await peer.head()
        data, complete = await all_chunks(peer)
        assert status == 200 and not complete
        sent = b"".join(pieces)
        assert data.startswith(sent)
        rest = data[len(sent) :]
        gap, _, event = rest.partition(b"event: error\ndata: ")
        assert gap in (b"", b"\n\n")
        assert not sent or (sent + gap).endswith((b"\n\n", b"\r\n\r\n"))
        assert orjson.loads(event)["error"]["type"] == "engine_lost" and event.endswith(b"\n\n")
        assert server.router.statistics.broken == 1

    scenario(body, engine(dying(*pieces)))


def test_nothing_is_written_into_a_compressed_stream() -> None:
    packed = gzip.compress(b"data: 1\n\n" * 50)

    async def body(server: RouterServer, peer: Peer) -> None:
        peer.post()
        await peer.head()
        data, complete = await all_chunks(peer)
        assert packed.startswith(data) and not complete

    scenario(body, engine(dying(packed[:20], fields=b"content-encoding: gzip\r\n")))
