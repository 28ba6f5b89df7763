"""One client asks the stub for some seconds, in a process of its own; prints what that cost, as JSON.

    python bench/asking.py penstock|aiohttp|httpx|openai PORT CONNECTIONS [--seconds 1.5] [--quiet-gc]

As many workers as connections send one chat request after the other: the same request of 1 KB, a dict encoded
each time; each answer is decoded to what the client gives and its text is compared.

Each of two passes goes from no request in flight to none in flight. In the first every worker asks once,
which opens the connections; in the second it goes on for some seconds. The cheaper pass counts: the second,
but for clients so slow that all that matters is their queue.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import tyro
import uvloop

from stub import TEXT

SYSTEM = "You are a careful mathematician. Think step by step and put the answer into a box."
QUESTION = "Seven rows of eight chairs stand in a hall, and some of them are taken away again. " * 10
MAX_TOKENS, TEMPERATURE, TOP_P = 1024, 0.6, 0.95
KEY = "EMPTY"
TIMEOUT = 3600.0
"""Seconds an answer may take: long generations do."""

Ask = Callable[[int], Awaitable[str]]
"""Sends a numbered request, gives the text of the answer."""


def messages(number: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{QUESTION}Case {number}."}]


def payload(number: int) -> dict[str, Any]:
    return {
        "model": "stub",
        "messages": messages(number),
        "max_tokens": MAX_TOKENS,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
    }


# -- the clients: each with its limits raised, else as it comes -----------------------------------


@asynccontextmanager
async def with_penstock(base: str) -> AsyncIterator[Ask]:
    from penstock import Client, SamplingParams

    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=TEMPERATURE, top_p=TOP_P)
    async with Client(base, model="stub", api_key=KEY) as client:

        async def ask(number: int) -> str:
            return (await client.chat(messages(number), params)).text

        yield ask


@asynccontextmanager
async def with_aiohttp(base: str) -> AsyncIterator[Ask]:
    import aiohttp

    url, headers = f"{base}/chat/completions", {"Authorization": f"Bearer {KEY}"}
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=TIMEOUT)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:

        async def ask(number: int) -> str:
            async with session.post(url, json=payload(number)) as response:
                return text_in(await response.json())

        yield ask


@asynccontextmanager
async def with_httpx(base: str) -> AsyncIterator[Ask]:
    import httpx

    url, headers = f"{base}/chat/completions", {"Authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=None)
    async with httpx.AsyncClient(limits=limits, timeout=TIMEOUT, headers=headers) as client:

        async def ask(number: int) -> str:
            response = await client.post(url, json=payload(number))
            response.raise_for_status()
            return text_in(response.json())

        yield ask


@asynccontextmanager
async def with_openai(base: str) -> AsyncIterator[Ask]:
    import httpx2  # what openai is built on
    import openai

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=None)
    http = openai.DefaultAsyncHttpxClient(limits=limits, timeout=TIMEOUT)
    async with openai.AsyncOpenAI(
        base_url=base, api_key=KEY, max_retries=0, timeout=TIMEOUT, http_client=http
    ) as client:

        async def ask(number: int) -> str:
            completion = await client.chat.completions.create(**payload(number))
            return str(completion.choices[0].message.content)

        yield ask


def text_in(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


CLIENTS: dict[str, Callable[[str], AbstractAsyncContextManager[Ask]]] = {
    "penstock": with_penstock,
    "aiohttp": with_aiohttp,
    "httpx": with_httpx,
    "openai": with_openai,
}


# -- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    """What a client costs, once."""

    client: tyro.conf.Positional[str]
    port: tyro.conf.Positional[int]
    connections: tyro.conf.Positional[int]
    seconds: float = 1.5
    """How long the second pass sends new requests."""
    limit: float = 25.0
    """Seconds after which a client that has not finished is given up."""
    quiet_gc: bool = False
    """Run as penstock's own processes do: imports frozen, the garbage collector's threshold raised."""


@dataclass
class Cost:
    """What a pass has cost so far."""

    cpu: float = 0.0
    """Seconds of user and system time of the process."""
    seconds: float = 0.0
    answers: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    finished: bool = False
    first_pass: bool = True
    peak_mb: float = 0.0
    """Resident memory of the process at its peak, MB."""


class Meter:
    """Counts the answers of a pass and reads the clocks around them."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self.begin(first_pass=True)

    def begin(self, *, first_pass: bool) -> None:
        self._cost = Cost(first_pass=first_pass)
        self._cpu, self._started = time.process_time(), time.perf_counter()

    async def one(self, number: int) -> None:
        try:
            text = await self._ask(number)
        except Exception as error:
            self._cost.errors[type(error).__name__] += 1
        else:
            self._cost.answers += 1
            if text != TEXT:
                self._cost.errors["wrong text"] += 1

    def read(self, *, finished: bool) -> Cost:
        cost = self._cost
        cost.cpu, cost.seconds = time.process_time() - self._cpu, time.perf_counter() - self._started
        cost.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        cost.finished = finished
        return cost


async def first_pass(meter: Meter, connections: int) -> None:
    """Every worker asks once. All ask before the first answer comes: each needs a connection of its own."""
    await asyncio.gather(*map(meter.one, range(connections)))


async def second_pass(meter: Meter, connections: int, seconds: float) -> None:
    end = time.perf_counter() + seconds

    async def work(number: int) -> None:
        await meter.one(number)
        while time.perf_counter() < end:
            await meter.one(number)

    await asyncio.gather(*map(work, range(connections)))


async def measure(args: Args) -> Cost:
    end = time.perf_counter() + args.limit
    async with CLIENTS[args.client](f"http://127.0.0.1:{args.port}/v1") as ask:
        await ask(0)  # what is loaded or prepared at the first request of a process
        meter = Meter(ask)

        async def passes() -> Cost:
            await first_pass(meter, args.connections)
            first = meter.read(finished=True)
            if time.perf_counter() + args.seconds + first.seconds > end or first.errors:
                return first
            meter.begin(first_pass=False)
            await second_pass(meter, args.connections, args.seconds)
            return min(first, meter.read(finished=True), key=lambda cost: cost.cpu / max(1, cost.answers))

        task = asyncio.create_task(passes())
        await asyncio.wait([task], timeout=end - time.perf_counter())
        print(json.dumps(asdict(task.result() if task.done() else meter.read(finished=False))), flush=True)
        os._exit(0)  # closing is not measured, and takes some clients minutes


def main() -> None:
    args = tyro.cli(Args)
    if args.client not in CLIENTS:
        sys.exit(f"there is no client {args.client!r}: choose one of {', '.join(CLIENTS)}")
    importlib.import_module(args.client)  # before the garbage collector's settings, which freeze it
    if args.quiet_gc:
        from penstock.wire.loop import run

        run(measure(args))
    else:
        uvloop.run(measure(args))


if __name__ == "__main__":
    main()
