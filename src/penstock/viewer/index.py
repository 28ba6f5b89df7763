"""The index of a file of traces: where each row lies and what it can be filtered and sorted by.

It guarantees: one pass, then only what is added; `Table.BYTES_A_ROW` bytes a row; a reader in another thread
sees whole rows only. Rows themselves are read from disk when asked for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from array import array
from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any, Final

from penstock.viewer.charts import Charts
from penstock.viewer.lines import Lines, Replaced
from penstock.viewer.trace_row import Trace, decode_columns, traces

logger = logging.getLogger(__name__)

POLL: Final = 0.3
"""Seconds between two looks at a file that has not grown."""
PUBLISH: Final = 0.25
"""Seconds between two pictures of the charts while the file is read."""
UNREADABLE: Final = "not a row"
"""Finish reason of a line that is no JSON object."""
OTHER: Final = "other"
MOST_FINISHES: Final = 16
UNKNOWN: Final = -1
"""Token count of a row that does not say."""


class Table:
    """Columns of numbers, an element a row. Of several samples the largest counts; rewards are averaged."""

    def __init__(self) -> None:
        self.offsets = array("Q")
        self.tokens = array("i")
        self.prompt_tokens = array("i")
        self.length = array("I")
        """Characters."""
        self.latency = array("f")
        """Seconds; nan: unknown."""
        self.reward = array("f")
        self.finish = array("H")
        """A bit for each of `finishes` the row has."""
        self.finishes: list[str] = []
        self.rows = 0
        """Rows whose columns are all there."""
        self.end = 0
        """Where the last of them ends, bytes."""

    BYTES_A_ROW: Final = 8 + 4 + 4 + 4 + 4 + 4 + 2

    def add(self, offset: int, end: int, found: list[Trace], finishes: Sequence[str]) -> None:
        self.offsets.append(offset)
        completions = (t.completion_tokens for t in found if t.completion_tokens is not None)
        prompts = (t.prompt_tokens for t in found if t.prompt_tokens is not None)
        self.tokens.append(max(completions, default=UNKNOWN))
        self.prompt_tokens.append(max(prompts, default=UNKNOWN))
        self.length.append(max((t.length for t in found), default=0))
        self.latency.append(max((t.latency for t in found if t.latency is not None), default=nan))
        rewards = [t.reward for t in found if t.reward is not None]
        self.reward.append(sum(rewards) / len(rewards) if rewards else nan)
        self.finish.append(sum({1 << self._number(name) for name in finishes}))
        self.end = end
        self.rows += 1

    def span(self, row: int) -> tuple[int, int]:
        """Where a row begins and ends in the file, bytes."""
        return self.offsets[row], (self.offsets[row + 1] if row + 1 < self.rows else self.end)

    def finishes_of(self, row: int) -> list[str]:
        mask = self.finish[row]
        return [name for i, name in enumerate(self.finishes) if mask >> i & 1]

    def _number(self, name: str) -> int:
        if name not in self.finishes:
            if len(self.finishes) >= MOST_FINISHES - 1:
                name = OTHER
            if name not in self.finishes:
                self.finishes.append(name)
        return self.finishes.index(name)


class Index:
    """The index of `path`. `advance` takes in what is new; `follow` does so until it is told to stop.

    One thread writes it; any may read `table`, `charts` and `lines.size`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None
        """Why the file cannot be read now."""
        self._begin()

    def _begin(self) -> None:
        self.lines = Lines(self.path)
        self._counted = Charts()
        self._published = 0.0
        self._is_current = False
        self.charts: dict[str, Any] = self._counted.data()
        self.table = Table()
        """Another object once the file was replaced."""

    @property
    def is_current(self) -> bool:
        """Whether all that was there at the last look has been taken in."""
        return self._is_current

    def follow(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                self.advance(stop)
                self.problem = None
            except OSError as error:
                self.problem = f"{self.path} cannot be read ({error.strerror})."
            except Exception:
                logger.exception("indexing %s failed", self.path)
                self.problem = f"{self.path} cannot be indexed further, see the viewer's log."
                return
            stop.wait(POLL)

    def advance(self, stop: threading.Event | None = None) -> None:
        """Takes in all lines that are whole now, or as many as there is time for. Raises OSError."""
        before = self.table.rows
        try:
            for offset, line in self.lines.fresh():
                self._is_current = False
                self._add(offset, line)
                if stop is not None and stop.is_set():
                    return
                if not self.table.rows & 63 and time.monotonic() - self._published > PUBLISH:
                    self._publish()
        except Replaced:
            self._begin()
            return
        self._is_current = True
        if self.table.rows != before:
            self._publish()

    def read(self, table: Table, row: int) -> bytes:
        """The line of a row. IndexError when there is none such; OSError."""
        if not 0 <= row < table.rows:
            raise IndexError(row)
        start, end = table.span(row)
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, end - start, start).strip()
        finally:
            os.close(fd)

    def _add(self, offset: int, line: bytes) -> None:
        columns = decode_columns(line)
        found = [] if columns is None else traces(columns)
        finishes = list(dict.fromkeys(trace.finish or "none" for trace in found))
        if columns is None:
            finishes = [UNREADABLE]
        elif isinstance(columns.error, str) and not found:
            finishes = [columns.error]
        self._counted.rows += 1
        for trace in found:
            self._counted.add(trace)
        if not found:
            self._counted.finish.update(finishes)
        self.table.add(offset, self.lines.end, found, finishes)

    def _publish(self) -> None:
        self._published = time.monotonic()
        self.charts = self._counted.data()
