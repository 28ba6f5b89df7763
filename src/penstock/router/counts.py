"""What the processes of a router show each other: numbers in memory they share.

Each process has a row of its own, which nobody else writes while it lives, so that there is no lock and a
process may be killed at any instruction; the parent clears the row of a dead one. A number is an aligned word
of 8 bytes, written and read whole. What is read of the others is a moment old; nothing that has to be exact
(see `penstock.router.ledger`) is decided by it.
"""

from __future__ import annotations

import mmap
import os
import sys
from typing import Final

IN_FLIGHT: Final = 0
"""Requests in flight; in place of a worker's number 0: requests that wait."""
AWAY: Final = 1
"""Not 0: the worker gets no requests from this process; DOWN, or BEHIND."""
DONE: Final = 2
TOKENS: Final = 3
MICROSECONDS: Final = 4
"""Requests that ended well, their tokens, their time: since the process began."""
SATURATED: Final = 5
"""Looks at which requests waited while the worker was at its limit."""
OVERLOADS: Final = 6
"""Requests it refused because it had too many."""
KINDS: Final = 7

DOWN: Final = 1
"""It accepts no connections, or is not well."""
BEHIND: Final = 2
"""It has not the weights it should have."""

COLUMNS: Final = 2048
"""Workers at a time, and one."""
WAITING: Final = 0
_WORD: Final = 8


class Counts:
    """The table of `processes` rows in the file `fd`; that of the process `own` is written."""

    def __init__(self, fd: int, processes: int, own: int = 0) -> None:
        self.processes = processes
        self._memory = mmap.mmap(fd, processes * KINDS * COLUMNS * _WORD)
        self._bytes = memoryview(self._memory)
        words = self._bytes.cast("q")
        self.rows = [words[self._at(own, kind) : self._at(own, kind) + COLUMNS] for kind in range(KINDS)]
        """The own row, a list of numbers by worker for each kind."""
        self._words = words
        self._others = [row for row in range(processes) if row != own]

    @staticmethod
    def create(processes: int) -> int:
        """A file for the table, empty: its descriptor."""
        fd = os.memfd_create("penstock-router")
        os.ftruncate(fd, processes * KINDS * COLUMNS * _WORD)
        return fd

    def elsewhere(self, kind: int, count: int) -> list[int]:
        """The sums over the other processes, for workers 0 to count - 1."""
        size, total = count * _WORD, 0
        for row in self._others:
            begin = self._at(row, kind) * _WORD
            total += int.from_bytes(self._bytes[begin : begin + size], sys.byteorder)  # all in one addition
        return memoryview(total.to_bytes(size, sys.byteorder)).cast("q").tolist()

    def get(self, process: int, kind: int, worker: int) -> int:
        return self._words[self._at(process, kind) + worker]

    def waiting_elsewhere(self) -> int:
        return sum(self._words[self._at(row, IN_FLIGHT) + WAITING] for row in self._others)

    def clear(self, process: int) -> None:
        """It is dead."""
        begin, size = self._at(process, 0) * _WORD, KINDS * COLUMNS * _WORD
        self._bytes[begin : begin + size] = bytes(size)

    def close(self) -> None:
        for row in self.rows:
            row.release()
        self._words.release()
        self._bytes.release()
        self._memory.close()

    @staticmethod
    def _at(process: int, kind: int) -> int:
        return (process * KINDS + kind) * COLUMNS
