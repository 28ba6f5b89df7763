"""Ten thousand in flight and more, idle pauses, new event loops: no error, little memory, nothing left
behind."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest

from penstock.wire.limits import SPARE_FILES
from tests.test_bench import pytestmark as needs_compiler
from tests.test_bench import stub

MEMORY = 500 << 20
"""Bytes a client may take with 20,000 requests in flight."""
IDLE_SERVER = """
import asyncio, sys, uvloop
sys.path.insert(0, "bench")
from penstock.wire.loop import raise_open_files
from penstock.wire.server import HttpServer
from tests.scripted import chat_body

BODY = chat_body()

def answer(exchange):
    asyncio.get_running_loop().call_later(0.2, exchange.respond, 200, BODY)

async def main():
    raise_open_files()
    async with HttpServer(answer, keep_alive=5.0) as server:
        print(server.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)

uvloop.run(main())
"""
"""A server that closes connections after five idle seconds, as uvicorn does."""


def burst(port: int, *words: str, timeout: float) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.burst", f"http://127.0.0.1:{port}", *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = orjson.loads(done.stdout)
    return result


@contextmanager
def idle_server() -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-c", IDLE_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        yield int(process.stdout.readline())
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("count", [10_000, 20_000])
def test_so_many_requests_of_five_seconds_at_once(count: int) -> None:
    """Where the machine allows fewer open files than 20,000 connections need, as many as it allows."""
    if needs_compiler.args[0]:
        pytest.skip(needs_compiler.kwargs["reason"])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = count if hard == resource.RLIM_INFINITY else min(count, hard - SPARE_FILES)
    with stub("--latency-ms", "5000") as port:
        started = time.monotonic()
        result = burst(port, "--requests", str(allowed), timeout=100)
    assert (result["samples"], result["attempts"]) == (allowed, allowed), result["errors"]
    assert result["peak_rss"] < MEMORY
    assert result["left"] == 0
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_idle_pauses_and_new_event_loops() -> None:
    steps, loops, requests = 6, 3, 2000
    with idle_server() as port:
        words = ["--requests", str(requests), "--steps", str(steps), "--loops", str(loops), "--pause", "5"]
        result = burst(port, *words, timeout=120)
    assert (result["samples"], result["errors"], result["left"]) == (steps * requests, {}, 0)
    assert result["attempts"] == result["samples"]


@pytest.mark.soak
def test_fifty_steps_of_five_thousand_with_pauses() -> None:
    """The load of a trainer: 5,000 at once, six idle seconds, a new event loop every ten steps."""
    with idle_server() as port:
        words = ["--requests", "5000", "--steps", "50", "--loops", "5", "--pause", "6"]
        result = burst(port, *words, timeout=900)
    assert (result["samples"], result["errors"], result["left"]) == (250_000, {}, 0)
