"""New weights for engines that are actors: who makes rollouts with them is told, and the object store brings
them.

It guarantees:
- before the weights of an engine may change, whoever makes rollouts with it knows, and what it has begun is
  stamped accordingly; an engine whose actor cannot be told is an engine that failed, and is left out until it
  has caught up (`penstock.control`);
- `ObjectStore` puts weights into the object store once; each node reads them once, whatever number of engines
  it has, and an actor hands them to its engine over HTTP on its own node.
"""

from __future__ import annotations

import pickle
from collections.abc import Awaitable, Callable
from typing import Any, Final

from penstock.cluster.rollout_worker import NoAnswer, Told, asked
from penstock.control.engine import Engine, refused
from penstock.control.staged import CHUNK, Given, Staged
from penstock.control.tensors import Tensors, parts, safetensors_file
from penstock.control.transport import WeightTransport
from penstock.errors import ConnectFailed, EngineError

TELL_LIMIT: Final = 15.0
"""Seconds in which an actor has to have heard how far an update is."""

ActorOf = Callable[[str], Any]
"""The actor of the engine at a URL. Raises EngineError when there is none."""

Tell = Callable[[Engine, Told, int], Awaitable[None]]


class TellingTransport:
    """A transport whose engines' actors are told. tell: raises PenstockError when that fails."""

    def __init__(self, inner: WeightTransport, tell: Tell) -> None:
        self.inner = inner
        self._tell = tell

    def __repr__(self) -> str:
        return repr(self.inner)

    async def prepare(self, engine: Engine, version: int) -> None:
        await self._tell(engine, "begun", version)
        await self.inner.prepare(engine, version)

    async def transfer(self, engine: Engine, version: int) -> None:
        await self.inner.transfer(engine, version)

    async def commit(self, engine: Engine, version: int) -> str | None:
        await self._tell(engine, "changing", version)
        try:
            said = await self.inner.commit(engine, version)
        except BaseException as error:
            kept = isinstance(error, ConnectFailed) or refused(error)
            await self._tell(engine, "kept" if kept else "spoilt", version)
            raise
        await self._tell(engine, "changed", version)
        return said

    async def abort(self, engine: Engine) -> None:
        try:
            await self.inner.abort(engine)
        finally:
            await self._tell(engine, "kept", 0)


class ObjectStore(Staged):
    """Tensors for embedded engines that are actors, through Ray's object store.

    actor_of: finds the actors. chunk: bytes of a part. Otherwise as `HttpChunks`. Raises ConfigError.
    """

    backend = "http"

    def __init__(
        self, tensors: Given, *, actor_of: ActorOf, since: Staged | None = None, chunk: int = CHUNK
    ) -> None:
        super().__init__(tensors, since=since)
        self._actor_of = actor_of
        self._chunk = chunk
        self._put: dict[int, list[Any]] = {}
        """References to what is in the object store, by the identity of what was put there."""

    async def _send(self, engine: Engine, tensors: Tensors) -> None:
        references = self._references(tensors)
        try:
            await asked(self._actor_of(engine.name).receive.remote(references), engine.update_timeout)
        except NoAnswer as error:
            raise EngineError(f"the actor of {engine.name} did not hand over the weights: {error}") from error

    def _references(self, tensors: Tensors) -> list[Any]:
        import ray

        if id(tensors) not in self._put:
            files = (safetensors_file(part) for part in parts(tensors, self._chunk))
            self._put[id(tensors)] = [ray.put(pickle.PickleBuffer(file)) for file in files]
        return self._put[id(tensors)]
