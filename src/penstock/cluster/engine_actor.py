"""One engine as an actor: it owns the life of one server, says where it is, and makes rollouts with it.

It guarantees:
- the engine is registered only while it is healthy, under an address that other nodes reach;
- when the actor's process ends, however it ends, no process of the engine is left: they hang on a pipe to it;
- an engine the registry does not want any longer (it was believed dead) ends itself;
- one life, one server: an engine that dies is started again as another actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from penstock.cluster.follow import find
from penstock.cluster.registry import BEAT, Entry
from penstock.cluster.rollout_worker import RemoteQueue, Told, Work, Worker
from penstock.errors import EngineError, PenstockError
from penstock.fleet.load import parse_load
from penstock.servers.devices import VISIBLE
from penstock.servers.diagnosis import DiagnosedError, EngineDied
from penstock.servers.engines import server_of
from penstock.servers.launched import LaunchedServer, LifeCycle
from penstock.servers.nodes import Nodes
from penstock.servers.spec import ServerSpec

logger = logging.getLogger(__name__)

BEAT_LIMIT: Final = 5.0
"""Seconds in which the registry has to have heard a beat."""
NOTICE: Final = 1.0
"""Seconds in which clients and routers have heard that an engine drains."""
LOOK: Final = 0.25
"""Seconds between two looks at what an engine that drains has in flight."""


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """Which engine this is."""

    name: str
    """Of the engines, and of their registry."""
    replica: str
    index: int
    address: str
    """Under which other nodes reach this one."""
    ray_address: str | None = None
    """Set where the engine itself lies on several nodes, over Ray."""
    stop_grace: float = 10.0
    """Seconds between SIGTERM and SIGKILL."""
    log_folder: str | None = None


class Event(msgspec.Struct, frozen=True):
    """What has happened to an engine."""

    kind: Literal["stage", "ready", "ended"]
    text: str = ""
    """The stage, the URL, or why it ended; "": it was told to."""
    cause: str | None = None
    """The kind of its diagnosis, where there is one."""


class EngineActor:
    """Becomes a Ray actor in `penstock.cluster.engines`. All methods are for one event loop."""

    def __init__(self, spec: ServerSpec, seat: Seat) -> None:
        self._spec = spec
        self._seat = seat
        self._events: list[Event] = []
        self._more = asyncio.Event()
        self._stop = asyncio.Event()
        self._left = asyncio.Event()
        self._draining = False
        self._server: LaunchedServer | None = None
        self._worker: Worker | None = None
        self._life: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Begins; `events` tell the rest. The actor's process id."""
        if self._life is None:
            self._life = asyncio.create_task(self._live(), name=f"penstock engine {self._seat.replica}")
        return os.getpid()

    async def events(self, since: int, timeout: float) -> list[Event]:
        """What happened after the first `since` events, once there is any, or after `timeout` s."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while len(self._events) <= since:
                    self._more.clear()
                    await self._more.wait()
        return self._events[since:]

    async def stop(self, drain: float) -> None:
        """Ends the engine; when this returns, nothing of it is left. drain: seconds what is in flight may
        take to end, when nobody sends any more."""
        if drain > 0 and self._server is not None:
            self._draining = True
            self._left.set()
            await self._drained(drain)
        self._stop.set()
        if self._life is not None:
            if self._server is None:
                self._life.cancel()  # it is not ready: its start is given up
            await asyncio.wait([self._life])

    # -- rollouts ---------------------------------------------------------------------------------

    async def work(self, work: Work, queue: Any) -> None:
        """Makes rollouts of a run, in place of those of any other. queue: an actor as
        `penstock.cluster.queue_actor.QueueActor`."""
        if self._worker is not None and self._worker.run == work.run:
            return
        await self.rest()
        server = self._server
        if server is None or server.ended.is_set():
            raise EngineError("The engine does not serve.")
        queue = RemoteQueue(queue)
        worker = Worker(server.base_url, self._seat.replica, work, queue, api_key=server.api_key)
        await worker.start()
        self._worker = worker

    async def told(self, told: Told, version: int) -> None:
        """How far a weight update of this engine is."""
        if self._worker is not None:
            self._worker.told(told, version)
            self._left.set()  # the registry has to know at once

    async def receive(self, parts: Sequence[Any]) -> None:
        """Weights of an update, as references into the object store: handed to the engine over HTTP."""
        if self._worker is None:
            raise EngineError(f"{self._seat.replica} takes part in no rollouts.")
        for part in parts:
            await self._worker.send_weights(memoryview(await part))

    async def rest(self) -> None:
        """Makes no rollouts any longer."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.close()

    # -- inside -----------------------------------------------------------------------------------

    async def _live(self) -> None:
        try:
            async with server_of(self._placed(), self._cycle()) as server:
                self._server = server
                try:
                    await self._serve(server)
                finally:
                    await self.rest()
                    self._server = None
                    await self._leave()
        except PenstockError as error:
            diagnosis = error.diagnosis if isinstance(error, DiagnosedError) else None
            self._say(Event("ended", str(error), None if diagnosis is None else diagnosis.kind.value))
        except Exception as error:
            logger.exception("%s ended", self._seat.replica)
            self._say(Event("ended", f"{type(error).__name__}: {error}"))
        else:
            self._say(Event("ended"))

    def _placed(self) -> ServerSpec:
        """The spec as it is on this node. Raises ConfigError."""
        seat = self._seat
        nodes = None
        if seat.ray_address is not None:
            os.environ.pop(VISIBLE, None)  # Ray hides GPUs from this process; vLLM takes its own
            nodes = Nodes(hosts=(seat.address,), rank=0, ray_address=seat.ray_address)
        return replace(self._spec, host=seat.address, nodes=nodes)

    def _cycle(self) -> LifeCycle:
        seat = self._seat
        return LifeCycle(
            stop_grace=seat.stop_grace,
            log_folder=None if seat.log_folder is None else Path(seat.log_folder),
            on_stage=lambda stage: self._say(Event("stage", stage)),
            on_death=_nothing,
        )

    async def _serve(self, server: LaunchedServer) -> None:
        """Until it is stopped. Raises EngineDied, or EngineError when it is not wanted."""
        beating = asyncio.ensure_future(self._beat(server))
        stopped = asyncio.ensure_future(self._stop.wait())
        ended = asyncio.ensure_future(server.ended.wait())
        try:
            await asyncio.wait((beating, stopped, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (beating, stopped, ended):
                task.cancel()
        if server.ended.is_set():
            await self._leave()
            await asyncio.wait([server.died])
            raise server.died.result()
        if beating.done() and not self._stop.is_set():
            beating.result()

    async def _beat(self, server: LaunchedServer) -> None:
        """Says that the engine is there until the registry does not want it: that is raised."""
        import ray.exceptions

        first = True
        while True:
            self._left.clear()
            try:
                async with asyncio.timeout(BEAT_LIMIT):
                    wanted = await find(self._seat.name).announce.remote(self._entry(server))
            except (PenstockError, TimeoutError, ray.exceptions.RayError) as error:
                logger.warning("the registry was not told that %s is there: %s", server.base_url, error)
            else:
                if not wanted:
                    raise EngineError("The engine was believed dead, and another takes its place.")
                if first:
                    first = False
                    self._say(Event("ready", server.base_url))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT):
                    await self._left.wait()

    def _entry(self, server: LaunchedServer) -> Entry:
        import ray

        worker = self._worker
        return Entry(
            replica=self._seat.replica,
            index=self._seat.index,
            url=server.base_url,
            engine=self._spec.engine,
            model=self._spec.name,
            node=ray.get_runtime_context().get_node_id(),
            policy_version=0 if worker is None else worker.policy_version,
            state="draining" if self._draining else "ready",
        )

    async def _leave(self) -> None:
        import ray.exceptions

        with contextlib.suppress(PenstockError, TimeoutError, ray.exceptions.RayError):
            async with asyncio.timeout(BEAT_LIMIT):
                await find(self._seat.name).leave.remote(self._seat.replica)

    async def _drained(self, limit: float) -> None:
        """Until the engine has nothing in flight, at most `limit` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                if self._worker is not None:
                    await self._worker.finish()
                await asyncio.sleep(NOTICE)
                while await self._busy():  # noqa: ASYNC110 -- the engine tells nobody
                    await asyncio.sleep(LOOK)

    async def _busy(self) -> bool:
        """Whether the engine says that it has requests; one that says nothing of the kind is not asked."""
        server = self._server
        if server is None or server.ended.is_set():
            return False
        try:
            load = parse_load((await server.metrics()).encode())
        except PenstockError:
            return False
        return load is not None and load.running + load.waiting > 0

    def _say(self, event: Event) -> None:
        self._events.append(event)
        self._more.set()


def _nothing(death: EngineDied) -> None:
    """`_serve` sees the death itself."""
