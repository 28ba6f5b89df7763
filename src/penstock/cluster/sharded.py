"""A batch job over many machines: its shards leased to workers, which are Ray actors.

The process that calls this is the only one that grants leases; workers are asked how they are once a second.
Guarantees:
1. rows = done + failed + owed over all shards; a shard counts once, however many have worked on it.
2. A worker that dies loses its shards at once, one that does not answer after `TERM` seconds; the next holder
   goes on from the journal, and the last one cannot write into its files (see `takeover`).
3. What no other worker would survive either (no engine, no permission, a full disk) stops the job with the
   words of the error. What was finished is on disk, and the same call goes on.
4. When the call ends, however it ends, none of its workers is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from penstock.batch.failures import FailureLimit
from penstock.batch.progress import Progress
from penstock.cluster.account import Total, read_shard
from penstock.cluster.lease import TERM, Lease, Leases
from penstock.cluster.merge import merge
from penstock.cluster.session import require
from penstock.cluster.takeover import Epochs, sweep
from penstock.cluster.worker import ShardedTask, ShardReport, ShardWorker, check_picklable
from penstock.errors import ConfigError, EngineError, PenstockError, TooManyFailures

BEAT: Final = 1.0
"""Seconds between two questions to a worker."""
READY_LOOK: Final = 0.1
"""Seconds between two looks at whether a worker is there."""
HELD: Final = 2
"""Shards a worker has at a time, so that the last long samples of one do not leave its engines idle."""
SPENT: Final = ("prompt_tokens", "completion_tokens", "retries")
"""Counts of a run, not of what is in the files."""
STOP_LIMIT: Final = 20.0
"""Seconds workers have to write what is finished when the job is stopped."""
PAUSES: Final = (0.0, 1.0, 2.0, 5.0, 10.0)
"""Seconds before a worker that was lost is replaced, by how many were lost in a row."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardedReport:
    """What a run came to. `total` is the job's, the rest this run's."""

    total: Total
    merged: bool
    """Whether OUT is there, with every row that is done."""
    lost_workers: int
    given_up: tuple[int, ...]
    """Shards that ended too many workers, see `Leases`."""
    seconds: float


class ShardedJob:
    """One run of a job in shards, with `workers` actors of `cpus` CPUs each.

    rows: of the whole input, where it was surveyed. max_failures: of all shards together. Raises ConfigError.
    """

    def __init__(
        self,
        task: ShardedTask,
        *,
        workers: int,
        rows: int | None = None,
        max_failures: FailureLimit | None = None,
        cpus: float = 1.0,
        term: float = TERM,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"--workers must be at least 1, not {workers}.")
        self.task = task
        self.workers = min(workers, task.shards.count)
        samples = None if rows is None else rows * task.settings.num_generations
        self.progress = Progress(
            rows=rows, rows_done=0, rows_failed=0, samples=samples, samples_done=0, samples_failed=0
        )
        self._rows = rows
        self._max_failures = max_failures
        self.lost_workers = 0
        self._cpus = cpus
        self._term = term
        self._reports: dict[int, ShardReport] = {}
        """The last word on each shard."""
        self._resumed: dict[int, int] = {}
        """Samples of each shard that were there before this run."""
        self._earlier: Counter[str] = Counter()
        """What holders that were lost have spent."""
        self._present: set[str] = set()
        """Workers that are there."""
        self._leases = Leases(task.shards.count, epoch=self._number, term=term)
        self._epochs: Epochs | None = None
        self._settled: dict[int, int] = {}
        self._started: set[int] = set()

    async def run(self) -> ShardedReport:
        """Generates all that is owed, and joins the shards when nothing is. Raises PenstockError when the job
        cannot go on."""
        require()
        check_picklable(self.task)
        begun = time.monotonic()
        shards = self.task.shards
        await asyncio.to_thread(shards.prepare)
        with Epochs(shards) as self._epochs:
            self._settled = await asyncio.to_thread(self._find_settled)
            await self._work()
            await asyncio.to_thread(sweep, shards)
        if self._leases.given_up:
            logger.warning("%d shards were given up", len(self._leases.given_up))
        merged = await asyncio.to_thread(merge, shards)
        found = merged.total
        if self._rows is not None and found.begun == found.shards and found.rows != self._rows:
            raise EngineError(f"The shards have {found.rows:,} rows and the input {self._rows:,}.")
        return ShardedReport(
            total=merged.total,
            merged=merged.total.begun == merged.total.shards and merged.total.owed == 0,
            lost_workers=self.lost_workers,
            given_up=tuple(sorted(self._leases.given_up)),
            seconds=time.monotonic() - begun,
        )

    def _find_settled(self) -> dict[int, int]:
        """The epochs of shards that owe nothing: their files stay, whoever looks at them."""
        shards = self.task.shards
        there = shards.epochs()
        return {index: there[index][-1] for index in there if read_shard(shards, index).settled}

    def _number(self, shard: int) -> int:
        """The epoch of a shard's next lease."""
        assert self._epochs is not None
        if shard in self._started:
            return self._epochs.take()
        self._started.add(shard)
        return self._settled.get(shard, self._epochs.first)

    # -- workers ----------------------------------------------------------------------------------

    async def _work(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                expiring = group.create_task(self._expire(), name="penstock leases")
                keeping = [group.create_task(self._keep(number)) for number in range(self.workers)]
                await asyncio.wait(keeping)
                expiring.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            for lease in self._leases.expire(time.monotonic()):
                logger.warning("shard %d: nothing was heard of %s", lease.shard, lease.worker)

    async def _keep(self, number: int) -> None:
        """Has a worker there, another one when it is lost, until nothing is left to do."""
        import ray.exceptions

        life = losses = 0
        while not self._leases.settled:
            life += 1
            name = f"{number}.{life}"
            progressed = False
            try:
                async with self._worker() as worker:
                    progressed = await self._drive(worker, name)
            except (ray.exceptions.RayError, TimeoutError) as error:
                self.lost_workers += 1
                losses = 0 if progressed else losses + 1
                lost = self._leases.lose(name)
                why = str(error).partition("\n")[0] or type(error).__name__
                logger.warning("worker %s is lost with %d shards: %s", name, len(lost), why)
                self._tell()
                await asyncio.sleep(PAUSES[min(losses, len(PAUSES) - 1)])
            finally:
                self._present.discard(name)

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[Any]:
        """An actor for the block, which is then ended; one that answers writes first what is finished."""
        import ray.exceptions

        options: dict[str, Any] = {
            "num_cpus": self._cpus, "max_concurrency": 8, "max_restarts": 0,
            "scheduling_strategy": "SPREAD",
        }  # fmt: skip
        worker: Any = ray.remote(ShardWorker).options(**options).remote(self.task)
        try:
            yield worker
        except (ray.exceptions.RayError, TimeoutError):
            raise
        except BaseException:
            await _stop(worker)
            raise
        else:
            await _stop(worker)
        finally:
            ray.kill(worker)

    async def _drive(self, worker: Any, name: str) -> bool:
        """Gives leases to a worker and hears how far it is, until nothing is left to do or it is lost."""
        ready = worker.ready.remote().future()
        while not ready.done():  # as long as it takes: no machine may have room for it yet
            await asyncio.sleep(READY_LOOK)
            if self._leases.settled:
                return False
        ready.result()
        self._present.add(name)
        ended: list[Lease] = []
        while True:
            await self._give(worker, name)
            reports = await asyncio.wait_for(_answer(worker.look.remote(tuple(ended))), 2 * self._term)
            ended = []
            for report in reports:
                if await self._hear(worker, report):
                    ended.append(report.lease)
            self._tell()
            if self._leases.settled:
                return True
            if not ended:
                await asyncio.sleep(BEAT)

    async def _give(self, worker: Any, name: str) -> None:
        concurrent = self.task.settings.max_concurrent
        held = min(HELD, concurrent)
        while len(self._leases.held_by(name)) < held:
            lease = self._leases.grant(name, time.monotonic())
            if lease is None:
                return
            await asyncio.wait_for(_answer(worker.take.remote(lease, concurrent // held)), self._term)

    async def _hear(self, worker: Any, report: ShardReport) -> bool:
        """Takes in how far a shard is. Whether its worker is done with it. Raises what stops the job."""
        leases, lease = self._leases, report.lease
        if report.state == "working":
            if not leases.renew(lease, time.monotonic()):
                await asyncio.wait_for(_answer(worker.drop.remote(lease)), self._term)
                return False
        elif report.state == "over":
            if not leases.finish(lease):
                return True
        elif report.state == "stopped":
            leases.give_back(lease)
        elif leases.renew(lease, time.monotonic()):
            assert report.error is not None
            raise _error(*report.error)
        self._note(report)
        return report.state != "working"

    # -- counts -----------------------------------------------------------------------------------

    def _note(self, report: ShardReport) -> None:
        """The last word on a shard. What an earlier holder has done in this run is not from before it."""
        shard = report.lease.shard
        last = self._reports.get(shard)
        if last is not None and last.lease != report.lease:
            self._earlier.update({name: getattr(last, name) for name in SPENT})
        if report.rows is not None:
            self._resumed.setdefault(shard, report.resumed_samples)
        self._reports[shard] = report

    def _tell(self) -> None:
        """Adds up the shards."""
        progress, reports = self.progress, list(self._reports.values())
        for name in ("rows_done", "rows_failed", "samples_done", "samples_failed", *SPENT):
            setattr(progress, name, sum(getattr(one, name) for one in reports) + self._earlier[name])
        progress.resumed_samples = sum(self._resumed.values())
        failures: Counter[str] = Counter()
        for one in reports:
            failures.update(one.failures)
        progress.failures = failures
        leases = self._leases
        progress.notice = (
            f"shards: {len(leases.over)} of {self.task.shards.count} done, {leases.leased} in work; "
            f"workers: {len(self._present)} of {self.workers}"
        )
        limit, failed = self._max_failures, failures.total()
        if limit is not None and limit.is_exceeded(failed, progress.samples_done - progress.resumed_samples):
            raise TooManyFailures(
                f"{failed:,} samples have failed in this run: more than {limit} is too many."
            )
        if said := [one.notice for one in reports if one.notice and one.state == "working"]:
            progress.notice += f" – {said[0]}"


async def _answer(reference: Any) -> Any:
    """What an actor says. Raises RayError when it is gone."""
    return await asyncio.wrap_future(reference.future())


async def _stop(worker: Any) -> None:
    """Whatever becomes of it, it is ended afterwards."""
    with contextlib.suppress(Exception):
        await asyncio.wait_for(_answer(worker.stop.remote()), STOP_LIMIT)


def _error(kind: str, message: str) -> PenstockError:
    """The error of a shard, again: as what can be mended on the command line, or as what went wrong."""
    if kind in ("ConfigError", "ResumeRefused"):
        return ConfigError(message)
    return EngineError(f"{kind}: {message}")
