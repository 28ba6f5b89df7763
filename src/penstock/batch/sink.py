"""The output: one line of JSON a row, and the one place that writes to disk.

Invariants:
1. A flush appends samples and failures to the journal, then rows to the output, then the rows' `w` records
   to the journal, in this order; a crash between any two is repaired on open (see `journal`).
2. What was handed in is in the files after about `FLUSH_INTERVAL`, on the disk within a second.
3. Writing is done in a worker thread; a job that outruns the disk waits (`room`).
4. A failed write stops the run: it is raised from `room` and from `close`, never swallowed.
"""

from __future__ import annotations

import asyncio
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self

from penstock.batch.journal import Journal, encode, sync_file, write_all
from penstock.errors import ConfigError

FLUSH_INTERVAL = 0.1
"""Seconds between the end of a flush and the next; 0.3 at 10,000 rows a second, on a busy loop."""

SYNC_INTERVAL = 0.5
"""Seconds between calls of fdatasync: with the flush before it, a sample is on disk within a second."""

MAX_PENDING = 32 << 20
"""Bytes handed in and not yet written, above which `room` waits."""


class Sink:
    """Output, failures file and journal of one job; flushes on time inside `async with`, and at its end.

    Opening it repairs the output (a torn line, a lost tail) so that it agrees with the journal. Raises
    ConfigError when the output cannot be written or holds rows no journal knows of.
    """

    def __init__(self, out: Path, failures: Path, journal: Journal) -> None:
        self.out = out
        self.journal = journal
        self._fd = _open_output(out)
        self._end = 0
        try:
            self.repaired = self._repair()
            self._failures_fd = _open_failures(failures, journal)
        except BaseException:
            os.close(self._fd)
            raise
        self._failures_path = failures
        self.rows_written = 0
        """Rows that are in the output since it was opened, and in the journal as written."""
        self._records = bytearray()
        self._failed = bytearray()
        self._rows: list[tuple[int, bytes]] = []
        self._pending = 0
        self._room = asyncio.Event()
        self._room.set()
        self._broken: Exception | None = None
        self._flusher: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Close the files; a failures file without failures is removed."""
        if os.fstat(self._failures_fd).st_size == 0:
            self._failures_path.unlink(missing_ok=True)
        os.close(self._failures_fd)
        os.close(self._fd)

    async def __aenter__(self) -> Self:
        self._flusher = asyncio.create_task(self._flush_on_time(), name="penstock sink")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._flusher is not None
        self._flusher.cancel()
        await asyncio.wait([self._flusher])
        if self._broken is None:
            await asyncio.to_thread(self._flush_all)
        if self._broken is not None and self._broken is not error:
            raise self._broken

    def add_sample(self, row: int, index: int, payload: bytes) -> None:
        self._records += encode(b"s", b"%d %d %b" % (row, index, payload))
        self._count(len(payload))

    def add_failure(self, row: int, index: int, payload: bytes) -> None:
        """`payload` is one JSON object: what the failures file says of this sample."""
        self._records += encode(b"f", b"%d %d %b" % (row, index, payload))
        self._failed += payload + b"\n"
        self._count(len(payload))

    def add_row(self, row: int, line: bytes) -> None:
        """A complete row; `line` without its line end."""
        self._rows.append((row, line + b"\n"))
        self._count(len(line))

    @property
    def is_full(self) -> bool:
        """Whether nothing should be handed in before `room` has returned."""
        return self._broken is not None or not self._room.is_set()

    async def room(self) -> None:
        """Wait while more than `MAX_PENDING` bytes are unwritten. Raises WriteFailed after a failed write."""
        await self._room.wait()
        if self._broken is not None:
            raise self._broken

    def _count(self, size: int) -> None:
        self._pending += size
        if self._pending > MAX_PENDING:
            self._room.clear()

    async def _flush_on_time(self) -> None:
        loop = asyncio.get_running_loop()
        synced = loop.time()
        while True:
            await asyncio.sleep(FLUSH_INTERVAL)
            due = loop.time() - synced >= SYNC_INTERVAL
            if not (due or self._pending):
                continue
            try:
                await _finish(loop.run_in_executor(None, self._flush, *self._take(), due))
            except Exception as error:  # whatever it is, `room` and `__aexit__` raise it
                self._broken = error
                self._room.set()
                return
            if due:
                synced = loop.time()
            if self._pending <= MAX_PENDING:
                self._room.set()

    def _take(self) -> tuple[bytearray, bytearray, list[tuple[int, bytes]]]:
        taken = self._records, self._failed, self._rows
        self._records, self._failed, self._rows, self._pending = bytearray(), bytearray(), [], 0
        return taken

    def _flush_all(self) -> None:
        self._flush(*self._take(), sync=True)

    def _flush(
        self, records: bytearray, failed: bytearray, rows: list[tuple[int, bytes]], sync: bool
    ) -> None:
        if records:
            self.journal.append(bytes(records))
        if failed:
            write_all(self._failures_fd, bytes(failed), self._failures_path)
        if rows:
            write_all(self._fd, b"".join(line for _, line in rows), self.out)
            self.journal.append(self._written_records(rows))
            self.rows_written += len(rows)
        if sync:
            sync_file(self._fd, self.out)
            self.journal.sync()

    def _written_records(self, rows: list[tuple[int, bytes]]) -> bytes:
        lines = []
        for row, line in rows:
            start, self._end = self._end, self._end + len(line)
            lines.append(encode(b"w", b"%d %d %d %d" % (row, start, self._end, zlib.crc32(line))))
        return b"".join(lines)

    def _repair(self) -> int:
        """Cut the output to what the journal vouches for; returns the number of bytes cut."""
        state = self.journal.state
        size = os.fstat(self._fd).st_size
        if size and not state.end and not state.samples:
            raise ConfigError(
                f"{self.out} is not empty and its journal {self.journal.path} knows nothing of it: "
                "use another --out, or move the file away."
            )
        self._end = self._sound_end(size)
        if self._end < state.end or state.gap is not None:
            self.journal.void_output(self._end)
        if self._end < size:
            os.ftruncate(self._fd, self._end)
        return size - self._end

    def _sound_end(self, size: int) -> int:
        """How far the output is what the journal's records say."""
        state = self.journal.state
        end = state.end if state.gap is None else state.gap
        if size < end:
            end = max(stop for stop in (0, *state.ends) if stop <= size)
        for written in state.tail:
            if written.end > end:
                break
            line = os.pread(self._fd, written.end - written.start, written.start)
            if zlib.crc32(line) != written.crc:
                return written.start
        return end


async def _finish(future: asyncio.Future[None]) -> None:
    """Wait for `future` even when cancelled meanwhile: files are not closed under a running flush."""
    try:
        await asyncio.wait([future])
    except asyncio.CancelledError:
        await asyncio.wait([future])
        future.result()
        raise
    future.result()


def _open_output(out: Path) -> int:
    try:
        return os.open(out, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}).") from None


def _open_failures(path: Path, journal: Journal) -> int:
    """The failures file, written anew from what the journal holds."""
    lines = [
        journal.read(span)
        for row in sorted(journal.state.failures)
        for span in journal.state.failures[row].values()
    ]
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}).") from None
    write_all(fd, b"".join(line + b"\n" for line in lines), path)
    return fd
