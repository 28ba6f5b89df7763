"""`penstock generate`: a dataset in, reasoning traces out."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes, arg

from penstock.batch.display import watch
from penstock.batch.failures import FailureLimit
from penstock.batch.generate import Format, GenerateReport, Watching, run_job
from penstock.batch.job import Job, JobSettings
from penstock.batch.progress import Progress
from penstock.batch.report import how_to_go_on, print_report
from penstock.cli.endpoints import EndpointArgs
from penstock.cli.inputs import InputArgs
from penstock.cli.prompting import PromptArgs, SampleArgs
from penstock.cli.ray import RayArgs
from penstock.cluster.shards import Shards
from penstock.errors import ConfigError
from penstock.inputs.selection import parse_shard
from penstock.inputs.source import Source, Survey
from penstock.wire.loop import run

INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM: the shell's convention for SIGINT."""


@dataclass(frozen=True)
class GenerateArgs:
    """Generate reasoning traces for the rows of a dataset.

    The job can be killed at any moment; the same command goes on where it was. Each row is written once, with
    its own columns and `generations`, `finish_reasons`, `api_metadata` and, where there is any, `reasonings`.
    """

    out: Annotated[Path, arg(aliases=("--output-file",))]
    """JSONL file to write. Beside it: OUT.journal (makes the job resumable) and OUT.failures. With --shard it
    is a file of the shard's own, in the folder OUT.shards."""
    source: OmitArgPrefixes[InputArgs] = field(default_factory=InputArgs)
    prompt: OmitArgPrefixes[PromptArgs] = field(default_factory=PromptArgs)
    samples: OmitArgPrefixes[SampleArgs] = field(default_factory=SampleArgs)
    endpoints: OmitArgPrefixes[EndpointArgs] = field(default_factory=EndpointArgs)
    ray: OmitArgPrefixes[RayArgs] = field(default_factory=RayArgs)
    format: Format = "jsonl"
    """parquet: besides OUT a folder of Parquet parts, traces.parquet/ for traces.jsonl."""
    push_to_hub: str | None = None
    """OWNER/NAME of a dataset to push the Parquet parts to once every row is done. The same command again
    pushes again."""
    private: bool = False
    """Make the pushed dataset private, where it is new."""
    retry_failed: bool = False
    """Take up the rows that failed before."""
    max_failures: str | None = None
    """Samples that may fail in this run before it stops: a number, or a share as 5%. Default: no limit."""
    preflight: bool = True
    """Ask the engines for one token first, so that a request that none of them takes is known at once."""
    prometheus_port: int | None = None
    """Serve /metrics on this port while the job runs; 0: any that is free."""
    prometheus_host: str = "127.0.0.1"
    """Address it listens on; 0.0.0.0 for all."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0 when every row is done, 1 when some are not, 130 when interrupted."""
    args = tyro.cli(GenerateArgs, prog="penstock generate", args=argv)
    try:
        if args.ray.ray:
            return run(_on_ray(args))
        return run(_generate(args, *_opened(args)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED


def _opened(args: GenerateArgs) -> tuple[Source, JobSettings, Survey | None]:
    """What is read and what is written, looked through before the event loop runs: it can be interrupted."""
    if given := args.ray.changed():
        raise ConfigError(f"{given[0]} is for --ray.")
    args.endpoints.check()
    form = args.prompt.form()
    source = args.source.open(args.samples.sampling.seed)
    settings = JobSettings(
        out=_out(args),
        form=form,
        num_generations=args.samples.num_generations,
        max_concurrent=args.endpoints.max_concurrent,
        retry_failed=args.retry_failed,
        max_failures=None if args.max_failures is None else FailureLimit.parse(args.max_failures),
    )
    args.samples.settings(None).check()
    if args.push_to_hub is not None and args.format != "parquet":
        raise ConfigError("--push-to-hub pushes Parquet parts: it wants --format parquet.")
    if args.private and args.push_to_hub is None:
        raise ConfigError("--private is for --push-to-hub.")
    return source, settings, source.survey(form) if source.again else None


async def _on_ray(args: GenerateArgs) -> int:
    from penstock.cli import sharded

    sharded.check(args)
    with terminated_as_interrupted():
        return await sharded.generate(args, Console(stderr=True))


def _out(args: GenerateArgs) -> Path:
    """The file this run writes: of a job in shards that of its own shard."""
    if args.source.shard is None:
        return args.out
    index, count = parse_shard(args.source.shard)
    shards = Shards(args.out, count)
    shards.prepare()
    return shards.output(index)


async def _generate(args: GenerateArgs, source: Source, settings: JobSettings, survey: Survey | None) -> int:
    console = Console(stderr=True)
    with terminated_as_interrupted():
        connect, model = await args.endpoints.connection(console)
        report = await run_job(
            source,
            settings,
            args.samples.settings(model),
            connect,
            survey=survey,
            watching=_watching(args, settings.out, console),
            on_open=lambda job: _tell_repairs(job, console),
            on_end=lambda report: _tell(report, console),
            asks_first=args.preflight,
            format=args.format,
        )
        if args.push_to_hub is not None and report.complete and report.parquet is not None:
            from penstock.batch.hub import push

            url = await asyncio.to_thread(push, report.parquet, args.push_to_hub, private=args.private)
            console.print(f"pushed to {url}", highlight=False, soft_wrap=True)
    return 0 if report.complete else 1


def _watching(args: GenerateArgs, out: Path, console: Console) -> Watching:
    """Shows the counts on the console, and where it is wanted on a port."""

    @asynccontextmanager
    async def watching(progress: Progress) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if args.prometheus_port is not None:
                from penstock.batch.metrics import served

                host = args.prometheus_host
                port = await stack.enter_async_context(served(progress, str(out), args.prometheus_port, host))
                console.print(f"metrics: http://{host}:{port}/metrics", highlight=False, soft_wrap=True)
            stack.enter_context(watch(progress, console))
            yield

    return watching


def _tell_repairs(job: Job, console: Console) -> None:
    if job.adopted:
        console.print(
            f"{job.settings.out} has no journal: its {job.adopted:,} rows are taken as done, as they are."
        )
    for path in job.asides:
        console.print(f"{path} keeps the rows as they were until every row has its new samples.")
    if job.repaired:
        console.print(
            f"{job.settings.out}: {job.repaired:,} bytes at its end were not whole and are written again."
        )
    if damaged := job.journal.state.damaged:
        console.print(f"{job.journal.path}: {damaged:,} damaged lines; what they held is done again.")


def _tell(report: GenerateReport, console: Console) -> None:
    if not (
        report.seconds or report.complete
    ):  # it ended before anything was generated: the error says it all
        return
    print_report(console, report)
    if (advice := how_to_go_on(report.accounting)) is not None:
        console.print(advice, highlight=False, soft_wrap=True)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM stops the current task as Ctrl-C does: cleanly."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
