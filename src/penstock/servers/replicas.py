"""Several servers of one model as a fleet: `async with launch(spec, replicas=4) as replicas`.

It guarantees:
- an endpoint is in the fleet only while its server is healthy: it joins when the server is ready and leaves
  as soon as the server is known to be dead; with which weights it is given requests, the fleet decides;
- a server that dies or fails to start is started again, bounded and with backoff (`Restart`); when none is
  left that could be, the block is cancelled and ends with the last one's error;
- a first start that fails while the block is being entered ends the entering with that error;
- no two servers get the same GPU;
- `scale` changes how many there are: one more joins when it is ready, one that goes finishes its requests;
- after the block no process of any server is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final, Protocol

from penstock.client import Client
from penstock.errors import ConfigError, EngineError
from penstock.fleet.fleet import Fleet
from penstock.servers.devices import VISIBLE, deal, visible
from penstock.servers.diagnosis import DiagnosedError, EngineDied
from penstock.servers.engines import server_of
from penstock.servers.keeper import Keeper, OnChange, Replica, State
from penstock.servers.launched import LaunchedServer, LifeCycle
from penstock.servers.machine import gpu_names
from penstock.servers.restart import Restart
from penstock.servers.spec import ServerSpec

STAGGER: Final = 1.0
"""Seconds between the first starts of two servers, which otherwise read the same disk in the same moment."""

DRAIN: Final = 60.0
"""Seconds a server that goes may take for the requests it has; the rest is tried again elsewhere."""

Devices = Sequence[int | str]


class Members(Protocol):
    """Where endpoints join and leave: a `Fleet`."""

    def add(self, url: str) -> None: ...

    async def remove(self, url: str) -> None:
        """Raises ConfigError when it is not there."""
        ...

    async def drain(self, url: str, timeout: float | None = None) -> bool:
        """As `remove`, once its requests are done. Whether they were, within `timeout` seconds."""
        ...


class Replicas(Keeper):
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
        _check_count(spec, replicas)
        needed = replicas if ready is None else min(ready, replicas)
        super().__init__(needed=needed, restart=restart, stagger=stagger, on_change=on_change)
        self.spec = spec
        self.name = spec.name
        self._members = members
        self._life = life or LifeCycle()
        self._make = make
        self._devices = _devices(spec, devices)
        self._more(replicas)
        self._scaling = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Replicas {self.name} {self.count} of {len(self.replicas)} ready>"

    @property
    def urls(self) -> list[str]:
        return [replica.url for replica in self.replicas if replica.url is not None]

    # -- more and fewer ---------------------------------------------------------------------------

    async def scale(self, count: int, *, drain: float | None = DRAIN) -> None:
        """From now on there are to be `count` servers; returns when new ones serve and the others are gone.

        New ones join with the weights they start with; a fleet gives them no request before they have its
        policy version. Those that go, the ones that do not serve first and the latest next, get no more
        requests and have `drain` seconds for what they have (None: as long as it takes). A call waits for the
        one before. Raises ConfigError for what cannot be, and nothing has changed; and what a new server
        failed with for good, which is then not one of the replicas.
        """
        async with self._scaling:
            if self._group is None or self._entering or any(one.leaving for one in self.replicas):
                raise ConfigError("Replicas are made more or fewer inside their block.")
            _check_count(self.spec, count)
            added = self._more(count - len(self.replicas))
            gone = sorted(self.replicas, key=lambda one: (one.url is None, one.index))[count:]
            async with asyncio.TaskGroup() as group:
                for replica in gone:
                    group.create_task(self._retire(replica, drain))
            for place, replica in enumerate(added):
                self._start(replica, place * self._stagger)
            for replica in added:
                await self._settled(replica)

    def _more(self, count: int) -> list[Replica]:
        """So many more replicas, not started. Raises ConfigError, and there are none then."""
        taken = {one.index for one in self.replicas}
        free = (index for index in itertools.count() if index not in taken)
        indices = list(itertools.islice(free, max(count, 0)))
        dealt = deal(self._devices, max(indices, default=-1) + 1, self.spec.gpus) if self._devices else None
        added = [Replica(index, dealt[index] if dealt else (), self._rule) for index in indices]
        for replica in added:
            self._make(self._spec_of(replica), self._life)  # refuses what cannot be
        self.replicas += added
        return added

    async def _settled(self, replica: Replica) -> None:
        """When it serves. Raises what it was given up for."""
        while replica.state is not State.READY:
            if replica.state is State.GIVEN_UP:
                self.replicas.remove(replica)
                assert replica.error is not None
                raise replica.error
            if replica.leaving:
                raise ConfigError("The block ended while a server was started.")
            replica.changed.clear()
            await replica.changed.wait()

    async def _retire(self, replica: Replica, drain: float | None) -> None:
        """Ends one of the servers."""
        replica.leaving = True
        try:
            if replica.url is not None:
                with contextlib.suppress(ConfigError):  # somebody has taken it out already
                    await self._members.drain(replica.url, drain)
        finally:
            assert replica.task is not None
            replica.task.cancel()
            self.replicas.remove(replica)
        await asyncio.wait([replica.task])

    # -- one replica ------------------------------------------------------------------------------

    async def _keep(self, replica: Replica, delay: float) -> None:
        """Keeps a replica running until it is cancelled, to go, or given up."""
        try:
            await asyncio.sleep(delay)
            while True:
                try:
                    await self._live(replica)
                except (EngineError, ConfigError) as error:
                    wait = self._wait_after(replica, error)
                if wait is None or replica.leaving:
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
            url = server.base_url
            self._members.add(url)
            self._serves(replica)
            try:
                await server.ended.wait()
            finally:
                with contextlib.suppress(ConfigError):  # somebody has taken it out already
                    await self._members.remove(url)
            await asyncio.wait([server.died])
        raise server.died.result()

    def _wait_after(self, replica: Replica, error: EngineError | ConfigError) -> float | None:
        diagnosis = error.diagnosis if isinstance(error, DiagnosedError) else None
        return self._failed(replica, error, None if diagnosis is None else diagnosis.kind)

    def _spec_of(self, replica: Replica) -> ServerSpec:
        spec = self.spec
        env = {**spec.env, VISIBLE: ",".join(replica.devices)} if replica.devices else spec.env
        return replace(spec, env=env, port=spec.port + replica.index if spec.port else 0)


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


def _check_count(spec: ServerSpec, count: int) -> None:
    if count < 1:
        raise ConfigError(f"There must be at least 1 replica, not {count}.")
    if spec.nodes is not None and count > 1:
        raise ConfigError("An engine on several nodes cannot have replicas: start a server for each.")
    if spec.port and spec.port + count > 65536:
        raise ConfigError(f"There are no {count} ports from {spec.port} on.")


def _devices(spec: ServerSpec, devices: Devices | None) -> Devices:
    """GPUs to deal out; none where they are not."""
    if devices is not None:
        return devices
    if spec.engine == "embedded" or spec.nodes is not None:
        return ()
    return visible(len(gpu_names()), {**os.environ, **spec.env})


def _nothing(death: EngineDied) -> None:
    """The replica's task sees the death itself."""
