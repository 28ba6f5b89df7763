"""Which sequences compute how many tokens in the next step, and in which KV blocks.

Guarantees:
- First come, first served. `running` and `waiting` are in order of arrival, and nothing waiting arrived
  before something running that it could replace. Who came last is preempted first.
- Every running sequence computes at least one token each step; what is left of the token budget goes to
  prompts in order of arrival. So the budget holds, decoding never waits for a prompt, and nobody starves.
- A sequence owns exactly the blocks its computed tokens need, shared ones counted; a block that others
  still read is copied before it is written. A freed row or block is given out again in the next step.
- While paused, nothing is admitted that has not begun (`Pause.NEW`), or nothing is scheduled (`Pause.ALL`);
  what is added meanwhile waits its turn.
- A block may be found by another prompt in the very step that computes it: `Step` lists the sequences in an
  order in which the blocks' writers come before their readers.

No torch and no clock here; the step's work is handed to the engine as plain lists.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from enum import IntEnum
from itertools import islice
from operator import attrgetter
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.engine.kv_cache import BlockPool
from penstock.engine.sequence import NO_ROW, Sequence

WATERMARK: Final = 0.01
"""Share of all blocks left free when a sequence is admitted beside others, so that they can grow a while
before someone must be preempted."""

_arrival = attrgetter("arrival")


class Pause(IntEnum):
    """How much is held back."""

    NONE = 0
    NEW = 1
    """What has begun goes on, one that was preempted included; nothing else is admitted."""
    ALL = 2


class Step:
    """The work of one step. Sequence i computes `counts[i]` tokens from position `starts[i]` on."""

    __slots__ = ("admitted", "copies", "counts", "last_tokens", "sampled", "sequences", "starts", "tokens")

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.tokens: list[int] = []
        """The tokens to compute, all sequences' after each other."""
        self.sampled: list[Sequence] = []
        """Sequences that get a new token from this step."""
        self.last_tokens: list[int] = []
        """For each of `sampled` the place in `tokens` whose logits decide; the same for forked siblings."""
        self.admitted: list[Sequence] = []
        """Sequences that were given a row in this step."""
        self.copies: list[tuple[int, int]] = []
        """(from, to) blocks to copy, all at once, before anything is computed."""


class Scheduler:
    """Owns the queues, the rows (a sequence's place in per-sequence arrays) and the block tables."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        caching: bool,
    ) -> None:
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        blocks_per_row = -(-max_model_len // pool.block_size)
        self.tables: npt.NDArray[np.int32] = np.zeros((max_num_seqs, blocks_per_row), dtype=np.int32)
        """Block of each row's tokens, [row, position // block_size]."""
        self.pause = Pause.NONE
        self.num_preemptions = 0
        self.prefix_queries = 0
        """Tokens of the sequences admitted (once each), which could have been found in the prefix cache."""
        self.prefix_hits = 0
        """Those that were."""
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._budget = max_num_batched_tokens
        self._caching = caching
        self._watermark = int(WATERMARK * pool.num_blocks)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; arrivals must not decrease."""
        self.waiting.append(sequence)

    def can_run(self) -> bool:
        """Whether the pause leaves anything to do."""
        if self.pause is Pause.NONE:
            return bool(self.running or self.waiting)
        if self.pause is Pause.ALL:
            return False
        return bool(self.running) or bool(self.waiting and self.waiting[0].preempted)

    def schedule(self) -> Step:
        """Choose the next step's work and count it as computed; an empty step when there is nothing to do."""
        step = Step()
        if self.pause is Pause.ALL:
            return step
        preempted = self.num_preemptions
        spare = self._schedule_running(step)
        if self.num_preemptions == preempted:
            self._admit_waiting(step, spare)
        self._fork(step)
        return step

    def _schedule_running(self, step: Step) -> int:
        """Give every running sequence its tokens; returns the budget left over."""
        running = self.running
        spare = self._budget - len(running)
        at = 0
        while at < len(running):
            sequence = running[at]
            count = min(len(sequence.tokens) - sequence.num_computed, 1 + spare)
            if self._reserve(sequence, count, step):
                self._compute(sequence, count, step)
                spare -= count - 1
                at += 1
            else:
                # The last in the list came last and is not scheduled yet; it may be this very sequence.
                self._preempt(running[-1])
                spare += 1
        return spare

    def _admit_waiting(self, step: Step, spare: int) -> None:
        """Start waiting sequences, in order, while rows, blocks and budget last."""
        while self.waiting and self._free_rows and spare > 0:
            sequence = self.waiting[0]
            if self.pause and not sequence.preempted:
                break
            if not self._take_prefix(sequence):
                break
            self.waiting.popleft()
            self._seat(sequence, step)
            self._adopt_siblings(sequence, step)
            count = min(len(sequence.tokens) - sequence.num_computed, spare)
            spare -= count
            self._reserve(sequence, count, step)
            self._compute(sequence, count, step)
            insort(self.running, sequence, key=_arrival)

    def _compute(self, sequence: Sequence, count: int, step: Step) -> None:
        start = sequence.num_computed
        end = sequence.num_computed = start + count
        step.sequences.append(sequence)
        step.starts.append(start)
        step.counts.append(count)
        tokens = sequence.tokens
        if count == 1:
            step.tokens.append(tokens[start])
        else:
            step.tokens += tokens[start:end]
        if end == len(tokens):
            step.sampled.append(sequence)
            step.last_tokens.append(len(step.tokens) - 1)
        if self._caching and end // self.pool.block_size > sequence.num_registered:
            self._register(sequence)

    def _reserve(self, sequence: Sequence, count: int, step: Step) -> bool:
        """Own the blocks of the next `count` tokens; False, and nothing changed, when there are too few."""
        pool, blocks = self.pool, sequence.blocks
        need = -(-(sequence.num_computed + count) // pool.block_size) - len(blocks)
        if need <= 0 and not sequence.shares_tail:
            return True
        copy = (
            sequence.shares_tail
            and sequence.num_computed % pool.block_size != 0
            and pool.refs[blocks[-1]] > 1
        )
        if pool.num_free < need + copy:
            return False
        if copy:
            shared, own = blocks[-1], pool.allocate()
            step.copies.append((shared, own))
            pool.release(shared)
            blocks[-1] = own
            self.tables[sequence.row, len(blocks) - 1] = own
        sequence.shares_tail = False
        for _ in range(need):
            block = pool.allocate()
            self.tables[sequence.row, len(blocks)] = block
            blocks.append(block)
        return True

    def _take_prefix(self, sequence: Sequence) -> bool:
        """Share the cached blocks a waiting sequence begins with; False when the rest of it does not fit.

        The last token is always computed anew, for its logits.
        """
        pool, length = self.pool, len(sequence.tokens)
        hits: list[int] = []
        if self._caching:
            hits = pool.lookup(sequence.prefix_digests((length - 1) // pool.block_size, pool.block_size))
        need = -(-length // pool.block_size) - len(hits) + pool.num_idle_among(hits)
        if pool.num_free < need + (self._watermark if self.running else 0):
            return False
        for block in hits:
            pool.share(block)
        sequence.blocks = hits
        sequence.num_computed = len(hits) * pool.block_size
        sequence.num_registered = len(hits)
        sequence.epoch = pool.epoch
        if not sequence.preempted:
            self.prefix_queries += length
            self.prefix_hits += sequence.num_computed
            sequence.num_cached = sequence.num_computed
        return True

    def _seat(self, sequence: Sequence, step: Step) -> None:
        """Give a sequence a row and copy its block table there."""
        sequence.row = self._free_rows.pop()
        self.tables[sequence.row, : len(sequence.blocks)] = sequence.blocks
        step.admitted.append(sequence)

    def _adopt_siblings(self, sequence: Sequence, step: Step) -> None:
        """Seat the waiting sequences of the same prompt; they are forked when the prompt is computed."""
        waiting = self.waiting
        while (
            not sequence.started
            and waiting
            and self._free_rows
            and waiting[0].request_id == sequence.request_id
            and not waiting[0].started
        ):
            sibling = waiting.popleft()
            self._seat(sibling, step)
            sequence.siblings.append(sibling)

    def _fork(self, step: Step) -> None:
        """Let the siblings of each prompt that is now computed share its blocks and its logits."""
        leaders = [
            (sequence, place)
            for sequence, place in zip(step.sampled, step.last_tokens, strict=True)
            if sequence.siblings
        ]
        for leader, place in leaders:
            for sibling in leader.siblings:
                self._inherit(sibling, leader)
                for block in leader.blocks:
                    self.pool.share(block)
                sibling.shares_tail = True
                insort(self.running, sibling, key=_arrival)
                step.sampled.append(sibling)
                step.last_tokens.append(place)
            leader.shares_tail = True
            leader.siblings = []

    def _inherit(self, heir: Sequence, leader: Sequence) -> None:
        """Give `heir` what is computed of the prompt it has in common with `leader`; counts no references."""
        heir.blocks = leader.blocks.copy()
        heir.num_computed = leader.num_computed
        heir.num_registered = leader.num_registered
        heir.num_cached = leader.num_cached
        heir.digests = leader.digests.copy()
        heir.epoch = leader.epoch
        self.tables[heir.row, : len(heir.blocks)] = heir.blocks

    def _register(self, sequence: Sequence) -> None:
        """Make the blocks that became full findable, unless they rest on content that was forgotten."""
        full = sequence.num_computed // self.pool.block_size
        if sequence.epoch == self.pool.epoch:
            digests = sequence.prefix_digests(full, self.pool.block_size)
            for block, digest in islice(
                zip(sequence.blocks, digests, strict=False), sequence.num_registered, full
            ):
                self.pool.register(block, digest)
        sequence.num_registered = full

    def _preempt(self, sequence: Sequence) -> None:
        """Put a running sequence back to the head of the queue; it will be computed again from its tokens."""
        self.running.remove(sequence)
        for sibling in reversed(sequence.siblings):
            self._vacate(sibling)
            self.waiting.appendleft(sibling)
        sequence.siblings = []
        self._vacate(sequence)
        sequence.preempted = True
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def preempt_all(self) -> None:
        """Put all running sequences back in the queue, in order; they hold no block any more."""
        while self.running:
            self._preempt(self.running[-1])

    def _vacate(self, sequence: Sequence) -> None:
        """Take row and blocks back."""
        self.pool.release_all(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
        sequence.num_registered = 0
        sequence.shares_tail = False
        self._free_rows.append(sequence.row)
        sequence.row = NO_ROW

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or aborted, wherever it is; its row and blocks are free at once."""
        if sequence.row == NO_ROW:
            self.waiting.remove(sequence)
            return
        if sequence in self.running:
            self.running.remove(sequence)
            if sequence.siblings:
                self._bequeath(sequence)
        else:
            leader = next(other for other in self.running if sequence in other.siblings)
            leader.siblings.remove(sequence)
        self._vacate(sequence)

    def _bequeath(self, leader: Sequence) -> None:
        """Let the first sibling go on with a prompt whose leader is removed."""
        heir, *others = leader.siblings
        self._inherit(heir, leader)
        heir.siblings = others
        leader.siblings = []
        leader.blocks = []
        insort(self.running, heir, key=_arrival)

    def num_empty_slots(self) -> int:
        """Token slots of held blocks that hold no token: all are in the last blocks of running sequences."""
        block_size = self.pool.block_size
        filled: dict[int, int] = {}
        for sequence in self.running:
            if sequence.blocks:
                used = sequence.num_computed - (len(sequence.blocks) - 1) * block_size
                filled[sequence.blocks[-1]] = max(used, filled.get(sequence.blocks[-1], 0))
        return len(filled) * block_size - sum(filled.values())
