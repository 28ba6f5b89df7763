"""What the words of a command line mean, as one source.

A word is, in this order: `-` standard input; `hf:NAME` a dataset of the hub; a folder; a file; a pattern;
else, if it does not look like a path, a dataset of the hub.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from penstock.errors import ConfigError
from penstock.inputs.chained import Selected, SelectedAsync, chain
from penstock.inputs.compressed import PACKED
from penstock.inputs.delimited import DelimitedInput
from penstock.inputs.huggingface import hub_dataset, is_saved_dataset, saved_dataset
from penstock.inputs.jsonl import JsonlInput, StdinInput
from penstock.inputs.parquet import ParquetInput
from penstock.inputs.selection import Shard, Window
from penstock.inputs.shuffled import Shuffled
from penstock.inputs.source import AsyncSource, Source

KINDS: Final = {
    ".jsonl": "JSONL",
    ".ndjson": "JSONL",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
    ".pq": "Parquet",
}
"""Kinds of files by suffix. A file of any other, when it is named itself, is JSONL."""

_PATTERN = re.compile(r"[*?\[]")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class DatasetOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What of a Hugging Face dataset is read, and how."""

    split: str | None = None
    """Default: the only one of a folder, else `train`."""
    config: str | None = None
    streaming: bool = False
    """Fetch rows while they are read, instead of the whole dataset first."""


PLAIN: Final = DatasetOptions()


def open_source(
    specs: Sequence[str | Path],
    *,
    dataset: DatasetOptions = PLAIN,
    shuffle: int | None = None,
    skip: int = 0,
    limit: int | None = None,
    shard: Shard | None = None,
) -> Source:
    """The rows of `specs` in turn; `shuffle` is the seed of their order, None: as they are.

    Raises ConfigError for what is not there, or is not what it looks like.
    """
    if not specs:
        raise ConfigError("Say what to read: files, folders, patterns, a dataset's name, or - for stdin.")
    sources = [source for spec in specs for source in _sources(spec, dataset)]
    if sum(isinstance(source, StdinInput) for source in sources) > 1:
        raise ConfigError("Stdin (-) can be read only once.")
    name = str(specs[0]) if len(specs) == 1 else f"{specs[0]} and {len(specs) - 1} more"
    return select(chain(name, sources), shuffle=shuffle, skip=skip, limit=limit, shard=shard)


def select(
    source: Source,
    *,
    shuffle: int | None = None,
    skip: int = 0,
    limit: int | None = None,
    shard: Shard | None = None,
) -> Source:
    """The part of `source` that is wanted: shuffle, then skip, then limit, then shard."""
    window = Window.of(skip, limit, shard)
    if shuffle is not None:
        if isinstance(source, AsyncSource):
            raise ConfigError(f"{source.name} cannot be shuffled: they are async.")
        return Shuffled(source, shuffle, window)
    if window.is_everything:
        return source
    if isinstance(source, AsyncSource):
        return SelectedAsync(source, window)
    return Selected(source, window)


def _sources(spec: str | Path, dataset: DatasetOptions) -> list[Source]:
    text = str(spec)
    if text == "-":
        return [StdinInput()]
    if text.startswith("hf:"):
        return [_hub(text[3:], dataset)]
    path = Path(spec).expanduser()
    if path.is_dir():
        return _folder(path, dataset)
    if path.exists():
        return [_file(path)]
    if _PATTERN.search(text):
        return _matches(str(path))
    if isinstance(spec, Path) or _kind(path) or text.startswith((".", "~")) or not _HUB_NAME.fullmatch(text):
        raise ConfigError(f"There is no input file {path}.")
    try:
        return [_hub(text, dataset)]
    except ConfigError as error:
        raise ConfigError(f"There is no file {text}. {error}") from None


def _hub(name: str, dataset: DatasetOptions) -> Source:
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"A dataset of the hub is OWNER/NAME, not {name!r}.")
    return hub_dataset(name, dataset.config, dataset.split, dataset.streaming)


def _folder(path: Path, dataset: DatasetOptions) -> list[Source]:
    if is_saved_dataset(path):
        return [saved_dataset(path, dataset.split)]
    files = sorted(child for child in path.iterdir() if child.name[0] not in "._" and _kind(child))
    files = [file for file in files if _is_input(file)]
    if not files:
        raise ConfigError(
            f"{path} has no {', '.join(KINDS)} files of its own: for those of its folders give a pattern, "
            f"'{path}/**/*.parquet'."
        )
    return _of_one_kind(path, files)


def _matches(pattern: str) -> list[Source]:
    files = [file for file in sorted(map(Path, glob.glob(pattern, recursive=True))) if _is_input(file)]  # noqa: PTH207
    if not files:
        raise ConfigError(f"No file matches {pattern}.")
    return _of_one_kind(Path(pattern), files)


def _is_input(path: Path) -> bool:
    """Whether it is a file, and not the output of a job that writes where its input is."""
    return path.is_file() and not path.with_name(f"{path.name}.journal").exists()


def _of_one_kind(where: Path, files: Sequence[Path]) -> list[Source]:
    """Files of several kinds side by side are as a rule the same rows twice."""
    kinds: dict[str, Path] = {}
    for file in files:
        kinds.setdefault(_kind(file) or "JSONL", file)
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise ConfigError(
            f"{where} has files of several kinds ({first.name} is {one}, {second.name} is {other}): "
            "give a pattern for one of them."
        )
    return [_file(file) for file in files]


def _kind(path: Path) -> str | None:
    """The kind of a file by its name, as far as that says."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def _file(path: Path) -> Source:
    match _kind(path):
        case "Parquet":
            if path.suffix in PACKED:
                raise ConfigError(f"{path}: Parquet is packed in itself; unpack the file first.")
            return ParquetInput(path)
        case "CSV":
            return DelimitedInput(path)
        case "TSV":
            return DelimitedInput(path, "\t")
        case _:
            return JsonlInput(path)
