"""A worker of a job in shards: one client, an event loop in a thread, and the shards it has leases of.

It becomes a Ray actor in `penstock.cluster.sharded`; nothing here knows of Ray. Guarantees:
1. What it is asked (`take`, `look`, `drop`) is answered at once, whatever its shards do.
2. A worker that nobody asks how it is for `fence` seconds stops its shards and closes their files: its leases
   are about to be another's.
3. An error of a shard is told with the words of the error, never raised here.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from socket import gethostname
from typing import Any, Final, Literal

import msgspec

from penstock.batch.engines import only_model
from penstock.batch.generate import run_job
from penstock.batch.generation import GenerationSettings
from penstock.batch.job import Job, JobSettings
from penstock.batch.progress import Progress
from penstock.client import Client
from penstock.cluster.lease import FENCE, Lease
from penstock.cluster.loop_thread import LoopThread
from penstock.cluster.shards import Shards
from penstock.cluster.takeover import take_over
from penstock.errors import ConfigError, PenstockError
from penstock.inputs.source import Source

GUARD: Final = 0.5
"""Seconds between two looks at whether somebody still asks."""

State = Literal["working", "over", "stopped", "failed"]
"""over: nothing is owed. stopped: its files are closed, and rows may be owed. failed: so may they, and no
other worker would fare better."""


@dataclass(frozen=True, kw_only=True)
class Engines:
    """Where the requests go: base URLs, or the engines of a registry. It pickles."""

    urls: tuple[str, ...] = ()
    registry: str | None = None
    """Name under which `penstock serve --ray` registered them."""
    model: str | None = None
    """None: the only one they serve."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `penstock.Client`."""

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """An open client that names a model. Raises ConfigError, DeadlineExceeded."""
        async with AsyncExitStack() as stack:
            if self.registry is None:
                made = Client(self.urls, model=self.model, **self.options)
            else:
                from penstock.cluster.follow import fleet

                made = Client(
                    await stack.enter_async_context(fleet(self.registry, **self.options)), model=self.model
                )
            client = await stack.enter_async_context(made)
            if client.model is None:
                client.model = await only_model(client)
            yield client


@dataclass(frozen=True, kw_only=True)
class ShardedTask:
    """A job to be done in shards. It pickles."""

    settings: JobSettings
    """`out` is the whole job's; `max_concurrent` one worker's."""
    generation: GenerationSettings
    """Its model is the engines'."""
    engines: Engines
    shards: Shards
    source: Callable[[int, int], Source]
    """The rows of shard i of n."""
    preflight: bool = True
    """Whether each worker asks for one token before its first shard."""
    fence: float = FENCE


class ShardReport(msgspec.Struct, frozen=True, kw_only=True):
    """How far a worker is with a shard."""

    lease: Lease
    state: State
    error: tuple[str, str] | None = None
    """Class and message."""
    rows: int | None = None
    rows_done: int = 0
    rows_failed: int = 0
    samples: int | None = None
    samples_done: int = 0
    samples_failed: int = 0
    resumed_samples: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    failures: dict[str, int] = {}
    notice: str = ""


class _Work:
    """A shard in the hands of a worker."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.state: State = "working"
        self.error: tuple[str, str] | None = None
        self.progress: Progress | None = None
        self.task: asyncio.Task[None] | None = None

    def report(self) -> ShardReport:
        counts = self.progress
        if counts is None:
            return ShardReport(lease=self.lease, state=self.state, error=self.error)
        names = (
            "rows", "rows_done", "rows_failed", "samples", "samples_done", "samples_failed",
            "resumed_samples", "prompt_tokens", "completion_tokens", "retries", "notice",
        )  # fmt: skip
        return ShardReport(
            lease=self.lease,
            state=self.state,
            error=self.error,
            failures=dict(Counter(counts.failures)),
            **{name: getattr(counts, name) for name in names},
        )


class ShardWorker:
    """Works on what it is given a lease of. Every method may be called from any thread."""

    def __init__(self, task: ShardedTask) -> None:
        self._task = task
        self._works: dict[Lease, _Work] = {}
        self._heard = time.monotonic()
        self._opened: asyncio.Task[Client] | None = None
        self._asked_first = False
        self._stack = AsyncExitStack()
        self._loop = LoopThread("penstock shards")
        self._guarding = self._loop.start(self._guard())

    def ready(self) -> None:
        """Returns once the worker is there."""

    def take(self, lease: Lease, max_concurrent: int) -> None:
        """Begins to work on a shard, with so many samples being made at a time."""
        self._loop.run(self._begin(lease, max_concurrent))

    def look(self, known: tuple[Lease, ...] = ()) -> list[ShardReport]:
        """How far each shard is. known: of those whose end was told before, to be forgotten."""
        self._heard = time.monotonic()
        return self._loop.run(self._reports(known))

    def drop(self, lease: Lease) -> None:
        """The lease has ended: stops working on its shard, and forgets it."""
        self._loop.run(self._drop(lease))

    def stop(self) -> list[ShardReport]:
        """Stops every shard; what was finished is on disk when this returns."""
        reports = self._loop.run(self._stop_all())
        self._guarding.cancel()
        self._loop.run(self._stack.aclose())
        self._loop.close()
        return reports

    # -- in the loop ------------------------------------------------------------------------------

    async def _begin(self, lease: Lease, max_concurrent: int) -> None:
        if lease not in self._works:
            work = self._works[lease] = _Work(lease)
            work.task = asyncio.create_task(self._do(work, max_concurrent), name=f"shard {lease.shard}")

    async def _do(self, work: _Work, max_concurrent: int) -> None:
        task, lease = self._task, work.lease
        try:
            output = await asyncio.to_thread(take_over, task.shards, lease.shard, lease.epoch)
            source = await asyncio.to_thread(task.source, lease.shard, task.shards.count)
            client = await self._client()
            settings = msgspec.structs.replace(task.settings, out=output, max_concurrent=max_concurrent)
            generation = msgspec.structs.replace(task.generation, model=client.model)

            def on_open(job: Job) -> None:
                work.progress = job.progress

            asks_first, self._asked_first = task.preflight and not self._asked_first, True
            report = await run_job(
                source, settings, generation, lambda _: _lent(client), on_open=on_open, asks_first=asks_first
            )
            work.state = "over" if report.accounting.owed == 0 else "stopped"
        except asyncio.CancelledError:
            work.state = "stopped"
        except Exception as error:
            said = str(error) if isinstance(error, PenstockError) else f"{type(error).__name__}: {error}"
            work.error = (type(error).__name__, f"{said} (shard {lease.shard}, on {gethostname()})")
            work.state = "failed"

    async def _client(self) -> Client:
        if self._opened is None:
            opening = self._stack.enter_async_context(self._task.engines.client())
            self._opened = asyncio.create_task(opening, name="penstock client")
        return await asyncio.shield(self._opened)

    async def _reports(self, known: tuple[Lease, ...]) -> list[ShardReport]:
        for lease in known:
            work = self._works.get(lease)
            if work is not None and work.state != "working":
                del self._works[lease]
        return [work.report() for work in self._works.values()]

    async def _drop(self, lease: Lease) -> None:
        work = self._works.pop(lease, None)
        if work is not None:
            await _ended(work)

    async def _stop_all(self) -> list[ShardReport]:
        works = list(self._works.values())
        for work in works:
            assert work.task is not None
            work.task.cancel()
        await asyncio.gather(*map(_ended, works))
        return [work.report() for work in works]

    async def _guard(self) -> None:
        """Stops everything when nobody asks any more."""
        while True:
            await asyncio.sleep(GUARD)
            if time.monotonic() - self._heard > self._task.fence:
                await self._stop_all()


async def _ended(work: _Work) -> None:
    assert work.task is not None
    work.task.cancel()
    await asyncio.wait([work.task])


@asynccontextmanager
async def _lent(client: Client) -> AsyncIterator[Client]:
    """The worker's client, which stays open."""
    yield client


def check_picklable(task: ShardedTask) -> None:
    """Raises ConfigError for a task that cannot be sent to another machine."""
    import pickle

    try:
        pickle.dumps(task)
    except Exception as error:
        raise ConfigError(f"The job cannot be sent to other machines: {error}.") from None
