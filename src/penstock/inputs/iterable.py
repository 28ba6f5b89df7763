"""Rows that Python hands over: any iterable or async iterable of mappings, a dataset of the library."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from penstock.errors import ConfigError
from penstock.inputs.encoding import encode_row
from penstock.inputs.huggingface import given_dataset
from penstock.inputs.source import Row, Source

Rows = Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]]

NAME = "the rows given"


class GivenRows(Source):
    """An iterable: a list or a tuple can be read again, anything else once."""

    name = NAME

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows = rows
        self.again = isinstance(rows, Sequence)

    def lines(self) -> Iterator[Row]:
        for number, row in enumerate(self._rows, 1):
            yield _row(number, row)


class GivenAsyncRows(Source):
    """An async iterable, read once, on the event loop."""

    name = NAME
    again = False

    def __init__(self, rows: AsyncIterable[Mapping[str, Any]]) -> None:
        self._rows = rows

    def lines(self) -> Iterator[Row]:
        raise ConfigError(f"{self.name} are async: they are read on the event loop.")

    async def async_lines(self) -> AsyncIterator[Row]:
        number = 0
        async for row in self._rows:
            number += 1
            yield _row(number, row)


def from_iterable(rows: Rows) -> Source:
    """`rows` as a source. Raises ConfigError for what cannot be iterated; a row that is no mapping, when it
    is read."""
    if (dataset := given_dataset(rows)) is not None:
        return dataset
    if isinstance(rows, AsyncIterable):
        return GivenAsyncRows(rows)
    if isinstance(rows, Iterable) and not isinstance(rows, str | bytes | Mapping):
        return GivenRows(rows)
    raise ConfigError(f"Rows are an iterable of mappings, not {type(rows).__name__}.")


def _row(number: int, row: Mapping[str, Any]) -> Row:
    where = f"row {number}"
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} is {type(row).__name__}: a row is a mapping of columns to values.")
    return where, encode_row(where, row)
