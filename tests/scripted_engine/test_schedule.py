"""The virtual batch: its invariants under any order of events, and its speed."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.errors import ConfigError
from penstock.scripted.distribution import Distribution
from penstock.scripted.schedule import Capacity, Schedule, Sequence

BLOCKS, BLOCK = 12, 4
MAX_SEQS = 4


def capacity(itl: str = "10ms", **settings: Any) -> Capacity:
    return Capacity(itl=Distribution.of_seconds(itl), **settings)


def schedule_of(itl: str = "10ms", **settings: Any) -> Schedule[Sequence]:
    return Schedule(capacity(itl, **settings), Random(1))


def tokens_by_time(schedule: Schedule[Sequence], until: float) -> list[tuple[float, Sequence, int]]:
    """What is made at which time, up to then, by a caller who is always on time."""
    made: list[tuple[float, Sequence, int]] = []
    for _ in range(100_000):
        if (due := schedule.due) > until:
            return made
        made += [(due, sequence, sequence.generated) for sequence in schedule.advance(due)]
    raise AssertionError("there is always something due")


class Machine(RuleBasedStateMachine):
    """Any order of arrivals, aborts, pauses and late looks at the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = schedule_of(
            max_num_seqs=MAX_SEQS,
            kv_tokens=BLOCKS * BLOCK,
            block_size=BLOCK,
            prefill_rate=1000.0,
            tokens_per_step=2,
        )
        self.now = 0.0
        self.all: list[Sequence] = []
        self.made: dict[Sequence, int] = {}

    @rule(prompt=st.integers(1, 20), length=st.integers(1, 28), ttft=st.floats(0, 0.05))
    def submit(self, prompt: int, length: int, ttft: float) -> None:
        sequence = Sequence(prompt, length, ttft)
        self.all.append(sequence)
        self.schedule.submit(sequence, self.now)

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.all))
        in_batch = sequence in self.schedule.running or sequence in self.schedule.waiting
        assert self.schedule.abort(sequence, self.now) == in_batch

    @rule(seconds=st.floats(0, 0.3))
    def wait(self, seconds: float) -> None:
        """The clock is looked at only afterwards."""
        self.now += seconds
        for _ in range(10_000):
            if self.schedule.due > self.now:
                return
            self.take(self.schedule.advance(self.now))
        raise AssertionError("there is always something due")

    @rule(on=st.booleans())
    def freeze(self, on: bool) -> None:
        if on:
            self.schedule.freeze(self.now)
            assert self.schedule.due == math.inf
        else:
            self.schedule.thaw(self.now)

    @rule(on=st.booleans())
    def admit(self, on: bool) -> None:
        self.schedule.admitting = on
        self.schedule.admit(self.now)

    def take(self, made: list[Sequence]) -> None:
        for sequence in made:
            new = sequence.generated - self.made.get(sequence, 0)
            assert 1 <= new <= 2
            self.made[sequence] = sequence.generated

    @invariant()
    def holds(self) -> None:
        schedule = self.schedule
        running, waiting = list(schedule.running), list(schedule.waiting)
        assert len(running) <= MAX_SEQS
        assert 0 <= schedule.free_blocks <= BLOCKS
        assert schedule.free_blocks + sum(sequence.blocks for sequence in running) == BLOCKS
        for sequence in running:
            held = sequence.blocks * BLOCK
            assert sequence.prompt_tokens + sequence.generated + sequence.room == held
        order = [sequence.serial for sequence in [*running, *waiting]]
        assert order == sorted(order), "first come, first served"
        for sequence in self.all:
            places = (sequence in schedule.running) + (sequence in schedule.waiting)
            assert places == (sequence.state != "ended")
            assert sequence.generated <= sequence.length
            assert self.made.get(sequence, 0) == sequence.generated, "every token is told"

    def teardown(self) -> None:
        self.schedule.thaw(self.now)
        self.schedule.admitting = True
        self.schedule.admit(self.now)
        for _ in range(10_000):
            if self.schedule.due == math.inf:
                break
            self.now = max(self.now, self.schedule.due)
            self.take(self.schedule.advance(self.now))
        assert all(sequence.state == "ended" for sequence in self.all)
        assert self.schedule.free_blocks == BLOCKS


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30)


def test_tokens_come_one_itl_apart_after_the_time_to_the_first() -> None:
    schedule = schedule_of("10ms", prefill_rate=1000.0)
    schedule.submit(Sequence(100, 5, ttft=0.05), now=2.0)
    times = [time for time, _, _ in tokens_by_time(schedule, 10.0)]
    assert times == pytest.approx([2.15, 2.16, 2.17, 2.18, 2.19], abs=0.0025)
    assert schedule.due == math.inf


def test_prompts_are_prefilled_one_after_the_other() -> None:
    schedule = schedule_of("10ms", prefill_rate=1000.0)
    for _ in range(3):
        schedule.submit(Sequence(100, 1), now=0.0)
    assert [time for time, _, _ in tokens_by_time(schedule, 1.0)] == pytest.approx([0.1, 0.2, 0.3])


def test_each_further_sequence_slows_all_and_beyond_the_knee_throughput_is_constant() -> None:
    def throughput(running: int) -> float:
        schedule = schedule_of("10ms", itl_per_seq=0.0001, knee=50, max_num_seqs=1000, kv_tokens=10_000_000)
        for _ in range(running):
            schedule.submit(Sequence(10, 10_000), now=0.0)
        tokens_by_time(schedule, 1.0)
        before = schedule.generation_tokens
        tokens_by_time(schedule, 3.0)
        return (schedule.generation_tokens - before) / 2

    assert throughput(1) == pytest.approx(100, rel=0.02)
    assert throughput(11) == pytest.approx(11 / 0.011, rel=0.02)
    knee = throughput(50)
    assert knee == pytest.approx(50 / 0.0149, rel=0.02)
    assert throughput(100) == pytest.approx(knee, rel=0.02)
    assert throughput(400) == pytest.approx(knee, rel=0.02)


def test_what_has_no_place_waits_in_the_order_it_came() -> None:
    schedule = schedule_of("10ms", max_num_seqs=2)
    sequences = [Sequence(1, 3) for _ in range(5)]
    for sequence in sequences:
        schedule.submit(sequence, now=0.0)
    assert (len(schedule.running), len(schedule.waiting)) == (2, 3)
    firsts = [sequence for _, sequence, made in tokens_by_time(schedule, 1.0) if made == 1]
    assert firsts == sequences


def test_a_full_cache_preempts_the_last_and_it_loses_nothing() -> None:
    schedule = schedule_of("10ms", kv_tokens=64, block_size=16)
    first, second = Sequence(16, 40), Sequence(16, 40)
    schedule.submit(first, now=0.0)
    schedule.submit(second, now=0.0)
    made = tokens_by_time(schedule, 10.0)
    assert schedule.preemptions >= 1
    ends = {sequence: time for time, sequence, count in made if count == 40}
    assert ends[first] < ends[second]
    assert [count for _, sequence, count in made if sequence is first] == list(range(1, 41))
    assert [count for _, sequence, count in made if sequence is second] == list(range(1, 41))
    assert schedule.prompt_tokens == 32 and schedule.generation_tokens == 80


def test_a_late_caller_catches_up_or_the_script_slips() -> None:
    schedule = schedule_of("10ms")
    schedule.submit(Sequence(1, 1000), now=0.0)
    tokens_by_time(schedule, 1.0)
    late = 1.05
    while schedule.due <= late:
        schedule.advance(late)
    assert schedule.slipped == 0.0
    assert schedule.generation_tokens == pytest.approx(106, abs=1)
    while schedule.due <= 3.05:
        schedule.advance(3.05)
    assert schedule.slipped == pytest.approx(1.9, abs=0.02)
    assert schedule.generation_tokens == pytest.approx(116, abs=2)


def test_a_frozen_batch_goes_on_where_it_stopped() -> None:
    schedule = schedule_of("10ms", prefill_rate=1000.0)
    sequence = Sequence(100, 3)
    schedule.submit(sequence, now=0.0)
    schedule.freeze(0.05)
    schedule.thaw(7.05)
    assert [time for time, _, _ in tokens_by_time(schedule, 10.0)] == pytest.approx(
        [7.1, 7.11, 7.12], abs=0.003
    )


@pytest.mark.parametrize(
    "settings",
    [{"max_num_seqs": 0}, {"knee": 0}, {"kv_tokens": 8}, {"prefill_rate": 0.0}, {"tokens_per_step": 0}],
)
def test_a_capacity_that_cannot_work_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings)).replace("_", ".")):
        capacity(**settings)
