"""The flags that say what is read: the same for every command with rows as its input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from penstock.errors import ConfigError
from penstock.inputs.opened import DatasetOptions, open_source
from penstock.inputs.selection import parse_shard
from penstock.inputs.source import Source


@dataclass(frozen=True)
class InputArgs:
    """Which rows are read: shuffle, then skip, then limit, then shard."""

    input: Annotated[Positional[tuple[str, ...]], arg(metavar="INPUT …")] = ()
    """JSONL (plain, .gz, .zst), CSV, TSV or Parquet files, folders and patterns of them, a folder that
    save_to_disk wrote, the name of a dataset of the hub, or - for JSONL on stdin."""
    dataset_name: str | None = None
    """A dataset of the Hugging Face hub, or a path, instead of INPUT."""
    dataset_config: str | None = None
    """Which of a dataset's configurations."""
    dataset_split: Annotated[str | None, arg(aliases=("--split",))] = None
    """Which of a dataset's splits. Default: train."""
    streaming: bool = False
    """Fetch the rows of a hub's dataset while they are read, instead of the whole dataset first."""
    shuffle: bool = False
    """Take the rows in an order that --seed decides (default: seed 0)."""
    skip: int = 0
    """Leave out this many rows at the beginning."""
    limit: int | None = None
    """Take this many rows at most."""
    shard: str | None = None
    """Take every Nth row: I/N is shard I of N, from 0. slurm: this task of the job array; slurm/N: shard
    SLURM_ARRAY_TASK_ID of N."""

    def open(self, seed: int | None = None) -> Source:
        """The rows; `seed` is of the shuffle. Raises ConfigError."""
        words: list[str | Path] = list(self.input)
        if self.dataset_name is not None:
            words.append(self.dataset_name)
        if not words:
            raise ConfigError("Say what to read: a file, a folder, a dataset's name, or - for stdin.")
        return open_source(
            words,
            dataset=DatasetOptions(
                split=self.dataset_split, config=self.dataset_config, streaming=self.streaming
            ),
            shuffle=(seed or 0) if self.shuffle else None,
            skip=self.skip,
            limit=self.limit,
            shard=None if self.shard is None else parse_shard(self.shard),
        )
