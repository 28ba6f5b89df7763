"""The account of a job, from its files alone, whether it runs or not.

It guarantees: nothing is written and no lock is taken, so a job that runs, or is about to, is not disturbed;
done, failed and owed are what the same command would begin with now (see `Sink` and `Journal`): rows whose
end the output does not hold any more are owed, though their samples are not generated again.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from penstock.batch.job import Accounting
from penstock.batch.journal import Header, Span, State, decode
from penstock.batch.progress import Progress
from penstock.batch.trace import decode_trace
from penstock.errors import ConfigError
from penstock.prompt import JsonlInput, PromptFormat, Template


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the files of a job say."""

    accounting: Accounting
    samples: int
    """Samples asked for: rows times samples of a row."""
    samples_done: int
    samples_failed: int
    samples_kept: int
    """Of the done ones, those of rows that are not in the output yet: a resume does not generate them."""
    running: int | None
    """Process id of the job; None: none is running on this machine."""
    parameters: dict[str, object]
    damaged: int
    """Lines of the journal whose checksum does not fit."""

    @property
    def samples_owed(self) -> int:
        return self.samples - self.samples_done - self.samples_failed


def journal_path(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def read_header(out: Path) -> Header | None:
    """What the job is; None without a journal, or where its first line is not whole."""
    try:
        with journal_path(out).open("rb") as file:
            record = decode(file.readline()[:-1])
        return msgspec.json.decode(record[1], type=Header) if record and record[0] == b"job" else None
    except (OSError, msgspec.MsgspecError):
        return None


def prompt_format(out: Path) -> PromptFormat | None:
    """How the job made prompts of rows; None: not known."""
    header = read_header(out)
    return None if header is None else format_of(header)


def format_of(header: Header) -> PromptFormat:
    """How the job of `header` makes prompts of rows."""
    parameters = header.parameters
    template = parameters.get("prompt_template")
    return PromptFormat(
        prompt_column=parameters.get("prompt_column", "prompt"),
        id_column=parameters.get("id_column"),
        template=None if template is None else Template(template),
        system_prompt=parameters.get("system_prompt"),
    )


class JournalFollower:
    """Reads a journal up to its last whole line, and on from there when it has grown.

    Raises ConfigError when there is no journal, or it is none.
    """

    def __init__(self, out: Path) -> None:
        self.path = journal_path(out)
        header = read_header(out)
        if header is None:
            reason = "is not a penstock journal" if self.path.exists() else "is not there"
            raise ConfigError(f"{self.path} {reason}: what a job owes is not known without its journal.")
        self.header = header
        self.state = State(header.rows)
        self._out = out
        self._end = 0
        self._running: int | None = None

    def advance(self) -> Iterator[tuple[bytes, bytes]]:
        """Takes in what is new; (kind, rest) of each record, as it is taken in."""
        self._running = lock_holder(self.path)  # looked up first: a job that has ended has written all
        with self.path.open("rb", buffering=1 << 20) as file:
            if os.fstat(file.fileno()).st_size < self._end:
                raise ConfigError(f"{self.path} was begun anew meanwhile: call this again.")
            yield from self._records(file)
            if self.state.has_voided_rows:
                self._recover(file)

    def _records(self, file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
        file.seek(self._end)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset, self._end = self._end, self._end + len(line)
            record = decode(line[:-1])
            if record is not None and record[0] == b"job" and offset == 0:
                continue
            try:
                if record is None:
                    raise ValueError("checksum")
                self.state.apply(*record, Span(offset, len(line) - 1))
            except (ValueError, IndexError, TypeError):
                self.state.damaged += 1
            else:
                yield record

    def _recover(self, file: BinaryIO) -> None:
        """Samples are forgotten once their row is written: find those of rows voided since."""
        state = self.state
        state.samples.clear()
        state.failures.clear()
        file.seek(0)
        offset = 0
        while offset < self._end:
            line = file.readline()
            record = decode(line[:-1])
            if record is not None and record[0] in (b"s", b"f", b"r"):
                try:
                    state.apply(*record, Span(offset, len(line) - 1))
                except (ValueError, IndexError, TypeError):
                    pass  # counted when it was first read
            offset += len(line)
        state.has_voided_rows = False

    def status(self) -> JobStatus:
        """The account of what `advance` has taken in."""
        state = self.state
        if self._running is None:
            self._void_what_is_lost()
        each = self.header.parameters.get("num_generations", 1)
        rows = self.header.rows
        written = state.written()
        kept = sum(len(found) for found in state.samples.values())
        return JobStatus(
            accounting=Accounting(rows, written, len(state.failures)),
            samples=rows * each,
            samples_done=written * each + kept,
            samples_failed=sum(len(found) for found in state.failures.values()),
            samples_kept=kept,
            running=self._running,
            parameters=self.header.parameters,
            damaged=state.damaged,
        )

    def _void_what_is_lost(self) -> None:
        end = self._sound_end()
        if end < self.state.end or self.state.gap is not None:
            self.state.void(end)
        if self.state.has_voided_rows:
            with self.path.open("rb", buffering=1 << 20) as file:
                self._recover(file)

    def _sound_end(self) -> int:
        """How far the output is what the journal says, as `Sink` would find when it is opened."""
        state = self.state
        end = state.end if state.gap is None else state.gap
        try:
            fd = os.open(self._out, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            size = os.fstat(fd).st_size
            if size < end:
                end = max(stop for stop in (0, *state.ends) if stop <= size)
            for written in state.tail:
                if written.end > end:
                    break
                if zlib.crc32(os.pread(fd, written.end - written.start, written.start)) != written.crc:
                    return written.start
            return end
        finally:
            os.close(fd)


def read_status(out: Path) -> JobStatus:
    """The account of the job that writes `out`. Raises ConfigError without a journal."""
    follower = JournalFollower(out)
    for _ in follower.advance():
        pass
    return follower.status()


def count_rows(out: Path, source: JsonlInput) -> Accounting:
    """By number alone, where there is no journal: rows of the input against whole lines of the output.

    Raises ConfigError when one of them cannot be read, or the output has more rows than the input.
    """
    rows = sum(1 for _ in source.lines())
    try:
        with out.open("rb", buffering=1 << 20) as file:
            done = sum(line.endswith(b"\n") and not line.isspace() for line in file)
    except OSError as error:
        raise ConfigError(f"{out} cannot be read ({error.strerror}).") from None
    if done > rows:
        raise ConfigError(
            f"{out} has {done} rows and {source.path} only {rows}: they do not belong together."
        )
    return Accounting(rows, done, 0)


def lock_holder(path: Path) -> int | None:
    """The process that holds the lock of `path` on this machine. It is looked up: taking the lock to see,
    even for a moment, could make a job that is just starting refuse its own output."""
    try:
        inode = path.stat().st_ino
        locks = Path("/proc/locks").read_text()
    except OSError:
        return None
    for line in locks.splitlines():
        fields = line.split()
        if len(fields) == 8 and fields[1] == "FLOCK" and fields[5].rsplit(":", 1)[1] == str(inode):
            return int(fields[4])
    return None


class Watched:
    """A job as its files show it, look after look; `progress` counts its samples and their tokens.

    Raises ConfigError without a journal.
    """

    def __init__(self, out: Path) -> None:
        self._follower = JournalFollower(out)
        header = self._follower.header
        samples = header.rows * header.parameters.get("num_generations", 1)
        self.progress = Progress(
            rows=header.rows, rows_done=0, rows_failed=0, samples=samples, samples_done=0, samples_failed=0
        )

    def look(self) -> JobStatus:
        """Takes in what the journal has grown by."""
        progress = self.progress
        for kind, rest in self._follower.advance():
            if kind == b"s":
                metadata = decode_trace(rest.split(b" ", 2)[2]).metadata
                progress.prompt_tokens += metadata.prompt_tokens
                progress.completion_tokens += metadata.completion_tokens
        status = self._follower.status()
        progress.samples_done, progress.samples_failed = status.samples_done, status.samples_failed
        progress.rows_done, progress.rows_failed = status.accounting.done, status.accounting.failed
        return status
