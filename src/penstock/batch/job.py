"""One batch job: every row of an input to a row of the output.

Invariants:
1. input = done + failed + owed, at every moment; only what is owed is generated.
2. A slot freed is a slot filled: each of `max_concurrent` workers takes the next owed sample as soon as its
   last one is done. There is no barrier, neither between rows nor between the samples of a row.
3. A finished sample goes to the sink at once; its siblings' failures do not touch it. A row is written when
   its last sample is done.
4. A failed sample is data: its row is listed as failed and the job goes on. What no other row would survive
   either (no engine, no permission, a full disk) stops the job, and what was not done stays owed.
5. The samples of a row differ: each has its own request and, where a seed was given, its own seed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec

from penstock import __version__
from penstock.batch.journal import Header, Journal, State
from penstock.batch.progress import Progress
from penstock.batch.sink import Sink
from penstock.batch.trace import Failure, Trace, decode_trace, encode_failure, encode_trace, row_line
from penstock.client import Client
from penstock.errors import (
    ConfigError,
    ConnectFailed,
    PenstockError,
    RequestRejected,
    ResponseError,
    TransportError,
)
from penstock.fleet.retry import classify
from penstock.prompt import JsonlInput, Prompt, PromptFormat, Survey
from penstock.sample import SamplingParams

HOPELESS_STATUS = frozenset({401, 403, 404})
"""Answers that concern the whole job, not a row: no key, no permission, no such model."""


class JobSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a job does; with the input, this is what a resume must agree in."""

    out: Path
    model: str
    form: PromptFormat = PromptFormat()
    params: SamplingParams = SamplingParams()
    num_generations: int = 1
    """Samples of each row."""
    max_concurrent: int = 512
    """Requests in flight; may differ between a job and its resume."""
    retry_failed: bool = False

    @property
    def journal_path(self) -> Path:
        return self.out.with_name(self.out.name + ".journal")

    @property
    def failures_path(self) -> Path:
        return self.out.with_name(self.out.name + ".failures")

    def header(self, survey: Survey) -> Header:
        form = self.form
        parameters: dict[str, Any] = {
            "model": self.model,
            "num_generations": self.num_generations,
            "prompt_column": form.prompt_column,
            "id_column": form.id_column,
            "prompt_template": form.template.text if form.template else None,
            "system_prompt": form.system_prompt,
            **msgspec.to_builtins(self.params.as_dict()),
        }
        set_ones = {name: value for name, value in parameters.items() if value is not None}
        return Header(parameters=set_ones, rows=survey.rows, digest=survey.digest, penstock=__version__)


class Accounting(msgspec.Struct, frozen=True):
    """Rows of the input: `rows` = `done` + `failed` + `owed`."""

    rows: int
    done: int
    failed: int

    @property
    def owed(self) -> int:
        return self.rows - self.done - self.failed

    @property
    def complete(self) -> bool:
        return self.done == self.rows


class _Row:
    """A row on its way: its prompt and what is there of its samples."""

    __slots__ = ("failed", "prompt", "traces")

    def __init__(self, prompt: Prompt, traces: dict[int, Trace], failed: bool) -> None:
        self.prompt = prompt
        self.traces = traces
        self.failed = failed


class _Owed(NamedTuple):
    """A sample to be generated."""

    row: _Row
    sample: int
    """Its index in the row."""


class Job:
    """A job over `source` as `settings` say, a context manager that holds its files.

    Opening reads the journal and repairs the output. Raises ConfigError, or ResumeRefused when the output
    belongs to another job.
    """

    def __init__(self, source: JsonlInput, survey: Survey, settings: JobSettings) -> None:
        self.source = source
        self.settings = settings
        self.journal = Journal(settings.journal_path, settings.header(survey))
        try:
            if settings.retry_failed:
                self.journal.forget_failures()
            self._sink = Sink(settings.out, settings.failures_path, self.journal)
        except BaseException:
            self.journal.discard()
            raise
        self.repaired = self._sink.repaired
        state = self.journal.state
        self._rows_before = state.written()
        samples = sum(len(found) for found in state.samples.values())
        self.progress = Progress(
            rows=survey.rows,
            rows_done=self._rows_before,
            rows_failed=len(state.failures),
            samples=survey.rows * settings.num_generations,
            samples_done=self._rows_before * settings.num_generations + samples,
            samples_failed=sum(len(found) for found in state.failures.values()),
        )

    def accounting(self) -> Accounting:
        """What is in the files, as far as it has been written."""
        progress = self.progress
        return Accounting(progress.rows, self._rows_before + self._sink.rows_written, progress.rows_failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sink.close()
        self.journal.close()

    async def run(self, client: Client) -> Accounting:
        """Generate all that is owed, once.

        Raises WriteFailed, ConnectFailed, PhaseTimeout or RequestRejected when the job cannot go on, and
        ConfigError when the input changed under it; all that was finished by then is kept.
        """
        work = self._owed()
        self.progress.in_flight = lambda: sum(client.statistics().in_flight.values())
        try:
            async with self._sink, asyncio.TaskGroup() as group:
                for _ in range(min(self.settings.max_concurrent, self.progress.samples_owed or 1)):
                    group.create_task(self._work(work, client))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return self.accounting()

    async def _work(self, work: Iterator[_Owed], client: Client) -> None:
        for row, index in work:
            if self._sink.is_full:
                await self._sink.room()
            await self._generate(row, index, client)

    async def _generate(self, row: _Row, index: int, client: Client) -> None:
        try:
            sample = await client.chat(row.prompt.messages, self._params(row.prompt, index))
        except (ResponseError, TransportError) as error:
            if _is_hopeless(error):
                raise
            self._fail(row, index, error)
            return
        trace = Trace.of(sample)
        self.progress.add_sample(sample)
        self._sink.add_sample(row.prompt.position, index, encode_trace(trace))
        row.traces[index] = trace
        self._write_if_complete(row)

    def _write_if_complete(self, row: _Row) -> None:
        count = self.settings.num_generations
        if len(row.traces) == count:
            line = row_line(row.prompt.fields, [row.traces[i] for i in range(count)])
            self._sink.add_row(row.prompt.position, line)
            self.progress.rows_done += 1

    def _fail(self, row: _Row, index: int, error: PenstockError) -> None:
        payload = encode_failure(Failure.of(row.prompt, index, error))
        self._sink.add_failure(row.prompt.position, index, payload)
        self.progress.add_failure(error, new_row=not row.failed)
        row.failed = True

    def _params(self, prompt: Prompt, index: int) -> SamplingParams:
        seed = self.settings.params.seed
        if seed is None:
            return self.settings.params
        return msgspec.structs.replace(self.settings.params, seed=sample_seed(seed, prompt, index))

    def _owed(self) -> Iterator[_Owed]:
        """Every sample that is neither done nor failed, in the order of the input."""
        state = self.journal.state
        for position, (where, line) in enumerate(self.source.lines()):
            if position >= len(state.ends):
                raise ConfigError(
                    f"{self.source.path} has grown while it was read; run the same command again."
                )
            if state.is_written(position):
                continue
            row = self._resume_row(self.settings.form.prompt(position, where, line), state)
            failed = state.failures.get(position, {})
            self._write_if_complete(row)
            for index in range(self.settings.num_generations):
                if index not in row.traces and index not in failed:
                    yield _Owed(row, index)

    def _resume_row(self, prompt: Prompt, state: State) -> _Row:
        spans = state.samples.get(prompt.position, {})
        traces = {index: decode_trace(self.journal.read(span)) for index, span in spans.items()}
        return _Row(prompt, traces, prompt.position in state.failures)


def sample_seed(seed: int, prompt: Prompt, index: int) -> int:
    """A seed of 31 bits for sample `index` of a prompt: reproducible, and other for every sample."""
    text = f"{seed}/{prompt.position}/{prompt.key}/{index}".encode()
    return int.from_bytes(blake2b(text, digest_size=4).digest(), "little") >> 1


def _is_hopeless(error: PenstockError) -> bool:
    """Whether every other row would meet the same error."""
    if isinstance(error, RequestRejected):
        return error.status in HOPELESS_STATUS
    return isinstance(error, ConnectFailed) or classify(error).refused
