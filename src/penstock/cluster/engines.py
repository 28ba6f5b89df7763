"""Engines on the nodes of a Ray cluster: placed, watched, started elsewhere when their node dies.

    async with Engines(spec, replicas=8) as engines, engines.fleet() as fleet: ...

It guarantees:
- where an engine goes is decided by `penstock.cluster.placement`, and held by a placement group until it has
  ended; two engines never get the same GPU;
- an engine is registered only while it is healthy; one whose process, actor or node is gone is taken out as
  soon as that is known here, and started again, bounded and with backoff (`Restart`), on another node where
  its own is in doubt;
- `scale` waits for what is in flight on an engine before it ends it;
- after the block no actor, no placement group and no process of any engine is left. A driver that is killed
  takes them along: Ray ends what belongs to it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Final

from penstock.cluster import follow
from penstock.cluster.life import Ending, Life
from penstock.cluster.nodes import ask_nodes
from penstock.cluster.placement import Need, Place, check_room, place
from penstock.cluster.registry_actor import start_registry
from penstock.cluster.session import require
from penstock.errors import ConfigError, EngineError
from penstock.fleet.fleet import Fleet
from penstock.servers.diagnosis import StartFailed
from penstock.servers.keeper import Keeper, OnChange, Replica, State
from penstock.servers.patterns import Kind
from penstock.servers.restart import Restart
from penstock.servers.spec import ServerSpec

DOUBTED: Final = 60.0
"""Seconds for which a node is avoided on which an engine was lost: Ray itself takes up to 20 to tell whether
it is dead."""
ROOM: Final = 1.0
"""Seconds between two looks for a node with room."""
DRAIN: Final = 60.0
"""Seconds that what is in flight on an engine may take before it is ended."""


class Engines(Keeper):
    """`replicas` engines as `spec` says, registered under `name`. This process has to be connected to Ray.

    cpus: that each takes beside its GPUs. ready: engines to wait for on entering; None: all. drain: seconds
    what is in flight may take when an engine is to go. Raises ConfigError for what cannot be, on entering
    also StartFailed; the block is cancelled and ends with the last error when no engine is left.
    """

    def __init__(
        self,
        spec: ServerSpec,
        *,
        replicas: int = 1,
        name: str = "penstock",
        cpus: float = 1.0,
        ready: int | None = None,
        restart: Restart | None = None,
        drain: float = DRAIN,
        stop_grace: float = 10.0,
        log_folder: str | None = None,
        on_change: OnChange | None = None,
    ) -> None:
        if replicas < 1:
            raise ConfigError(f"There must be at least 1 replica, not {replicas}.")
        if not cpus >= 0:
            raise ConfigError(f"An engine takes 0 CPUs or more, not {cpus}.")
        if spec.nodes is not None or spec.port:
            raise ConfigError("On Ray nodes and ports are found by themselves: give neither.")
        needed = replicas if ready is None else min(ready, replicas)
        super().__init__(needed=needed, restart=restart, on_change=on_change)
        gpus = 0 if spec.engine == "embedded" else spec.gpus
        self.need = Need(gpus, cpus, splits=spec.engine == "vllm" and gpus > 1)
        self.spec = replace(spec, env={**_interpreters(), **spec.env})
        self.name = name
        self.drain = drain
        self.stop_grace = stop_grace
        self.log_folder = log_folder
        self._wanted = replicas
        self._lives: dict[int, Life] = {}
        self._doubted: dict[str, float] = {}
        """Until when a node is avoided."""
        self._placing = asyncio.Lock()
        self._registry: Any = None
        self._next = 0
        self._more(replicas)

    def __repr__(self) -> str:
        return f"<Engines {self.name} {self.count} of {self._wanted} ready>"

    @property
    def urls(self) -> list[str]:
        return [life.url for life in self._lives.values() if life.url is not None]

    @property
    def places(self) -> dict[str, str]:
        """The node of each engine that is ready, by URL."""
        return {life.url: life.node for life in self._lives.values() if life.url is not None}

    # -- the block --------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        require()
        check_room(self.need, await ask_nodes(), self._wanted)
        self._registry = start_registry(self.name)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        try:
            await super().__aexit__(kind, error, trace)
        finally:
            ray.kill(self._registry)

    async def scale(self, replicas: int) -> None:
        """So many engines from now on. Those that are too many get no more requests, and end when they have
        none in flight, which is waited for; new ones start in the background. Raises ConfigError."""
        if replicas < 1:
            raise ConfigError(f"There must be at least 1 replica, not {replicas}.")
        if replicas > len(self.replicas):
            check_room(self.need, await ask_nodes(), replicas)
        self._wanted = replicas
        for replica in self._more(replicas - len(self.replicas)):
            self._start(replica)
        # Those that do not serve go first, then the youngest.
        order = sorted(self.replicas, key=lambda one: (one.state is State.READY, -one.index))
        surplus = order[: len(self.replicas) - replicas]
        for replica in surplus:
            self.replicas.remove(replica)
        await asyncio.gather(*(self._end(replica) for replica in surplus))

    @asynccontextmanager
    async def fleet(self, **options: Any) -> AsyncIterator[Fleet]:
        """A fleet kept in step with these engines, see `penstock.cluster.follow.fleet`."""
        async with follow.fleet(self.name, **{"api_key": self.spec.api_key, **options}) as fleet:
            yield fleet

    # -- one replica ------------------------------------------------------------------------------

    def _more(self, count: int) -> list[Replica]:
        """So many more replicas, not started."""
        added = [Replica(self._next + one, (), self._rule) for one in range(count)]
        self._next += len(added)
        self.replicas += added
        return added

    async def _end(self, replica: Replica) -> None:
        """A replica is not wanted any longer."""
        assert replica.task is not None
        life = self._lives.get(replica.index)
        if life is not None and life.url is not None:
            await life.stop(self.drain)
        replica.task.cancel()
        await asyncio.wait([replica.task])

    async def _keep(self, replica: Replica, delay: float) -> None:
        try:
            await asyncio.sleep(delay)
            while True:
                ending = await self._live(replica)
                if ending.told:
                    self._enter(replica, State.STOPPED)
                    return
                error = EngineError(ending.text) if replica.state is State.READY else StartFailed(ending.text)
                cause = None if ending.cause is None else Kind(ending.cause)
                wait = self._failed(replica, error, cause, lost=ending.lost)
                if wait is None:
                    return
                await asyncio.sleep(wait)
        except asyncio.CancelledError:
            self._enter(replica, State.STOPPED)
            raise

    async def _live(self, replica: Replica) -> Ending:
        """One life of a replica, from its place to its end."""
        replica.stage = ""
        self._enter(replica, State.STARTING)
        async with self._place_for(replica) as (found, group):
            life = Life(self, replica.index, found, group)
            self._lives[replica.index] = life
            try:
                return await life.run(
                    self._registry,
                    on_stage=lambda stage: self._hear(replica, stage),
                    on_ready=lambda: self._serves(replica),
                )
            finally:
                del self._lives[replica.index]
                if life.lost:
                    self._doubted[life.node] = time.monotonic() + DOUBTED

    @asynccontextmanager
    async def _place_for(self, replica: Replica) -> AsyncIterator[tuple[Place, Any]]:
        """A place and its placement group, as soon as there is room."""
        from ray.util.placement_group import remove_placement_group

        from penstock.cluster.nodes import reserve

        while True:
            async with self._placing:
                found = place(self.need, await ask_nodes(), self._load(), self._avoided())
                group = None if found is None else await reserve(found)
            if found is not None and group is not None:
                break
            if found is not None:  # the node took nothing: it may be dying, or somebody else was faster
                self._doubted[found.shares[0].node] = time.monotonic() + DOUBTED
            self._hear(replica, f"waiting for room: {self.need}")
            await asyncio.sleep(ROOM)
        try:
            yield found, group
        finally:
            remove_placement_group(group)

    def _load(self) -> Counter[str]:
        return Counter(life.node for life in self._lives.values())

    def _avoided(self) -> set[str]:
        now = time.monotonic()
        return {node for node, until in self._doubted.items() if until > now}


def _interpreters() -> dict[str, str]:
    """Where this machine is told that the engines are: the nodes are told the same."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PENSTOCK_") and name.endswith("_PYTHON")
    }
