"""The router in front of two embedded engines, processes of their own, one of which is killed mid-stream."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import orjson
import pytest

from penstock.models import ARITHMETIC
from penstock.router.server import RouterServer
from tests.router.front import Peer, scenario, settled

TOKENS = 300
JSON = b"Content-Type: application/json\r\n"
READY = "penstock engine ready on "


@contextmanager
def engine_process() -> Iterator[tuple[str, int]]:
    """URL and process id of an engine with the shipped model."""
    command = [sys.executable, "-m", "penstock.engine", "--model", str(ARITHMETIC), "--port", "0"]
    flags = ["--max-model-len", "512", "--threads", "1"]
    child = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        assert line.startswith(READY), line
        yield line.removeprefix(READY).strip(), child.pid
    finally:
        child.kill()
        child.communicate()


@pytest.fixture(scope="module")
def pair() -> Iterator[dict[str, int]]:
    """Two engines: process ids by URL. One test may kill one of them."""
    with ExitStack() as stack:
        yield dict(stack.enter_context(engine_process()) for _ in range(2))


BODY: dict[str, Any] = {
    "prompt": "1 + 1 =",
    "max_tokens": TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


async def events(peer: Peer) -> list[bytes]:
    """The data of the events of a stream, up to its end or its break."""
    data = b""
    try:
        while piece := await peer.chunk():
            data += piece
        data += b"data: <end>\n\n"
    except (ValueError, asyncio.IncompleteReadError, ConnectionError):
        pass
    return [line.removeprefix(b"data: ") for line in data.split(b"\n") if line.startswith(b"data: ")]


def text_of(found: list[bytes]) -> str:
    chunks = [orjson.loads(event) for event in found if event.startswith(b"{")]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk.get("choices"))


async def uninterrupted(server: RouterServer, peer: Peer) -> str:
    peer.post(orjson.dumps(BODY), "/v1/completions", JSON)
    assert (await peer.head())[0] == 200
    found = await events(peer)
    assert found[-2:] == [b"[DONE]", b"<end>"]
    await settled(server)
    return text_of(found)


async def killed(server: RouterServer, peer: Peer, pair: dict[str, int], fields: bytes) -> list[bytes]:
    """The events of a stream whose engine was killed after its first ones."""
    peer.post(orjson.dumps(BODY), "/v1/completions", JSON + fields)
    assert (await peer.head())[0] == 200
    first = [await peer.chunk() for _ in range(5)]
    busy = next(end for end in server.router.fleet.endpoints if end.in_flight)
    os.kill(pair.pop(busy.name), signal.SIGKILL)
    lines = b"".join(first).split(b"\n")
    return [line[6:] for line in lines if line.startswith(b"data: ")] + await events(peer)


def test_a_stream_goes_on_elsewhere_when_asked_and_else_visibly_ends(pair: dict[str, int]) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        whole = await uninterrupted(server, peer)
        found = await killed(server, peer, pair, b"X-Penstock-Resume: 1\r\n")
        assert found[-2:] == [b"[DONE]", b"<end>"] and text_of(found) == whole
        chunks = [orjson.loads(event) for event in found[:-2]]
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert not any("token_ids" in choice for chunk in chunks for choice in chunk["choices"])
        assert chunks[-1]["usage"]["completion_tokens"] == TOKENS
        assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "length"
        assert server.router.statistics.resumed == 1
        await settled(server)
        found = await killed(server, peer, pair, b"")
        assert b"<end>" not in found and b"[DONE]" not in found
        assert orjson.loads(found[-1])["error"]["type"] == "engine_lost"
        assert whole.startswith(text_of(found))

    scenario(body, worker_urls=tuple(pair), queue_timeout_secs=5.0)
