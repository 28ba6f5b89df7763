"""The journal: what makes a job resumable. An append-only file beside the output; `records` has its format.

Invariants:
1. A line whose checksum does not fit holds nothing; a torn last line is cut when the journal is opened.
2. Rows are named by hash and occurrence, never by position: an input may grow or be shuffled.
3. A sample is in the journal before its row is in the output, a row in the output before its `w` record.
4. So the output is a pure function of journal and input: whatever part of it is missing, torn or not what
   its record says is cut away and written again from the samples; nothing finished is lost, no row doubles.
5. `w` records join without a gap. Where one is missing, the output is void from there on.
6. One process has the journal open: a second is refused.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

import msgspec

from penstock.batch import snapshot
from penstock.batch.records import (
    VERSION,
    Header,
    Target,
    encode,
    encode_json,
    record_at,
    records,
)
from penstock.batch.state import NewBeginning, State, rescan, scan
from penstock.errors import ConfigError, ResumeRefused, WriteFailed

CONTENT: Final = frozenset({b"s", b"f", b"p", b"w"})
"""Kinds of records that hold something of a row: a journal without any can become another job's."""


class Journal:
    """An open journal: its state, and a file to append to.

    samples: of each row, as asked for now. rows: of the input, where that is known.

    Raises ConfigError when the file cannot be opened, is in use, or is not a journal; ResumeRefused when
    it belongs to another job, or has more samples of a row than are asked for.
    """

    def __init__(self, path: Path, header: Header, samples: int = 1, rows: int = 0) -> None:
        self.path = path
        self._is_new = False
        self.fd = _open_locked(path)
        try:
            self._cut_torn_line()
            self._is_new = os.fstat(self.fd).st_size == 0
            if not self._holds_job(header):
                os.ftruncate(self.fd, 0)
                self.end = 0
                self.append(encode_json(b"job", header))
            self.end = os.fstat(self.fd).st_size
            """Where the next record begins."""
            self._kept = 0
            """Where the last snapshot was taken."""
            self.state = self._scan(samples, rows)
            """What the journal says; whoever appends to it takes it in."""
            self._due = snapshot.LEAST_GROWTH
            """Bytes the journal grows by until the next."""
        except BaseException:
            self.discard()
            raise

    def append(self, lines: bytes | bytearray) -> None:
        """Append whole lines. Raises WriteFailed."""
        write_all(self.fd, lines, self.path)
        self.end += len(lines)

    def sync(self) -> None:
        sync_file(self.fd, self.path)

    def payload(self, offset: int, fields: int = 3) -> bytes | None:
        """What the line at `offset` holds behind its first `fields` fields; None where it is damaged."""
        record = record_at(self.fd, offset)
        return record.payload(fields) if record.kind else None

    def aim(self, target: Target) -> None:
        """Record what this run is asked for, where the last one was asked for something else."""
        if target != self.state.target:
            self.append(encode_json(b"i", target))
            self.state.target = target
            self.state.begun = self.state.begun or target.samples

    def begin_anew(self) -> None:
        """The output is written from its beginning, now with as many samples a row as are asked for."""
        samples, place = self.state.samples, self.end
        self.append(encode(b"b", b"%d" % samples))
        self.sync()
        self.state.begin_anew(place, samples)

    def void_output(self, end: int) -> None:
        """Record that the output was cut to `end`, and find the records of the rows that fell away."""
        place = self.end
        self.append(encode(b"t", b"%d" % end))
        self.state.cut(place, end)
        if self.state.needs_rescan:
            self.state = rescan(self.fd, self.state)

    def drop(self, rows: list[tuple[int, int]]) -> None:
        """The input has no such rows any more: what was kept of them is forgotten."""
        self.append(b"".join(encode(b"d", b"%016x %d" % row) for row in rows))
        for hash, occurrence in rows:
            self.state.forget(self.state.rows.slot(hash, occurrence))

    def forget_failures(self) -> None:
        """What failed so far is owed again."""
        if self.state.failed_samples:
            self.append(encode(b"r"))
            self.state.forget_failures()

    def keep_state(self, *, last: bool = False) -> None:
        """Write a snapshot, if enough has come since the last one. `state` must be what the journal says."""
        grown = self.end - self._kept
        if grown < (snapshot.LEAST_GROWTH if last else self._due):
            return
        try:
            size = snapshot.save(self.path, self.fd, self.end, self.state)
        except OSError:
            size = 0  # it is only a cache; that the disk is full is told by who writes what matters
        self._kept = self.end
        self._due = max(snapshot.LEAST_GROWTH, snapshot.GROWTH_PER_BYTE * size)

    def close(self) -> None:
        os.close(self.fd)

    def discard(self) -> None:
        """Close, and leave no trace of a job that never was: a journal made just now is removed."""
        if self._is_new:
            self.path.unlink(missing_ok=True)
        self.close()

    def _holds_job(self, header: Header) -> bool:
        """Whether there is anything to resume. Raises when what is there is another job's."""
        found = next(records(self.fd), None)
        if found is None:
            return False
        if found.kind != b"job":
            raise ConfigError(f"{self.path} is not a penstock journal, or its first line is damaged.")
        try:
            begun = msgspec.json.decode(found.rest, type=Header)
        except msgspec.MsgspecError:
            raise ConfigError(f"{self.path} is not a penstock journal: its first line says so.") from None
        if begun.version != VERSION:
            raise ConfigError(
                f"{self.path} was written by penstock {begun.penstock}, in format {begun.version}; "
                f"this penstock reads format {VERSION}. Finish the job with that one, or use another --out."
            )
        if not _has_content(self.fd):
            return False
        if differences := begun.differences(header):
            raise ResumeRefused(
                f"{self.path} belongs to another job: {'; '.join(differences)}. "
                "Use another --out, or the parameters it was begun with.",
                differences,
            )
        return True

    def _scan(self, samples: int, rows: int) -> State:
        known = snapshot.load(self.path, self.fd, samples)
        state, start = (State(samples), 0) if known is None else known
        self._kept = start
        state.rows.reserve(rows)
        try:
            return scan(self.fd, state, start)
        except NewBeginning as begun:
            difference = f"it has up to {begun.samples} samples of a row, and {samples} are asked for"
            raise ResumeRefused(
                f"{self.path}: {difference}. Samples can be added to a job, not taken away: "
                f"use -n {begun.samples} or more, or another --out.",
                [difference],
            ) from None

    def _cut_torn_line(self) -> None:
        size = os.fstat(self.fd).st_size
        end = size
        while end > 0:
            start = max(0, end - (1 << 16))
            newline = os.pread(self.fd, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(self.fd, end)


def is_blank(path: Path) -> bool:
    """Whether there is no journal at `path`, or one that holds nothing of any row."""
    try:
        with path.open("rb") as file:
            return not _has_content(file.fileno())
    except OSError:
        return True


def _has_content(fd: int) -> bool:
    return any(record.kind in CONTENT for record in records(fd))


def _open_locked(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}).") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise ConfigError(f"{path} is in use by another job; wait for it or use another --out.") from None
    return fd


def write_all(fd: int, data: bytes | bytearray, path: Path) -> None:
    """Write all of `data`, or raise WriteFailed with what the system said."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        raise WriteFailed(
            f"{path} could not be written ({error.strerror}); nothing finished is lost."
        ) from None


def sync_file(fd: int, path: Path) -> None:
    try:
        os.fdatasync(fd)
    except OSError as error:
        raise WriteFailed(f"{path} could not be synced to disk ({error.strerror}).") from None
