"""Which rows of an input are taken, and in which order: shuffle, then skip, then limit, then shard.

Guarantees: a shuffle is a permutation of all rows that depends on their number and the seed alone; the shards
0/n to n-1/n of the same input hold every row that skip and limit leave in exactly one of them, in equal
numbers up to one row.
"""

from __future__ import annotations

import os
import re
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from random import Random
from typing import Protocol

import msgspec

from penstock.errors import ConfigError

Shard = tuple[int, int]
"""(index from 0, number of shards)."""

_SHARD = re.compile(r"(\d+)/(\d+)")
_SLURM = re.compile(r"slurm(?:/(\d+))?")


class Wanted(Protocol):
    """A set of rows, by their index in the input."""

    def within(self, first: int, count: int) -> Sequence[int]:
        """Those of the rows `first` to `first + count - 1`, ascending, counted from `first`."""
        ...

    @property
    def stop(self) -> int | None:
        """No row at or behind this index is wanted; None: there is no bound."""
        ...


class Window(msgspec.Struct, frozen=True):
    """Every `step`th row from `start` on, before `stop`."""

    start: int = 0
    stop: int | None = None
    step: int = 1

    @classmethod
    def of(cls, skip: int = 0, limit: int | None = None, shard: Shard | None = None) -> Window:
        """Raises ConfigError for a negative number, and a shard that is none."""
        index, shards = shard or (0, 1)
        if skip < 0 or (limit is not None and limit < 0):
            raise ConfigError("skip and limit must not be negative.")
        if not 0 <= index < shards:
            raise ConfigError(
                f"There is no shard {index}/{shards}: of {shards} shards the first is 0 and the last "
                f"{shards - 1}."
            )
        return cls(skip + index, None if limit is None else skip + limit, shards)

    @property
    def is_everything(self) -> bool:
        return self == Window()

    def within(self, first: int, count: int) -> range:
        end = first + count if self.stop is None else min(first + count, self.stop)
        begin = self.start if first <= self.start else first + (self.start - first) % self.step
        return range(begin - first, max(begin, end) - first, self.step)

    def of_count(self, count: int) -> slice:
        """The window on a sequence of `count`."""
        return slice(self.start, count if self.stop is None else min(count, self.stop), self.step)


class Picked:
    """Rows one by one; `indices` ascend."""

    def __init__(self, indices: array[int]) -> None:
        self.indices = indices

    @property
    def stop(self) -> int:
        return self.indices[-1] + 1 if self.indices else 0

    def within(self, first: int, count: int) -> Sequence[int]:
        begin = bisect_left(self.indices, first)
        end = bisect_left(self.indices, first + count, begin)
        return [index - first for index in self.indices[begin:end]]


def permutation(count: int, seed: int) -> array[int]:
    """The numbers below `count` in an order that `seed` decides (Fisher and Yates, by `random()`, whose
    sequence Python keeps from version to version): 8 bytes a row."""
    order = array("Q", range(count))
    random = Random(seed).random
    for last in range(count - 1, 0, -1):
        other = int(random() * (last + 1))
        order[last], order[other] = order[other], order[last]
    return order


def parse_shard(text: str, environment: Mapping[str, str] = os.environ) -> Shard:
    """A shard as the command line names it: `3/8`, `slurm` or `slurm/8`.

    `slurm` is this task of a job array as it was submitted; `slurm/8` takes SLURM_ARRAY_TASK_ID as the index
    of 8 shards, so that a task of the array can be submitted again alone. Raises ConfigError.
    """
    if (match := _SHARD.fullmatch(text)) is not None:
        shard = int(match[1]), int(match[2])
        Window.of(shard=shard)
        return shard
    if (match := _SLURM.fullmatch(text)) is None:
        raise ConfigError(f"A shard is INDEX/NUMBER from 0 on, slurm or slurm/NUMBER, not {text!r}.")
    task = _slurm(environment, "ID")
    if match[1] is not None:
        if task >= int(match[1]):
            raise ConfigError(
                f"SLURM_ARRAY_TASK_ID is {task}: of {match[1]} shards the first is 0 and the last "
                f"{int(match[1]) - 1} (sbatch --array=0-{int(match[1]) - 1})."
            )
        return task, int(match[1])
    first, last, count = (_slurm(environment, name) for name in ("MIN", "MAX", "COUNT"))
    step = int(environment.get("SLURM_ARRAY_TASK_STEP") or 1)
    if last != first + (count - 1) * step or (task - first) % step:
        raise ConfigError("The tasks of this job array do not follow evenly: give the shard as INDEX/NUMBER.")
    return (task - first) // step, count


def _slurm(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(f"SLURM_ARRAY_TASK_{name}", "")
    if not value.isdigit():
        raise ConfigError(
            f"SLURM_ARRAY_TASK_{name} is not set: the shard `slurm` is for a task of a Slurm job array."
        )
    return int(value)
