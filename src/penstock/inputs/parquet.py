"""Parquet files, by row group and in small batches.

Guarantees: a row group without wanted rows is not read, and memory does not depend on the size of row groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from penstock.errors import ConfigError
from penstock.inputs.arrow import batch_rows, missing_package
from penstock.inputs.selection import Wanted, Window
from penstock.inputs.source import Countable, Row

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

BATCH_ROWS: Final = 512
"""Rows that are decoded at a time."""

BUFFER_BYTES: Final = 1 << 20
"""Bytes of a column that are read at a time."""


class ParquetInput(Countable):
    """A Parquet file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def count(self) -> int:
        with self._open() as file:
            return int(file.metadata.num_rows)

    def lines(self) -> Iterator[Row]:
        return self.select(Window())

    def select(self, wanted: Wanted) -> Iterator[Row]:
        with self._open() as file:
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if wanted.stop is not None and first >= wanted.stop:
                    return
                if wanted.within(first, count):
                    yield from self._group(file, group, first, wanted)
                first += count

    def _group(self, file: ParquetFile, group: int, first: int, wanted: Wanted) -> Iterator[Row]:
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
            if local := wanted.within(first, batch.num_rows):
                yield from batch_rows(self.name, first, batch, local)
            first += batch.num_rows

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise missing_package("Parquet files", "pyarrow") from None
        try:
            with pq.ParquetFile(self.path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
                yield file
        except FileNotFoundError:
            raise ConfigError(f"There is no input file {self.path}.") from None
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{self.path} is no Parquet file, or is damaged ({error}).") from None
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read ({error.strerror or error}).") from None
