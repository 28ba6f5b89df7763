"""Arrow tables → rows. A value that cannot be read is named with its row and its column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from penstock.errors import ConfigError
from penstock.inputs.encoding import encode_row
from penstock.inputs.source import Row

if TYPE_CHECKING:
    import pyarrow as pa


def batch_rows(
    name: str, first: int, batch: pa.RecordBatch | pa.Table, local: Sequence[int]
) -> Iterator[Row]:
    """The rows `local` (ascending) of `batch`, whose first row is row `first`, from 0, of the source `name`.

    Rows are named from 1 on. Raises ConfigError, which names row and column.
    """
    names = batch.column_names
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ConfigError(f"{name} has two columns named {twice!r}.")
    if len(local) < batch.num_rows:
        batch = batch.take(list(local))
    numbers = [first + index + 1 for index in local]
    columns = [_values(name, numbers, each, batch.column(each)) for each in names]
    if not columns:
        return
    for number, values in zip(numbers, zip(*columns, strict=True), strict=True):
        where = f"{name} row {number}"
        yield where, encode_row(where, dict(zip(names, values, strict=True)))


def _values(name: str, numbers: Sequence[int], column: str, array: Any) -> list[Any]:
    """The values of a column in Python, those of the rows `numbers`."""
    try:
        values: list[Any] = array.to_pylist()
    except (ValueError, OverflowError, NotImplementedError) as error:
        reason = error
    else:
        return values
    for number, value in zip(numbers, array, strict=True):
        try:
            value.as_py()
        except (ValueError, OverflowError, NotImplementedError) as error:
            raise ConfigError(
                f"{name} row {number}: the column {column!r} ({array.type}) cannot be read ({error})."
            ) from None
    raise ConfigError(f"{name}: the column {column!r} ({array.type}) cannot be read ({reason}).")


def missing_package(what: str, package: str) -> ConfigError:
    """The error for an input whose library is not installed."""
    return ConfigError(f"{what} need the package {package}: pip install 'penstock[datasets]'.")
