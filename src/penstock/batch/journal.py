"""The journal: what makes a job resumable.

An append-only text file beside the output. Each line is a record: its CRC-32 in hex, a kind, and the rest.

    job   {header}                     the first line: what the job is
    s ROW INDEX {sample}               a finished sample
    f ROW INDEX {failure}              a sample that was given up
    w ROW START END CRC                row ROW stands at bytes START..END of the output, with this CRC-32
    t END                              the output was cut to END bytes; what stood behind is void
    r                                  retry: failures so far are forgotten

Invariants:
1. A line whose checksum does not fit holds nothing; a torn last line is cut when the journal is opened.
2. A sample is in the journal before its row is in the output, a row in the output before its `w` record.
3. So the output is a pure function of journal and input: whatever part of it is missing, torn or not what
   its record says is cut away and written again from the samples; nothing finished is lost, no row doubles.
4. `w` records join without a gap. Where one is missing, the output is void from there on.
5. One process has the journal open: a second is refused.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
import orjson

from penstock.errors import ConfigError, ResumeRefused, WriteFailed

VERSION = 1
"""Version of the format, written in the header."""

VERIFIED_TAIL = 8 << 20
"""Bytes at the end of the output that are checked against their checksums when a job is opened: more than
is written between two calls of fdatasync."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a job is. A resume must agree in every field of `parameters` and in the input."""

    parameters: dict[str, Any]
    rows: int
    digest: str
    version: int = VERSION
    penstock: str = ""
    """The version of penstock that began the job; may differ between a job and its resume."""

    def differences(self, other: Header) -> list[str]:
        """How `other` (asked for now) differs from this header (on disk), a clause each."""
        names = sorted(self.parameters.keys() | other.parameters.keys())
        found = [
            f"{name} was {_show(self.parameters.get(name))} and is now {_show(other.parameters.get(name))}"
            for name in names
            if self.parameters.get(name) != other.parameters.get(name)
        ]
        if self.rows != other.rows:
            found.append(f"the input had {self.rows} rows and has now {other.rows}")
        elif self.digest != other.digest:
            found.append("the input's content is another")
        if self.version != other.version:
            found.append(f"the journal's format was {self.version} and is now {other.version}")
        return found


class Span(NamedTuple):
    """Where a record's payload lies in the journal, in bytes."""

    offset: int
    length: int


class Written(NamedTuple):
    """A `w` record: bytes `start` to `end` of the output hold `row`."""

    row: int
    start: int
    end: int
    crc: int


class State:
    """What the journal says, condensed: 8 bytes a row and a span for each sample not yet in the output."""

    def __init__(self, rows: int) -> None:
        self.ends = array("Q", bytes(8 * rows))
        """End of the row in the output; 0 where it is not written."""
        self.samples: dict[int, dict[int, Span]] = {}
        """Samples of rows that are not in the output, by row and index."""
        self.failures: dict[int, dict[int, Span]] = {}
        self.end = 0
        """Where the output ends, as far as the records say."""
        self.tail: deque[Written] = deque()
        """The last written rows, as many as `VERIFIED_TAIL` covers."""
        self.gap: int | None = None
        """Where the records of the output have a hole: the output is void from there on."""
        self.damaged = 0
        """Lines whose checksum did not fit."""
        self.has_voided_rows = False
        """Whether a written row was voided and its samples are still to be looked up again."""

    def is_written(self, row: int) -> bool:
        return self.ends[row] != 0

    def written(self) -> int:
        return len(self.ends) - self.ends.count(0)

    def apply(self, kind: bytes, rest: bytes, span: Span) -> None:
        """Take in one record. ValueError or IndexError for a record that makes no sense."""
        if kind == b"s" or kind == b"f":
            row, index, payload = rest.split(b" ", 2)
            self._keep(kind, int(row), int(index), span, len(payload))
        elif kind == b"w":
            self._write(Written(*map(int, rest.split(b" "))))
        elif kind == b"t":
            self.void(int(rest))
        elif kind == b"r":
            self.failures.clear()
        else:
            raise ValueError(kind)

    def _keep(self, kind: bytes, row: int, index: int, span: Span, length: int) -> None:
        if self.ends[row]:
            return
        kept = self.samples if kind == b"s" else self.failures
        kept.setdefault(row, {})[index] = Span(span.offset + span.length - length, length)

    def _write(self, written: Written) -> None:
        if written.start != self.end:
            self.gap = min(written.start, self.end, *(() if self.gap is None else (self.gap,)))
        self.ends[written.row] = written.end
        self.end = written.end
        self.samples.pop(written.row, None)
        self.failures.pop(written.row, None)
        self.tail.append(written)
        while self.tail and self.tail[0].end < self.end - VERIFIED_TAIL:
            self.tail.popleft()

    def void(self, end: int) -> None:
        """The output ends at `end`: rows behind it are not written."""
        for row, stop in enumerate(self.ends):
            if stop > end:
                self.ends[row] = 0
                self.has_voided_rows = True
        while self.tail and self.tail[-1].end > end:
            self.tail.pop()
        self.end = min(self.end, end)
        if self.gap is not None and end <= self.gap:
            self.gap = None


def encode(kind: bytes, rest: bytes = b"") -> bytes:
    """One line of the journal."""
    body = b"%b %b" % (kind, rest) if rest else kind
    return b"%08x %b\n" % (zlib.crc32(body), body)


def decode(line: bytes) -> tuple[bytes, bytes] | None:
    """(kind, rest) of a line without its end; None when the checksum does not fit."""
    try:
        if len(line) < 10 or line[8:9] != b" " or int(line[:8], 16) != zlib.crc32(line[9:]):
            return None
    except ValueError:
        return None
    kind, _, rest = line[9:].partition(b" ")
    return kind, rest


class Journal:
    """An open journal: its header, its state, and a file to append to.

    Raises ConfigError when the file cannot be opened, is in use, or is not a journal; ResumeRefused when
    it belongs to another job.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self._fd = _open_locked(path)
        try:
            self._cut_torn_line()
            self._is_new = os.fstat(self._fd).st_size == 0
            if not self._holds_job(header):
                os.ftruncate(self._fd, 0)
                self.append(encode(b"job", orjson.dumps(msgspec.to_builtins(header))))
            self.state = self._scan(header.rows)
        except BaseException:
            self.close()
            raise

    def append(self, lines: bytes) -> None:
        """Append whole lines. Raises WriteFailed."""
        write_all(self._fd, lines, self.path)

    def sync(self) -> None:
        sync_file(self._fd, self.path)

    def read(self, span: Span) -> bytes:
        data = os.pread(self._fd, span.length, span.offset)
        if len(data) != span.length:
            raise WriteFailed(f"{self.path} was cut while it was in use; run the same command again.")
        return data

    def void_output(self, end: int) -> None:
        """Record that the output was cut to `end`, and find the samples of the rows that fell away."""
        self.append(encode(b"t", b"%d" % end))
        self.state.void(end)
        self._recover_samples(self.state)

    def forget_failures(self) -> None:
        """What failed so far is owed again."""
        self.append(encode(b"r"))
        self.state.failures.clear()

    def close(self) -> None:
        os.close(self._fd)

    def discard(self) -> None:
        """Close, and leave no trace of a job that never was: a journal made just now is removed."""
        if self._is_new:
            self.path.unlink(missing_ok=True)
        self.close()

    def _holds_job(self, header: Header) -> bool:
        """Whether there is anything to resume. Raises when what is there is another job's."""
        with self._reader() as file:
            first, second = file.readline(), file.readline()
        if not first:
            return False
        found = decode(first[:-1])
        if found is None or found[0] != b"job":
            raise ConfigError(f"{self.path} is not a penstock journal, or its first line is damaged.")
        differences = msgspec.json.decode(found[1], type=Header).differences(header)
        if differences and second:
            raise ResumeRefused(
                f"{self.path} belongs to another job: {'; '.join(differences)}. "
                "Use another --out, or the parameters and input it was begun with.",
                differences,
            )
        return not differences

    def _reader(self) -> BinaryIO:
        file = os.fdopen(os.dup(self._fd), "rb", buffering=1 << 20)
        file.seek(0)
        return file

    def _records(self) -> Iterator[tuple[Span, tuple[bytes, bytes] | None]]:
        """(span of the line without its end, record or None) of each line after the header."""
        with self._reader() as file:
            offset = len(file.readline())
            for line in file:
                yield Span(offset, len(line) - 1), decode(line[:-1])
                offset += len(line)

    def _scan(self, rows: int) -> State:
        state = State(rows)
        for span, record in self._records():
            try:
                if record is None:
                    raise ValueError("checksum")
                state.apply(*record, span)
            except (ValueError, IndexError, TypeError):
                state.damaged += 1
        self._recover_samples(state)
        return state

    def _recover_samples(self, state: State) -> None:
        """Samples are forgotten once their row is written: find those of rows voided since."""
        if not state.has_voided_rows:
            return
        state.samples.clear()
        state.failures.clear()
        for span, record in self._records():
            if record is not None and record[0] in (b"s", b"f", b"r"):
                state.apply(*record, span)
        state.has_voided_rows = False

    def _cut_torn_line(self) -> None:
        size = os.fstat(self._fd).st_size
        end = size
        while end > 0:
            start = max(0, end - (1 << 16))
            newline = os.pread(self._fd, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._fd, end)


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


def write_all(fd: int, data: bytes, path: Path) -> None:
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


def _show(value: Any) -> str:
    return "unset" if value is None else orjson.dumps(value).decode()
