"""Two ways people send a dataset through a chat endpoint, to measure beside ours.

    python bench/peers.py aiohttp|open-r1 INPUT OUT URL CONCURRENCY

`aiohttp` is the floor: a session, workers, a request a row, nothing written. `open-r1` has the structure of
open-r1's generate_reasoning.py, written anew: a task a row in a set that asyncio.wait watches, a progress bar
refreshed a row, the output opened, appended to and flushed under a lock a row. Its random pause before a
request is left out.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import aiofiles
import aiohttp
import uvloop
from tqdm.asyncio import tqdm

HEADERS = {"Authorization": "Bearer EMPTY"}


def payload(row: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": row["question"]}]
    return {"model": "stub", "messages": messages, "max_tokens": 32, "temperature": 0.6, "top_p": 0.95}


async def ask(session: aiohttp.ClientSession, url: str, row: dict[str, Any]) -> dict[str, Any]:
    async with session.post(url, json=payload(row), headers=HEADERS) as response:
        answer: dict[str, Any] = await response.json(content_type=None)
        return answer


async def bare(
    session: aiohttp.ClientSession, url: str, rows: list[dict[str, Any]], concurrency: int
) -> None:
    source = iter(rows)

    async def work() -> None:
        for row in source:
            await ask(session, url, row)

    await asyncio.gather(*(work() for _ in range(concurrency)))


async def open_r1(
    session: aiohttp.ClientSession, url: str, rows: list[dict[str, Any]], concurrency: int, out: Path
) -> None:
    lock = asyncio.Lock()
    active: set[asyncio.Task[None]] = set()

    async def process(row: dict[str, Any], bar: tqdm) -> None:
        (completion,) = await asyncio.gather(ask(session, url, row))
        choice = completion["choices"][0]
        result = {
            **row,
            "generations": [choice["message"]["content"]],
            "finish_reasons": [choice["finish_reason"]],
            "api_metadata": [completion["usage"]],
        }
        async with lock, aiofiles.open(out, mode="a") as file:
            await file.write(json.dumps(result) + "\n")
            await file.flush()
        bar.set_postfix(active=len(active), refresh=False)
        bar.update(1)

    with Path(os.devnull).open("w") as null, tqdm(total=len(rows), file=null, mininterval=2) as bar:
        for row in rows:
            while len(active) >= concurrency:
                _, active = await asyncio.wait(active, return_when=asyncio.FIRST_COMPLETED)
            task = asyncio.create_task(process(row, bar))
            active.add(task)
            task.add_done_callback(active.discard)
            bar.set_postfix(active=len(active), refresh=True)
        await asyncio.gather(*active)


async def main() -> None:
    peer, source, out, url, concurrency = sys.argv[1:]
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    connector = aiohttp.TCPConnector(limit=int(concurrency))
    async with aiohttp.ClientSession(connector=connector) as session:
        if peer == "aiohttp":
            await bare(session, url, rows, int(concurrency))
        else:
            await open_r1(session, url, rows, int(concurrency), Path(out))


if __name__ == "__main__":
    uvloop.run(main())
