"""The queue of rollouts as an actor: what `penstock.cluster.queue` decides, for whoever asks over Ray.

Its process may be restarted at any time; each answer names its epoch, so that who asks notices. Every
question is answered within the time it gives.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec

from penstock.cluster.queue import Queue, Request, Result, Taken
from penstock.cluster.registry_actor import QUESTIONS, here
from penstock.cluster.session import NAMESPACE

T = TypeVar("T")

LOOK: Final = 1.0
"""Seconds between two looks for workers that are not heard of."""
BATCH: Final = 64
"""Groups in one answer."""


class Fetched(msgspec.Struct, frozen=True):
    """Groups that are done."""

    epoch: str
    results: tuple[Result, ...]
    leased: int
    """Groups in the hands of workers."""


class QueueActor:
    """Becomes a Ray actor in `start_queue`."""

    def __init__(self) -> None:
        self._epoch = secrets.token_hex(8)
        self._queue = Queue()
        self._changed = asyncio.Event()
        self._serials: dict[str, int] = {}

    async def put(self, requests: Sequence[Request]) -> str:
        """Groups are wanted. The epoch."""
        self._queue.put(requests)
        self._tell()
        return self._epoch

    async def cancel(self, ids: Sequence[int]) -> None:
        self._queue.cancel(ids)
        self._tell()

    async def fetch(self, done: Sequence[int], timeout: float) -> Fetched:
        """Results, once there are any, or after `timeout` seconds. done: those that were fetched before."""
        self._queue.fetched(done)
        found = await self._until(lambda: self._queue.fetch(BATCH), timeout)
        return Fetched(self._epoch, tuple(found), self._queue.leased)

    async def take(
        self, worker: str, version: int | None, room: int, holding: Sequence[int], timeout: float
    ) -> Taken:
        """Groups for a worker to make, once there are any for it, or after `timeout` seconds. A later
        question of the same worker takes the place of this one."""
        serial = self._serials[worker] = self._serials.get(worker, 0) + 1

        def look() -> Taken | None:
            if self._serials[worker] != serial:
                return Taken((), ())
            taken = self._queue.take(worker, version, room, holding, time.monotonic())
            return taken if taken.requests or taken.cancelled else None

        self._tell()  # an earlier question of it ends
        return await self._until(look, timeout) or Taken((), ())

    async def done(self, worker: str, result: Result) -> None:
        """A group is made."""
        self._queue.done(worker, result, time.monotonic())
        self._tell()

    async def lost(self, worker: str) -> None:
        """A worker is dead: others get at once what it had."""
        self._queue.lost(worker)
        self._tell()

    async def _until(self, look: Callable[[], T], timeout: float) -> T:
        deadline = time.monotonic() + timeout
        while True:
            self._queue.expire(now := time.monotonic())
            found = look()
            if found or now >= deadline:
                return found
            changed = self._changed
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(LOOK, deadline - now)):
                    await changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def start_queue(name: str) -> Any:
    """The actor. name: unlike that of any other."""
    import ray

    options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_concurrency": QUESTIONS,
        "label_selector": here(),
    }
    return ray.remote(QueueActor).options(**options).remote()
