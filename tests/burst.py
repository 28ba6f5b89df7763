"""Bursts of requests from one process, told as JSON: what `test_many.py` runs, in a process it can measure.

python -m tests.burst URL --requests N --steps S --pause SECONDS --loops L

Each step sends N requests at once and waits for all; between two steps the connections lie idle. The steps
are shared out over L event loops, one after the other, with one client that is opened in each.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import orjson
import tyro
from tyro.conf import Positional

from penstock import Client, PenstockError, SamplingParams
from penstock.wire.loop import run

PROMPT = [{"role": "user", "content": "What is seven times eight? " * 20}]
PARAMS = SamplingParams(temperature=0.6, max_tokens=256)


@dataclass
class Result:
    samples: int = 0
    attempts: int = 0
    resent: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    peak_rss: int = 0
    """Bytes."""
    cpu: float = 0.0
    """Seconds of user and system time."""
    left: int = 0
    """Requests in flight or waiting when all were done."""


async def steps(client: Client, result: Result, requests: int, count: int, pause: float) -> None:
    async with client:
        for step in range(count):
            if step:
                await asyncio.sleep(pause)
            before = time.process_time()
            outcomes = await asyncio.gather(
                *(client.chat(PROMPT, PARAMS) for _ in range(requests)), return_exceptions=True
            )
            result.cpu += time.process_time() - before
            for outcome in outcomes:
                if isinstance(outcome, PenstockError):
                    result.errors[f"{type(outcome).__name__}: {outcome}"[:200]] += 1
                elif isinstance(outcome, BaseException):
                    raise outcome
                else:
                    result.samples += 1
                    result.attempts += outcome.attempts
            statistics = client.statistics()
            result.left += sum(statistics.in_flight.values()) + statistics.waiting
        result.resent += client.statistics().resent


def main(
    url: Positional[str],
    /,
    requests: int,
    steps_: Annotated[int, tyro.conf.arg(name="steps")] = 1,
    pause: float = 0.0,
    loops: int = 1,
) -> None:
    client, result = Client(url, model="stub", max_in_flight=requests), Result()
    for _ in range(loops):
        run(steps(client, result, requests, steps_ // loops, pause))
        time.sleep(pause if loops > 1 else 0.0)
        gc.collect()
    result.peak_rss = peak_rss()
    print(orjson.dumps(asdict(result)).decode())  # noqa: T201


def peak_rss() -> int:
    """Bytes. Of this program alone: getrusage's maximum has that of the process it was started from in it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


if __name__ == "__main__":
    tyro.cli(main)
