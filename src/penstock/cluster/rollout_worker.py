"""Rollouts made beside one engine: groups are pulled from the queue, generated, scored and pushed back.

It guarantees:
- a group is begun only while the engine is known to have weights of at least the version that is asked for,
  and given back when nobody can say any longer what weights it has;
- what it has in its hands it names at each question to the queue: nothing is lost, or made twice, by a queue
  that forgets;
- a group that was made is offered until the queue has it, or nobody wants it any longer;
- the versions of tokens are as exact as in `penstock.rollout`: whoever updates the weights says so before
  they change and after.

Only `RemoteQueue` and `asked` know Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Literal, Protocol

import msgspec

from penstock.client import Client
from penstock.cluster.queue import Request, Result, Taken
from penstock.control.control import UPDATE_TIMEOUT, Control
from penstock.control.engine import Engine
from penstock.errors import ConfigError, PenstockError
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.fleet import Fleet
from penstock.rollout.environment import MakeEnvironment
from penstock.rollout.group import Rollout
from penstock.rollout.sampling import Bounds, Sampler
from penstock.rollout.scoring import RewardFunction
from penstock.rollout.waits import Waits
from penstock.sample import SamplingParams

logger = logging.getLogger(__name__)

POLL: Final = 2.0
"""Seconds the queue holds a question to which there is nothing; also the beat by which a worker is heard."""
LATE: Final = 10.0
"""Seconds beyond that after which an answer is given up."""
AGAIN: Final = 0.5
"""Seconds until a queue that could not be asked is asked again."""

Told = Literal["begun", "changing", "changed", "kept", "spoilt"]
"""How far a weight update of the engine is: it has begun; its weights may change from now on; they have; they
have not; nobody can say."""


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What rollouts are made of: as `penstock.rollout.rollouts.Rollouts` takes it."""

    run: str
    """Unlike any other run's."""
    reward: RewardFunction | None
    params: SamplingParams
    size: int
    """Samples of a group."""
    oversample: int
    groups: int
    """That are made at a time."""
    environment: MakeEnvironment | None
    max_turns: int
    bounds: Bounds | None
    seed: int | None
    streamed: bool


class Made(msgspec.Struct, array_like=True):
    """The payload of a result."""

    rollouts: tuple[Rollout, ...]
    failures: tuple[str, ...]
    """Why other samples could not be made."""
    tokens: int
    """Sampled since the result before, those that are in no rollout included."""
    refused: str | None = None
    """A ConfigError: no group can be made like this."""


encode: Final[Callable[[Made], bytes]] = msgspec.msgpack.Encoder().encode
decode: Final[Callable[[bytes], Made]] = msgspec.msgpack.Decoder(Made).decode


class QueueOfGroups(Protocol):
    """What a worker asks of the queue. Raises NoAnswer."""

    async def take(
        self, worker: str, version: int | None, room: int, holding: list[int], timeout: float
    ) -> Taken: ...

    async def done(self, worker: str, result: Result) -> None: ...


class NoAnswer(PenstockError):
    """An actor cannot be asked, has not answered, or what it was asked for has failed."""


class RemoteQueue:
    """The queue where it is an actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def take(
        self, worker: str, version: int | None, room: int, holding: list[int], timeout: float
    ) -> Taken:
        answer = self._actor.take.remote(worker, version, room, holding, timeout)
        taken: Taken = await asked(answer, timeout + LATE)
        return taken

    async def done(self, worker: str, result: Result) -> None:
        await asked(self._actor.done.remote(worker, result), LATE)


async def asked(answer: Awaitable[Any], limit: float) -> Any:
    """An actor's answer. Raises NoAnswer when there is none within `limit` seconds."""
    import ray.exceptions

    try:
        async with asyncio.timeout(limit):
            return await answer
    except TimeoutError:
        raise NoAnswer(f"there was no answer within {limit:g} s") from None
    except ray.exceptions.RayTaskError as error:
        raise NoAnswer(f"{type(error.cause).__name__}: {error.cause}") from error
    except ray.exceptions.RayError as error:
        raise NoAnswer(_why(error)) from error


def _why(error: Exception) -> str:
    """What Ray says, in a line: the first, and of a traceback the last one."""
    first, *rest = str(error).strip().splitlines() or [""]
    return f"{first} {rest[-1].strip()}" if "raised in its creation task" in first and rest else first


class Worker:
    """Makes rollouts with the engine at `url`. name: of the worker, unlike any other's.

    `start` before anything else, `close` at the end. Raises ConfigError.
    """

    def __init__(
        self, url: str, name: str, work: Work, queue: QueueOfGroups, *, api_key: str | None = None
    ) -> None:
        self.name = name
        self.run = work.run
        self._work = work
        self._queue = queue
        self._fleet = Fleet(url, api_key=api_key)
        self._client = Client(self._fleet)
        self._control = Control(self._fleet)
        self._sampler = Sampler(
            self._client,
            work.params,
            work.reward,
            Waits(),
            environment=work.environment,
            max_turns=work.max_turns,
            bounds=work.bounds,
            seed=work.seed,
            streamed=work.streamed,
        )
        self._making: dict[int, asyncio.Task[None]] = {}
        """What is in its hands, the offering of the result included."""
        self._pull = asyncio.Event()
        """A new question to the queue is worth while."""
        self._told_tokens = 0
        """Of the sampler's tokens, those that were in a result."""
        self._finishing = False
        self._task: asyncio.Task[None] | None = None
        self._stack = contextlib.AsyncExitStack()

    def __repr__(self) -> str:
        return f"<Worker {self.name} making={len(self._making)}>"

    @property
    def policy_version(self) -> int | None:
        """That of the engine's weights, until they have changed that of those before; None: not known."""
        return self._endpoint.policy_version

    @property
    def _makes(self) -> int | None:
        """The version of what is begun now; None: nothing may be."""
        endpoint = self._endpoint
        return endpoint.policy_version if endpoint.current else None

    @property
    def _endpoint(self) -> Endpoint:
        return self._fleet.endpoints[0]

    # -- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        await self._stack.enter_async_context(self._client)
        await self._stack.enter_async_context(self._control)
        self._task = asyncio.create_task(self._run(), name="penstock rollout worker")

    async def close(self) -> None:
        """What is in its hands is dropped; the queue gives it to others."""
        tasks = {one for one in (self._task, *self._making.values()) if one is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._stack.aclose()

    async def finish(self) -> None:
        """Takes nothing more; until what is in its hands is done."""
        self._finishing = True
        self._pull.set()
        while self._making:
            await asyncio.wait(set(self._making.values()))

    # -- weights ----------------------------------------------------------------------------------

    def told(self, told: Told, version: int) -> None:
        """How far a weight update to `version` is."""
        versions, endpoint = self._fleet.versions, self._endpoint
        match told:
            case "begun":
                self._sampler.unpaused.clear()
                return
            case "changing":
                versions.commit(endpoint)
            case "changed":
                versions.committed(endpoint, version)
            case "kept":
                versions.kept(endpoint)
            case "spoilt":
                versions.spoil(endpoint)
                self._drop(list(self._making))
        if told != "changing":
            self._sampler.unpaused.set()
        self._fleet.show_versions()
        self._pull.set()

    async def send_weights(self, part: memoryview) -> None:
        """A part of new weights, a safetensors file, to the engine. Raises PenstockError."""
        engine = Engine(self._fleet, self._endpoint, UPDATE_TIMEOUT, UPDATE_TIMEOUT)
        try:
            await engine.send("/update_weights", bytes(part))
        finally:
            await engine.close()

    # -- groups -----------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Pulls groups until cancelled."""
        while True:
            self._pull.clear()
            asking = asyncio.ensure_future(self._take())
            waking = asyncio.ensure_future(self._pull.wait())
            try:
                await asyncio.wait((asking, waking), return_when=asyncio.FIRST_COMPLETED)
            finally:
                waking.cancel()
                asking.cancel()  # an answer that is on its way is not lost: the queue sees what is held
            if not asking.done() or asking.cancelled():
                continue
            try:
                self._accept(asking.result())
            except NoAnswer as error:
                logger.debug("the queue cannot be asked: %s", error)
                await asyncio.sleep(AGAIN)

    async def _take(self) -> Taken:
        version = None if self._finishing else self._makes
        room = max(0, self._work.groups - len(self._making))
        return await self._queue.take(self.name, version, room, list(self._making), POLL)

    def _drop(self, ids: Iterable[int]) -> None:
        """They are not in its hands any longer: the queue sees it by the next question."""
        for one in ids:
            if (task := self._making.pop(one, None)) is not None:
                task.cancel()

    def _accept(self, taken: Taken) -> None:
        self._drop(taken.cancelled)
        if self._makes is None:
            return
        for request in taken.requests:
            if request.id not in self._making:
                task = asyncio.create_task(self._make(request), name=f"penstock group {request.position}")
                self._making[request.id] = task

    async def _make(self, request: Request) -> None:
        work = self._work
        try:
            rollouts, failures = await self._sampler.group(
                request.prompt, request.position, work.size, work.oversample
            )
        except ConfigError as error:
            made = Made((), (), 0, str(error))
        except Exception as error:
            logger.exception("a group failed")
            made = Made((), (f"{type(error).__name__}: {error}",), 0)
        else:
            made = Made(tuple(rollouts), tuple(failures), 0)
        made.tokens, self._told_tokens = self._sampler.tokens - self._told_tokens, self._sampler.tokens
        await self._offer(Result(request.id, encode(made)))
        self._making.pop(request.id, None)
        self._pull.set()

    async def _offer(self, result: Result) -> None:
        while True:
            try:
                await self._queue.done(self.name, result)
                return
            except NoAnswer as error:
                logger.debug("a group cannot be delivered yet: %s", error)
                await asyncio.sleep(AGAIN)
