"""Several sources read one after the other, and the part of a source that is wanted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from penstock.errors import ConfigError
from penstock.inputs.selection import Wanted, Window
from penstock.inputs.source import AsyncSource, Countable, Row, Source


class Chained(Source):
    """The rows of `sources` in turn."""

    def __init__(self, name: str, sources: Sequence[Source]) -> None:
        self.name = name
        self.again = all(source.again for source in sources)
        self.sources = sources

    def lines(self) -> Iterator[Row]:
        for source in self.sources:
            yield from source.lines()


class ChainedCountable(Countable):
    """The rows of `sources` in turn; a source without wanted rows is not read."""

    def __init__(self, name: str, sources: Sequence[Countable]) -> None:
        self.name = name
        self.again = all(source.again for source in sources)
        self.sources = sources

    def count(self) -> int:
        return sum(source.count() for source in self.sources)

    def lines(self) -> Iterator[Row]:
        for source in self.sources:
            yield from source.lines()

    def select(self, wanted: Wanted) -> Iterator[Row]:
        first = 0
        for source in self.sources:
            if wanted.stop is not None and first >= wanted.stop:
                return
            count = source.count()
            if wanted.within(first, count):
                yield from source.select(_Shifted(wanted, first))
            first += count


@dataclass(frozen=True)
class _Shifted:
    """`wanted` as a source sees it whose first row has the index `first`."""

    wanted: Wanted
    first: int

    @property
    def stop(self) -> int | None:
        return None if self.wanted.stop is None else max(self.wanted.stop - self.first, 0)

    def within(self, first: int, count: int) -> Sequence[int]:
        return self.wanted.within(first + self.first, count)


def chain(name: str, sources: Sequence[Source]) -> Source:
    """`sources` as one."""
    if len(sources) == 1:
        return sources[0]
    countable = [source for source in sources if isinstance(source, Countable)]
    if len(countable) == len(sources):
        return ChainedCountable(name, countable)
    return Chained(name, sources)


class Selected(Source):
    """The rows of `source` in a window."""

    def __init__(self, source: Source, window: Window) -> None:
        self.name = source.name
        self.again = source.again
        self.may_be_empty = window.step > 1
        self._source = source
        self._window = window

    def lines(self) -> Iterator[Row]:
        if isinstance(self._source, Countable):
            return self._source.select(self._window)
        return islice(self._source.lines(), self._window.start, self._window.stop, self._window.step)


class SelectedAsync(Source):
    """The rows of an async source in a window."""

    again = False

    def __init__(self, source: AsyncSource, window: Window) -> None:
        self.name = source.name
        self.may_be_empty = window.step > 1
        self._source = source
        self._window = window

    def lines(self) -> Iterator[Row]:
        raise ConfigError(f"{self.name} is async: its rows are read on the event loop.")

    async def async_lines(self) -> AsyncIterator[Row]:
        index = 0
        if self._window.stop == 0:
            return
        async for row in self._source.async_lines():
            if self._window.within(index, 1):
                yield row
            index += 1
            if self._window.stop is not None and index >= self._window.stop:
                return
