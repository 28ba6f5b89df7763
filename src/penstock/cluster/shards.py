"""The files of a job that is done in shards: an output and a journal for each, in one folder beside OUT.

    OUT.shards/00012-of-00064.jsonl          what shard 12 of 64 has written, with its .journal and .failures
    OUT.shards/00012-of-00064.e0003.jsonl    the same, after it has been taken over three times

Guarantees: names sort in the order of the shards; the number of shards stands in every name, so that a job
cannot go on with another number without it being noticed; of several epochs of a shard the highest counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from penstock.errors import ConfigError

MAX_SHARDS: Final = 99_999
"""More would not sort by their names."""

_NAME: Final = re.compile(r"(\d{5})-of-(\d{5})(?:\.e(\d{4,}))?\.jsonl(\.journal)?\Z")


@dataclass(frozen=True)
class Shards:
    """The files of `count` shards of the job that makes `out`. Raises ConfigError for no number of shards."""

    out: Path
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_SHARDS:
            raise ConfigError(f"The number of shards must be between 1 and {MAX_SHARDS:,}, not {self.count}.")

    @classmethod
    def found(cls, out: Path) -> Self | None:
        """The shards there are of `out`; None: it was not made in shards. Raises ConfigError for shards of
        two numbers."""
        counts = {count for _, count, _ in _files(folder_of(out))}
        if len(counts) > 1:
            raise ConfigError(
                f"{folder_of(out)} holds shards of several jobs ({_listed(counts)}): move those of one away."
            )
        return cls(out, counts.pop()) if counts else None

    @property
    def folder(self) -> Path:
        return folder_of(self.out)

    def prepare(self) -> None:
        """Makes the folder. Raises ConfigError when it cannot be made, or holds shards of another number."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be made ({error.strerror}).") from None
        there = type(self).found(self.out)
        if there is not None and there.count != self.count:
            raise ConfigError(
                f"{self.out} was begun in {there.count} shards: go on with {there.count}, not {self.count}, "
                "or use another --out."
            )

    def output(self, index: int, epoch: int = 0) -> Path:
        """Where a shard's rows are written under its lease of this epoch."""
        later = f".e{epoch:04}" if epoch else ""
        return self.folder / f"{index:05}-of-{self.count:05}{later}.jsonl"

    def epochs(self) -> dict[int, list[int]]:
        """The epochs of which there are files, in order, of each shard that has any."""
        there: dict[int, set[int]] = {}
        for index, _, epoch in _files(self.folder):
            there.setdefault(index, set()).add(epoch)
        return {index: sorted(epochs) for index, epochs in sorted(there.items())}

    def newest(self, index: int) -> Path:
        """The output that counts of a shard, also where there is none yet."""
        return self.output(index, max(self.epochs().get(index, [0])))


def folder_of(out: Path) -> Path:
    return out.with_name(out.name + ".shards")


def journal_of(output: Path) -> Path:
    return output.with_name(output.name + ".journal")


def failures_of(output: Path) -> Path:
    return output.with_name(output.name + ".failures")


def _files(folder: Path) -> list[tuple[int, int, int]]:
    """(index, count, epoch) of each output or journal in the folder."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = (_NAME.match(name) for name in names)
    return [(int(found[1]), int(found[2]), int(found[3] or 0)) for found in matches if found]


def _listed(counts: set[int]) -> str:
    return " and ".join(str(count) for count in sorted(counts))
