"""A virtual batch: when a vLLM-like engine of a given speed would have made which token.

Pure: clock and randomness are handed in, nothing waits. It guarantees, at every moment:
- `running` ≤ max_num_seqs; the KV blocks held are those of the running sequences, never more than there are;
- sequences are admitted first come, first served: each one running came before each one waiting;
- when blocks run out, the sequence that came last is preempted: it goes to the front of the queue, keeps the
  tokens it has made, and is prefilled again; the one that came first is never preempted, so that
- every sequence ends, by its last token or by `abort`, if time goes on and nothing is paused for ever.

All running sequences make tokens at the same rate, one every `itl(running)` seconds, each at a phase of its
own: the time between two tokens is cut into PHASES slots, and a tick serves the sequences of one slot. When
the caller comes later than a tick is due, ticks follow each other at once until the lag is made up; what is
more than MAX_LAG is given up and counted in `slipped`: the machine was too slow for the script.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Final, Generic, Literal, TypeVar

from penstock.errors import ConfigError
from penstock.scripted.distribution import Distribution

MIN_PHASES: Final = 4
MAX_PHASES: Final = 64
"""Slots between two tokens of a sequence."""

PHASE_SECONDS: Final = 0.002
"""A tick is at least this long, unless the tokens come faster than MIN_PHASES of it."""

MAX_LAG: Final = 0.1
"""Seconds the ticks may be late and still catch up."""

State = Literal["new", "waiting", "prefill", "decode", "ended"]


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How fast the engine is, and how much it holds."""

    itl: Distribution
    """Seconds from one token of a sequence to the next when it is alone; drawn anew for each step."""
    itl_per_seq: float = 0.0
    """Seconds added for each further sequence that runs."""
    knee: int | None = None
    """Running sequences from which the throughput stays the same, so that each gets slower. None: no knee."""
    max_num_seqs: int = 256
    """Sequences that run at most."""
    kv_tokens: int = 500_000
    """Tokens the KV cache holds."""
    block_size: int = 16
    """Tokens of one KV block."""
    prefill_rate: float | None = None
    """Prompt tokens a second, one prompt after the other. None: at once."""
    tokens_per_step: int = 1
    """Tokens a sequence makes at a time, as with speculative decoding."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "block_size", "tokens_per_step"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.kv_tokens < self.block_size:
            raise ConfigError(f"kv_tokens must be at least a block of {self.block_size}")
        if self.knee is not None and self.knee < 1:
            raise ConfigError(f"knee must be at least 1, not {self.knee}")
        if self.prefill_rate is not None and not self.prefill_rate > 0:
            raise ConfigError(f"the prefill rate must be above 0, not {self.prefill_rate}")
        if not self.itl.mean > 0:
            raise ConfigError("the time between two tokens must be above 0")

    @property
    def blocks(self) -> int:
        """KV blocks there are."""
        return self.kv_tokens // self.block_size

    def slowdown(self, running: int, alone: float) -> float:
        """Seconds between two tokens of a sequence when `running` run and `alone` is drawn for one."""
        if self.knee is None or running <= self.knee:
            return alone + self.itl_per_seq * (running - 1)
        return (alone + self.itl_per_seq * (self.knee - 1)) * running / self.knee


class Sequence:
    """One sample that is generated. ttft: seconds from the end of its prefill to its first token."""

    __slots__ = (
        "admitted",
        "blocks",
        "generated",
        "length",
        "prompt_tokens",
        "ready",
        "room",
        "serial",
        "slot",
        "state",
        "ttft",
    )

    def __init__(self, prompt_tokens: int, length: int, ttft: float = 0.0) -> None:
        self.prompt_tokens = prompt_tokens
        self.length = length
        """Tokens it will make."""
        self.ttft = ttft
        self.generated = 0
        self.blocks = 0
        """KV blocks held."""
        self.room = 0
        """Tokens that still fit into them."""
        self.state: State = "new"
        self.serial = -1
        self.slot = -1
        self.ready = 0.0
        """When its next token is due, while it is prefilled."""
        self.admitted = False
        """It has run before."""


S = TypeVar("S", bound=Sequence)


class Schedule(Generic[S]):
    """The batch. `advance` is to be called when `due` has come."""

    def __init__(self, capacity: Capacity, random: Random) -> None:
        self.capacity = capacity
        self.running: OrderedDict[S, None] = OrderedDict()
        """Those that hold blocks, in the order they came."""
        self.waiting: OrderedDict[S, None] = OrderedDict()
        """In the order they came."""
        self.free_blocks = capacity.blocks
        self.preemptions = 0
        self.prompt_tokens = 0
        """Prefilled so far, once for each sequence."""
        self.generation_tokens = 0
        self.slipped = 0.0
        """Seconds by which the script was delayed because `advance` came too late."""
        self.admitting = True
        self._frozen_since: float | None = None
        self._random = random
        self._serial = 0
        phases = int(capacity.itl.mean / PHASE_SECONDS)
        self._slots: list[dict[S, None]] = [{} for _ in range(min(max(phases, MIN_PHASES), MAX_PHASES))]
        self._cursor = 0
        """The slot that was served last."""
        self._decoding = 0
        self._tick_at = math.inf
        self._alone = 0.0
        """The time between two tokens drawn for the present step."""
        self._prefills: list[tuple[float, int, S]] = []
        """Heap by the time the first token is due. Holds sequences that are no longer prefilled, too."""
        self._pushes = count()
        self._prefill_free = 0.0

    @property
    def due(self) -> float:
        """When `advance` has to be called next; infinity: not before something is submitted."""
        if self._frozen_since is not None:
            return math.inf
        while self._prefills and not self._is_prefilling(self._prefills[0]):
            heappop(self._prefills)
        return min(self._tick_at, self._prefills[0][0] if self._prefills else math.inf)

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that are held."""
        return 1.0 - self.free_blocks / self.capacity.blocks

    @property
    def frozen(self) -> bool:
        """No token is made until `thaw`."""
        return self._frozen_since is not None

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens, prompt and all, can ever be whole in the KV cache."""
        return -(-tokens // self.capacity.block_size) <= self.capacity.blocks

    # -- what comes and goes ----------------------------------------------------------------------

    def submit(self, sequence: S, now: float) -> None:
        """Queues a new sequence. It must fit: see `fits`."""
        assert sequence.state == "new" and sequence.length > 0
        assert self.fits(sequence.prompt_tokens + sequence.length)
        sequence.serial = self._serial
        self._serial += 1
        sequence.state = "waiting"
        self.waiting[sequence] = None
        self.admit(now)

    def abort(self, sequence: S, now: float) -> bool:
        """Ends a sequence; False if it has ended already."""
        if sequence.state == "ended":
            return False
        if sequence.state == "waiting":
            del self.waiting[sequence]
        elif sequence.state != "new":
            self._release(sequence)
        sequence.state = "ended"
        self.admit(now)
        return True

    def freeze(self, now: float) -> None:
        """Stops the time of the batch. Nothing is admitted, no token is made."""
        if self._frozen_since is None:
            self._frozen_since = now

    def thaw(self, now: float) -> None:
        """Lets time go on where it stopped."""
        if self._frozen_since is None:
            return
        stopped, self._frozen_since = now - self._frozen_since, None
        self._tick_at += stopped
        self._prefill_free += stopped
        prefills = [entry for entry in self._prefills if self._is_prefilling(entry)]
        self._prefills.clear()
        for due, _, sequence in prefills:
            self._prefill(sequence, due + stopped)
        self.admit(now)

    def admit(self, now: float) -> None:
        """Admits from the front of the queue what has a place and blocks."""
        capacity = self.capacity
        while self.waiting and self.admitting and self._frozen_since is None:
            if len(self.running) >= capacity.max_num_seqs:
                return
            sequence = next(iter(self.waiting))
            tokens = sequence.prompt_tokens + sequence.generated
            blocks = max(1, -(-tokens // capacity.block_size))
            if blocks > self.free_blocks:
                return
            del self.waiting[sequence]
            self.free_blocks -= blocks
            sequence.blocks = blocks
            sequence.room = blocks * capacity.block_size - tokens
            sequence.state = "prefill"
            self.running[sequence] = None
            begin = max(now, self._prefill_free)
            if capacity.prefill_rate is not None:
                begin += tokens / capacity.prefill_rate
            self._prefill_free = begin
            self._prefill(sequence, begin + (0.0 if sequence.admitted else sequence.ttft))
            if not sequence.admitted:
                sequence.admitted = True
                self.prompt_tokens += sequence.prompt_tokens

    def _prefill(self, sequence: S, ready: float) -> None:
        sequence.ready = ready
        heappush(self._prefills, (ready, next(self._pushes), sequence))

    # -- time ---------------------------------------------------------------------------------------

    def advance(self, now: float) -> list[S]:
        """The sequences that have made tokens by the next thing that is due: one tick, or first tokens.

        A sequence whose `state` is `ended` has made its last. Empty when nothing is due.
        """
        due = self.due
        if due > now:
            return []
        if due < self._tick_at:
            return self._first_tokens(due, now)
        if now - due > MAX_LAG:
            self.slipped += now - due - MAX_LAG
            self._tick_at = due = now - MAX_LAG
        self._cursor = (self._cursor + 1) % len(self._slots)
        if self._cursor == 0:
            self._alone = self.capacity.itl.sample(self._random)
        self._tick_at = due + self._tick()
        made = [
            sequence
            for sequence in list(self._slots[self._cursor])
            if sequence.state == "decode" and self._make(sequence)  # not preempted by one before it
        ]
        self.admit(now)
        return made

    def _tick(self) -> float:
        """Seconds to the next tick."""
        return self.capacity.slowdown(max(1, self._decoding), self._alone) / len(self._slots)

    def _first_tokens(self, due: float, now: float) -> list[S]:
        made = []
        while self._prefills and self._prefills[0][0] <= due:
            entry = heappop(self._prefills)
            sequence = entry[2]
            if self._is_prefilling(entry):
                sequence.state = "decode"
                if not self._decoding:
                    self._alone = self.capacity.itl.sample(self._random)
                    self._tick_at = due + self._tick()
                sequence.slot = self._cursor
                self._slots[self._cursor][sequence] = None
                self._decoding += 1
                if self._make(sequence):
                    made.append(sequence)
        self.admit(now)
        return made

    @staticmethod
    def _is_prefilling(entry: tuple[float, int, S]) -> bool:
        sequence = entry[2]
        return sequence.state == "prefill" and sequence.ready == entry[0]

    def _make(self, sequence: S) -> bool:
        """Makes the tokens of one step; False if there were no blocks for them and it was preempted."""
        tokens = min(self.capacity.tokens_per_step, sequence.length - sequence.generated)
        if sequence.room < tokens and not self._grow(sequence, tokens):
            return False
        sequence.room -= tokens
        sequence.generated += tokens
        self.generation_tokens += tokens
        if sequence.generated == sequence.length:
            self._release(sequence)
            sequence.state = "ended"
        return True

    def _grow(self, sequence: S, tokens: int) -> bool:
        """Gets blocks for so many tokens, from those who came later if need be."""
        needed = -(-(tokens - sequence.room) // self.capacity.block_size)
        while self.free_blocks < needed:
            last = next(reversed(self.running))
            self._preempt(last)
            if last is sequence:
                return False
        self.free_blocks -= needed
        sequence.blocks += needed
        sequence.room += needed * self.capacity.block_size
        return True

    def _preempt(self, sequence: S) -> None:
        self._release(sequence)
        self.preemptions += 1
        sequence.state = "waiting"
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)

    def _release(self, sequence: S) -> None:
        """Takes a sequence out of the batch."""
        if sequence.state == "decode":
            del self._slots[sequence.slot][sequence]
            self._decoding -= 1
            if not self._decoding:
                self._tick_at = math.inf
        del self.running[sequence]
        self.free_blocks += sequence.blocks
        sequence.blocks = sequence.room = 0
