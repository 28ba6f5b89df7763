"""The scheduler as a state machine, its KV cache simulated slot by slot.

Every simulated slot remembers which tokens, up to and including its own, it was computed from. So whatever
sharing, forking, copying, evicting and preempting led there, a sequence that reads a slot not computed
from its own prefix is found out in that very step.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.engine.kv_cache import BlockPool
from penstock.engine.sampling import SamplingParams
from penstock.engine.scheduler import Pause, Scheduler, Step
from penstock.engine.sequence import Sequence

VOCAB = 2
"""Few tokens, so that prompts often begin alike."""


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run and are aborted in any order."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        spare_blocks=st.integers(0, 8),
        max_num_seqs=st.integers(2, 6),
        spare_tokens=st.integers(0, 6),
        caching=st.booleans(),
    )
    def start(
        self, block_size: int, spare_blocks: int, max_num_seqs: int, spare_tokens: int, caching: bool
    ) -> None:
        self.max_len = 24
        self.block_size = block_size
        self.budget = max_num_seqs + spare_tokens
        self.max_num_seqs = max_num_seqs
        self.pool = BlockPool(-(-self.max_len // block_size) + spare_blocks, block_size)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_model_len=self.max_len,
            caching=caching,
        )
        self.slots: dict[tuple[int, int], tuple[tuple[int, ...], int]] = {}
        """(block, place) to the tokens it was computed from, and the oldest cache epoch it rests on."""
        self.unfinished: list[Sequence] = []
        self.arrivals = 0
        self.requests = 0

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=16),
        n=st.integers(1, 4),
        count=st.integers(1, 10),
    )
    def add(self, prompt: list[int], n: int, count: int) -> None:
        params = SamplingParams(max_tokens=count)
        self.requests += 1
        for index in range(n):
            limit = min(len(prompt) + count, self.max_len)
            sequence = Sequence(str(self.requests), index, prompt, params, arrival=self.arrivals, limit=limit)
            self.arrivals += 1
            self.unfinished.append(sequence)
            self.scheduler.add(sequence)

    @precondition(lambda self: self.unfinished)
    @rule(which=st.integers(0, 1000), count=st.integers(1, 10))
    def add_continuation(self, which: int, count: int) -> None:
        """A prompt that begins with what another sequence has generated so far."""
        tokens = self.unfinished[which % len(self.unfinished)].tokens
        self.add([*tokens[: self.max_len - 2], 0], 1, count)

    @rule(steps=st.integers(1, 4), salt=st.integers(0, 3))
    def run(self, steps: int, salt: int) -> None:
        for _ in range(steps):
            self.step(salt)

    @precondition(lambda self: self.unfinished)
    @rule(which=st.integers(0, 1000))
    def abort(self, which: int) -> None:
        sequence = self.unfinished.pop(which % len(self.unfinished))
        self.scheduler.remove(sequence)

    @rule()
    def forget(self) -> None:
        self.pool.forget()

    @rule(how=st.sampled_from(Pause))
    def pause(self, how: Pause) -> None:
        self.scheduler.pause = how

    @rule(salt=st.integers(0, 3))
    def drain(self, salt: int) -> None:
        """What has begun ends, whether it has a place or not, and nothing else begins."""
        begun = {sequence.request_id for sequence in self.scheduler.running}
        begun |= {sequence.request_id for sequence in self.unfinished if sequence.preempted}
        running = list(self.scheduler.running)
        self.scheduler.pause = Pause.NEW
        while self.scheduler.can_run():
            assert {sequence.request_id for sequence in self.scheduler.running} <= begun
            self.step(salt)
        assert not any(sequence in self.unfinished for sequence in running)

    @rule()
    def preempt_all(self) -> None:
        self.scheduler.preempt_all()
        assert self.scheduler.running == []
        assert self.pool.num_held == 0

    def step(self, salt: int) -> None:
        running_before = list(self.scheduler.running)
        can_run = self.scheduler.can_run()
        step = self.scheduler.schedule()
        assert bool(step.sequences) == can_run
        self.check_shape(step, running_before)
        self.compute(step)
        for sequence in step.sampled:
            assert sequence.num_computed == len(sequence.tokens)
            sequence.tokens.append((len(sequence.tokens) * 7 + sequence.index + salt) % VOCAB)
            if len(sequence.tokens) >= sequence.limit:
                self.unfinished.remove(sequence)
                self.scheduler.remove(sequence)

    def check_shape(self, step: Step, running_before: list[Sequence]) -> None:
        """The budget holds, nobody runs twice, and nobody who stayed running was passed over."""
        assert len(step.tokens) == sum(step.counts) <= self.budget
        assert len(set(map(id, step.sequences))) == len(step.sequences) <= self.max_num_seqs
        assert all(count >= 1 for count in step.counts)
        if self.scheduler.pause is Pause.ALL:
            assert not step.sequences
            return
        if self.scheduler.pause is Pause.NONE:
            assert bool(step.sequences) == bool(self.unfinished)
        if step.sequences and self.scheduler.pause is Pause.NONE:
            oldest = min(self.unfinished, key=lambda sequence: sequence.arrival)
            assert oldest in step.sequences or oldest in step.sampled
        still = [sequence for sequence in running_before if sequence.row >= 0]
        assert all(sequence in step.sequences for sequence in still)
        targets = [target for _, target in step.copies]
        assert len(set(targets)) == len(targets)

    def compute(self, step: Step) -> None:
        """Do to the slots what the model does to the cache, and check all that it reads."""
        sources = {
            (target, place): self.slots.get((source, place))
            for source, target in step.copies
            for place in range(self.block_size)
        }
        self.slots.update({slot: content for slot, content in sources.items() if content is not None})
        offset = 0
        for sequence, start, count in zip(step.sequences, step.starts, step.counts, strict=True):
            end = start + count
            assert step.tokens[offset : offset + count] == sequence.tokens[start:end]
            offset += count
            table = self.scheduler.tables[sequence.row].tolist()
            slots = [(table[i // self.block_size], i % self.block_size) for i in range(end)]
            oldest = min((self.slots[slot][1] for slot in slots[:start]), default=self.pool.epoch)
            if sequence in step.admitted:
                assert oldest == self.pool.epoch
            for position in range(start, end):
                self.slots[slots[position]] = tuple(sequence.tokens[: position + 1]), oldest
            for position, slot in enumerate(slots):
                assert self.slots[slot][0] == tuple(sequence.tokens[: position + 1])

    @invariant()
    def blocks_are_counted(self) -> None:
        """References are exactly those of the sequences, and no block is in two states or in none."""
        if not hasattr(self, "pool"):
            return
        held = Counter(block for sequence in self.unfinished for block in sequence.blocks)
        assert self.pool.refs == [held[block] for block in range(self.pool.num_blocks)]
        assert self.pool.num_held == len(held)
        assert self.pool.num_free + len(held) == self.pool.num_blocks
        for sequence in self.scheduler.running:
            assert len(sequence.blocks) == -(-sequence.num_computed // self.block_size)
            row = self.scheduler.tables[sequence.row, : len(sequence.blocks)].tolist()
            assert row == sequence.blocks

    @invariant()
    def queues_are_in_order(self) -> None:
        """Each unfinished sequence is in one place; both queues are in order of arrival."""
        if not hasattr(self, "pool"):
            return
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        pending = [sibling for sequence in running for sibling in sequence.siblings]
        everyone = running + waiting + pending
        assert sorted(map(id, everyone)) == sorted(map(id, self.unfinished))
        for queue in (running, waiting):
            assert queue == sorted(queue, key=lambda sequence: sequence.arrival)
        rows = [sequence.row for sequence in running + pending]
        assert len(set(rows)) == len(rows) <= self.max_num_seqs
        assert all(sequence.row < 0 and not sequence.blocks for sequence in waiting)

    @invariant()
    def empty_slots_are_counted(self) -> None:
        if not hasattr(self, "pool"):
            return
        filled = {
            (sequence.blocks[position // self.block_size], position % self.block_size)
            for sequence in self.scheduler.running
            for position in range(sequence.num_computed)
        }
        assert self.scheduler.num_empty_slots() == self.pool.num_held * self.block_size - len(filled)

    def teardown(self) -> None:
        """All that was admitted finishes, and then nothing is held."""
        if not hasattr(self, "pool"):
            return
        self.scheduler.pause = Pause.NONE
        bound = 10 + 40 * sum(sequence.limit for sequence in self.unfinished)
        for _ in range(bound):
            if not self.unfinished:
                break
            self.step(0)
        assert not self.unfinished
        self.blocks_are_counted()
        assert self.pool.num_held == 0
        assert not self.scheduler.running and not self.scheduler.waiting


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=300, stateful_step_count=40)


def test_content_from_before_a_reset_is_not_found_after_it() -> None:
    """Nor what was computed after it on top of such content: the machine's checks tell the two apart."""
    machine = SchedulerMachine()
    machine.start(block_size=2, spare_blocks=40, max_num_seqs=4, spare_tokens=20, caching=True)
    machine.add([0, 1, 1, 0, 1], n=1, count=10)
    machine.run(steps=3, salt=0)
    machine.forget()
    machine.run(steps=4, salt=0)
    for _ in range(2):
        machine.add_continuation(which=0, count=2)
        machine.run(steps=1, salt=0)
    assert machine.scheduler.prefix_hits > 0
    machine.teardown()


def test_the_next_sibling_takes_over_from_an_aborted_leader() -> None:
    """In the middle of the prompt, nothing is computed twice."""
    subject = scheduler(40, seqs=4, tokens=8)
    group = [sequence(i, [0] * 12, 5, "group") for i in range(3)]
    for each in group:
        subject.add(each)
    assert subject.schedule().counts == [8]
    subject.remove(group[0])
    step = subject.schedule()
    assert (step.sequences, step.starts, step.counts) == ([group[1]], [8], [4])
    assert step.sampled == group[1:]


def sequence(arrival: int, prompt: list[int], count: int, request: str | None = None) -> Sequence:
    return Sequence(
        request or str(arrival),
        arrival,
        prompt,
        SamplingParams(max_tokens=count),
        arrival=arrival,
        limit=len(prompt) + count,
    )


def scheduler(blocks: int, *, seqs: int, tokens: int, caching: bool = True) -> Scheduler:
    pool = BlockPool(blocks, 4)
    return Scheduler(
        pool, max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=40, caching=caching
    )


def test_a_freed_row_is_refilled_in_the_next_step() -> None:
    subject = scheduler(40, seqs=2, tokens=16)
    first, second, third = (sequence(i, [i] * 3, 5) for i in range(3))
    for queued in (first, second, third):
        subject.add(queued)
    assert subject.schedule().sequences == [first, second]
    subject.remove(first)
    second.tokens.append(1)
    assert subject.schedule().sequences == [second, third]


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    """The prompt takes what budget the running sequences leave, in chunks."""
    subject = scheduler(40, seqs=4, tokens=8)
    decoding, prompt = sequence(0, [0] * 3, 20), sequence(1, [1] * 30, 2)
    subject.add(decoding)
    subject.schedule()
    subject.add(prompt)
    chunks = []
    while prompt.num_computed < 30:
        decoding.tokens.append(0)
        step = subject.schedule()
        assert step.sequences == [decoding, prompt]
        chunks.append(step.counts)
    assert chunks == [[1, 7], [1, 7], [1, 7], [1, 7], [1, 2]]


def test_the_last_to_come_is_preempted() -> None:
    subject = scheduler(4, seqs=4, tokens=16, caching=False)
    queued = [sequence(i, [i] * 4, 8) for i in range(3)]
    for each in queued:
        subject.add(each)
    assert subject.schedule().sequences == queued
    for each in queued:
        each.tokens.append(9)
    step = subject.schedule()
    assert step.sequences == queued[:2]
    assert subject.num_preemptions == 1
    assert list(subject.waiting) == [queued[2]]


def test_forks_copy_the_shared_last_block_once_each_but_one() -> None:
    """Three sequences share two full blocks and a part of a third; the last writer keeps the original."""
    subject = scheduler(40, seqs=4, tokens=16)
    group = [sequence(i, [0] * 10, 5, "group") for i in range(3)]
    for each in group:
        subject.add(each)
    step = subject.schedule()
    assert step.sequences == [group[0]]
    assert step.sampled == group
    assert step.last_tokens == [9, 9, 9]
    assert subject.pool.num_held == 3
    for each in group:
        each.tokens.append(each.index)
    step = subject.schedule()
    original = group[2].blocks[2]
    assert [source for source, _ in step.copies] == [original, original]
    assert subject.pool.num_held == 5
    assert group[0].blocks[:2] == group[1].blocks[:2] == group[2].blocks[:2]
    assert subject.pool.refs[group[0].blocks[0]] == 3
