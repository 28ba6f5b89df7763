"""A fleet, a router or anything else that has endpoints, kept as the registry says.

It guarantees:
- what a registry takes out leaves at once, what it drains gets no more requests, what it adds joins;
- while the registry cannot be asked, everything stays as it is; it is asked again until it answers;
- `async with` owns the one task.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final, Self

from penstock.cluster.registry import Followed, Snapshot
from penstock.cluster.session import NAMESPACE, require
from penstock.errors import ConfigError, DeadlineExceeded
from penstock.fleet.fleet import Fleet
from penstock.servers.replicas import Members

logger = logging.getLogger(__name__)

POLL: Final = 20.0
"""Seconds a registry holds a question to which there is nothing new."""
LATE: Final = 10.0
"""Seconds beyond that after which its answer is given up."""
AGAIN: Final = 0.5
"""Seconds until a registry that could not be asked is asked again."""
DRAIN: Final = 600.0
"""Seconds an endpoint that drains may have requests in flight; after these they are tried elsewhere."""


def actor_name(name: str) -> str:
    """Of the registry of these engines."""
    return f"{name}.registry"


def find(name: str) -> Any:
    """The registry of the engines that were started as `name`. Raises ConfigError."""
    import ray

    require()
    try:
        return ray.get_actor(actor_name(name), namespace=NAMESPACE)
    except ValueError:
        raise ConfigError(
            f"No engines are registered as {name!r} on this Ray cluster: start them with "
            f"`penstock serve --ray`, or say the name they have."
        ) from None


class Follower:
    """`async with Follower(name, members)`: entered when the registry has been heard once.

    on_snapshot: told each snapshot, before it is applied. Raises ConfigError when there is no such registry.
    """

    def __init__(
        self,
        name: str,
        members: Members,
        *,
        all_versions: bool = False,
        on_snapshot: Callable[[Snapshot], None] | None = None,
    ) -> None:
        self.name = name
        self.snapshot: Snapshot | None = None
        """The last one."""
        self._members = members
        self._followed = Followed(all_versions=all_versions)
        self._on_snapshot = on_snapshot
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._draining: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Follower {self.name} {len(self._followed.urls)} endpoints>"

    async def __aenter__(self) -> Self:
        find(self.name)
        self._task = asyncio.create_task(self._run(), name=f"penstock follows {self.name}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        tasks = {self._task, *self._draining}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def until(self, count: int, timeout: float | None = None) -> None:
        """Waits until there are `count` endpoints. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(timeout):
                while len(self._followed.urls) < count:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"{len(self._followed.urls)} of {count} engines of {self.name!r} were ready within "
                f"{timeout:g} s"
            ) from None

    async def _run(self) -> None:
        import ray.exceptions

        epoch, revision = "", -1
        while True:
            try:
                asked = find(self.name).watch.remote(epoch, revision, POLL)
                async with asyncio.timeout(POLL + LATE):
                    snapshot: Snapshot = await asked
            except (ConfigError, TimeoutError, ray.exceptions.RayError) as error:
                logger.debug("the registry of %s cannot be asked: %s", self.name, error)
                await asyncio.sleep(AGAIN)
                continue
            if (snapshot.epoch, snapshot.revision) != (epoch, revision):
                epoch, revision = snapshot.epoch, snapshot.revision
                await self._apply(snapshot)

    async def _apply(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        if self._on_snapshot is not None:
            self._on_snapshot(snapshot)
        changes = self._followed.take(snapshot)
        for url in changes.leave:
            with contextlib.suppress(ConfigError):  # somebody has taken it out already
                await self._members.remove(url)
        for url in changes.drain:
            task = asyncio.create_task(self._drain(url), name=f"penstock drains {url}")
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)
        for url in changes.join:
            self._members.add(url)
        self._changed.set()

    async def _drain(self, url: str) -> None:
        with contextlib.suppress(ConfigError):
            await self._members.drain(url, DRAIN)


@asynccontextmanager
async def fleet(
    name: str, *, ready: int = 1, timeout: float | None = 60.0, **options: Any
) -> AsyncIterator[Fleet]:
    """The engines of the registry `name` as a `Fleet`, kept in step; only those with the weights of its
    policy version.

    ready: endpoints to wait for on entering, at most `timeout` seconds. options: those of `Fleet`.
    Raises ConfigError, DeadlineExceeded.
    """
    found = Fleet(**options)  # opened when there is something in it
    async with Follower(name, found) as follower:
        await follower.until(ready, timeout)
        async with found:
            yield found
