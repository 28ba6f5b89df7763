"""One life of an engine, from the side of who placed it: its actor started, heard, ended.

It guarantees:
- when `run` ends, however it ends, the actor is dead or told to die, and the registry does not have the
  engine any longer;
- whoever cancels `run` is told after that; a second time, nothing is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from penstock.cluster.engine_actor import EngineActor, Event, Seat
from penstock.cluster.nodes import address_of
from penstock.cluster.placement import Place
from penstock.cluster.rollout_worker import NoAnswer, asked
from penstock.cluster.session import NAMESPACE

if TYPE_CHECKING:
    from penstock.cluster.engines import Engines

POLL: Final = 20.0
"""Seconds an actor holds the question for its news."""
LATE: Final = 10.0
"""Seconds beyond that, after which it is given up."""
BIRTH: Final = 120.0
"""Seconds in which the actor's process has to be there; a new node may have to load packages first."""
MARGIN: Final = 30.0
"""Seconds beyond its grace in which an engine has to have ended."""
QUICK: Final = 5.0
"""Seconds for a word to the registry or the end of a process."""


class Ending(msgspec.Struct, frozen=True):
    """How a life ended."""

    text: str = ""
    """Why."""
    cause: str | None = None
    """The kind of its diagnosis."""
    lost: bool = False
    """Its actor, or its node, is gone, or does not answer."""
    told: bool = False
    """It was told to."""


class Life:
    """engines: whose it is. group: the placement group that holds the place."""

    def __init__(self, engines: Engines, index: int, place: Place, group: Any) -> None:
        self.replica = f"{engines.name}.{index}.{secrets.token_hex(4)}"
        self.node = place.shares[0].node
        self.url: str | None = None
        """Where it serves; None while it does not."""
        self.lost = False
        self._engines = engines
        self._index = index
        self._place = place
        self._group = group
        self._actor: Any = None
        self._stopping: asyncio.Future[None] | None = None

    async def run(
        self, registry: Any, *, on_stage: Callable[[str], None], on_ready: Callable[[], None]
    ) -> Ending:
        """Until the engine has ended."""
        try:
            ending = await self._heard(on_stage, on_ready)
        except NoAnswer as error:
            if getattr(error.__cause__, "actor_init_failed", False):
                ending = Ending(f"penstock cannot be loaded on the node of the engine: {error}")
            else:
                self.lost = True
                ending = Ending(f"The engine's actor or its node is gone: {error}", lost=True)
        except asyncio.CancelledError:
            await self._insist()
            raise
        finally:
            self.url = None
            await self._bury(registry)
        return ending

    async def stop(self, drain: float = 0.0) -> None:
        """Ends the engine, and waits until nothing of it is left, or until it is plain that it cannot be
        told."""
        if self._actor is None:
            return
        limit = drain + self._engines.stop_grace + MARGIN
        with contextlib.suppress(NoAnswer):
            await asked(self._actor.stop.remote(drain), limit)

    # -- inside -----------------------------------------------------------------------------------

    async def _heard(self, on_stage: Callable[[str], None], on_ready: Callable[[], None]) -> Ending:
        await self._born()
        seen = 0
        while True:
            events: list[Event] = await asked(self._actor.events.remote(seen, POLL), POLL + LATE)
            seen += len(events)
            for event in events:
                if event.kind == "stage":
                    on_stage(event.text)
                elif event.kind == "ready":
                    self.url = event.text
                    on_ready()
                else:
                    return Ending(event.text, event.cause, told=not event.text)

    async def _born(self) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        engines, share = self._engines, self._place.shares[0]
        over = self._place.strategy == "PACK"
        seat = Seat(
            name=engines.name,
            replica=self.replica,
            index=self._index,
            address=await asyncio.to_thread(address_of, self.node),
            ray_address=ray.get_runtime_context().gcs_address if over else None,
            stop_grace=engines.stop_grace,
            log_folder=engines.log_folder,
        )
        options: dict[str, Any] = {
            "name": self.replica,
            "namespace": NAMESPACE,
            "num_cpus": share.cpus,
            "num_gpus": 0 if over else share.gpus,
            "max_concurrency": 1000,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, 0),
        }
        self._actor = ray.remote(EngineActor).options(**options).remote(engines.spec, seat)
        await asked(self._actor.start.remote(), BIRTH)

    async def _insist(self) -> None:
        """Stops the engine although this task is to end; cancelled again, without waiting."""
        stopping = asyncio.ensure_future(self.stop())
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([stopping])
        stopping.cancel()

    async def _bury(self, registry: Any) -> None:
        """The registry is told, and the actor's process ended: its engine, if there is one, ends with it."""
        import ray

        with contextlib.suppress(NoAnswer):
            await asked(registry.leave.remote(self.replica), QUICK)
        if self._actor is None:
            return
        ray.kill(self._actor)
        with contextlib.suppress(NoAnswer):
            await asked(self._actor.events.remote(0, QUICK), QUICK)
