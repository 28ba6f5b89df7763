"""A source of rows, and the survey that looks through one before anything is generated.

Guarantees: a row is one JSON object as bytes without a line end, and where it stands is named in the words
of its own file. `survey` finds every bad row while that is still cheap, counts the rows, and condenses them
to a digest and to hashes by which a resumed job knows them again. Its memory is 8 bytes a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import AsyncIterator, Iterator
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import msgspec

from penstock.errors import ConfigError
from penstock.inputs.selection import Wanted
from penstock.prompt import KEY_BYTES, RESERVED_COLUMNS, PromptFormat, content_hash, parse_row, row_hash

Row = tuple[str, bytes]
"""Where a row stands, in words for a message, and the row: one JSON object without a line end."""


class Survey(msgspec.Struct, frozen=True):
    """What one pass over the input found."""

    rows: int
    digest: str
    """Hash over the content of all rows in order."""
    hashes: array[int]
    """`row_hash` of every row in order, 64 bits each."""


class Source(ABC):
    """Rows, from wherever they are."""

    name: str
    """For messages: the path, the dataset's name, "stdin"."""
    again: bool = True
    """Whether `lines` may be called more than once; False for stdin and for an iterator."""
    may_be_empty: bool = False
    """Whether no rows at all are in order: a shard of few rows."""

    @abstractmethod
    def lines(self) -> Iterator[Row]:
        """Each row in order, lazily. Raises ConfigError where it cannot be read or holds what is no row."""

    def survey(self, form: PromptFormat) -> Survey:
        """One pass over all rows; only where `again`.

        Raises ConfigError for the first row that lacks a column `form` wants, or has one of the result's, and
        for an input without rows.
        """
        return survey(self, form)


class Countable(Source):
    """A source that knows how many rows it has, and passes over those that are not wanted."""

    @abstractmethod
    def count(self) -> int: ...

    @abstractmethod
    def select(self, wanted: Wanted) -> Iterator[Row]:
        """The rows that are `wanted`, in order."""


@runtime_checkable
class AsyncSource(Protocol):
    """A source whose rows are awaited: it can be read once, on the event loop, and only by a `Feed`."""

    name: str

    def async_lines(self) -> AsyncIterator[Row]: ...


def survey(source: Source, form: PromptFormat) -> Survey:
    """See `Source.survey`."""
    digest = blake2b(digest_size=KEY_BYTES)
    hashes = array("Q")
    for where, line in source.lines():
        row = parse_row(where, line)
        form.messages(where, row)
        form.id(where, row)
        if not RESERVED_COLUMNS.isdisjoint(row):
            taken = next(name for name in row if name in RESERVED_COLUMNS)
            raise ConfigError(f"{where}: the column {taken!r} is one of the result's own; rename it.")
        content = content_hash(row)
        digest.update(content)
        hashes.append(row_hash(content))
    if not hashes and not source.may_be_empty:
        raise ConfigError(f"{source.name} holds no rows.")
    return Survey(len(hashes), digest.hexdigest(), hashes)
