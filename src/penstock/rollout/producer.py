"""The producing side: begins prompts as staleness allows, makes groups of samples, and keeps the ledger.

It guarantees:
- a prompt that was begun ends as a group that is ready, is dropped with a reason, or is owed again, in the
  ledger first;
- an error of a sample is data; one of the run (ConfigError, WriteFailed) ends it and is raised at the
  trainer;
- what is too old for the trainer is treated as `overflow` says, and never silently otherwise.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal, get_args

import msgspec

from penstock.errors import ConfigError
from penstock.rollout.group import Group, without_tokens_before
from penstock.rollout.ledger import Ledger
from penstock.rollout.sampling import Groups
from penstock.rollout.selection import Curriculum, Selection, judge
from penstock.rollout.source import Next, Source
from penstock.rollout.staleness import Staleness
from penstock.rollout.waits import Signal, Waits, loop_time

Overflow = Literal["requeue", "mask", "train"]
"""What becomes of a group with tokens that are too old: its prompt is begun again, those tokens are masked,
or it is trained on as it is, by a learner that weighs tokens by their importance."""

OVERFLOWS: Final = get_args(Overflow)

TRAINER = "the trainer"
UPDATE = "the first weight update"
PROMPTS = "prompts"
"""What generation waits for."""


class Producer:
    """Generates groups of `size` samples until the source is exhausted."""

    def __init__(
        self,
        rules: Staleness[int],
        ledger: Ledger,
        sampler: Groups,
        source: Source,
        *,
        size: int,
        selection: Selection,
        curriculum: Curriculum,
        overflow: Overflow,
        waits: Waits,
        on_change: Callable[[], None],
    ) -> None:
        self.rules = rules
        self.ready: dict[int, Group] = {}
        """By position."""
        self.out: dict[int, Group] = {}
        """Handed to the trainer, and not known to be trained on."""
        self.held_for: str | None = None
        """What nothing may be begun before, besides staleness."""
        self.waits_for: str | None = None
        """What generation waits for now."""
        self.failure: BaseException | None = None
        """What has ended the run."""
        self.changed = Signal()
        self._ledger = ledger
        self._sampler = sampler
        self._source = source
        self._size = size
        self._selection = selection
        self._curriculum = curriculum
        self._overflow = overflow
        self._waits = waits
        self._on_change = on_change
        """Told when what generation waits for may have changed."""
        self._begun: dict[int, tuple[Next, asyncio.Task[None]]] = {}
        """Groups in flight."""
        self._prompts: dict[int, Next] = {}
        """Of groups that are ready."""
        self._failed: Counter[int] = Counter()
        """How often a prompt's samples failed."""
        self._solved: set[int] = set()
        """Groups that are ready or out, whose prompt is solved."""

    @property
    def in_flight(self) -> int:
        """Groups that are being generated."""
        return len(self._begun)

    @property
    def drained(self) -> bool:
        """Nothing is in flight, and nothing is left to begin."""
        return self._source.exhausted and not self._begun

    # -- generation -------------------------------------------------------------------------------

    async def run(self, prepare: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled; `prepare` comes first. An error that ends the run is kept as `failure`."""
        try:
            await prepare()
            await self._restore()
            async with asyncio.TaskGroup() as group:
                while True:
                    self.waits_for = await self._begin(group)
                    self._on_change()
                    self.changed.notify()
                    with self._waits.on("generation", self.waits_for):
                        await self.changed.wait()
        except asyncio.CancelledError:
            raise
        except BaseExceptionGroup as errors:
            self.failure = errors.exceptions[0]
        except Exception as error:
            self.failure = error
        finally:
            self.changed.notify()

    async def _restore(self) -> None:
        for one, kept in await self._source.restore():
            group = Group(
                key=one.key,
                position=one.position,
                prompt=one.prompt,
                rollouts=kept.rollouts,
                attempt=kept.attempt,
                seconds=kept.seconds,
            )
            oldest = group.oldest
            assert oldest is not None, "a group without tokens is never kept"
            self.rules.restore(one.position, oldest)
            self._prompts[one.position], self.ready[one.position] = one, group
        self.settle_overdue()

    async def _begin(self, group: asyncio.TaskGroup) -> str:
        """Begins all that may be; what has to happen before more may."""
        while True:
            if self.held_for is not None:
                return self.held_for
            if not self.rules.capacity:
                return TRAINER
            one = await self._source.next()
            if one is None:
                return PROMPTS
            if self.held_for is not None or not self.rules.capacity:  # things have changed meanwhile
                self._source.put_back(one)
                continue
            attempt = self._ledger.lease(one.position, one.key)
            self.rules.admit(one.position)
            task = group.create_task(self._make(one, attempt))
            self._begun[one.position] = one, task

    async def _make(self, one: Next, attempt: int) -> None:
        started = loop_time()
        rollouts, failures = await self._sampler.group(
            one.prompt, one.position, self._size, self._selection.oversample
        )
        # Nothing is awaited from here on: the group is in one state or the other.
        position, seconds = one.position, loop_time() - started
        del self._begun[position]
        verdict = judge(rollouts, failures, self._failed[position] + 1, self._size, self._selection)
        group = Group(
            key=one.key,
            position=position,
            prompt=one.prompt,
            rollouts=tuple(rollouts),
            attempt=attempt,
            seconds=seconds,
        )
        self._check_newest(group)
        if verdict.fate == "again":
            self._failed[position] += 1
            self._again(one, verdict.reason)
        elif verdict.fate == "drop":
            self._failed.pop(position, None)
            self._ledger.dropped(position, verdict.reason, solved=verdict.solved)
            self.rules.dropped(position)
        else:
            self._failed.pop(position, None)
            self._ledger.generated(position, group.rollouts, seconds, group.newest)
            self.rules.finished(position, group.oldest)
            self._prompts[position], self.ready[position] = one, group
            if verdict.solved:
                self._solved.add(position)
            self.settle_overdue()
        if verdict.solved:
            self._source.solved(one.key)
        self._curriculum.learned(group, verdict)
        self.changed.notify()

    def _check_newest(self, group: Group) -> None:
        """Raises ConfigError for tokens of weights the trainer knows nothing of."""
        if (group.newest or 0) > self.rules.trainer_version:
            raise ConfigError(
                f"an engine says its weights are of version {group.newest}, the trainer is at version "
                f"{self.rules.trainer_version}: it has them from another run"
            )

    # -- the trainer's side -----------------------------------------------------------------------

    def hand_out(self, count: int) -> list[Group]:
        """So many groups for the trainer, by position, when they are there and may be taken; else none."""
        picked = self.rules.pick(count)
        if not picked:
            return []
        groups = []
        oldest_allowed = self.rules.trainer_version - self.rules.async_steps
        for position in sorted(picked):
            age = self.rules.taken(position)
            group = self.ready.pop(position)
            del self._prompts[position]
            if age > self.rules.async_steps and self._overflow == "mask":
                rollouts = tuple(without_tokens_before(one, oldest_allowed) for one in group.rollouts)
                group = msgspec.structs.replace(group, rollouts=rollouts)
                age = self.rules.trainer_version - (group.oldest or 0)
            groups.append(msgspec.structs.replace(group, staleness=age))
        self.out.update((group.position, group) for group in groups)
        self.changed.notify()
        return groups

    def trained(self, groups: Sequence[Group], step: int) -> None:
        """Raises ConfigError, WriteFailed."""
        positions = [group.position for group in groups]
        for position in positions:
            if position not in self.out:
                raise ConfigError(f"group {position} is not with the trainer: it was not handed out")
        done = [(position, position in self._solved) for position in positions]
        self._ledger.trained(done, step, self.rules.trainer_version)
        for position in positions:
            del self.out[position]
            self._solved.discard(position)
        self.changed.notify()

    def settle_overdue(self) -> None:
        """Begins anew what is too old to be trained on, where that is to be."""
        oldest_allowed = self.rules.trainer_version - self.rules.async_steps
        for position in self.rules.overdue():
            group = self.ready.get(position)
            if self._overflow == "mask":
                if group is None or (group.newest or 0) >= oldest_allowed:
                    continue  # there is, or will be, something left of it
            elif self._overflow == "train":
                continue
            if group is None:
                one, task = self._begun.pop(position)
                task.cancel()
            else:
                del self.ready[position]
                one = self._prompts.pop(position)
            self._solved.discard(position)
            self._again(one, "too old")

    def _again(self, one: Next, reason: str) -> None:
        self._ledger.owed_again(one.position, reason)
        self.rules.dropped(one.position)
        self._source.put_back(one)
