"""The output: one line of JSON a row, and the one place that writes to disk.

Invariants:
1. A flush appends samples and failures to the journal, then rows to the output, then the rows' `w` records
   to the journal, in this order; a crash between any two is repaired on open (see `journal`).
2. What was handed in is in the files after about `FLUSH_INTERVAL`, on the disk within a second.
3. Writing is done in a worker thread; a job that outruns the disk waits (`room`).
4. A failed write stops the run: it is raised from `room` and from `close`, never swallowed.
5. An output of fewer samples a row than are asked for now is kept under another name until every row of the
   input is in the new one.
"""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from penstock.batch.journal import Journal, sync_file, write_all
from penstock.batch.records import encode, encode_json
from penstock.batch.state import FAILURE, SAMPLE, STEP, Written, sound_end
from penstock.errors import ConfigError

FLUSH_INTERVAL = 0.1
"""Seconds between the end of a flush and the next; 0.3 at 10,000 rows a second, on a busy loop."""

SYNC_INTERVAL = 0.5
"""Seconds between calls of fdatasync: with the flush before it, a sample is on disk within a second."""

MAX_PENDING = 32 << 20
"""Bytes handed in and not yet written, above which `room` waits."""

RowKey = tuple[int, int]
"""Hash and occurrence of a row."""


class Batch:
    """What is written together."""

    __slots__ = ("base", "failed", "kept", "records", "rows")

    def __init__(self) -> None:
        self.base = 0
        """Where `records` begin in the journal, once they are written."""
        self.records = bytearray()
        self.failed = bytearray()
        self.rows: list[tuple[RowKey, bytes, list[Place]]] = []
        self.kept: list[tuple[int, RowKey, int, int]] = []
        """Kind, row, index and place of each record whose row was not complete in the same moment."""


Place = int | tuple[Batch, int]
"""Where a sample's line begins in the journal: known, or known once the batch is written."""

Flushed = tuple[Batch, list[Written]]
"""What was written, and where its rows are in the output."""


class Sink:
    """Output, failures file and journal of one job; flushes on time inside `async with`, and at its end.

    Opening it repairs the output (a torn line, a lost tail) so that it agrees with the journal. Raises
    ConfigError when the output cannot be written or holds rows no journal knows of.
    """

    def __init__(self, out: Path, failures: Path, journal: Journal) -> None:
        self.out = out
        self.journal = journal
        if 0 < journal.state.begun < journal.state.samples:
            _set_aside(out, journal.state.begun)
            journal.begin_anew()
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
        self._batch = Batch()
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
            self._take_in(await asyncio.to_thread(self._flush, self._take(), True))
            self.journal.keep_state(last=True)
        if self._broken is not None and self._broken is not error:
            raise self._broken

    def add_sample(self, row: RowKey, index: int, payload: bytes) -> Place:
        """A finished sample; `payload` is one JSON object. Returns where it will be in the journal."""
        batch = self._batch
        place = batch, len(batch.records)
        batch.kept.append((SAMPLE, row, index, place[1]))
        self._record(b"s %016x %d %d " % (*row, index), payload)
        return place

    def add_step(self, row: RowKey, index: int, payload: bytes) -> None:
        """A step of a sample that is not finished; `payload` has no line end."""
        self._batch.kept.append((STEP, row, index, len(self._batch.records)))
        self._record(b"p %016x %d %d " % (*row, index), payload)

    def add_failure(self, row: RowKey, index: int, payload: bytes) -> None:
        """`payload` is one JSON object: what the failures file says of this sample."""
        self._batch.kept.append((FAILURE, row, index, len(self._batch.records)))
        self._record(b"f %016x %d %d " % (*row, index), payload)
        self._batch.failed += payload + b"\n"

    def add_note(self, note: dict[str, Any]) -> None:
        """Something that all samples of a run share."""
        self._batch.records += encode_json(b"n", note)

    def add_row(self, row: RowKey, line: bytes, places: list[Place]) -> None:
        """A complete row; `line` without its line end. places: of its samples, by index."""
        kept = self._batch.kept
        if kept and kept[-1][1] == row:
            kept.pop()
        self._batch.rows.append((row, line + b"\n", places))
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

    def asides(self) -> list[Path]:
        """Outputs with fewer samples a row that are kept until every row is in the new one."""
        paths = [aside(self.out, samples) for samples in self.journal.state.befores]
        return [path for path in paths if path.exists()]

    def remove_asides(self) -> None:
        """Every row is in the output: what was kept of outputs with fewer samples is not needed any more."""
        for path in self.asides():
            path.unlink()

    def _record(self, head: bytes, payload: bytes) -> None:
        """Put a record into the batch, as `encode` would make it, but copied once."""
        records = self._batch.records
        records += b"%08x %b" % (zlib.crc32(payload, zlib.crc32(head)), head)
        records += payload
        records += b"\n"
        self._count(len(payload))

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
                flushed = loop.run_in_executor(None, self._flush, self._take(), due)
                await _finish(flushed, self._take_in)
                self.journal.keep_state()
            except Exception as error:  # whatever it is, `room` and `__aexit__` raise it
                self._broken = error
                self._room.set()
                return
            if due:
                synced = loop.time()
            if self._pending <= MAX_PENDING:
                self._room.set()

    def _take(self) -> Batch:
        taken = self._batch
        self._batch, self._pending = Batch(), 0
        return taken

    def _take_in(self, flushed: Flushed) -> None:
        """What was written belongs to the state now."""
        batch, written = flushed
        state = self.journal.state
        for row in written:
            state.write(row, 0)
        base = batch.base
        for kind, (hash, occurrence), index, place in batch.kept:
            state.add(kind, hash, occurrence, index, base + place)
        batch.kept = []

    def _flush(self, batch: Batch, sync: bool) -> Flushed:
        written: list[Written] = []
        batch.base = self.journal.end
        if batch.records:
            self.journal.append(batch.records)
        if batch.failed:
            write_all(self._failures_fd, batch.failed, self._failures_path)
        if batch.rows:
            write_all(self._fd, b"".join(line for _, line, _ in batch.rows), self.out)
            self.journal.append(self._written_records(batch, written))
            self.rows_written += len(batch.rows)
        # Rows on their way hold the batch, to know where their samples are: not what was written.
        batch.records, batch.failed, batch.rows = bytearray(), bytearray(), []
        if sync:
            sync_file(self._fd, self.out)
            self.journal.sync()
        return batch, written

    def _written_records(self, batch: Batch, written: list[Written]) -> bytes:
        lines = []
        for row, line, places in batch.rows:
            start, self._end = self._end, self._end + len(line)
            offsets = [
                b"%d" % (place if isinstance(place, int) else place[0].base + place[1]) for place in places
            ]
            crc = zlib.crc32(line)
            lines.append(
                encode(b"w", b"%016x %d %d %d %d %b" % (*row, start, self._end, crc, b",".join(offsets)))
            )
            written.append(Written(*row, start, self._end, crc, len(places)))
        return b"".join(lines)

    def _repair(self) -> int:
        """Cut the output to what the journal vouches for; returns the number of bytes cut."""
        state = self.journal.state
        size = os.fstat(self._fd).st_size
        if size and not state.end and not state.kept_samples and not state.befores:
            raise ConfigError(
                f"{self.out} is not empty and its journal {self.journal.path} knows nothing of it: "
                "use another --out, or move the file away."
            )
        self._end = sound_end(state, self.journal.fd, self._fd)
        if self._end < state.end or state.gap is not None:
            self.journal.void_output(self._end)
        if self._end < size:
            os.ftruncate(self._fd, self._end)
        return size - self._end


def aside(out: Path, samples: int) -> Path:
    """Where an output with `samples` samples a row is kept while one with more is written."""
    return out.with_name(f"{out.name}.n{samples}")


def _set_aside(out: Path, samples: int) -> None:
    kept = aside(out, samples)
    try:
        size = out.stat().st_size
        if size and (not kept.exists() or kept.stat().st_size <= size):
            out.replace(kept)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{out} cannot be renamed to {kept} ({error.strerror}).") from None


async def _finish(future: asyncio.Future[Flushed], then: Callable[[Flushed], None]) -> None:
    """Wait for `future` even when cancelled meanwhile: files are not closed under a running flush. `then`
    takes what came of it."""
    try:
        await asyncio.wait([future])
    except asyncio.CancelledError:
        await asyncio.wait([future])
        then(future.result())
        raise
    then(future.result())


def _open_output(out: Path) -> int:
    try:
        return os.open(out, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}).") from None


def _open_failures(path: Path, journal: Journal) -> int:
    """The failures file, written anew from what the journal holds."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}).") from None
    lines = bytearray()
    for offset in sorted(journal.state.failures()):
        lines += (journal.payload(offset) or b"{}") + b"\n"
        if len(lines) > MAX_PENDING:
            write_all(fd, lines, path)
            lines.clear()
    write_all(fd, lines, path)
    return fd
