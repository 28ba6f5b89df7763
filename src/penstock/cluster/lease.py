"""Who works on which shard: leases that end when their holder is not heard of.

Pure: the clock and the numbers of epochs are handed in. Guarantees:
1. shards = waiting + leased + over + given up, at every moment.
2. A shard has one lease at a time. Its epoch is higher than that of any lease before, unless its last holder
   gave it back: then nobody else can be writing, and the files of the epoch go on.
3. What is said under a lease that has ended is refused, whoever says it.
4. A shard whose holders are lost `losses` times is given up: it is likely what ends them.

A holder may be alive after its lease has ended: hung, or cut off from the network. It writes to the files of
its own epoch, which are not looked at any more (see `penstock.cluster.takeover`): that is the fence. That it
stops by itself when nobody asks it how it is, long before its lease ends, only saves work.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

TERM: Final = 60.0
"""Seconds without a sign of life after which a lease has ended: longer than any pause of a process that
lives. A process whose end Ray sees loses its leases at once."""

FENCE: Final = TERM / 2
"""Seconds without being asked after which a worker stops by itself. Its clock and ours need only agree on how
long a second is."""

LOSSES: Final = 5
"""Holders a shard may lose."""


@dataclass(frozen=True)
class Lease:
    """The right to work on a shard, and the epoch under which its files are written."""

    shard: int
    epoch: int
    worker: str


class Leases:
    """Of `shards` shards. epoch: the number under which a shard goes on, asked for before its first lease and
    after each loss; higher than all there have been of it, also in earlier runs."""

    def __init__(
        self, shards: int, *, epoch: Callable[[int], int], term: float = TERM, losses: int = LOSSES
    ) -> None:
        self._epoch = epoch
        self._term = term
        self._limit = losses
        self._waiting = deque(range(shards))
        self._epochs: dict[int, int] = {}
        """Under which each shard goes on; not there: a new number is needed."""
        self._held: dict[int, Lease] = {}
        self._until: dict[int, float] = {}
        self.lost: Counter[int] = Counter()
        """How often the holder of a shard was lost."""
        self.over: set[int] = set()
        """Shards whose work is done."""
        self.given_up: set[int] = set()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def leased(self) -> int:
        return len(self._held)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to be done: all over or given up."""
        return not self._waiting and not self._held

    def held_by(self, worker: str) -> list[Lease]:
        return [lease for lease in self._held.values() if lease.worker == worker]

    def grant(self, worker: str, now: float) -> Lease | None:
        """The next shard that waits; None: none does."""
        if not self._waiting:
            return None
        shard = self._waiting.popleft()
        if shard not in self._epochs:
            self._epochs[shard] = self._epoch(shard)
        lease = self._held[shard] = Lease(shard, self._epochs[shard], worker)
        self._until[shard] = now + self._term
        return lease

    def renew(self, lease: Lease, now: float) -> bool:
        """Its holder was heard of. False: the lease has ended."""
        if self._held.get(lease.shard) != lease:
            return False
        self._until[lease.shard] = now + self._term
        return True

    def finish(self, lease: Lease) -> bool:
        """The shard's work is done. False: the lease has ended, and what was done under it does not count."""
        if not self._end(lease):
            return False
        self.over.add(lease.shard)
        return True

    def give_back(self, lease: Lease) -> bool:
        """Its holder has stopped and closed its files. False: the lease had ended."""
        if not self._end(lease):
            return False
        self._waiting.appendleft(lease.shard)
        return True

    def lose(self, worker: str) -> list[Lease]:
        """A worker is gone; the leases it had."""
        return [self._lose(lease) for lease in self.held_by(worker)]

    def expire(self, now: float) -> list[Lease]:
        """Ends the leases whose holders were not heard of in time."""
        late = [shard for shard, until in self._until.items() if until <= now]
        return [self._lose(self._held[shard]) for shard in late]

    def _lose(self, lease: Lease) -> Lease:
        self._end(lease)
        del self._epochs[lease.shard]
        self.lost[lease.shard] += 1
        if self.lost[lease.shard] >= self._limit:
            self.given_up.add(lease.shard)
        else:
            self._waiting.appendleft(lease.shard)
        return lease

    def _end(self, lease: Lease) -> bool:
        if self._held.get(lease.shard) != lease:
            return False
        del self._held[lease.shard], self._until[lease.shard]
        return True
