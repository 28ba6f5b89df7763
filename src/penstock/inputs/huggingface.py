"""Hugging Face datasets: a `save_to_disk` folder, a dataset of the hub, whole or streamed.

Guarantees: rows are read as Arrow holds them, so images and sounds are not decoded. Whatever the library says
against a name, a configuration or a split is passed on as one sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from penstock.errors import ConfigError
from penstock.inputs.arrow import batch_rows, missing_package
from penstock.inputs.selection import Wanted, Window
from penstock.inputs.source import Countable, Row, Source

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BATCH_ROWS: Final = 512
"""Rows taken at a time."""

DEFAULT_SPLIT: Final = "train"
"""The split that is read where none is named and there are several."""


class DatasetInput(Countable):
    """A dataset on this machine's disk."""

    def __init__(self, name: str, dataset: Dataset) -> None:
        self.name = name
        self._dataset = dataset

    def count(self) -> int:
        return len(self._dataset)

    def lines(self) -> Iterator[Row]:
        return self.select(Window())

    def select(self, wanted: Wanted) -> Iterator[Row]:
        tables = self._dataset.with_format("arrow")
        count = len(self._dataset) if wanted.stop is None else min(len(self._dataset), wanted.stop)
        for first in range(0, count, BATCH_ROWS):
            size = min(BATCH_ROWS, count - first)
            if local := wanted.within(first, size):
                yield from batch_rows(self.name, first, tables[first : first + size], local)


class StreamInput(Source):
    """A dataset that is fetched while it is read, once."""

    again = False

    def __init__(self, name: str, dataset: IterableDataset) -> None:
        self.name = name
        self._dataset = dataset

    def lines(self) -> Iterator[Row]:
        first = 0
        try:
            for table in self._dataset.with_format("arrow").iter(BATCH_ROWS):
                yield from batch_rows(self.name, first, table, range(table.num_rows))
                first += table.num_rows
        except ConfigError:
            raise
        except Exception as error:  # the library lets through whatever its file systems raise
            raise ConfigError(f"{self.name} cannot be read after row {first} ({_reason(error)}).") from None


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` is a folder that `save_to_disk` wrote."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_dataset(path: Path, split: str | None) -> Source:
    """The dataset in the folder `path`. Raises ConfigError where it cannot be read or has no such split."""
    datasets = _library()
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder raises whatever its files are missing
        raise ConfigError(f"{path} cannot be read as a dataset ({_reason(error)}).") from None
    if not isinstance(found, datasets.DatasetDict):
        if split is not None:
            raise ConfigError(f"{path} holds one dataset without splits: leave the split {split!r} out.")
        return DatasetInput(str(path), found)
    if split is None:
        split = next(iter(found)) if len(found) == 1 else DEFAULT_SPLIT
    if split not in found:
        raise ConfigError(f"{path} has no split {split!r}: it has {', '.join(found)}.")
    return DatasetInput(f"{path} split {split}", found[split])


def hub_dataset(name: str, config: str | None, split: str | None, streaming: bool) -> Source:
    """The dataset `name` of the hub. Raises ConfigError where it cannot be had."""
    datasets = _library()
    try:
        found = datasets.load_dataset(name, config, split=split or DEFAULT_SPLIT, streaming=streaming)
    except Exception as error:  # the library and the hub's client raise some twenty types
        raise ConfigError(f"The dataset {name!r} cannot be had from the hub: {_reason(error)}.") from None
    shown = f"{name} split {split or DEFAULT_SPLIT}"
    return StreamInput(shown, found) if streaming else DatasetInput(shown, found)


def given_dataset(rows: object) -> Source | None:
    """A dataset of the library as a source; None for anything else."""
    if type(rows).__module__.partition(".")[0] != "datasets":
        return None
    datasets = _library()
    if isinstance(rows, datasets.Dataset):
        return DatasetInput("the dataset", rows)
    if isinstance(rows, datasets.IterableDataset):
        return StreamInput("the dataset", rows)
    return None


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise missing_package("Hugging Face datasets", "datasets") from None
    return datasets


def _reason(error: Exception) -> str:
    """The first line of what it says, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
