"""The account of a job, from its files alone, whether it runs or not.

It guarantees: nothing is written and no lock is taken, so a job that runs, or is about to, is not disturbed;
done, failed and owed are what the same command would begin with now (see `Sink` and `Journal`): rows whose
end the output does not hold any more are owed, though their samples are not generated again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from penstock.batch import snapshot
from penstock.batch.job import Accounting
from penstock.batch.progress import Progress
from penstock.batch.records import VERSION, Header, Record, records
from penstock.batch.state import NewBeginning, State, rescan, sound_end
from penstock.batch.trace import decode_trace
from penstock.errors import ConfigError
from penstock.inputs.source import Source, Survey
from penstock.prompt import PromptFormat


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the files of a job say."""

    accounting: Accounting
    samples: int | None
    """Samples asked for: rows times samples of a row; None as for the rows."""
    samples_done: int
    samples_failed: int
    samples_kept: int
    """Of the done ones, those of rows that are not in the output yet: a resume does not generate them."""
    running: int | None
    """Process id of the job; None: none is running on this machine."""
    parameters: dict[str, object]
    """What makes the text, and `num_generations`."""
    strays: int
    """Rows of the output that the input did not have when it was read to its end."""
    damaged: int
    """Lines of the journal whose checksum does not fit."""

    @property
    def samples_owed(self) -> int | None:
        return None if self.samples is None else self.samples - self.samples_done - self.samples_failed


class Against(msgspec.Struct, frozen=True):
    """The rows of an input beside those of a job."""

    accounting: Accounting
    """Rows of this input."""
    strays: int
    """Rows of the output that this input does not have: with it, the job would be refused."""


def journal_path(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def read_header(out: Path) -> Header | None:
    """What the job is; None without a journal, or where its first line is not whole."""
    try:
        with journal_path(out).open("rb") as file:
            record = next(records(file.fileno()), None)
        return msgspec.json.decode(record.rest, type=Header) if record and record.kind == b"job" else None
    except (OSError, msgspec.MsgspecError):
        return None


def prompt_format(out: Path) -> PromptFormat | None:
    """How the job made prompts of rows; None: not known."""
    header = read_header(out)
    return None if header is None else PromptFormat.of(header.parameters)


class JournalFollower:
    """Reads a journal up to its last whole line, and on from there when it has grown. What a snapshot has of
    it is not read again.

    Raises ConfigError when there is no journal, or it is none.
    """

    def __init__(self, out: Path) -> None:
        self.path = journal_path(out)
        header = read_header(out)
        if header is None:
            reason = "is not a penstock journal" if self.path.exists() else "is not there"
            raise ConfigError(f"{self.path} {reason}: what a job owes is not known without its journal.")
        if header.version != VERSION:
            raise ConfigError(
                f"{self.path} was written by penstock {header.penstock}, in format {header.version}; "
                f"this penstock reads format {VERSION}."
            )
        self.header = header
        self.state = State(1)
        self._out = out
        self._end = 0
        self._running: int | None = None

    def advance(self) -> Iterator[Record]:
        """Takes in what is new; each record as it is taken in. A journal in which the samples of a row become
        more is begun again: some records come twice."""
        self._running = lock_holder(self.path)  # looked up first: a job that has ended has written all
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not self._end and (known := snapshot.load(self.path, fd, None)) is not None:
                self.state, self._end = known
            if os.fstat(fd).st_size < self._end:
                raise ConfigError(f"{self.path} was begun anew meanwhile: call this again.")
            while True:
                try:
                    yield from self._records(fd)
                    break
                except NewBeginning as begun:
                    self.state, self._end = State(begun.samples), 0
            if self.state.needs_rescan:
                self.state = rescan(fd, self.state)
        finally:
            os.close(fd)

    def _records(self, fd: int) -> Iterator[Record]:
        for record in records(fd, self._end):
            self.state.apply(record)
            self._end = record.offset + len(record.line) + 1
            yield record

    def status(self) -> JobStatus:
        """The account of what `advance` has taken in."""
        if self._running is None:
            self._void_what_is_lost()
        state, target = self.state, self.state.target
        rows = None if target is None else target.rows
        strays, stray_samples = (0, 0) if target is None else (target.strays, target.stray_samples)
        done = state.done - strays
        samples_done = done * state.samples + state.kept_samples - stray_samples
        if rows is not None and (
            rows < done + state.failed or rows * state.samples < samples_done + state.failed_samples
        ):
            rows = None  # the record of a larger input is damaged
        return JobStatus(
            accounting=Accounting(rows, done, state.failed),
            samples=None if rows is None else rows * state.samples,
            samples_done=samples_done,
            samples_failed=state.failed_samples,
            samples_kept=state.kept_samples - stray_samples,
            running=self._running,
            parameters={**self.header.parameters, "num_generations": state.samples},
            strays=strays,
            damaged=state.damaged,
        )

    def against(self, survey: Survey) -> Against:
        """The account of an input as it is now. To be asked after `status`."""
        state = self.state
        rows = state.rows
        rows.begin_pass()
        done = failed = 0
        for hash in survey.hashes:
            slot = rows.meet(hash)
            if state.is_done(slot):
                done += 1
            else:
                failed += state.is_failed(slot)
        strays = state.strays()
        return Against(Accounting(survey.rows, done, failed), strays.done + strays.begun)

    def _void_what_is_lost(self) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            end = self._sound_end(fd)
            if end < self.state.end or self.state.gap is not None:
                self.state = rescan(fd, self.state, end)
        finally:
            os.close(fd)

    def _sound_end(self, fd: int) -> int:
        """How far the output is what the journal says, as `Sink` would find when it is opened."""
        try:
            output = os.open(self._out, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            return sound_end(self.state, fd, output)
        finally:
            os.close(output)


def read_status(out: Path) -> JobStatus:
    """The account of the job that writes `out`. Raises ConfigError without a journal."""
    follower = JournalFollower(out)
    for _ in follower.advance():
        pass
    return follower.status()


def read_against(out: Path, source: Source) -> tuple[JobStatus, Against]:
    """The account of the job, and of `source` as its input. Raises ConfigError when one cannot be read."""
    follower = JournalFollower(out)
    survey = source.survey(PromptFormat.of(follower.header.parameters))
    for _ in follower.advance():
        pass
    return follower.status(), follower.against(survey)


def count_rows(out: Path, source: Source) -> Accounting:
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
            f"{out} has {done} rows and {source.name} only {rows}: they do not belong together."
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
    """A job as its files show it, look after look. `progress` counts its samples, and the tokens of those
    that came since the last snapshot of the journal.

    Raises ConfigError without a journal.
    """

    def __init__(self, out: Path) -> None:
        self._follower = JournalFollower(out)
        self._read = 0
        """Bytes of the journal whose tokens are counted."""
        self.progress = Progress(
            rows=None, rows_done=0, rows_failed=0, samples=None, samples_done=0, samples_failed=0
        )

    def look(self) -> JobStatus:
        """Takes in what the journal has grown by."""
        progress = self.progress
        for record in self._follower.advance():
            if record.kind == b"s" and record.offset >= self._read:
                self._read = record.offset + 1
                progress.add_trace(decode_trace(record.payload(3)))
        status = self._follower.status()
        progress.samples, progress.rows = status.samples, status.accounting.rows
        progress.samples_done, progress.samples_failed = status.samples_done, status.samples_failed
        progress.rows_done, progress.rows_failed = status.accounting.done, status.accounting.failed
        return status
