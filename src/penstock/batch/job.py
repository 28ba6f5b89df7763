"""One batch job: every row of an input to a row of the output.

Invariants:
1. input = done + failed + owed, at every moment; only what is owed is generated.
2. A slot freed is a slot filled: each of `max_concurrent` workers takes the next owed sample as soon as its
   last one is done. There is no barrier, neither between rows nor between the samples of a row.
3. A finished sample goes to the sink at once; its siblings' failures do not touch it. A row is written when
   its last sample is done.
4. A failed sample is data: its row is listed as failed and the job goes on. What no other row would survive
   either (no engine, no permission, a full disk), or more failures than allowed, stops the job, and what was
   not done stays owed.
5. Rows are known by their content: what is done stays done when the input grows or comes in another order.
   Memory does not grow with the rows but for the row table (see `rows`) and 8 bytes a row of the survey.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import msgspec

from penstock import __version__
from penstock.batch.adopt import adopt, is_adoptable
from penstock.batch.failures import FailureLimit
from penstock.batch.generation import Generation
from penstock.batch.journal import Journal, is_blank
from penstock.batch.owed import OwedRow, OwedSamples
from penstock.batch.progress import Progress
from penstock.batch.records import MOST_SAMPLES, Header, Target
from penstock.batch.sink import Sink
from penstock.batch.state import Strays
from penstock.batch.steps import Steps
from penstock.batch.trace import Failure, encode_failure, encode_trace, row_line
from penstock.errors import (
    ConfigError,
    ConnectFailed,
    PenstockError,
    RequestRejected,
    ResponseError,
    ResumeRefused,
    SampleFailed,
    TooManyFailures,
    TransportError,
)
from penstock.fleet.retry import classify
from penstock.inputs.feed import Feed
from penstock.inputs.source import Source, Survey
from penstock.prompt import PromptFormat

HOPELESS_STATUS = frozenset({401, 403, 404})
"""Answers that concern the whole job, not a row: no key, no permission, no such model."""


class JobSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a job does, but for how samples are made."""

    out: Path
    form: PromptFormat = PromptFormat()
    num_generations: int = 1
    """Samples of each row; a resume may ask for more."""
    max_concurrent: int = 512
    """Samples being made at a time; may differ between a job and its resume."""
    retry_failed: bool = False
    max_failures: FailureLimit | None = None
    """More failures than this in one run stop it; None: no limit."""

    @property
    def journal_path(self) -> Path:
        return self.out.with_name(self.out.name + ".journal")

    @property
    def failures_path(self) -> Path:
        return self.out.with_name(self.out.name + ".failures")

    def header(self, fingerprint: Mapping[str, Any]) -> Header:
        parameters = {**self.form.parameters(), **msgspec.to_builtins(dict(fingerprint))}
        set_ones = {name: value for name, value in parameters.items() if value is not None}
        return Header(parameters=set_ones, penstock=__version__)


class Accounting(msgspec.Struct, frozen=True):
    """Rows of the input: `rows` = `done` + `failed` + `owed`."""

    rows: int | None
    """None: the input can be read only once, and was not read to its end."""
    done: int
    failed: int

    @property
    def owed(self) -> int | None:
        return None if self.rows is None else self.rows - self.done - self.failed

    @property
    def complete(self) -> bool:
        return self.done == self.rows


class Job:
    """A job over `source` as `settings` say, a context manager that holds its files.

    fingerprint: what makes the text, as JSON; a resume must agree in it. survey: of the source, if it was
    made; a source that can be read only once has none.

    Opening reads the journal and repairs the output. Raises ConfigError, or ResumeRefused when the output
    belongs to another job, or holds rows that the source does not have.
    """

    def __init__(
        self,
        source: Source,
        settings: JobSettings,
        fingerprint: Mapping[str, Any],
        survey: Survey | None = None,
    ) -> None:
        if not 1 <= settings.num_generations < MOST_SAMPLES:
            raise ConfigError(f"The samples of a row must be 1 to {MOST_SAMPLES - 1:,}.")
        self.source = source
        self.settings = settings
        self.strays = 0
        """Rows of the output that the input turned out not to have: known at the end of an input that can be
        read only once, else such an output is refused."""
        if survey is None and source.again:
            survey = source.survey(settings.form)
        self._survey = survey
        known = 0 if survey is None else survey.rows
        samples = settings.num_generations
        header = settings.header(fingerprint)
        self.adopted = 0
        """Rows of an output without a journal, begun by another program, that are taken as done."""
        if is_adoptable(settings.out) and is_blank(settings.journal_path):
            self.adopted = adopt(
                settings.out, settings.journal_path, header, samples, settings.form, source, survey
            )
        self.journal = Journal(settings.journal_path, header, samples, known)
        try:
            if survey is not None:
                self._refuse_strays(survey)
            if settings.retry_failed:
                self.journal.forget_failures()
            self._sink = Sink(settings.out, settings.failures_path, self.journal)
            try:
                self.journal.aim(self._target(None if survey is None else survey.rows))
            except BaseException:
                self._sink.close()
                raise
        except BaseException:
            self.journal.discard()
            raise
        self.journal.keep_state(last=True)  # so that a long journal is read once
        self.repaired = self._sink.repaired
        """Bytes at the end of the output that were cut, and are written again."""
        self.asides = self._sink.asides()
        """Outputs with fewer samples a row, kept until every row is in the new one."""
        state = self.journal.state
        self._rows_before = state.done
        self.progress = Progress(
            rows=None if survey is None else survey.rows,
            rows_done=state.done,
            rows_failed=state.failed,
            samples=None if survey is None else survey.rows * samples,
            samples_done=state.done * samples + state.kept_samples,
            samples_failed=state.failed_samples,
        )
        self._failed_before = state.failed_samples

    def accounting(self) -> Accounting:
        """What is in the files, as far as it has been written."""
        progress = self.progress
        return Accounting(progress.rows, self._rows_before + self._sink.rows_written, progress.rows_failed)

    def note(self, note: dict[str, Any]) -> None:
        """Put into the journal what all samples of this run share. Before or while it runs."""
        self._sink.add_note(note)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sink.close()
        self.journal.close()

    async def run(self, generation: Generation) -> Accounting:
        """Generate all that is owed, once.

        Raises WriteFailed, ConnectFailed, PhaseTimeout, RequestRejected or TooManyFailures when the job
        cannot go on, and ConfigError when the input changed under it; all that was finished by then is kept.
        """
        settings, owed_samples = self.settings, self.progress.samples_owed
        workers = settings.max_concurrent
        if owed_samples is not None:
            workers = min(workers, owed_samples or 1)
        try:
            async with self._sink, Feed(self.source) as feed, asyncio.TaskGroup() as group:
                owed = OwedSamples(feed, self.journal, settings.form, settings.num_generations, self._survey)
                owed.on_complete = self._write
                owed.on_damaged = self._lose
                for _ in range(workers):
                    group.create_task(self._work(owed, generation))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        if self._survey is None:
            self._end_of_input(owed.rows)
        accounting = self.accounting()
        if accounting.complete:
            self._sink.remove_asides()
        return accounting

    async def _work(self, owed: OwedSamples, generation: Generation) -> None:
        sink = self._sink
        while (sample := owed.take() or await owed.next()) is not None:
            if sink.is_full:
                await sink.room()
            await self._generate(*sample, generation)

    async def _generate(self, row: OwedRow, index: int, generation: Generation) -> None:
        sink, key = self._sink, row.key
        steps = Steps(
            None if row.steps is None else row.steps.pop(index, None), partial(sink.add_step, key, index)
        )
        try:
            trace = await generation(row.prompt, index, steps)
        except (ResponseError, TransportError, SampleFailed) as error:
            if is_hopeless(error):
                raise
            self._fail(row, index, error)
            return
        self.progress.add_trace(trace)
        row.traces[index] = trace, sink.add_sample(key, index, encode_trace(trace))
        if len(row.traces) == self.settings.num_generations:
            self._write(row)

    def _write(self, row: OwedRow) -> None:
        """A row whose samples are all there."""
        found = [row.traces[index] for index in range(self.settings.num_generations)]
        line = row_line(row.prompt.fields, [trace for trace, _ in found])
        self._sink.add_row(row.key, line, [place for _, place in found])
        self.progress.rows_done += 1

    def _lose(self, samples: int) -> None:
        """So many samples were counted as done, and their lines in the journal are damaged."""
        self.progress.samples_done -= samples

    def _fail(self, row: OwedRow, index: int, error: PenstockError) -> None:
        payload = encode_failure(Failure.of(row.prompt, index, error))
        self._sink.add_failure(row.key, index, payload)
        progress = self.progress
        progress.add_failure(error, new_row=not row.failed)
        row.failed = True
        limit = self.settings.max_failures
        failed = progress.samples_failed - self._failed_before
        done = progress.samples_done - progress.resumed_samples
        if limit is not None and limit.is_exceeded(failed, done):
            raise TooManyFailures(
                f"{failed:,} of {failed + done:,} samples failed in this run, and no more than {limit} may. "
                f"The last one: {error} All are in {self.settings.failures_path}."
            )

    def _target(self, rows: int | None, strays: Strays | None = None) -> Target:
        return Target(
            samples=self.settings.num_generations,
            rows=rows,
            strays=strays.done if strays else 0,
            stray_samples=strays.samples if strays else 0,
            digest="" if self._survey is None else self._survey.digest,
            source=self.source.name,
        )

    def _refuse_strays(self, survey: Survey) -> None:
        """Raises ResumeRefused where the journal has rows that the input does not have. Rows that failed are
        let go: someone took them out."""
        state = self.journal.state
        if not len(state.rows):
            return
        for hash in survey.hashes:
            state.rows.meet(hash)
        strays = state.strays()
        if strays.done or strays.begun:
            count = strays.done + strays.begun
            raise ResumeRefused(
                f"{self.settings.out} has {count:,} rows that {self.source.name} does not have. "
                "Give all rows it was begun with (more of them, and in any order, if you like), "
                "or use another --out.",
                [f"{count:,} rows are not in the input"],
            )
        self._let_go(strays)
        state.rows.begin_pass()

    def _end_of_input(self, rows: int) -> None:
        """An input that can be read only once has turned out to have so many rows."""
        state, progress, samples = self.journal.state, self.progress, self.settings.num_generations
        strays = state.strays()
        kept, failed, rows_failed = state.kept_samples, state.failed_samples, state.failed
        self._let_go(strays)
        self.strays = strays.done + strays.begun
        self._rows_before -= strays.done
        progress.rows, progress.samples = rows, rows * samples
        progress.rows_done -= strays.done
        progress.samples_done -= strays.done * samples + strays.samples + kept - state.kept_samples
        progress.samples_failed -= failed - state.failed_samples
        progress.rows_failed -= rows_failed - state.failed
        self.journal.aim(self._target(rows, strays))
        self.journal.sync()

    def _let_go(self, strays: Strays) -> None:
        if strays.unfinished:
            self.journal.drop(strays.unfinished)


def is_hopeless(error: PenstockError) -> bool:
    """Whether every other row would meet the same error."""
    if isinstance(error, RequestRejected):
        return error.status in HOPELESS_STATUS
    return isinstance(error, ConnectFailed) or classify(error).refused
