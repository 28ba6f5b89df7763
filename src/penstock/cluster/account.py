"""The account of a job in shards, from the files of all of them.

Guarantees: nothing is written and nothing is locked. A shard that nobody has begun has no rows yet: the job
is complete only when every shard was begun and owes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.batch.status import JobStatus, read_status
from penstock.cluster.shards import Shards, journal_of


@dataclass(frozen=True)
class ShardStatus:
    """One shard, as its files show it."""

    index: int
    status: JobStatus | None
    """None: not begun."""

    @property
    def settled(self) -> bool:
        """Whether the same command would find nothing to do: all rows done, or failed."""
        return self.status is not None and self.status.accounting.owed == 0

    @property
    def complete(self) -> bool:
        return self.status is not None and self.status.accounting.complete


@dataclass(frozen=True)
class Total:
    """Counts over shards. Rows of the shards that were begun: `rows` = `done` + `failed` + `owed`."""

    shards: int
    begun: int
    settled: int
    running: int
    """Shards that a process of this machine is working on."""
    rows: int
    done: int
    failed: int

    @property
    def owed(self) -> int:
        return self.rows - self.done - self.failed

    @property
    def complete(self) -> bool:
        """Whether every row of the input is done."""
        return self.begun == self.shards and self.done == self.rows


def read_shards(shards: Shards) -> list[ShardStatus]:
    """Every shard in order. Raises ConfigError for a journal that is none."""
    return [read_shard(shards, index) for index in range(shards.count)]


def read_shard(shards: Shards, index: int) -> ShardStatus:
    output = shards.newest(index)
    if not journal_of(output).exists():
        return ShardStatus(index, None)
    return ShardStatus(index, read_status(output))


def total(found: list[ShardStatus]) -> Total:
    known = [shard.status for shard in found if shard.status is not None]
    return Total(
        shards=len(found),
        begun=len(known),
        settled=sum(shard.settled for shard in found),
        running=sum(status.running is not None for status in known),
        rows=sum(status.accounting.rows or 0 for status in known),
        done=sum(status.accounting.done for status in known),
        failed=sum(status.accounting.failed for status in known),
    )


def unfinished(shards: Shards) -> list[int]:
    """The shards that still owe rows or were not begun, in order."""
    return [shard.index for shard in read_shards(shards) if not shard.settled]
