"""Rollouts whose groups are made by engine actors: `penstock.rollout.rollouts.Rollouts` over many nodes.

The learner is whoever opens them: the driver, or an actor. Prompts go into a queue, engine actors pull them,
generate, score and push groups with rewards back. What may be begun, what is too old, and what became of each
prompt is decided here, by the same staleness and the same ledger as on one machine. It guarantees besides:
- a group that an engine, its node or the queue has lost is made again; one that comes twice counts once;
- weights go to all engines of the registry as a transaction of `penstock.control`; one that missed it makes
  no groups until it has caught up.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from penstock.cluster.follow import Follower
from penstock.cluster.queue import Request
from penstock.cluster.queue_actor import Fetched, start_queue
from penstock.cluster.registry import Entry, Snapshot
from penstock.cluster.rollout_worker import LATE, NoAnswer, Told, Work, asked, decode
from penstock.cluster.session import NAMESPACE, require
from penstock.cluster.weights import TELL_LIMIT, ObjectStore, TellingTransport
from penstock.control.engine import Engine
from penstock.control.staged import ChangedOnly, Given
from penstock.control.transport import DiskReload, WeightTransport
from penstock.control.update import WeightUpdate
from penstock.errors import ConfigError, DeadlineExceeded, EngineError
from penstock.fleet.fleet import Fleet
from penstock.prompt import Prompt
from penstock.rollout.environment import MakeEnvironment
from penstock.rollout.group import Rollout
from penstock.rollout.rollouts import MAX_TOKENS, Rollouts
from penstock.rollout.sampling import Bounds
from penstock.rollout.scoring import RewardFunction
from penstock.rollout.selection import Selection
from penstock.sample import SamplingParams
from penstock.wire.address import Address

logger = logging.getLogger(__name__)

POLL: Final = 5.0
"""Seconds the queue holds a question for groups that are done."""
AGAIN: Final = 0.5
"""Seconds until a queue that could not be asked is asked again."""
GROUPS: Final = 32
"""Groups an engine makes at a time."""
COMPARE: Final = 3.0
"""Seconds between two looks whether engines and their workers agree on the version of the weights."""
JOIN: Final = 30.0
"""Seconds in which an engine's actor has to begin to make rollouts."""


class RemoteGroups:
    """Asks for groups by the queue. queue: the actor. samples: of a group, those too many included.
    version: of the weights that may make what is asked for now."""

    def __init__(self, queue: Any, samples: int, version: Callable[[], int]) -> None:
        self.tokens = 0
        self.in_flight = 0
        self.unpaused = asyncio.Event()
        self.on_count: Callable[[], None] = _nobody
        self._queue = queue
        self._samples = samples
        self._version = version
        self._ids = itertools.count(1)
        self._open: dict[int, tuple[Request, asyncio.Future[bytes]]] = {}
        """What is asked for and not there."""
        self._fresh: list[Request] = []
        self._dropped: list[int] = []
        self._more = asyncio.Event()
        self._epoch = ""

    async def group(
        self, prompt: Prompt, position: int, size: int, oversample: int
    ) -> tuple[list[Rollout], list[str]]:
        request = Request(next(self._ids), position, prompt, self._version())
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._open[request.id] = request, future
        self._fresh.append(request)
        self._more.set()
        self._count(self._samples)
        try:
            made = decode(await future)
        except asyncio.CancelledError:
            self._dropped.append(request.id)
            self._more.set()
            raise
        finally:
            del self._open[request.id]
            self._count(-self._samples)
        self.tokens += made.tokens
        if made.refused is not None:
            raise ConfigError(made.refused)
        return list(made.rollouts), list(made.failures)

    def _count(self, samples: int) -> None:
        self.in_flight += samples
        self.on_count()

    async def push(self) -> None:
        """Puts into the queue what is asked for, until cancelled."""
        while True:
            await self._more.wait()
            self._more.clear()
            fresh, self._fresh = self._fresh, []
            dropped, self._dropped = self._dropped, []
            try:
                if dropped:
                    await asked(self._queue.cancel.remote(dropped), LATE)
                if fresh:
                    self._know(await asked(self._queue.put.remote(fresh), LATE))
            except NoAnswer as error:
                logger.debug("the queue cannot be filled: %s", error)
                self._fresh = [*fresh, *self._fresh]
                self._dropped = [*dropped, *self._dropped]
                self._more.set()
                await asyncio.sleep(AGAIN)

    async def pull(self) -> None:
        """Takes what is done, until cancelled."""
        done: list[int] = []
        while True:
            try:
                fetched: Fetched = await asked(self._queue.fetch.remote(done, POLL), POLL + LATE)
            except NoAnswer as error:
                logger.debug("the queue cannot be asked: %s", error)
                await asyncio.sleep(AGAIN)
                continue
            self._know(fetched.epoch)
            done = [one.id for one in fetched.results]
            for one in fetched.results:
                _, future = self._open.get(one.id, (None, None))
                if future is not None and not future.done():  # else it came a second time
                    future.set_result(one.payload)

    def _know(self, epoch: str) -> None:
        """A queue that was restarted knows nothing of what is open."""
        if self._epoch and epoch != self._epoch:
            logger.warning("the queue was restarted: %d groups are asked for again", len(self._open))
            self._fresh = [request for request, future in self._open.values() if not future.done()]
            self._more.set()
        self._epoch = epoch


class RayRollouts(Rollouts):
    """`Rollouts` with the engines that are registered as `name`; each makes `groups` groups at a time.

    reward and environment go to the engines: they have to pickle. ready: engines to wait for on entering, at
    most `start_timeout` seconds. fleet: options of the `Fleet` over which weights are updated, such as the
    engines' `api_key`. Otherwise as `Rollouts`. Raises ConfigError, on entering also DeadlineExceeded.
    """

    def __init__(
        self,
        name: str = "penstock",
        *,
        reward: RewardFunction | None = None,
        params: SamplingParams | None = None,
        group_size: int = 8,
        seed: int | None = 0,
        environment: MakeEnvironment | None = None,
        max_turns: int = 16,
        bounds: Bounds | None = None,
        streamed: bool = False,
        selection: Selection | None = None,
        groups: int = GROUPS,
        ready: int = 1,
        start_timeout: float | None = 600.0,
        fleet: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        if groups < 1:
            raise ConfigError(f"an engine makes at least 1 group at a time, not {groups}")
        params = params or SamplingParams(max_tokens=MAX_TOKENS)
        super().__init__(
            Fleet(**(fleet or {})),
            reward=reward, params=params, group_size=group_size, seed=seed, environment=environment,
            max_turns=max_turns, bounds=bounds, streamed=streamed, selection=selection, **settings,
        )  # fmt: skip
        self.name = name
        oversample = (selection or Selection()).oversample
        self._work = Work(
            run=secrets.token_hex(8), reward=reward, params=params, size=group_size, oversample=oversample,
            groups=groups, environment=environment, max_turns=max_turns, bounds=bounds, seed=seed,
            streamed=streamed,
        )  # fmt: skip
        self._samples = group_size + oversample
        self._ready, self._start_timeout = ready, start_timeout
        self._entries: dict[str, Entry] = {}
        """Of the registry, by replica."""
        self._actors: dict[str, Any] = {}
        """By replica."""
        self._joining: dict[str, asyncio.Task[None]] = {}
        self._joined = asyncio.Event()
        self._queue: Any = None
        self._around = AsyncExitStack()
        self._store = ChangedOnly(partial(ObjectStore, actor_of=self.actor_of))

    # -- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        import ray

        require()
        async with AsyncExitStack() as stack:
            self._queue = start_queue(f"{self.name}.rollouts.{secrets.token_hex(4)}")
            stack.callback(ray.kill, self._queue)
            stack.push_async_callback(self._part)
            follower = Follower(
                self.name, self.client.fleet, all_versions=True, on_snapshot=self._on_snapshot
            )
            await stack.enter_async_context(follower)
            await follower.until(self._ready, self._start_timeout)
            await self._until_joined()
            await stack.enter_async_context(self.client)
            self._owns_client = False
            groups = RemoteGroups(self._queue, self._samples, lambda: self._rules.engine_version)
            self._sampler = groups
            await self._own(stack, groups.push(), "penstock rollouts push")
            await self._own(stack, groups.pull(), "penstock rollouts pull")
            await self._own(stack, self._compare(), "penstock rollouts versions")
            await super().__aenter__()
            self._around = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await super().__aexit__(kind, error, trace)
        finally:
            await self._around.aclose()

    async def _part(self) -> None:
        """The engines make nothing more for this run."""
        for task in self._joining.values():
            task.cancel()
        if self._joining:
            await asyncio.wait(self._joining.values())
        resting = [asked(actor.rest.remote(), TELL_LIMIT) for actor in self._actors.values()]
        await asyncio.gather(*resting, return_exceptions=True)

    # -- weights ----------------------------------------------------------------------------------

    async def update(
        self, weights: WeightTransport | str | Path | Given, *, all_or_nothing: bool = False
    ) -> WeightUpdate:
        """As `Rollouts.update`; weights may also be a checkpoint's tensors by name, which go through the
        object store, after the first time only what has changed (embedded engines)."""
        transport: WeightTransport
        if isinstance(weights, str | Path):
            transport = DiskReload(weights)
        else:
            transport = self._store(weights) if isinstance(weights, Mapping) else weights
        return await super().update(TellingTransport(transport, self._tell), all_or_nothing=all_or_nothing)

    def actor_of(self, url: str) -> Any:
        """Raises EngineError."""
        replica = self._replica_at(url)
        if replica is not None and replica in self._actors:
            return self._actors[replica]
        raise EngineError(f"{url} is no engine of {self.name!r} that makes rollouts")

    def _replica_at(self, url: str) -> str | None:
        address = Address.parse(url)
        found = (name for name, one in self._entries.items() if Address.parse(one.url) == address)
        return next(found, None)

    async def _tell(self, engine: Engine, told: Told, version: int) -> None:
        joining = self._joining.get(self._replica_at(engine.name) or "")
        if joining is not None:
            await asyncio.wait([joining], timeout=TELL_LIMIT)
        try:
            await asked(self.actor_of(engine.name).told.remote(told, version), TELL_LIMIT)
        except NoAnswer as error:
            raise EngineError(f"the actor of {engine.name} was not told of the update: {error}") from error

    async def _compare(self) -> None:
        """Tells workers what version their engine is known to be at, where it was found out by asking it."""
        while True:
            await asyncio.sleep(COMPARE)
            fleet = self.client.fleet
            known = {end.address: end for end in fleet.endpoints}
            for entry in list(self._entries.values()):
                end = known.get(Address.parse(entry.url))
                if end is None or not end.current or entry.replica not in self._actors or self._updating:
                    continue
                if entry.policy_version != fleet.policy_version:
                    told = self._actors[entry.replica].told.remote("changed", fleet.policy_version)
                    with contextlib.suppress(NoAnswer):
                        await asked(told, TELL_LIMIT)

    # -- engines ----------------------------------------------------------------------------------

    def _on_snapshot(self, snapshot: Snapshot) -> None:
        entries = {one.replica: one for one in snapshot.entries}
        if not snapshot.settled:  # who is not named may only not have been heard of yet
            entries = {**self._entries, **entries}
        for replica in self._entries.keys() - entries.keys():
            self._lose(replica)
        self._entries = entries
        for replica, entry in entries.items():
            if replica not in self._actors and replica not in self._joining and entry.state == "ready":
                task = asyncio.create_task(self._join(replica), name=f"penstock rollouts join {replica}")
                self._joining[replica] = task

    def _lose(self, replica: str) -> None:
        self._actors.pop(replica, None)
        if (task := self._joining.pop(replica, None)) is not None:
            task.cancel()
        self._queue.lost.remote(replica)

    async def _until_joined(self) -> None:
        """Until as many engines as are waited for make rollouts. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(self._start_timeout):
                while len(self._actors) < self._ready:
                    self._joined.clear()
                    await self._joined.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"{len(self._actors)} of {self._ready} engines of {self.name!r} made rollouts within "
                f"{self._start_timeout:g} s"
            ) from None

    async def _join(self, replica: str) -> None:
        """An engine makes rollouts of this run, tried until it does or has left."""
        import ray

        while replica not in self._actors:
            try:
                actor: Any = ray.get_actor(replica, namespace=NAMESPACE)
                await asked(actor.work.remote(self._work, self._queue), JOIN)
            except (ValueError, NoAnswer) as error:
                logger.warning("%s does not make rollouts yet: %s", replica, error)
                await asyncio.sleep(AGAIN)
            else:
                self._actors[replica] = actor
                self._joined.set()
        self._joining.pop(replica, None)


def _nobody() -> None:
    """Nobody counts what is in flight."""
