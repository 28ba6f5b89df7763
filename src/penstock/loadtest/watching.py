"""What the parts under test use while they are measured: CPU and memory of their processes, the router's lag,
the requests that are at the engines.

Read from /proc, a part with all its descendants. The lag of a router is how long its simplest answer takes,
asked ten times a second over one connection: its event loop has to come round for it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Final, Self

from penstock.errors import PenstockError
from penstock.loadtest.histogram import Histogram
from penstock.servers.supervisor import descendants
from penstock.wire.address import Address
from penstock.wire.pool import Pool

TICK: Final = 0.1
"""Seconds between two questions to the router, and between two looks at the processes."""
HELD_TICK: Final = 0.25
"""Seconds between two questions to the engines how many requests they have."""
TREE_LOOKS: Final = 20
"""Looks between two searches for processes that the known ones have started: a search reads all of /proc."""
CLOCK_TICK: Final = os.sysconf("SC_CLK_TCK")
PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Looks at processes, by the part they belong to, while the block runs. ask_held: says how many requests
    are at the engines; None: they do not tell."""

    def __init__(
        self,
        pids: Mapping[str, Sequence[int]],
        router_url: str | None,
        ask_held: Callable[[], Awaitable[int | None]] | None = None,
    ) -> None:
        self._pids = pids
        self._router_url = router_url
        self._ask_held = ask_held
        self._held: list[tuple[float, int]] = []
        self._samples: dict[str, list[tuple[float, float, int]]] = {part: [] for part in pids}
        self._lags: list[tuple[float, float]] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks.append(asyncio.create_task(self._look()))
        if self._ask_held is not None:
            self._tasks.append(asyncio.create_task(self._count(self._ask_held)))
        if self._router_url is not None:
            self._tasks.append(asyncio.create_task(self._knock(self._router_url)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    def used(self, part: str, begin: float, end: float) -> tuple[float, float, int] | None:
        """Seconds of CPU, seconds they were counted over, and the most bytes of memory of a part, between two
        times; None: not known."""
        within = [sample for sample in self._samples.get(part, ()) if begin <= sample[0] <= end]
        if len(within) < 2:
            return None
        (first, before, _), (last, after, _) = within[0], within[-1]
        return after - before, last - first, max(sample[2] for sample in within)

    def lag(self, begin: float, end: float) -> float | None:
        """Seconds the router took for an empty answer, in 99 of a hundred cases; None: not known."""
        histogram = Histogram()
        histogram.extend(took for at, took in self._lags if begin <= at <= end)
        return histogram.percentile(99)

    def held(self, begin: float, end: float, start: float) -> list[tuple[float, int]]:
        """(seconds after `start`, requests at the engines) between two times."""
        return [(round(at - start, 2), count) for at, count in self._held if begin <= at <= end]

    async def _count(self, ask: Callable[[], Awaitable[int | None]]) -> None:
        while True:
            try:
                count = await ask()
            except PenstockError:
                pass  # an engine that does not answer shows in the requests
            else:
                if count is None:
                    return
                self._held.append((monotonic(), count))
            await asyncio.sleep(HELD_TICK)

    async def _look(self) -> None:
        trees: dict[str, list[int]] = {}
        for look in count():
            for part, pids in self._pids.items():
                if look % TREE_LOOKS == 0:
                    trees[part] = [each for pid in pids for each in (pid, *descendants(pid))]
                self._samples[part].append((monotonic(), *usage(trees[part])))
            await asyncio.sleep(TICK)

    async def _knock(self, url: str) -> None:
        address = Address.parse(url)
        head = f"GET {address.root}/liveness HTTP/1.1\r\nhost: {address.authority}\r\n".encode()
        pool = Pool(address)
        try:
            while True:
                began = monotonic()
                try:
                    await pool.request(head)
                    self._lags.append((began, monotonic() - began))
                except PenstockError:
                    pass  # a router that does not answer shows in the requests
                await asyncio.sleep(TICK)
        finally:
            await pool.close()


def usage(pids: Sequence[int]) -> tuple[float, int]:
    """Seconds of CPU and bytes of memory of processes, those that have ended left out."""
    cpu, rss = 0.0, 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        cpu += (int(fields[11]) + int(fields[12])) / CLOCK_TICK
        rss += int(fields[21]) * PAGE
    return cpu, rss
