"""Rows as Parquet files.

Guarantees: a file is whole when it has its name; memory does not grow with the number of rows. Types are
those of `columns`, so nothing is lost when rows differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from penstock.batch.columns import Columns, Fit
from penstock.errors import ConfigError, WriteFailed

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_ROWS: Final = 8192
"""Rows of a row group, at most."""

GROUP_BYTES: Final = 32 << 20
"""Bytes of JSON of a row group, about, at most."""

COMPRESSION: Final = "zstd"

decode_row = msgspec.json.Decoder().decode
"""One row of JSON in Python: whole numbers of any length as they are."""

Sized = tuple[int, Mapping[str, Any]]
"""A row and about how many bytes of JSON it is."""


def need_pyarrow(what: str) -> None:
    """Raises ConfigError where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ConfigError(f"{what} needs the package pyarrow: pip install 'penstock[datasets]'.") from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; its file gets its name `path`, synced, when all went well, and is removed when not.

    Raises WriteFailed.
    """
    # Datasets are read from folders: a name that begins so is never taken for a part of one.
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise WriteFailed(f"{path} could not be written ({error.strerror or error}).") from None
    finally:
        unfinished.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_parquet(
    rows: Iterable[Sized], path: Path, columns: Columns, metadata: Mapping[bytes, bytes] | None = None
) -> None:
    """Write `rows`, all of which `columns` has met, as the file `path`. Raises WriteFailed."""
    import pyarrow.parquet as pq

    schema = columns.schema()
    if metadata:
        schema = schema.with_metadata(dict(metadata))
    with (
        whole_file(path) as unfinished,
        pq.ParquetWriter(unfinished, schema, compression=COMPRESSION) as writer,
    ):
        for batch in batches(rows, schema, columns.fits()):
            writer.write_batch(batch)


def batches(
    rows: Iterable[Sized], schema: pa.Schema, fits: Mapping[str, Fit | None]
) -> Iterator[pa.RecordBatch]:
    """`rows` in batches of `schema`."""
    group: list[Mapping[str, Any]] = []
    size = 0
    for length, row in rows:
        group.append(row)
        size += length
        if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
            yield _batch(group, schema, fits)
            group, size = [], 0
    if group:
        yield _batch(group, schema, fits)


def _batch(
    rows: list[Mapping[str, Any]], schema: pa.Schema, fits: Mapping[str, Fit | None]
) -> pa.RecordBatch:
    import pyarrow as pa

    arrays = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if (fit := fits[field.name]) is not None:
            values = [fit(value) for value in values]
        arrays.append(pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
