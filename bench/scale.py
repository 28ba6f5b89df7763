"""What a large fleet costs its client: choosing an endpoint, looking after it, a request in flight, a chunk.

    python bench/scale.py [--endpoints 1 100 1000] [--in-flight 10000] [--seconds 10] [--requests 20000]

CPU is user and system time of this process; the engines stand in one of their own. `docs/scale.md` works out
from it how far one client goes.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import uvloop

import stub
from penstock.client import Client
from penstock.errors import PenstockError
from penstock.fleet.dispatch import Dispatch
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.fleet import Fleet
from penstock.fleet.limit import POLL
from penstock.fleet.policy import POLICIES
from penstock.fleet.transport import Transport
from penstock.wire.address import Address
from penstock.wire.loop import GC_THRESHOLD, raise_open_files

PAGE_SERIES = 450
"""Histogram series of a metrics page beside those that are read; such a page has about 45 KB."""
TURNS = 20_000
"""Requests that are given an endpoint in one measurement of the dispatcher."""
CHUNKS, CHUNK_MS = 100, 20
"""Of a measured stream."""
STREAMS = 200


ANSWER = json.dumps(
    {
        "id": "chatcmpl-1", "model": "stub", "object": "chat.completion", "created": 1,
        "choices": [{"index": 0, "message": {"content": stub.TEXT}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 210, "completion_tokens": 80, "total_tokens": 290},
    }
).encode()  # fmt: skip
MESSAGES = [{"role": "user", "content": "How much is seven times eight? Explain each step. " * 16}]
IN_FLIGHT = 2_000
"""Requests in flight while the cost of one is measured."""


class Ticket:
    """A request that never waits."""

    def __init__(self) -> None:
        self.priority = self.trial = 0
        self.session: int | None = None
        self.avoid: Endpoint | None = None

    def offer(self, endpoint: Endpoint) -> bool:
        raise AssertionError("it does not wait")

    def refuse(self, error: PenstockError) -> None:
        raise AssertionError(error)


class Engine(asyncio.Protocol):
    """Answers what a monitor asks at once; a request with `answer`, or never."""

    page = b""
    answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"GET"):
            body = self.page if data.startswith(b"GET /metrics") else b"{}"
        elif self.answer:
            body = self.answer
        else:
            return
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))


def metrics_page() -> bytes:
    histogram = 'vllm:time_to_first_token_seconds_bucket{engine="0",le="%g",model_name="m"} %d.0\n'
    buckets = "".join(histogram % (number / 100, number) for number in range(PAGE_SERIES))
    gauges = "".join(
        f'vllm:{name}{{engine="0",model_name="m"}} 1.0\n'
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
                     "num_preemptions_total", "generation_tokens_total")
    )  # fmt: skip
    return (buckets + gauges).encode()


def serve(count: int, answers: bool, ready: Connection) -> None:
    """`count` engines on ports of 127.0.0.1, until the other end of `ready` is closed."""

    async def until_closed() -> None:
        raise_open_files()
        Engine.page = metrics_page()
        Engine.answer = ANSWER if answers else b""
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(Engine, "127.0.0.1", 0, backlog=4096) for _ in range(count)]
        ready.send([server.sockets[0].getsockname()[1] for server in servers])
        closed = asyncio.Event()
        loop.add_reader(ready.fileno(), closed.set)
        await closed.wait()

    uvloop.run(until_closed())


@contextmanager
def engines(count: int, *, answers: bool = False) -> Iterator[list[str]]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(count, answers, there), daemon=True)
    process.start()
    there.close()
    try:
        yield [f"http://127.0.0.1:{port}" for port in here.recv()]
    finally:
        here.close()
        process.join(10)


def dispatch_cost(count: int, policy: str) -> float:
    """Microseconds to take a slot on one of `count` endpoints and to give it back, 64 in flight on each."""
    nowhere = cast(Transport, None)
    fleet = [Endpoint(Address.parse(f"10.{n >> 8}.{n & 255}.1:80"), nowhere) for n in range(count)]
    dispatch = Dispatch(fleet, policy=POLICIES[policy], random=random.random)
    ticket = Ticket()
    taken = [dispatch.take(ticket) for _ in range(64 * count)]
    random.shuffle(taken)
    started = time.process_time()
    for turn in range(TURNS):
        place = turn % len(taken)
        endpoint = taken[place]
        assert endpoint is not None
        dispatch.give_back(endpoint)
        taken[place] = dispatch.take(ticket)
    return (time.process_time() - started) / TURNS * 1e6


async def monitor_cost(urls: list[str], *, adaptive: bool, busy: bool, seconds: float) -> float:
    """Microseconds of CPU an endpoint costs in a second, without any request sent. busy: each has one."""
    async with Fleet(urls, adaptive=adaptive, max_in_flight=64) as fleet:
        if busy:
            ticket = Ticket()
            for endpoint in fleet.endpoints:
                endpoint.take()
                fleet.dispatch.in_flight += 1
            del ticket
        await asyncio.sleep(2 * POLL)
        started, clock = time.process_time(), time.monotonic()
        await asyncio.sleep(seconds)
        used, passed = time.process_time() - started, time.monotonic() - clock
        if busy:
            for endpoint in fleet.endpoints:
                fleet.dispatch.give_back(endpoint)
    return used / passed / len(urls) * 1e6


async def memory_cost(urls: list[str], in_flight: int) -> float:
    """Bytes of resident memory a request in flight takes, its connection included."""
    async with Client(urls, model="stub") as client:
        gc.collect()
        before = resident()
        tasks = [asyncio.create_task(client.chat(MESSAGES)) for _ in range(in_flight)]
        while client.statistics().connections < in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)
        gc.collect()
        after = resident()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return (after - before) / in_flight


async def request_cost(urls: list[str], requests: int, policy: str) -> float:
    """Microseconds of CPU a chat request costs, with a fixed limit that is never met."""
    async with Client(urls, model="stub", policy=policy) as client:

        async def ask(count: int) -> None:
            for _ in range(count):
                await client.chat(MESSAGES)

        await asyncio.gather(*(ask(2) for _ in range(IN_FLIGHT)))  # connections are opened
        started = time.process_time()
        await asyncio.gather(*(ask(requests // IN_FLIGHT) for _ in range(IN_FLIGHT)))
        return (time.process_time() - started) / (requests // IN_FLIGHT * IN_FLIGHT) * 1e6


async def chunk_cost(url: str) -> float:
    """Microseconds of CPU a streamed chunk costs, its share of the request included."""
    async with Client(url, model="stub") as client:

        async def read() -> None:
            async with client.stream("x") as stream:
                async for _ in stream:
                    pass

        await read()
        started = time.process_time()
        await asyncio.gather(*(read() for _ in range(STREAMS)))
        return (time.process_time() - started) / (STREAMS * CHUNKS) * 1e6


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--endpoints", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--in-flight", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--requests", type=int, default=20_000)
    return parser.parse_args()


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def main() -> None:
    given = arguments()
    raise_open_files()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    row("µs to choose an endpoint of", *POLICIES)
    for count in given.endpoints:
        costs = [min(dispatch_cost(count, name) for _ in range(3)) for name in POLICIES]
        row(f"{count:,}", *(f"{cost:.1f}" for cost in costs))
    row("µs an endpoint and second, of", "idle", "busy", "busy, adaptive")
    for count in given.endpoints:
        with engines(count) as urls:
            costs = [
                uvloop.run(monitor_cost(urls, adaptive=adaptive, busy=busy, seconds=given.seconds))
                for adaptive, busy in ((False, False), (False, True), (True, True))
            ]
        row(f"{count:,}", *(f"{cost:.1f}" for cost in costs))
    row("µs a request, endpoints", "least_in_flight", "power_of_two")
    for count in given.endpoints:
        with engines(count, answers=True) as urls:
            names = ("least_in_flight", "power_of_two")
            costs = [uvloop.run(request_cost(urls, given.requests, name)) for name in names]
        row(f"{count:,}", *(f"{cost:.1f}" for cost in costs))
    with engines(4) as urls:
        row("KB a request in flight", f"{uvloop.run(memory_cost(urls, given.in_flight)) / 1e3:.1f}")
    with stub.serving(chunks=CHUNKS, chunk_ms=CHUNK_MS) as server:
        cost = uvloop.run(chunk_cost(f"http://127.0.0.1:{server.port}"))
        row(f"µs a chunk, {STREAMS} streams", f"{cost:.1f}")


if __name__ == "__main__":
    main()
