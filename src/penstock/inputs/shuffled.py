"""Rows in an order that a seed decides.

Guarantees: each row in exactly one place, the same order each time (see `selection`). Plain JSONL files are
read where their lines stand; a source that knows its rows but cannot seek (Parquet, a dataset) is read once
for those that are wanted, any other once as a whole, and these rows lie in a temporary file (TMPDIR) until
the source is dropped. Memory is 24 bytes a row.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Final

from penstock.errors import ConfigError
from penstock.inputs.jsonl import JsonlInput
from penstock.inputs.selection import Picked, Window, permutation
from penstock.inputs.source import Countable, Row, Source

OPEN_FILES: Final = 128
"""Files of a shuffled folder that are open at a time."""

SPOOL_BUFFER: Final = 1 << 20
"""Bytes of a spool file written at a time."""


class Shuffled(Source):
    """The rows of `source` in the order of `seed`, those in `window` of them."""

    def __init__(self, source: Source, seed: int, window: Window) -> None:
        self._source = source
        self._seed = seed
        self._window = window
        self._kept: tuple[_Store, Sequence[int]] | None = None
        self.name = source.name
        self.may_be_empty = window.step > 1

    def lines(self) -> Iterator[Row]:
        if self._kept is None:
            self._kept = self._look_through()
        store, order = self._kept
        yield from store.rows(order)

    def _look_through(self) -> tuple[_Store, Sequence[int]]:
        """The rows where they can be read in any order, and the order."""
        if (files := _seekable(self._source)) is not None:
            index = _LineIndex(files)
            return index, self._order(len(index))
        if isinstance(self._source, Countable):
            order = self._order(self._source.count())
            picked = array("Q", sorted(order))
            spool = _Spool(self._source.select(Picked(picked)))
            return spool, array("Q", (bisect_left(picked, index) for index in order))
        spool = _Spool(self._source.lines())
        return spool, self._order(len(spool))

    def _order(self, count: int) -> array[int]:
        return permutation(count, self._seed)[self._window.of_count(count)]


def _seekable(source: Source) -> Sequence[JsonlInput] | None:
    """The plain JSONL files it is made of, if it is."""
    sources: Sequence[Source] = getattr(source, "sources", [source])
    files = [each for each in sources if isinstance(each, JsonlInput) and each.seekable]
    return files if len(files) == len(sources) else None


class _Store(ABC):
    """Rows that can be read in any order."""

    @abstractmethod
    def rows(self, order: Sequence[int]) -> Iterator[Row]: ...


class _LineIndex(_Store):
    """Where the rows of plain files stand."""

    def __init__(self, files: Sequence[JsonlInput]) -> None:
        self._files = files
        self._offsets = array("Q")
        self._lengths = array("I")
        self._numbers = array("I")
        self._firsts: list[int] = []
        for file in files:
            self._firsts.append(len(self._offsets))
            for number, offset, length in file.places():
                self._offsets.append(offset)
                self._lengths.append(length)
                self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._offsets)

    def rows(self, order: Sequence[int]) -> Iterator[Row]:
        opened: dict[int, int] = {}
        with ExitStack() as stack:
            for row in order:
                file = bisect_right(self._firsts, row) - 1
                if (fd := opened.get(file)) is None:
                    if len(opened) == OPEN_FILES:
                        stack.close()
                        opened.clear()
                    fd = opened[file] = _open_fd(self._files[file], stack)
                line = os.pread(fd, self._lengths[row], self._offsets[row])
                yield f"{self._files[file].path} line {self._numbers[row]}", line.strip()


def _open_fd(file: JsonlInput, stack: ExitStack) -> int:
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{file.path} cannot be read ({error.strerror}).") from None
    stack.callback(os.close, fd)
    return fd


class _Spool(_Store):
    """Rows in a temporary file that has no name: it goes when it is closed, whatever happens."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._ends = array("Q", [0])
        end = 0
        try:
            self._file = tempfile.TemporaryFile(buffering=SPOOL_BUFFER)  # noqa: SIM115 - see finalize
            weakref.finalize(self, self._file.close)
            for where, line in rows:
                name = where.encode()
                end += self._file.write(b"%b\n%b" % (name, line))
                self._ends.append(end)
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"The rows to shuffle cannot be kept in {tempfile.gettempdir()} ({error.strerror}): "
                "TMPDIR can name a folder with more room."
            ) from None

    def __len__(self) -> int:
        return len(self._ends) - 1

    def rows(self, order: Sequence[int]) -> Iterator[Row]:
        fd = self._file.fileno()
        for row in order:
            start, end = self._ends[row], self._ends[row + 1]
            name, _, line = os.pread(fd, end - start, start).partition(b"\n")
            yield name.decode(), line
