"""Several servers of one model as a fleet: `async with launch(spec, replicas=4) as replicas`.

It guarantees:
- an endpoint is in the fleet only while its server is healthy: it joins when the server is ready and leaves
  as soon as the server is known to be dead; with which weights it is given requests, the fleet decides;
- a server that dies or fails to start is started again, bounded and with backoff (`Restart`); when none is
  left that could be, the block is cancelled and ends with the last one's error;
- a first start that fails while the block is being entered ends the entering with that error;
- no two servers get the same GPU;
- after the block no process of any server is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from enum import StrEnum
from types import TracebackType
from typing import Any, Final, Protocol, Self

from penstock.client import Client
from penstock.errors import ConfigError, EngineError, PenstockError
from penstock.fleet.fleet import Fleet
from penstock.servers.devices import VISIBLE, deal, visible
from penstock.servers.diagnosis import DiagnosedError, EngineDied
from penstock.servers.engines import server_of
from penstock.servers.launched import LaunchedServer, LifeCycle
from penstock.servers.machine import gpu_names
from penstock.servers.patterns import Stage
from penstock.servers.restart import Restart, Restarts
from penstock.servers.spec import ServerSpec

STAGGER: Final = 1.0
"""Seconds between the first starts of two servers, which otherwise read the same disk in the same moment."""

Devices = Sequence[int | str]


class Members(Protocol):
    """Where endpoints join and leave: a `Fleet`."""

    def add(self, url: str) -> None: ...

    async def remove(self, url: str) -> None:
        """Raises ConfigError when it is not there."""
        ...


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

    def __repr__(self) -> str:
        return f"<Replica {self.index} {self.state.value}>"

    @property
    def url(self) -> str | None:
        """Where it serves; None while it does not."""
        server = self.server if self.state is State.READY else None
        return None if server is None or server.ended.is_set() else server.base_url


OnChange = Callable[[Replica], None]
"""Told when a replica's state or stage has changed."""


class Replicas:
    """`replicas` servers as `spec` says, each a member of `members` while it is healthy.

    devices: GPUs to deal out, by index or UUID; None: all this process may use, for engines other than the
    embedded one; empty: none are dealt out. ready: servers to wait for on entering; None: all. stagger:
    seconds between two first starts. With a port in the spec the servers take that one and those after it.
    Raises ConfigError for what cannot be, on entering also StartFailed.
    """

    def __init__(
        self,
        spec: ServerSpec,
        members: Members,
        *,
        replicas: int = 1,
        devices: Devices | None = None,
        ready: int | None = None,
        stagger: float = STAGGER,
        restart: Restart | None = None,
        life: LifeCycle | None = None,
        on_change: OnChange | None = None,
        make: Callable[[ServerSpec, LifeCycle], LaunchedServer] = server_of,
    ) -> None:
        if replicas < 1:
            raise ConfigError(f"There must be at least 1 replica, not {replicas}.")
        if spec.nodes is not None and replicas > 1:
            raise ConfigError("An engine on several nodes cannot have replicas: start a server for each.")
        if spec.port and spec.port + replicas > 65536:
            raise ConfigError(f"There are no {replicas} ports from {spec.port} on.")
        self.spec = spec
        self.name = spec.name
        self._members = members
        self._needed = replicas if ready is None else min(ready, replicas)
        self._stagger = stagger
        self._life = life or LifeCycle()
        self._on_change = on_change
        self._make = make
        dealt = _dealt(spec, replicas, devices)
        rule = restart or Restart()
        self.replicas = [Replica(index, dealt[index], rule) for index in range(replicas)]
        for replica in self.replicas:
            make(self._spec_of(replica), self._life)  # refuses what cannot be
        self._group: asyncio.TaskGroup | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._entering = True
        self._enough = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Replicas {self.name} {self.count} of {len(self.replicas)} ready>"

    @property
    def count(self) -> int:
        """Of those that are ready."""
        return len(self.urls)

    @property
    def urls(self) -> list[str]:
        """Of those that are ready."""
        return [replica.url for replica in self.replicas if replica.url is not None]

    # -- the block --------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._group is not None:
            raise ConfigError("The replicas are already started: make others for each block.")
        self._group = await asyncio.TaskGroup().__aenter__()
        self._tasks = [
            self._group.create_task(self._keep(replica), name=f"penstock replica {replica.index}")
            for replica in self.replicas
        ]
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
        for task in self._tasks:
            task.cancel()
        try:
            await self._group.__aexit__(kind, error, trace)
        except BaseExceptionGroup as group:
            if group.exceptions[0] is not error:  # else it goes on as it is
                raise group.exceptions[0] from None

    # -- one replica ------------------------------------------------------------------------------

    async def _keep(self, replica: Replica) -> None:
        """Keeps a replica running until it is cancelled or given up."""
        try:
            await asyncio.sleep(replica.index * self._stagger)
            while True:
                try:
                    await self._live(replica)
                except (EngineError, ConfigError) as error:
                    wait = self._wait_after(replica, error)
                if wait is None:
                    return
                await asyncio.sleep(wait)
        except asyncio.CancelledError:
            self._enter(replica, State.STOPPED)
            raise

    async def _live(self, replica: Replica) -> None:
        """One life of a replica, from its start to its death, which is raised."""
        life = replace(
            self._life,
            on_stage=lambda stage: self._hear(replica, stage),
            on_death=self._life.on_death or _nothing,
        )
        server = self._make(self._spec_of(replica), life)
        replica.server, replica.stage = server, ""
        self._enter(replica, State.STARTING)
        async with server:
            replica.restarts.ready(time.monotonic())
            url = server.base_url
            self._members.add(url)
            self._enter(replica, State.READY)
            if self.count >= self._needed:
                self._enough.set()
            try:
                await server.ended.wait()
            finally:
                with contextlib.suppress(ConfigError):  # somebody has taken it out already
                    await self._members.remove(url)
            await asyncio.wait([server.died])
        raise server.died.result()

    def _wait_after(self, replica: Replica, error: EngineError | ConfigError) -> float | None:
        """Seconds until the next start; None: given up. Raises the error when that is the end of all."""
        first = replica.restarts.total == 0 and replica.state is State.STARTING
        replica.error = error
        if self._entering and first:
            raise error
        diagnosis = error.diagnosis if isinstance(error, DiagnosedError) else None
        wait = replica.restarts.failed(time.monotonic(), None if diagnosis is None else diagnosis.kind)
        replica.retry_in = 0.0 if wait is None else wait
        self._enter(replica, State.GIVEN_UP if wait is None else State.DIED)
        if wait is None and all(other.state is State.GIVEN_UP for other in self.replicas):
            raise error
        return wait

    def _spec_of(self, replica: Replica) -> ServerSpec:
        spec = self.spec
        env = {**spec.env, VISIBLE: ",".join(replica.devices)} if replica.devices else spec.env
        return replace(spec, env=env, port=spec.port + replica.index if spec.port else 0)

    def _hear(self, replica: Replica, stage: str) -> None:
        replica.stage = stage
        if stage != Stage.READY.value:  # it is the state's to say so, once the fleet has it
            self._tell(replica)

    def _enter(self, replica: Replica, state: State) -> None:
        if state is not replica.state:
            replica.state = state
            self._tell(replica)

    def _tell(self, replica: Replica) -> None:
        if self._on_change is not None:
            self._on_change(replica)


class LaunchedFleet(Replicas):
    """Replicas and the fleet they are members of."""

    def __init__(self, spec: ServerSpec, fleet: Fleet, **settings: Any) -> None:
        super().__init__(spec, fleet, **settings)
        self.fleet = fleet

    def client(self, **settings: Any) -> Client:
        """A client of the fleet; `settings` are `model` and `resume_streams` of `penstock.Client`."""
        return Client(self.fleet, **{"model": self.name, **settings})


@asynccontextmanager
async def launch(
    spec: ServerSpec,
    *,
    replicas: int = 1,
    devices: Devices | None = None,
    ready: int | None = None,
    stagger: float = STAGGER,
    restart: Restart | None = None,
    life: LifeCycle | None = None,
    on_change: OnChange | None = None,
    **options: Any,
) -> AsyncIterator[LaunchedFleet]:
    """Servers of one model and the fleet of their endpoints, `launched.fleet`.

    As `Replicas`; options: those of `Fleet`. Raises ConfigError, and on entering StartFailed; the block ends
    with EngineDied or StartFailed when no server is left and none can be started again.
    """
    fleet = Fleet(**{"api_key": spec.api_key, **options})
    launched = LaunchedFleet(
        spec,
        fleet,
        replicas=replicas,
        devices=devices,
        ready=ready,
        stagger=stagger,
        restart=restart,
        life=life,
        on_change=on_change,
    )
    async with fleet, launched:
        yield launched


def _dealt(spec: ServerSpec, replicas: int, devices: Devices | None) -> list[tuple[str, ...]]:
    if devices is None:
        if spec.engine == "embedded" or spec.nodes is not None:
            devices = ()
        else:
            devices = visible(len(gpu_names()), {**os.environ, **spec.env})
    return deal(devices, replicas, spec.gpus) if devices else [()] * replicas


def _nothing(death: EngineDied) -> None:
    """The replica's task sees the death itself."""
