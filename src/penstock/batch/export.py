"""Rows to a file, a folder of Parquet parts, or a dataset that `load_from_disk` reads.

Guarantees: what has the target's name is whole: it is written beside it and renamed. Nothing that is there is
replaced unasked, and never a folder that holds anything but an earlier export. Rows are read twice where they
need a schema, once to learn it; memory does not grow with their number.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import msgspec
import zstandard

from penstock.batch.columns import Columns
from penstock.batch.parquet import Sized, batches, decode_row, need_pyarrow, whole_file, write_parquet
from penstock.errors import ConfigError, WriteFailed

PART_BYTES: Final = 512 << 20
"""Bytes of JSON in one part of a folder, about: a third to a tenth of it in Parquet."""

WRITE_BYTES: Final = 1 << 20
"""Bytes of a JSONL file written at a time."""

Rows = Callable[[], Iterator[bytes]]
"""Gives all rows, one JSON object each, the same ones at each call."""

OWN_FILES: Final = ("part-*.parquet", "data-*.arrow", "state.json", "dataset_info.json")
"""What a folder may hold that is replaced."""


class Target(msgspec.Struct, frozen=True):
    """Where to, as the command line names it."""

    kind: Literal["jsonl", "parquet", "folder", "dataset"]
    path: Path

    @classmethod
    def parse(cls, text: str) -> Target:
        """`x.jsonl` (.gz, .zst), `x.parquet`, `FOLDER/` or `hf:FOLDER`. Raises ConfigError."""
        if text.startswith("hf:") and len(text) > 3:
            return cls("dataset", Path(text[3:]))
        path = Path(text)
        if text.endswith("/") or path.is_dir():
            return cls("folder", path)
        if path.suffix == ".parquet":
            return cls("parquet", path)
        if path.suffix in (".jsonl", ".gz", ".zst"):
            return cls("jsonl", path)
        raise ConfigError(
            f"{text}: an export goes to a file .jsonl (.jsonl.gz, .jsonl.zst) or .parquet, to FOLDER/ "
            "(Parquet in parts) or to hf:FOLDER (a Hugging Face dataset)."
        )

    @property
    def is_folder(self) -> bool:
        return self.kind in ("folder", "dataset")

    def check(self, overwrite: bool) -> None:
        """Raises ConfigError where something is in the way."""
        path = self.path
        if self.is_folder and path.is_dir():
            foreign = [file.name for file in path.iterdir() if not any(map(file.match, OWN_FILES))]
            if foreign:
                raise ConfigError(f"{path} holds {foreign[0]}, which is no export: name a folder of its own.")
            if not overwrite and any(path.iterdir()):
                raise ConfigError(f"{path} is not empty: --overwrite replaces what is there.")
        elif path.is_dir() or (self.is_folder and path.exists()):
            raise ConfigError(f"{path} is {'a folder' if path.is_dir() else 'a file'}.")
        elif path.exists() and not overwrite:
            raise ConfigError(f"{path} is there already: --overwrite replaces it.")


class Exported(msgspec.Struct, frozen=True):
    """What was written."""

    rows: int
    as_json: list[str]
    """Columns in which rows differ so much that they are JSON text; always empty for JSONL."""


def export(rows: Rows, target: Target) -> Exported:
    """Write `rows` to `target`; what is there is replaced. Raises ConfigError, and WriteFailed."""
    if not target.path.parent.is_dir():
        raise ConfigError(f"There is no folder {target.path.parent} to write to.")
    if target.kind == "jsonl":
        return Exported(_write_jsonl(rows(), target.path), [])
    need_pyarrow("An export with columns")
    count, columns = _learn(rows())
    if target.kind == "parquet":
        write_parquet(_sized(rows()), target.path, columns)
    elif target.kind == "folder":
        with _whole_folder(target.path) as folder:
            _write_parts(rows(), folder, columns)
    else:
        _write_dataset(rows(), target.path, columns)
    return Exported(count, columns.as_json())


def _learn(rows: Iterable[bytes]) -> tuple[int, Columns]:
    columns, count = Columns(), 0
    for line in rows:
        columns.see(decode_row(line))
        count += 1
    if not columns.shapes:
        raise ConfigError("There are no rows to export yet.")
    return count, columns


def _sized(rows: Iterable[bytes]) -> Iterator[Sized]:
    return ((len(line), decode_row(line)) for line in rows)


def _write_jsonl(rows: Iterable[bytes], path: Path) -> int:
    count = 0
    with whole_file(path) as unfinished, _packed(unfinished, path.suffix) as file:
        for line in rows:
            file.write(line + b"\n")
            count += 1
    return count


@contextmanager
def _packed(unfinished: Path, suffix: str) -> Iterator[BinaryIO]:
    if suffix == ".gz":
        import gzip

        with gzip.open(unfinished, "wb") as packed:
            yield packed  # type: ignore[misc]
    elif suffix == ".zst":
        with zstandard.open(unfinished, "wb") as packed:
            yield packed
    else:
        with unfinished.open("wb", buffering=WRITE_BYTES) as plain:
            yield plain


def _write_parts(rows: Iterable[bytes], folder: Path, columns: Columns) -> None:
    """Parts of about `PART_BYTES` each."""
    left = iter(rows)
    number = 0
    while (first := next(left, None)) is not None:
        write_parquet(_sized(_some(first, left)), part_path(folder, number), columns)
        number += 1


def _some(first: bytes, rows: Iterator[bytes]) -> Iterator[bytes]:
    """`first` and as many more as make a part."""
    yield first
    size = len(first)
    while size < PART_BYTES and (line := next(rows, None)) is not None:
        size += len(line)
        yield line


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05}.parquet"


@contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write to that gets the name `path`, in place of what has it, when all went well.

    Raises WriteFailed.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        if path.exists():
            shutil.rmtree(path)
        unfinished.rename(path)
    except OSError as error:
        raise WriteFailed(f"{path} could not be written ({error.strerror or error}).") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_dataset(rows: Iterable[bytes], path: Path, columns: Columns) -> None:
    """As `Dataset.save_to_disk` does, from an Arrow file whose rows are not held in memory."""
    try:
        import datasets
    except ImportError:
        raise ConfigError("A dataset needs the package datasets: pip install 'penstock[datasets]'.") from None
    import pyarrow as pa

    schema = columns.schema()
    stream = path.with_name(f".{path.name}.rows.tmp")
    try:
        with _whole_folder(path) as folder:
            with pa.OSFile(str(stream), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                for batch in batches(_sized(rows), schema, columns.fits()):
                    writer.write_batch(batch)
            with _quiet(datasets):
                datasets.Dataset.from_file(str(stream)).save_to_disk(str(folder))
    finally:
        stream.unlink(missing_ok=True)


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without progress bars."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
