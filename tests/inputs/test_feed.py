"""Rows read ahead: in order, each once, as soon as they are there, and never too many."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvloop

from penstock.errors import ConfigError
from penstock.inputs import feed as feeding
from penstock.inputs.feed import Feed
from penstock.inputs.iterable import from_iterable
from penstock.inputs.opened import select
from penstock.inputs.source import Source

PATIENCE = 20.0


async def drain(source: Source) -> list[tuple[int, bytes]]:
    found = []
    async with asyncio.timeout(PATIENCE), Feed(source) as feed:
        while rows := await feed.batch():
            found += [(position, line) for position, _, line in rows]
        assert not await feed.batch()
    return found


def test_rows_come_in_order_each_once() -> None:
    count = 3 * feeding.AHEAD_ROWS
    found = uvloop.run(drain(from_iterable({"n": n} for n in range(count))))
    assert found == [(n, b'{"n":%d}' % n) for n in range(count)]


def test_an_async_iterable_is_read_on_the_loop() -> None:
    count = feeding.AHEAD_ROWS + 10

    async def rows() -> AsyncIterator[dict[str, Any]]:
        for n in range(count):
            await asyncio.sleep(0)
            yield {"n": n}

    assert uvloop.run(drain(from_iterable(rows()))) == [(n, b'{"n":%d}' % n) for n in range(count)]
    window = select(from_iterable(rows()), skip=5, limit=7, shard=(1, 3))
    assert [line for _, line in uvloop.run(drain(window))] == [b'{"n":6}', b'{"n":9}']


def test_a_row_is_handed_on_while_the_next_one_is_not_there() -> None:
    gate = threading.Event()

    def rows() -> Iterator[dict[str, Any]]:
        yield {"n": 0}
        assert gate.wait(PATIENCE)
        yield {"n": 1}

    async def main() -> None:
        async with asyncio.timeout(PATIENCE), Feed(from_iterable(rows())) as feed:
            assert [line for _, _, line in await feed.batch()] == [b'{"n":0}']
            gate.set()
            assert [line for _, _, line in await feed.batch()] == [b'{"n":1}']
            assert not await feed.batch()

    uvloop.run(main())


def test_no_more_is_read_than_may_wait() -> None:
    read = 0
    nine = threading.Event()

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal read
        while True:
            read += 1
            if read == 9:
                nine.set()
            yield {"text": "x" * (feeding.AHEAD_BYTES // 8)}

    async def main() -> None:
        async with asyncio.timeout(PATIENCE), Feed(from_iterable(rows())) as feed:
            assert await asyncio.to_thread(nine.wait, PATIENCE)
            await asyncio.sleep(0.1)
            assert read == 9  # eight wait, the ninth is in the reader's hand
            assert len(await feed.batch()) == 8

    uvloop.run(main())


def test_what_goes_wrong_is_raised_after_the_rows_before_it() -> None:
    async def main() -> None:
        async with asyncio.timeout(PATIENCE), Feed(from_iterable([{"n": 0}, {"n": object()}])) as feed:
            assert len(await feed.batch()) == 1
            with pytest.raises(ConfigError, match=r"row 2: the column 'n' has no form in JSON \(.*object"):
                await feed.batch()

    uvloop.run(main())


def test_closed_early_it_leaves_the_iterator_closed() -> None:
    closed = threading.Event()

    def rows() -> Iterator[dict[str, Any]]:
        try:
            while True:
                yield {"n": 0}
        finally:
            closed.set()

    async def main() -> None:
        iterator = rows()
        feed = Feed(from_iterable(iterator))
        await feed.batch()
        await feed.close()
        del iterator, feed

    uvloop.run(main())
    assert closed.wait(PATIENCE)
