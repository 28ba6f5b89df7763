"""How one rollout is made: turns of the policy, steps of the environment, and the reward at the end.

It guarantees:
- a rollout ends with a Rollout or one typed error, each of its waits bounded;
- a turn that was cut off by a pause of the engines is continued from its tokens, as long as was asked for;
- a sampling seed depends on the run's seed, the prompt's position and the sample's index, on nothing else;
  without a seed of the run none is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from hashlib import blake2b
from typing import Final, Protocol, TypeVar

import msgspec

from penstock.client import Client
from penstock.errors import ConfigError, DeadlineExceeded, PenstockError, WriteFailed
from penstock.prompt import Message, Prompt
from penstock.rollout.environment import MakeEnvironment, Renderer, SingleTurn, Step
from penstock.rollout.group import Rollout, Timings, VersionSpan, join_spans
from penstock.rollout.score import Score
from penstock.rollout.scoring import RewardFunction, Scoring, as_score
from penstock.rollout.trajectory import Trajectory, rest_of, spans_of
from penstock.rollout.waits import Waits, loop_time
from penstock.sample import Sample, SamplingParams

ABORTED: Final = "abort"
LENGTH: Final = "length"
HALF: Final = "\ufffd"
"""What a tokenizer writes for a part of a character."""
MAX_HALF: Final = 4
"""Tokens that may hold a character that is not whole."""
ABORT_PAUSE: Final = 0.05
"""Seconds before an engine that has cut off a turn without a token is asked again."""
ASKED: Final = {"return_weight_versions": True}
"""Which weights made which token: the embedded engine's field. Others pass over it."""

T = TypeVar("T")


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds something may take; None: no limit. What takes longer is a sample that failed."""

    turn: float | None = 1800.0
    """All requests of a turn, waiting for a slot and pauses of the engines included."""
    environment: float | None = 120.0
    """A step, or the reset."""
    reward: float | None = 120.0

    def check(self) -> None:
        """Raises ConfigError."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"the bound of a {name} must be positive, not {value}")


class Groups(Protocol):
    """Makes the samples of groups, here (`Sampler`) or elsewhere."""

    tokens: int
    """Sampled so far, those of rollouts that failed included."""
    in_flight: int
    """Turns that are asked for and not over."""
    unpaused: asyncio.Event
    """Not set: what was cut off need not be asked for, the engines are paused."""
    on_count: Callable[[], None]
    """Told when `in_flight` has changed."""

    async def group(
        self, prompt: Prompt, position: int, size: int, oversample: int
    ) -> tuple[list[Rollout], list[str]]:
        """The first `size` samples that are scored of `oversample` more, in order; with fewer, also some
        that are not; and why others could not be made. Raises ConfigError."""
        ...


class Sampler:
    """Makes rollouts. params: of each turn; max_tokens has to be set. max_turns: of a rollout with an
    environment. reward: None where the environment gives it. streamed: turns are read while they are
    generated, so that versions are told better where engines do not say them. Raises ConfigError."""

    def __init__(
        self,
        client: Client,
        params: SamplingParams,
        reward: RewardFunction | None,
        waits: Waits,
        *,
        environment: MakeEnvironment | None = None,
        max_turns: int = 16,
        bounds: Bounds | None = None,
        seed: int | None = 0,
        streamed: bool = False,
    ) -> None:
        if params.max_tokens is None:
            raise ConfigError("set max_tokens of the sampling parameters: a turn is as long as that at most")
        if params.seed is not None:
            raise ConfigError("give the seed to the rollouts: each sample gets its own from it")
        if reward is None and environment is None:
            raise ConfigError("give a reward, or an environment that gives rewards")
        if max_turns < 1:
            raise ConfigError(f"max_turns must be at least 1, not {max_turns}")
        bounds = bounds or Bounds()
        bounds.check()
        self.tokens = 0
        self.in_flight = 0
        self.unpaused = asyncio.Event()
        self.unpaused.set()
        self.on_count: Callable[[], None] = _nobody
        self._client = client
        self._max_tokens = params.max_tokens
        self._params = params if params.logprobs is not None else msgspec.structs.replace(params, logprobs=0)
        self._scoring = None if reward is None else Scoring(reward, bounds.reward, waits)
        self._waits = waits
        self._make = environment or SingleTurn
        self._max_turns = max_turns if environment is not None else 1
        self._bounds = bounds
        self._seed = seed
        self._streamed = streamed
        self._renderer = Renderer(client)

    async def group(
        self, prompt: Prompt, position: int, size: int, oversample: int
    ) -> tuple[list[Rollout], list[str]]:
        scored: list[Rollout] = []
        unscored: list[Rollout] = []
        failures: list[str] = []
        pending = {
            asyncio.create_task(self.rollout(prompt, position, index)) for index in range(size + oversample)
        }
        try:
            while pending and len(scored) < size:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    try:
                        rollout = task.result()
                    except (ConfigError, WriteFailed):
                        raise
                    except PenstockError as error:
                        failures.append(f"{type(error).__name__}: {error}")
                    else:
                        (scored if rollout.reward.failed is None else unscored).append(rollout)
        finally:
            await _cancelled(pending)
        found = scored[:size]
        if len(scored) < size:
            found += unscored
        return sorted(found, key=lambda rollout: rollout.index), failures

    async def rollout(self, prompt: Prompt, position: int, index: int) -> Rollout:
        """One rollout. A reward that failed is in it. Raises PenstockError for one that could not be made."""
        so_far, gained = Trajectory(), list[Score]()
        spent = {"generation": 0.0, "environment": 0.0}
        seed = None if self._seed is None else seed_of(self._seed, position, index)
        params = msgspec.structs.replace(self._params, seed=seed)
        environment = self._make()
        try:
            messages = await self._stepped(spent, environment.reset(prompt))
            while True:
                began = loop_time()
                sample = await self._turn(so_far, messages, params)
                spent["generation"] += loop_time() - began
                step = await self._stepped(spent, environment.step(sample))
                gained.append(as_score(step.reward))
                if step.done or sample.finish_reason == LENGTH or so_far.turns >= self._max_turns:
                    break
                await self._observe(so_far, step, sample)
        finally:
            await self._stepped(spent, environment.close())
        began = loop_time()
        reward = total(gained, None if self._scoring is None else await self._scoring(prompt, sample))
        timings = Timings(**spent, reward=loop_time() - began)
        return so_far.rollout(index, sample.finish_reason, reward, timings)

    def _count(self, turns: int) -> None:
        self.in_flight += turns
        self.on_count()

    # -- a turn -----------------------------------------------------------------------------------

    async def _turn(self, so_far: Trajectory, messages: Sequence[Message], params: SamplingParams) -> Sample:
        """One turn within its bound."""
        scope = asyncio.timeout(self._bounds.turn)
        self._count(1)
        try:
            async with scope:
                return await self._until_over(so_far, messages, _seeded(params, len(so_far.token_ids)))
        except TimeoutError as error:
            if not scope.expired() or isinstance(error, PenstockError):
                raise
            raise DeadlineExceeded(f"a turn was not over within {self._bounds.turn:g} s") from None
        finally:
            self._count(-1)

    async def _until_over(
        self, so_far: Trajectory, messages: Sequence[Message], params: SamplingParams
    ) -> Sample:
        """Asks until the turn is over, however often it is cut off."""
        turns = so_far.turns
        seams: list[int] = []
        while True:
            again = so_far.turns > turns
            sampled = so_far.sampled if again else 0
            with self._waits.on("samples", "engines"):
                await self._ask(so_far, messages, rest_of(params, sampled) if again else params)
            assert so_far.sample is not None
            if so_far.sample.finish_reason != ABORTED:
                return await self._joined(so_far, seams)
            await self._drop_half(so_far)
            seams.append(len(so_far.text))
            if so_far.sampled >= self._max_tokens:
                return so_far.turn(LENGTH)
            with self._waits.on("samples", "weights"):
                if not so_far.sample.token_ids:
                    await asyncio.sleep(ABORT_PAUSE)
                await self.unpaused.wait()

    async def _ask(self, so_far: Trajectory, messages: Sequence[Message], params: SamplingParams) -> None:
        """One request: of the messages, or behind the tokens so far."""
        client = self._client
        version = client.fleet.policy_version
        arrived: list[VersionSpan] = []
        if self._streamed:
            what = messages if so_far.sample is None else so_far.ids
            async with client.stream(what, params, return_token_ids=True, extra_body=ASKED) as stream:
                arrived += [
                    VersionSpan(self._surely(version), len(delta.token_ids)) async for delta in stream
                ]
            sample = stream.sample
        elif so_far.sample is None:
            sample = await client.chat(messages, params, return_token_ids=True, extra_body=ASKED)
        else:
            sample = await client.complete(so_far.ids, params, return_token_ids=True, extra_body=ASKED)
        spans, told = spans_of(sample, version)
        if not told and sum(span.tokens for span in arrived) == len(sample.token_ids or ()):
            spans = join_spans(arrived)
        so_far.add(sample, spans, exact=told or self._unchanged_since(version, sample))
        self.tokens += len(sample.token_ids or ())

    def _surely(self, since: int) -> int:
        """The version that whatever arrives now has at least, of a request sent at version `since`: the
        lowest one of an engine that is at work."""
        versions = [end.policy_version for end in self._client.fleet.endpoints if end.in_flight]
        return max(since, min((since if one is None else one for one in versions), default=since))

    def _unchanged_since(self, version: int, sample: Sample) -> bool:
        """Whether the engine of the sample has had the same weights all along."""
        fleet = self._client.fleet
        changing = any(end.name == sample.endpoint and not end.current for end in fleet.endpoints)
        return fleet.policy_version == version and not changing

    async def _drop_half(self, so_far: Trajectory) -> None:
        """Of a turn that was cut off within a character, drops the tokens of its first part."""
        if not so_far.text.endswith(HALF):
            return
        ids = so_far.token_ids[len(so_far.token_ids) - so_far.sampled :]
        for count in range(1, min(MAX_HALF, len(ids)) + 1):
            if not (await self._text(ids[:-count])).endswith(HALF):
                so_far.drop_last(count, so_far.text.rstrip(HALF))
                return

    async def _joined(self, so_far: Trajectory, seams: Sequence[int]) -> Sample:
        """The turn. A stop string that lies across a seam was seen by no engine: the turn ends there."""
        text, found = so_far.text, None
        for seam in seams:
            for stop in self._params.stop or ():
                at = text.find(stop, max(0, seam - len(stop) + 1), seam + len(stop) - 1)
                if at >= 0 and (found is None or at < found[0]):
                    found = at, stop
        if found is None:
            return so_far.turn()
        ids = so_far.token_ids[len(so_far.token_ids) - so_far.sampled :]
        least, most = 1, len(ids)
        while least < most:  # the fewest tokens that hold the stop string
            middle = (least + most) // 2
            if len(held := await self._text(ids[:middle])) > found[0] and found[1] in held[found[0] :]:
                most = middle
            else:
                least = middle + 1
        so_far.drop_last(len(ids) - least, text[: found[0]])
        return msgspec.structs.replace(so_far.turn("stop"), stop_reason=found[1])

    async def _text(self, ids: Sequence[int]) -> str:
        return await self._client.detokenize(ids) if ids else ""

    # -- between turns ----------------------------------------------------------------------------

    async def _stepped(self, spent: dict[str, float], work: Awaitable[T]) -> T:
        """A call of the environment. What it raises is a PenstockError then."""
        began = loop_time()
        scope = asyncio.timeout(self._bounds.environment)
        try:
            with self._waits.on("samples", "environments"):
                async with scope:
                    return await work
        except PenstockError:
            raise
        except Exception as error:
            if scope.expired() and isinstance(error, TimeoutError):
                raise DeadlineExceeded(
                    f"the environment took longer than {self._bounds.environment:g} s"
                ) from None
            raise EnvironmentFailed(f"the environment failed: {type(error).__name__}: {error}") from error
        finally:
            spent["environment"] += loop_time() - began

    async def _observe(self, so_far: Trajectory, step: Step, sample: Sample) -> None:
        if not step.observation:
            raise ConfigError("an environment that is not done has to say something to the policy")
        last = so_far.token_ids[-1] if sample.token_ids else -1
        so_far.observe(await self._renderer.observation(step.observation, last))


class EnvironmentFailed(PenstockError):
    """An environment raised an error: the rollout cannot go on."""


def total(gained: Sequence[Score], scored: Score | None) -> Score:
    """What the environment has given step by step, and the reward function in the end, together."""
    scores = [*gained, *(() if scored is None else (scored,))]
    failed = next((one.failed for one in scores if one.failed is not None), None)
    parts: dict[str, float] = {}
    for one in scores:
        for name, value in one.parts.items():
            parts[name] = parts.get(name, 0.0) + value
    if failed is not None:
        return Score.failure(failed, parts)
    if scored is not None and any(one.value for one in gained):
        parts["environment"] = sum(one.value for one in gained)
    return Score(sum(one.value for one in scores), parts)


def seed_of(seed: int, position: int, index: int) -> int:
    """The sampling seed of a sample, in [0, 2^31)."""
    digest = blake2b(f"{seed}/{position}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def _seeded(params: SamplingParams, tokens: int) -> SamplingParams:
    """Parameters of a turn behind so many tokens: the same seed would draw the first turn's numbers again."""
    if params.seed is None or not tokens:
        return params
    return msgspec.structs.replace(params, seed=params.seed + tokens)


async def _cancelled(tasks: set[asyncio.Task[Rollout]]) -> None:
    """Ends tasks, and waits until they have."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def _nobody() -> None:
    """Nobody counts what is in flight."""
