"""`penstock.generate`: rows in, traces out; the same job as the command `penstock generate`.

Guarantees: nothing of the host is changed (no signal handler, no event loop policy, nothing printed unless
asked for); what blocks (looking through the input, opening the journal) is done in a thread; a call that is
cancelled leaves files that the same call goes on with.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import msgspec

from penstock import __version__
from penstock.batch.engines import only_model, preflight, served_model, versions
from penstock.batch.failures import FailureLimit
from penstock.batch.function import Function
from penstock.batch.generation import GenerationSettings, LengthPolicy
from penstock.batch.job import Accounting, Job, JobSettings
from penstock.batch.progress import Progress
from penstock.batch.steps import Steps
from penstock.batch.trace import Trace
from penstock.client import Client
from penstock.errors import ConfigError, PenstockError
from penstock.fleet.monitor import OnOutage
from penstock.inputs.iterable import Rows, from_iterable
from penstock.inputs.opened import DatasetOptions, open_source, select
from penstock.inputs.selection import Shard
from penstock.inputs.source import Source, Survey
from penstock.prompt import Prompt, PromptFormat, Template, read_template
from penstock.sample import SamplingParams

if TYPE_CHECKING:
    from penstock.batch.parts import Parts

Connect = Callable[[Progress], AbstractAsyncContextManager[Client]]
"""Opens the client of a job; is given its counts, for notices."""

Watching = Callable[[Progress], AbstractAsyncContextManager[None]]
"""Shows the counts while the block runs."""


Format = Literal["jsonl", "parquet"]


class GenerateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a run did. Rows are the job's, everything else is this run's."""

    accounting: Accounting
    """rows = done + failed + owed."""
    out: Path
    failures_path: Path
    samples: int
    resumed_samples: int
    """Samples that were there before."""
    dropped_samples: int
    """Of `samples`, left out of their rows by the length policy."""
    failures: Mapping[str, int]
    """Samples that failed, by class."""
    prompt_tokens: int
    completion_tokens: int
    retries: int
    seconds: float
    """From the first request to the last; the engines' start is not among them."""
    repaired: int
    """Bytes at the end of the output that were not whole and were written again."""
    damaged: int
    """Lines of the journal that were damaged; what they held was done again."""
    strays: int
    """Rows of the output that an input read only once turned out not to have."""
    parquet: Path | None = None
    """The folder of Parquet parts, where they were asked for."""
    as_json: tuple[str, ...] = ()
    """Columns that are JSON text in the parts: their rows differ too much."""

    @property
    def complete(self) -> bool:
        """Every row is done."""
        return self.accounting.complete


class GenerateOptions(TypedDict, total=False):
    """How `generate` generates."""

    base_url: str | Sequence[str]
    """Servers that speak the OpenAI API, with or without /v1."""
    client: Client
    """Instead of `base_url`: one of your own, open or not; it is not closed if it was open."""
    model: str | None
    """Default: the client's, or the only one there is."""
    api_key: str | None
    prompt_column: str | None
    """Text, or chat messages; `prompt`. None: rows of a rollout function that have none."""
    id_column: str | None
    prompt_template: str | Path | Template | None
    """`{column}` places; a path: a file, Jinja where it ends in .jinja."""
    system_prompt: str | None
    num_generations: int
    sampling: SamplingParams
    max_concurrent: int
    """Samples being made at a time; 512."""
    rollout: str | Function | None
    """`async def rollout(row, client)`, or `module:function`."""
    validate: str | Function | None
    """`validate(sample, row)`: True, False or the reason of a rejection."""
    max_validate_attempts: int
    length_policy: LengthPolicy
    max_continues: int
    retry_failed: bool
    max_failures: int | str | None
    """Samples, or a share as "5%", that may fail before the run stops with TooManyFailures."""
    format: Format
    """parquet: parts in a folder besides the JSONL."""
    preflight: bool
    """Ask for one token before anything is generated; True."""
    dataset_split: str | None
    """Of a Hugging Face dataset; its only one, else `train`."""
    dataset_config: str | None
    streaming: bool
    """Fetch a hub's rows while they are read."""
    shuffle: int | None
    """The seed of the rows' order; None: as they come."""
    skip: int
    limit: int | None
    shard: Shard | None
    """(i, n): every nth row, from the ith on."""
    on_progress: Callable[[Progress], None]
    """Is given the live counts once, before the run begins."""
    display: bool
    """Show progress on stderr; False."""


async def generate(
    rows: str | Path | Sequence[str | Path] | Source | Rows,
    out: str | Path,
    **options: Unpack[GenerateOptions],
) -> GenerateReport:
    """Generate samples for every row, into `out` (JSONL), and go on where an earlier call was.

        report = await penstock.generate("problems.jsonl", "traces.jsonl", base_url="http://localhost:8000")

    rows: files, folders, patterns, a dataset's name; or an iterable of mappings, async or not. A failed
    sample is data (see the report, and the file of failures); raised is what no other row would survive:
    ConfigError (ResumeRefused) for what cannot be done as asked, ConnectFailed, RequestRejected (401, 403,
    404), TooManyFailures, WriteFailed.
    """
    given = dict(options)
    known = GenerateOptions.__annotations__
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(f"generate() has no option {unknown[0]!r}; it has {', '.join(known)}.")
    source = _source(rows, options)
    concurrent = options.get("max_concurrent", 512)
    if concurrent < 1:
        raise ConfigError("max_concurrent must be at least 1.")
    connect, model = await _connection(options, concurrent)
    limit = options.get("max_failures")
    job = JobSettings(
        out=Path(out),
        form=_form(options),
        num_generations=options.get("num_generations", 1),
        max_concurrent=concurrent,
        retry_failed=options.get("retry_failed", False),
        max_failures=None if limit is None else FailureLimit.parse(str(limit)),
    )
    chosen: dict[str, Any] = {
        name: given[name]
        for name in ("rollout", "validate", "max_validate_attempts", "length_policy", "max_continues")
        if name in given
    }
    generation = GenerationSettings(model=model, params=options.get("sampling", SamplingParams()), **chosen)
    on_progress = options.get("on_progress")
    return await run_job(
        source,
        job,
        generation,
        connect,
        watching=_shown if options.get("display", False) else None,
        on_open=None if on_progress is None else lambda opened: on_progress(opened.progress),
        asks_first=options.get("preflight", True),
        format=options.get("format", "jsonl"),
    )


async def run_job(
    source: Source,
    settings: JobSettings,
    generation: GenerationSettings,
    connect: Connect,
    *,
    survey: Survey | None = None,
    watching: Watching | None = None,
    on_open: Callable[[Job], None] | None = None,
    on_end: Callable[[GenerateReport], None] | None = None,
    asks_first: bool = True,
    format: Format = "jsonl",
) -> GenerateReport:
    """One job from its files to its report.

    Files, input and functions are checked before `connect` is called. survey: of the source, where it was
    made. on_end: is given the report also where the run ends with an error.
    """
    generation.check()
    job = await _opened(source, settings, generation.fingerprint, survey)
    with job:
        if on_open is not None:
            on_open(job)
        parts: Parts | None = None
        try:
            async with _parts(settings.out, format) as parts:
                if job.progress.samples_owed == 0:  # rows may still be waiting to be written
                    await job.run(_nothing_owed)
                else:
                    await _run(job, generation, connect, watching, asks_first)
        finally:
            report = _report(job, parts)
            if on_end is not None:
                on_end(report)
    return report


async def _run(
    job: Job,
    generation: GenerationSettings,
    connect: Connect,
    watching: Watching | None,
    asks_first: bool,
) -> None:
    async with connect(job.progress) as client:
        made = generation.generation(client)
        if asks_first:
            await preflight(client, generation.model, generation.params, chat=generation.rollout is None)
        engines = await versions(client.fleet)
        job.note({"penstock": __version__, "started": round(time(), 3), "engines": engines})
        job.progress.fleet = client.statistics
        job.progress.began = monotonic()
        try:
            async with watching(job.progress) if watching is not None else nullcontext():
                await job.run(made)
        finally:
            job.progress.fleet = None  # the client is closed: nobody knows any more


async def _nothing_owed(prompt: Prompt, index: int, steps: Steps) -> Trace:
    raise AssertionError(f"row {prompt.position} sample {index} is done or failed")


async def _opened(
    source: Source, settings: JobSettings, fingerprint: Mapping[str, Any], survey: Survey | None
) -> Job:
    """The job, opened in a thread: a large input or journal takes seconds. A job that is there when the call
    is cancelled is closed."""
    opening = asyncio.ensure_future(asyncio.to_thread(Job, source, settings, fingerprint, survey))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        await asyncio.wait([opening])
        if not opening.cancelled() and opening.exception() is None:
            opening.result().__exit__()
        raise


def _parts(out: Path, format: Format) -> AbstractAsyncContextManager[Parts | None]:
    """The Parquet parts of `out`, made while the block runs; none where they were not asked for."""
    if format == "jsonl":
        return nullcontext()
    if format != "parquet":
        raise ConfigError(f"The format is jsonl or parquet, not {format!r}.")
    from penstock.batch.parts import parts_of

    return parts_of(out)


def _report(job: Job, parts: Parts | None) -> GenerateReport:
    progress = job.progress
    seconds = 0.0 if progress.began is None else monotonic() - progress.began
    return GenerateReport(
        accounting=job.accounting(),
        out=job.settings.out,
        failures_path=job.settings.failures_path,
        samples=progress.samples_done - progress.resumed_samples,
        resumed_samples=progress.resumed_samples,
        dropped_samples=progress.samples_dropped,
        failures=dict(progress.failures),
        prompt_tokens=progress.prompt_tokens,
        completion_tokens=progress.completion_tokens,
        retries=progress.retries,
        seconds=seconds,
        repaired=job.repaired,
        damaged=job.journal.state.damaged,
        strays=job.strays,
        parquet=None if parts is None else parts.folder,
        as_json=() if parts is None else tuple(parts.as_json),
    )


def _source(rows: Any, options: GenerateOptions) -> Source:
    shuffle, skip = options.get("shuffle"), options.get("skip", 0)
    limit, shard = options.get("limit"), options.get("shard")
    if isinstance(rows, str | Path):
        rows = [rows]
    if isinstance(rows, Sequence) and rows and all(isinstance(spec, str | Path) for spec in rows):
        dataset = DatasetOptions(
            split=options.get("dataset_split"),
            config=options.get("dataset_config"),
            streaming=options.get("streaming", False),
        )
        return open_source(rows, dataset=dataset, shuffle=shuffle, skip=skip, limit=limit, shard=shard)
    source = rows if hasattr(rows, "lines") else from_iterable(rows)
    return select(source, shuffle=shuffle, skip=skip, limit=limit, shard=shard)


def _form(options: GenerateOptions) -> PromptFormat:
    template = options.get("prompt_template")
    if isinstance(template, Path):
        template = read_template(template)
    elif isinstance(template, str):
        template = Template(template)
    return PromptFormat(
        prompt_column=options.get("prompt_column", "prompt"),
        id_column=options.get("id_column"),
        template=template,
        system_prompt=options.get("system_prompt"),
    )


async def _connection(options: GenerateOptions, concurrent: int) -> tuple[Connect, str | None]:
    """How the client is opened, and the model its requests name. Raises ConfigError."""
    given, urls, model = options.get("client"), options.get("base_url", ()), options.get("model")
    if (given is None) == (not urls):
        raise ConfigError("Say where to generate: base_url=… or client=….")
    if given is not None:
        if options.get("api_key") is not None:
            raise ConfigError("The client has its own key: api_key is for base_url.")
        borrowed = given
        if (model := model or given.model) is None:
            async with _borrowed(given) as client:
                model = await only_model(client)
        return lambda progress: _borrowed(borrowed), model
    found, key = [urls] if isinstance(urls, str) else list(urls), options.get("api_key")
    name = await served_model(found, model, key)

    def connect(progress: Progress) -> Client:
        return Client(
            found,
            model=name,
            api_key=key,
            max_in_flight=concurrent,
            adaptive=True,
            on_outage=outage_notice(progress),
        )

    return connect, name


@asynccontextmanager
async def _borrowed(client: Client) -> AsyncIterator[Client]:
    """A client of somebody else's: opened and closed only if it is not open."""
    if client.is_open:
        yield client
        return
    async with client:
        yield client


@asynccontextmanager
async def _shown(progress: Progress) -> AsyncIterator[None]:
    from rich.console import Console

    from penstock.batch.display import watch

    with watch(progress, Console(stderr=True)):
        yield


def outage_notice(progress: Progress) -> OnOutage:
    """Puts into the progress that no engine answers."""

    def on_outage(seconds: float, error: PenstockError | None) -> None:
        progress.notice = f"no engine has answered for {seconds:.0f} s: {error}" if error else ""

    return on_outage
