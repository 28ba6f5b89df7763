"""Rollouts for a trainer: groups of samples with rewards, from a policy whose weights change meanwhile.

It guarantees:
- groups stream out as they finish, none with a token older than `async_steps` updates when it is handed out;
- policy versions, staleness and the ledger move together: weights are updated through `update`, and not while
  the trainer has groups it has not said are trained on;
- whatever is killed, a resume skips no prompt and trains on none twice: see `penstock.rollout.ledger`;
- every wait is bounded, or has a name in `waiting()`;
- `async with` owns each task and whatever it opened itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from penstock.client import Client
from penstock.control.control import Control
from penstock.control.dialect import PauseMode
from penstock.control.transport import DiskReload, WeightTransport
from penstock.control.update import WeightUpdate, check_mode
from penstock.errors import ConfigError, DeadlineExceeded, PenstockError
from penstock.fleet.fleet import Fleet
from penstock.rollout.balance import Balance, Elastic, Meter, Reading, Scaler, balance
from penstock.rollout.environment import MakeEnvironment
from penstock.rollout.group import Group
from penstock.rollout.ledger import Counts, Ledger, Resumed
from penstock.rollout.producer import OVERFLOWS, TRAINER, UPDATE, Overflow, Producer
from penstock.rollout.sampling import Bounds, Groups, Sampler
from penstock.rollout.scoring import RewardFunction
from penstock.rollout.selection import Curriculum, InOrder, Selection
from penstock.rollout.source import Item, Source
from penstock.rollout.staleness import Staleness
from penstock.rollout.waits import Waiting, Waits, loop_time
from penstock.sample import SamplingParams

logger = logging.getLogger(__name__)

WINDOW: Final = 16
"""Batches `balance` looks back."""
MAX_TOKENS: Final = 1024
"""Length of a sample where nothing else is asked for."""


class Rollouts:
    """Groups of `group_size` samples of each prompt, for a trainer that may be `async_steps` updates ahead.

    engines: base URLs, a Fleet, or a Client, which has to be open. reward: a function of prompt and sample,
    see `penstock.rollout.scoring`; with an `environment` it may be None. batch_groups: groups the trainer
    takes between two updates. params: sampling parameters, max_tokens among them. seed: each sample gets its
    own from it, None: none is sent. ledger: path of the ledger, None: the run cannot be resumed. step: of the
    checkpoint the trainer goes on from. in_flight: what becomes of requests in flight when weights change:
    kept, cut off and continued (`abort`), or waited for. overflow: see `penstock.rollout.producer.Overflow`.
    window: prompts the curriculum chooses from. streamed: samples are read while they are generated, for
    engines that do not say their versions. control: that of the fleet, where it has one. elastic: engines to
    add and remove.
    Raises ConfigError, on entering also ResumeRefused.
    """

    def __init__(
        self,
        engines: str | Sequence[str] | Fleet | Client,
        *,
        reward: RewardFunction | None = None,
        prompts: Iterable[Item] | None = None,
        group_size: int = 8,
        async_steps: int = 2,
        batch_groups: int = 32,
        params: SamplingParams | None = None,
        seed: int | None = 0,
        ledger: str | Path | None = None,
        step: int | None = None,
        in_flight: PauseMode = "keep",
        overflow: Overflow = "requeue",
        selection: Selection | None = None,
        curriculum: Curriculum | None = None,
        window: int = 1,
        environment: MakeEnvironment | None = None,
        max_turns: int = 16,
        bounds: Bounds | None = None,
        streamed: bool = False,
        control: Control | None = None,
        elastic: Elastic | None = None,
    ) -> None:
        check_mode(in_flight)
        if overflow not in OVERFLOWS:
            raise ConfigError(f"overflow must be one of {', '.join(OVERFLOWS)}, not {overflow!r}")
        if elastic is not None:
            elastic.check()
        self._owns_client = not isinstance(engines, Client)
        self.client = engines if isinstance(engines, Client) else Client(engines)
        (selection := selection or Selection()).check(group_size)
        self._selection = selection
        self._waits = Waits()
        params = params or SamplingParams(max_tokens=MAX_TOKENS)
        self._sampler: Groups = Sampler(
            self.client,
            params,
            reward,
            self._waits,
            environment=environment,
            max_turns=max_turns,
            bounds=bounds,
            seed=seed,
            streamed=streamed,
        )
        self._rules: Staleness[int] = Staleness(async_steps, batch_groups)
        self._size = group_size
        self._ledger_path = ledger
        self._ledger_settings: dict[str, Any] = {"group_size": group_size, "seed": seed, **params.as_dict()}
        self._prompts, self._step = prompts, step
        self._in_flight, self._overflow = in_flight, overflow
        self._curriculum, self._window = curriculum or InOrder(), window
        self._control, self._elastic = control, elastic
        self._ages: Counter[int] = Counter()
        self._stack = AsyncExitStack()
        self._ledger: Ledger | None = None
        self._producer: Producer | None = None
        self._updating = self._used = False

    def __repr__(self) -> str:
        return f"<Rollouts {self._rules!r} {self._waits!r}>"

    # -- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._used:
            raise ConfigError("rollouts are opened once: make others for each block")
        self._used = True
        self._meter = Meter(loop_time)
        self._sampler.on_count = self._tick
        async with AsyncExitStack() as stack:
            if self._owns_client:
                await stack.enter_async_context(self.client)
            self._ledger = Ledger(self._ledger_path, self._ledger_settings, step=self._step)
            stack.callback(self._close_ledger)
            self._readings: deque[Reading] = deque([self._read()], maxlen=WINDOW + 1)
            version = max(self.client.fleet.policy_version, self._ledger.resumed.version)
            self._rules.trainer_at(version)
            self._rules.engines_at(self.client.fleet.policy_version)
            if self._prompts is not None:
                await self._produce(stack, self._prompts)
            if self._elastic is not None:
                await self._own(stack, self._scale(), "penstock rollouts elastic")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def _close_ledger(self) -> None:
        ledger, self._ledger, self._producer = self._opened(), None, None
        ledger.close()

    async def _produce(self, stack: AsyncExitStack, prompts: Iterable[Item]) -> Producer:
        source = Source(prompts, self._opened(), self._curriculum, window=self._window)
        self._producer = Producer(
            self._rules,
            self._opened(),
            self._sampler,
            source,
            size=self._size,
            selection=self._selection,
            curriculum=self._curriculum,
            overflow=self._overflow,
            waits=self._waits,
            on_change=self._tick,
        )
        if self.client.fleet.policy_version < self._rules.trainer_version:
            self._producer.held_for = UPDATE
        await self._own(stack, self._producer.run(self._compare_versions), "penstock rollouts")
        return self._producer

    async def _compare_versions(self) -> None:
        """Engines that another run has left with its weights get the trainer's first of all."""
        producer, fleet = self._producing(), self.client.fleet
        with self._waits.on("generation", "the engines' versions"):
            told = await (await self._steering()).weight_versions()
        others = [one.value for one in told.values() if one.value is not None]
        if max(others, default=0) > max(self.version, fleet.policy_version):
            producer.held_for = UPDATE

    async def _own(self, stack: AsyncExitStack, work: Coroutine[Any, Any, None], name: str) -> None:
        """A task that ends with the block."""
        task = asyncio.create_task(work, name=name)

        async def end() -> None:
            task.cancel()
            await asyncio.wait([task])

        stack.push_async_callback(end)

    # -- groups -----------------------------------------------------------------------------------

    async def groups(self, prompts: Iterable[Item] | None = None) -> AsyncIterator[Group]:
        """Each group as it finishes, until the prompts are used up. `prompts`: unless they were given before.

        A consumer that goes on asking without an update is taken to mean so: it gets more groups of the same
        weights. Groups are held until they are said to be `trained`. Raises as `batch`.
        """
        if prompts is not None:
            if self._producer is not None:
                raise ConfigError("the rollouts have their prompts already")
            await self._produce(self._stack, prompts)
        while groups := await self.batch(1):
            yield groups[0]

    async def batch(self, groups: int | None = None, *, timeout: float | None = None) -> list[Group]:
        """So many groups to train on next, by default `batch_groups`, by position; fewer only at the end of
        the prompts, and then none.

        Say `trained` of them before the next `update`. Raises DeadlineExceeded after `timeout` seconds, and
        what has ended the run: ConfigError, ResumeRefused, WriteFailed.
        """
        count = self._rules.batch_groups if groups is None else groups
        if count < 1:
            raise ConfigError(f"a batch has at least 1 group, not {count}")
        producer = self._producing()
        scope = asyncio.timeout(timeout)
        try:
            async with scope:
                while not (found := self._hand_out(producer, count)):
                    if producer.drained and not self._rules.groups:
                        break
                    self._check_way_on(producer)
                    with self._waits.on("trainer", "groups"):
                        await producer.changed.wait()
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceeded(
                f"{count} groups were not there within {timeout:g} s: {self._why(producer)}"
            ) from error
        self._readings.append(self._read())
        return found

    async def trained(self, groups: Iterable[Group], step: int | None = None) -> int:
        """The trainer's step `step`, by default the next one, has used these groups; the step's number.

        On disk when it returns: save the checkpoint of the step after it. Raises ConfigError, WriteFailed.
        """
        ledger, producer = self._opened(), self._producing()
        step = ledger.step + 1 if step is None else step
        producer.trained(list(groups), step)
        self._tick()
        return step

    async def update(
        self, weights: WeightTransport | str | Path, *, all_or_nothing: bool = False
    ) -> WeightUpdate:
        """New weights for the engines: a transport, or the path of a checkpoint folder they can read.

        After a resume the first ones are the checkpoint's. After one that failed everywhere the next has the
        same version, unless groups were handed out meanwhile. Raises ControlFailed, ConfigError, WriteFailed.
        """
        ledger, rules = self._opened(), self._rules
        if self._producer is not None and self._producer.out:
            raise ConfigError(
                f"{len(self._producer.out)} groups are with the trainer: say trained() of them before the "
                "weights are updated, for their tokens would be older than promised"
            )
        if self._updating:
            raise ConfigError("a weight update is under way: one at a time")
        transport = DiskReload(weights) if isinstance(weights, str | Path) else weights
        control = await self._steering()
        fleet = self.client.fleet
        pending = rules.trainer_version > fleet.policy_version and not rules.handed
        version = rules.trainer_version if pending else rules.trainer_version + 1
        self._updating = True
        self._sampler.unpaused.clear()  # so that the versions of what was cut off are known
        try:
            ledger.published(version)
            rules.trainer_at(version)
            self._settle()
            with self._waits.on("trainer", "weights"):
                return await control.update_weights(
                    transport, version, pause=self._in_flight, all_or_nothing=all_or_nothing
                )
        finally:
            self._updating = False
            self._sampler.unpaused.set()
            rules.engines_at(max(rules.engine_version, fleet.policy_version))
            if self._producer is not None and fleet.policy_version >= rules.trainer_version:
                self._producer.held_for = None
            self._settle()

    # -- what there is to see ---------------------------------------------------------------------

    @property
    def resumed(self) -> Resumed:
        """Where the run began: step 0 for a new one. With a version above 0 the first thing to do is to
        `update` the engines to the checkpoint's weights."""
        return self._opened().resumed

    @property
    def step(self) -> int:
        """The last step that was trained."""
        return self._opened().step

    @property
    def version(self) -> int:
        """The policy version of the trainer's weights."""
        return self._rules.trainer_version

    def counts(self) -> Counts:
        """Prompts in each state of the ledger."""
        return self._opened().counts()

    def dropped(self) -> dict[str, int]:
        """How many prompts were dropped, by reason."""
        return self._opened().reasons()

    def waiting(self) -> list[Waiting]:
        """Who waits for what since when, the longest first."""
        return self._waits.now()

    def balance(self) -> Balance:
        """Generation against training over the last batches, and what to change."""
        return self._balance(self._readings[0])

    # -- inside -----------------------------------------------------------------------------------

    def _opened(self) -> Ledger:
        if self._ledger is None:
            raise ConfigError("the rollouts are not open: use them inside `async with`")
        return self._ledger

    def _producing(self) -> Producer:
        self._opened()
        if self._producer is None:
            raise ConfigError("the rollouts have no prompts: give `prompts`, or call groups(prompts)")
        return self._producer

    async def _steering(self) -> Control:
        if self._control is None:
            self._control = await self._stack.enter_async_context(Control(self.client.fleet))
        return self._control

    def _settle(self) -> None:
        if self._producer is not None:
            self._producer.settle_overdue()
            self._producer.changed.notify()

    def _hand_out(self, producer: Producer, count: int) -> list[Group]:
        """The groups, if they are there. Raises what has ended the run."""
        if producer.failure is not None:
            raise producer.failure
        if self._rules.wanted(count):
            producer.changed.notify()  # there is room for more
        if producer.drained:
            count = min(count, len(producer.ready))
        found = producer.hand_out(count) if count else []
        if found:
            self._meter.batches += 1
            self._meter.trained += sum(group.tokens for group in found)
            self._ages.update(self._ages_of(found))
        return found

    def _ages_of(self, groups: Sequence[Group]) -> Counter[int]:
        ages: Counter[int] = Counter()
        for group in groups:
            for one in group.rollouts:
                start = 0
                for version, tokens in one.versions:
                    ages[self.version - version] += sum(one.mask[start : start + tokens])
                    start += tokens
        return +ages

    def _check_way_on(self, producer: Producer) -> None:
        """Raises ConfigError when the trainer would wait for ever, for something only it can do."""
        behind = self.client.fleet.policy_version < self.version
        held = producer.held_for == UPDATE
        stuck = (producer.waits_for == UPDATE and held) or (producer.waits_for == TRAINER and behind)
        if not stuck or producer.in_flight or self._updating:
            return
        what = (
            f"weights of version {self.client.fleet.policy_version}" if behind else "weights of another run"
        )
        raise ConfigError(
            f"the engines have {what} and the trainer is at version {self.version}: nothing can be generated "
            "before they are updated, call update()"
        )

    def _why(self, producer: Producer) -> str:
        waits = ", ".join(f"{one.count} {one.who} wait for {one.what}" for one in self.waiting())
        return f"{len(producer.ready)} are ready, {producer.in_flight} being generated; {waits}"

    def _tick(self) -> None:
        """The share of the engines' slots that is empty has perhaps changed."""
        producer, empty = self._producer, 0.0
        if producer is not None and producer.waits_for == TRAINER:
            fleet = self.client.fleet
            # A limit that adapts, or none, does not say what an engine takes: then one request keeps it busy.
            known = 1 if fleet.settings.adaptive else fleet.settings.max_in_flight or 1
            slots = known * sum(end.up and end.current for end in fleet.endpoints)
            empty = max(0.0, 1.0 - self._sampler.in_flight / max(1, slots))
        self._meter.tick(empty)

    def _read(self) -> Reading:
        self._tick()
        self._meter.generated = self._sampler.tokens
        return self._meter.reading(
            trainer_waited=self._waits.seconds("trainer", "groups"),
            updating=self._waits.seconds("trainer", "weights"),
        )

    def _balance(self, since: Reading) -> Balance:
        engines = (
            self._elastic.engines.count if self._elastic is not None else len(self.client.fleet.endpoints)
        )
        measured = self._read().since(since, async_steps=self._rules.async_steps, engines=engines)
        producer = self._producer
        return msgspec.structs.replace(
            balance(measured),
            in_flight=self._sampler.in_flight,
            queued=self.client.fleet.dispatch.waiting,
            generating=producer.in_flight if producer is not None else 0,
            ready=len(producer.ready) if producer is not None else 0,
            out=len(producer.out) if producer is not None else 0,
            staleness=dict(sorted(self._ages.items())),
        )

    async def _scale(self) -> None:
        """Adds and removes engines until cancelled."""
        assert self._elastic is not None
        scaler, since = Scaler(self._elastic), self._read()
        while True:
            await asyncio.sleep(self._elastic.every)
            found = self._balance(since)
            if not found.batches:
                continue
            wanted = scaler.wanted(found)
            if wanted != self._elastic.engines.count:
                logger.info("%d engines in place of %d", wanted, self._elastic.engines.count)
                try:
                    await self._elastic.engines.scale(wanted)
                except PenstockError as error:
                    logger.warning("the engines stay as they are: %s", error)
                except Exception:
                    logger.exception("the engines stay as they are")
            since = self._read()
