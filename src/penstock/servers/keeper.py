"""Replicas of a server, kept running while a block lasts: what those of this machine and of a cluster share.

It guarantees:
- entering waits until as many serve as are needed; leaving ends the tasks that keep them, and waits for it;
- a first start that fails while the block is being entered ends the entering with that error; later on
  replicas are started again as `Restart` says, and when none is left that could be, the block is cancelled;
- what ends the block is raised as it is, not in a group.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType
from typing import Self

from penstock.errors import ConfigError, PenstockError
from penstock.servers.launched import LaunchedServer
from penstock.servers.patterns import Kind, Stage
from penstock.servers.restart import Restart, Restarts


class State(StrEnum):
    """Where a replica is in its life."""

    WAITING = "waiting for its turn"
    STARTING = "starting"
    READY = "ready"
    DIED = "waiting to be restarted"
    GIVEN_UP = "given up"
    STOPPED = "stopped"


class Replica:
    """One of the servers, whichever process it is at the moment."""

    def __init__(self, index: int, devices: tuple[str, ...], rule: Restart) -> None:
        self.index = index
        self.devices = devices
        """GPUs it has to itself; none: not dealt out."""
        self.state = State.WAITING
        self.stage = ""
        """Of its start: what the server is doing."""
        self.server: LaunchedServer | None = None
        self.error: PenstockError | None = None
        """What it last ended with."""
        self.retry_in = 0.0
        """Seconds from its last end to its next start."""
        self.restarts = Restarts(rule)
        self.leaving = False
        """It is to go: it is not started again."""
        self.task: asyncio.Task[None] | None = None
        """Keeps it running."""
        self.changed = asyncio.Event()
        """Set when its state changes."""

    def __repr__(self) -> str:
        return f"<Replica {self.index} {self.state.value}>"

    @property
    def url(self) -> str | None:
        """Where it serves; None while it does not."""
        server = self.server if self.state is State.READY else None
        return None if server is None or server.ended.is_set() else server.base_url


OnChange = Callable[[Replica], None]
"""Told when a replica's state or stage has changed."""


class Keeper(ABC):
    """Keeps `replicas` running. needed: of them to wait for on entering. stagger: seconds between two first
    starts."""

    def __init__(
        self,
        *,
        needed: int,
        restart: Restart | None = None,
        stagger: float = 0.0,
        on_change: OnChange | None = None,
    ) -> None:
        self.replicas: list[Replica] = []
        self._needed = needed
        self._rule = restart or Restart()
        self._stagger = stagger
        self._on_change = on_change
        self._group: asyncio.TaskGroup | None = None
        self._entering = True
        self._enough = asyncio.Event()

    @property
    def count(self) -> int:
        """Of those that are ready."""
        return len(self.urls)

    @property
    @abstractmethod
    def urls(self) -> list[str]:
        """Of those that are ready."""

    @abstractmethod
    async def _keep(self, replica: Replica, delay: float) -> None:
        """Keeps a replica running, from `delay` seconds on, until it is cancelled, to go, or given up."""

    async def _prepare(self) -> None:  # noqa: B027 – there may be nothing to do
        """What is done before the first start. Raises ConfigError."""

    async def __aenter__(self) -> Self:
        if self._group is not None:
            raise ConfigError("They are already started: make others for each block.")
        await self._prepare()
        self._group = await asyncio.TaskGroup().__aenter__()
        for replica in self.replicas:
            self._start(replica, replica.index * self._stagger)
        try:
            await self._enough.wait()
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        self._entering = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._group is not None
        for replica in self.replicas:
            replica.leaving = True
            if replica.task is not None:
                replica.task.cancel()
        try:
            await self._group.__aexit__(kind, error, trace)
        except BaseExceptionGroup as group:
            if group.exceptions[0] is not error:  # else it goes on as it is
                raise group.exceptions[0] from None

    def _start(self, replica: Replica, delay: float = 0.0) -> None:
        assert self._group is not None
        name = f"penstock replica {replica.index}"
        replica.task = self._group.create_task(self._keep(replica, delay), name=name)

    def _serves(self, replica: Replica) -> None:
        """A replica is ready, and one of `urls`."""
        replica.restarts.ready(time.monotonic())
        self._enter(replica, State.READY)
        if self.count >= self._needed:
            self._enough.set()

    def _failed(
        self, replica: Replica, error: PenstockError, cause: Kind | None, *, lost: bool = False
    ) -> float | None:
        """Seconds until the next start; None: given up. Raises the error when that is the end of all.

        lost: it failed for where it was, and may well start elsewhere.
        """
        first = replica.restarts.total == 0 and replica.state is State.STARTING
        replica.error = error
        if self._entering and first and not lost:
            raise error
        wait = replica.restarts.failed(time.monotonic(), cause)
        replica.retry_in = 0.0 if wait is None else wait
        self._enter(replica, State.GIVEN_UP if wait is None else State.DIED)
        if wait is None and all(one.state is State.GIVEN_UP for one in self.replicas):
            raise error
        return wait

    def _hear(self, replica: Replica, stage: str) -> None:
        replica.stage = stage
        if stage != Stage.READY.value:  # it is the state's to say so, once it can be found
            self._tell(replica)

    def _enter(self, replica: Replica, state: State) -> None:
        if state is not replica.state:
            replica.state = state
            replica.changed.set()
            self._tell(replica)

    def _tell(self, replica: Replica) -> None:
        if self._on_change is not None:
            self._on_change(replica)
