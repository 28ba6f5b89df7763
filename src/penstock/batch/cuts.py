"""Cuts of the output, as the journal has them. Pure."""

from __future__ import annotations


class Cuts:
    """Which of the rows that were written are void: those that reach behind a later cut of the output."""

    def __init__(self, cuts: list[tuple[int, int]]) -> None:
        """cuts: (where in the journal, new end of the output) of each cut, in order of the journal."""
        self._places = [place for place, _ in cuts]
        self._lowest: list[int] = []
        """The lowest end among a cut and those after it."""
        for _, end in reversed(cuts):
            self._lowest.append(min(end, self._lowest[-1] if self._lowest else end))
        self._lowest.reverse()
        self._next = 0

    def voids(self, offset: int, end: int) -> bool:
        """Whether the row that the record at `offset` puts up to `end` is void. To be asked in order."""
        while self._next < len(self._places) and self._places[self._next] < offset:
            self._next += 1
        return self._next < len(self._lowest) and self._lowest[self._next] < end
