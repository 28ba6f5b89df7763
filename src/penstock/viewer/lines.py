"""The lines of a file that may still grow.

It guarantees:
- a line is given out once, when it is whole: its line end is there, or it is a whole JSON object already (of
  which no longer line can be the continuation); a torn last line waits for its rest;
- a file that became shorter, was replaced or is not what it was before the end is noticed: `Replaced`;
- memory is one line and a read buffer, whatever the file's size; nothing is ever written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import orjson

READ_BYTES: Final = 1 << 20
MARK_BYTES: Final = 64
"""Bytes before the end that are looked at again when the file has grown."""


class Replaced(Exception):
    """The file is not the one whose lines were given out: begin anew."""


class Lines:
    """The lines of `path` from `start` bytes on, a file that need not exist yet."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path = path
        self.end = start
        """Bytes given out as lines, blank ones included."""
        self.size = start
        """Bytes of the file when it was last looked at."""
        self._inode: int | None = None
        self._mark = b""

    @property
    def torn(self) -> int:
        """Bytes behind the last whole line."""
        return self.size - self.end

    def fresh(self) -> Iterator[tuple[int, bytes]]:
        """(offset, line without its end) of each line that has become whole; blank ones are left out.

        Raises Replaced; OSError where the file cannot be read.
        """
        try:
            with self.path.open("rb", buffering=READ_BYTES) as file:
                if self._grown(file.fileno()):
                    file.seek(self.end)
                    yield from self._whole(file)
        except FileNotFoundError:
            if self._inode is not None:
                raise Replaced from None

    def _grown(self, fd: int) -> bool:
        status = os.fstat(fd)
        if self._inode not in (None, status.st_ino) or status.st_size < self.end:
            raise Replaced
        grown = self._inode is None or status.st_size != self.size
        if grown and self._mark and os.pread(fd, len(self._mark), self.end - len(self._mark)) != self._mark:
            raise Replaced
        self._inode, self.size = status.st_ino, status.st_size
        return grown

    def _whole(self, file: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
        for line in file:
            offset = self.end
            if not line.endswith(b"\n") and not _is_object(line):
                self.size = offset + len(line)
                return
            self.end = offset + len(line)
            self.size = max(self.size, self.end)
            self._mark = line[-MARK_BYTES:]
            if stripped := line.strip():
                yield offset, stripped


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False
