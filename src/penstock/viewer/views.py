"""What a page looks at: the rows of an index that fit a query, in the order it asks for.

A view takes in what its index and its search have found since, and keeps four bytes a row that fits; the
view of everything keeps nothing. `Query` is decided by numbers alone, which the index holds.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Iterable, Sequence
from math import isnan
from typing import Final, Literal

import msgspec

from penstock.viewer.index import Index, Table
from penstock.viewer.search import Pattern, Search, Where

Sort = Literal["position", "length", "tokens", "prompt_tokens", "time", "reward"]

SORT_SHARE: Final = 4
"""A growing view is sorted again after this many times as long as sorting took."""

_COLUMNS: Final = {
    "tokens": "tokens",
    "prompt_tokens": "prompt_tokens",
    "length": "length",
    "time": "latency",
    "reward": "reward",
}
"""What a query calls a column → what the table does."""


class Query(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to show; bounds are inclusive, and a row that does not say fits no bound."""

    source: Literal["rows", "failures"] = "rows"
    text: str = ""
    regex: bool = False
    where: Where = "all"
    finish: str = ""
    """A finish reason, or the class of a failure."""
    tokens_min: float | None = None
    tokens_max: float | None = None
    prompt_tokens_min: float | None = None
    prompt_tokens_max: float | None = None
    length_min: float | None = None
    length_max: float | None = None
    time_min: float | None = None
    time_max: float | None = None
    reward_min: float | None = None
    reward_max: float | None = None
    sort: Sort = "position"
    down: bool = False

    @property
    def pattern(self) -> Pattern | None:
        return Pattern(self.text, self.regex, self.where) if self.text else None

    @property
    def is_bounded(self) -> bool:
        """Whether numbers alone leave rows out."""
        return bool(self.finish) or any(
            getattr(self, f"{name}_{end}") is not None for name in _COLUMNS for end in ("min", "max")
        )

    def select(self, table: Table, rows: Iterable[int]) -> list[int]:
        """Those of `rows` that fit; the text is not looked at."""
        found = list(rows)
        if self.finish:
            if self.finish not in table.finishes:
                return []
            bit, finish = 1 << table.finishes.index(self.finish), table.finish
            found = [row for row in found if finish[row] & bit]
        for name, column in _COLUMNS.items():
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low is not None or high is not None:
                values = getattr(table, column)
                least = low if low is not None else 0.0 if values.typecode != "f" else float("-inf")
                most = float("inf") if high is None else high
                found = [row for row in found if least <= values[row] <= most]
        return found

    def arrange(self, table: Table, rows: Sequence[int]) -> Sequence[int]:
        """`rows`, ascending, in the order asked for; what does not say comes last."""
        if self.sort == "position":
            return rows[::-1] if self.down else rows
        values = getattr(table, _COLUMNS[self.sort])
        if values.typecode == "f":
            unknown = [row for row in rows if isnan(values[row])]
            known: Iterable[int] = [row for row in rows if not isnan(values[row])] if unknown else rows
        else:
            unknown = [row for row in rows if values[row] < 0]
            known = [row for row in rows if values[row] >= 0] if unknown else rows
        return [*sorted(known, key=values.__getitem__, reverse=self.down), *unknown]


class View:
    """The rows of `index` that fit `query`; `search` looks for its text."""

    def __init__(self, index: Index, query: Query, search: Search | None) -> None:
        self._index = index
        self.query = query
        self.table = index.table
        self.search = search
        self.used = time.monotonic()
        """When it was last asked for."""
        self._lock = threading.Lock()
        self._fits: array[int] | None = array("I") if search or query.is_bounded else None
        self._seen = 0
        """Rows, or hits of the search, that were looked at."""
        self._order: Sequence[int] | None = None
        self._ordered = 0
        self._sorted = self._sort_cost = 0.0

    @property
    def is_stale(self) -> bool:
        """Whether the file was replaced since."""
        return self.table is not self._index.table

    def update(self) -> int:
        """Takes in what is new; the number of rows that fit. Runs in any thread, one at a time."""
        with self._lock:
            fits = self._fits
            if fits is None:
                self._sort(self.table.rows, range(self.table.rows))
                return len(self._rows())
            if self.search is None:
                last = self.table.rows
                fits.extend(self.query.select(self.table, range(self._seen, last)))
                self._seen = last
            else:
                hits = self.search.hits
                fresh = [hit for hit in hits[self._seen :] if hit < self.table.rows]
                fits.extend(self.query.select(self.table, fresh))
                self._seen += len(fresh)
            self._sort(len(fits), fits)
            return len(self._rows())

    def rows(self, first: int, count: int) -> list[int]:
        """The numbers of the rows at places `first`… of the view."""
        with self._lock:
            return list(self._rows()[first : first + count])

    def place(self, row: int) -> int | None:
        """Where in the view a row stands."""
        with self._lock:
            rows = self._rows()
            try:
                return rows.index(row)
            except ValueError:
                return None

    def _rows(self) -> Sequence[int]:
        if self._order is not None:
            return self._order
        return range(self.table.rows) if self._fits is None else self._fits

    def _sort(self, count: int, rows: Sequence[int]) -> None:
        query = self.query
        if query.sort == "position" and not query.down:
            return
        began = time.monotonic()
        if count == self._ordered and self._order is not None:
            return
        if began - self._sorted < SORT_SHARE * self._sort_cost:
            return
        order = query.arrange(self.table, rows)
        self._order = order if isinstance(order, range) else array("I", order)
        self._ordered, self._sorted = count, time.monotonic()
        self._sort_cost = self._sorted - began
