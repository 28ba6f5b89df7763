"""One process's share of a load: requests sent when they are due, what came of each counted.

Guarantees: every request that was sent ends up in the tally, answered or with an error; latency counts from
the intended send time, so that a late send is not hidden; what is still in flight when the drain is over is
cut off and counted as `Unfinished`.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Coroutine, Iterator
from itertools import count as counting
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, Final

from penstock.loadtest.arrivals import first_send, send_times
from penstock.loadtest.asking import Answered, Askers
from penstock.loadtest.histogram import Histogram
from penstock.loadtest.plan import METRICS, UNFINISHED, Beat, Job, Second, Tally
from penstock.loadtest.workload import Workload

LAG_TICK: Final = 0.01
"""Seconds between two looks at how late the event loop is."""
PAGE: Final[int] = os.sysconf("SC_PAGE_SIZE")
FAILED_PAUSE: Final = 0.1
"""Seconds from a send to the next in a closed loop where the first one failed: an engine that is down is not
asked thousands of times a second."""
LATE_SENDS: Final = 64
"""Requests sent in a row when they are late, before the loop may do something else."""


class Sending:
    """Runs a job. `tally` is whole once `run` has returned."""

    def __init__(self, job: Job, workload: Workload, askers: Askers) -> None:
        self.job = job
        self.tally = Tally(window=job.extent.duration)
        self._workload = workload
        self._askers = askers
        self._histograms = {name: Histogram() for name in (*METRICS, "lag", "delay")}
        self._timeline: dict[int, Second] = defaultdict(Second)
        self._tasks: set[asyncio.Task[object]] = set()
        self._idle = asyncio.Event()
        self._in_flight = 0
        extent, shape = job.extent, job.load.shape
        self._measured_from = job.start + shape.ramp + extent.warmup
        self._end = math.inf if extent.duration is None else self._measured_from + extent.duration
        self._left = sys.maxsize
        """Measured requests still to be sent."""
        self._peers = job.processes
        """Processes that have a share."""
        if job.load.concurrency is not None:
            self._peers = min(job.processes, -(-job.load.concurrency // workload.group))
        if job.index >= self._peers:
            self._left = 0
        elif extent.count is not None:
            self._left = share(extent.count, workload.group, job.index, self._peers)
        self._meter: tuple[float, float] | None = None
        """CPU and clock when measuring began."""

    async def run(self) -> Tally:
        """Sends everything, waits for what is in flight, and gives the tally."""
        job = self.job
        lag = asyncio.create_task(self._watch_lag(), name="penstock bench lag")
        try:
            await _until(job.start)
            if job.load.concurrency is None:
                await self._open_loop()
            else:
                await self._closed_loop(job.load.concurrency)
            await self._drain()
        finally:
            lag.cancel()
            await asyncio.wait([lag, *self._cancelled()])
        return self._finished()

    def beat(self) -> Beat:
        """Where it is now."""
        tokens = sum(second.tokens for second in self._timeline.values())
        done = sum(second.done for second in self._timeline.values())
        failed = sum(second.failed for second in self._timeline.values())
        self.tally.rss = max(self.tally.rss, resident())
        return Beat(self.tally.asked, done, failed, tokens, self._in_flight)

    # -- when ---------------------------------------------------------------------------------------

    async def _open_loop(self) -> None:
        for late, (number, due) in enumerate(self._due()):
            at = self.job.start + due
            if at >= self._end or self._left <= 0:
                return
            if at > monotonic():
                await _until(at)
            elif late % LATE_SENDS == 0:
                await asyncio.sleep(0)
            self._spawn(self._one(number, at, self._admit(at)))

    def _due(self) -> Iterator[tuple[int, float]]:
        """Numbers and times of this process's requests."""
        job, workload = self.job, self._workload
        if job.load.rate is None:
            times = enumerate(workload.times)
        else:
            drawn = send_times(
                job.load.rate,
                Random(job.seed),
                burstiness=job.load.burstiness,
                group=workload.group,
                shape=job.load.shape,
            )
            times = enumerate(drawn)
        for number, due in times:
            if number // workload.group % job.processes == job.index:
                yield number, due

    async def _closed_loop(self, concurrency: int) -> None:
        job, group = self.job, self._workload.group
        workers = -(-concurrency // group)
        numbers = counting(job.index, self._peers)
        for worker in range(job.index, workers, self._peers):
            # The last group is smaller where the concurrency is no multiple of it.
            size = min(group, concurrency - worker * group)
            begin = job.start + first_send(worker, workers, job.load.shape)
            self._spawn(self._worker(begin, size, numbers))
        await self._idle_by(self._end)

    async def _worker(self, begin: float, size: int, numbers: Iterator[int]) -> None:
        """Sends a group, waits for all of it, sends the next."""
        job, group = self.job, self._workload.group
        await _until(begin)
        ready = max(begin, job.start)
        while True:
            at = job.start + job.load.shape.resume(ready - job.start)
            if at > monotonic():
                await _until(at)
            if at >= self._end or self._left <= 0:
                return
            first = next(numbers) * group
            if size == 1:
                answered = await self._one(first, at, self._admit(at))
            else:
                members = range(first, first + min(size, self._left))
                answered = all(
                    await asyncio.gather(*[self._one(member, at, self._admit(at)) for member in members])
                )
            ready = monotonic() if answered else max(monotonic(), at + FAILED_PAUSE)

    # -- one request --------------------------------------------------------------------------------

    def _admit(self, at: float) -> bool:
        """A request that is due at this time will be sent: whether it counts."""
        self.tally.asked += 1
        if at < self._measured_from:
            return False
        self._left -= 1
        self.tally.sent += 1
        if self._meter is None:
            self._meter = (time.process_time(), monotonic())
        return True

    async def _one(self, number: int, at: float, measured: bool) -> bool:
        """Sends a request, and counts what came of it; whether that was an answer."""
        now = monotonic()
        self._in_flight += 1
        self._timeline[int(now - self.job.start)].sent += 1
        answered: Answered | None = None
        try:
            answered = await self._askers.ask(number)
        finally:
            self._in_flight -= 1
            if answered is None:
                answered = Answered(monotonic(), error=UNFINISHED)
            self._count(number, at, now, answered, measured)
        return answered.error is None

    def _count(self, number: int, at: float, sent: float, answered: Answered, measured: bool) -> None:
        second = self._timeline[max(0, int(answered.end - self.job.start))]
        tally, error = self.tally, answered.error
        if error is not None:
            second.failed += 1
            tally.unanswered.append(number)
            if measured:
                tally.errors[error] += 1
            return
        latency = answered.end - at
        second.done += 1
        second.tokens += answered.output_tokens
        second.e2el[two_digits(latency)] += 1
        if self._measured_from <= answered.end <= self._end:
            tally.window_done += 1
            tally.window_tokens += answered.output_tokens
        if self._meter is not None:
            tally.cpu_done += 1
            tally.chunks += len(answered.times)
        if measured:
            self._measure(at, sent, latency, answered)

    def _measure(self, at: float, sent: float, latency: float, answered: Answered) -> None:
        tally, histograms, times = self.tally, self._histograms, answered.times
        tally.done += 1
        tally.input_tokens += answered.input_tokens
        tally.output_tokens += answered.output_tokens
        tally.first_sent = min(tally.first_sent, at)
        tally.last_done = max(tally.last_done, answered.end)
        histograms["e2el"].add(latency)
        histograms["delay"].add(max(0.0, sent - at))
        values = {"e2el": latency}
        if times:
            values["ttft"] = times[0] - at
            histograms["ttft"].add(values["ttft"])
            histograms["itl"].extend(map(float.__sub__, times[1:], times))
            if answered.output_tokens > 1:
                values["tpot"] = (answered.end - times[0]) / (answered.output_tokens - 1)
                histograms["tpot"].add(values["tpot"])
        tally.good += all(values.get(name, 0.0) <= bound for name, bound in self.job.goodput)

    # -- the end ------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        if self._end < math.inf:
            self._read_meter()
        await self._idle_by(monotonic() + self.job.extent.drain)
        if self._end == math.inf:
            self._read_meter()

    def _read_meter(self) -> None:
        if self._meter is not None:
            cpu, begin = self._meter
            self.tally.cpu = time.process_time() - cpu
            self.tally.wall = monotonic() - begin
            self._meter = None

    def _cancelled(self) -> set[asyncio.Task[object]]:
        for task in self._tasks:
            task.cancel()
        return self._tasks

    def _finished(self) -> Tally:
        tally = self.tally
        tally.opened, resent, retries, tally.strays = self._askers.connections()
        broken = sum(count for name, count in tally.errors.items() if name.startswith("ConnectionLost"))
        tally.resets, tally.retries = broken + resent, resent + retries
        tally.histograms = {name: histogram.encoded() for name, histogram in self._histograms.items()}
        tally.timeline = dict(self._timeline)
        tally.rss = max(tally.rss, resident())
        return tally

    async def _watch_lag(self) -> None:
        histogram, due = self._histograms["lag"], monotonic()
        while True:
            due = max(due, monotonic()) + LAG_TICK
            await asyncio.sleep(LAG_TICK)
            if self._measured_from <= due <= self._end:
                histogram.add(max(0.0, monotonic() - due))

    def _spawn(self, work: Coroutine[Any, Any, object]) -> None:
        task: asyncio.Task[object] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _idle_by(self, end: float) -> None:
        """Waits until nothing is left to do, or until this time."""
        self._idle = asyncio.Event()
        if self._tasks:
            try:
                async with asyncio.timeout(None if end == math.inf else end - monotonic()):
                    await self._idle.wait()
            except TimeoutError:
                pass

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._idle.set()
        if not task.cancelled():
            task.result()  # what is no PenstockError is a mistake of ours, and shown


def share(count: int, group: int, index: int, processes: int) -> int:
    """How many of `count` requests are one process's; groups are dealt out whole, the last may be smaller."""
    groups = -(-count // group)
    own = len(range(index, groups, processes)) * group
    return own - (groups * group - count if (groups - 1) % processes == index else 0)


async def _until(at: float) -> None:
    """The timers of the loop have a resolution of a millisecond and may be early by half of it."""
    while (left := at - monotonic()) > 0:  # noqa: ASYNC110 - time is what is waited for
        await asyncio.sleep(left)


def resident() -> int:
    """Bytes of memory that this process has now."""
    pages: int = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * PAGE


def two_digits(seconds: float) -> int:
    """Milliseconds, to two digits."""
    value = max(0, round(seconds * 1e3))
    unit = int(10 ** max(0, len(str(value)) - 2))
    return value // unit * unit
