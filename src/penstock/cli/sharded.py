"""`penstock generate --ray`: the same job in shards, on the machines of a Ray cluster."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from penstock.batch.display import watch
from penstock.batch.engines import served_model
from penstock.batch.failures import FailureLimit
from penstock.batch.generate import GenerateReport
from penstock.batch.job import Accounting, JobSettings
from penstock.batch.report import how_to_go_on, print_report
from penstock.cli.inputs import InputArgs
from penstock.cli.launching import Display
from penstock.cluster import session
from penstock.cluster.follow import find
from penstock.cluster.sharded import ShardedJob, ShardedReport
from penstock.cluster.shards import Shards, failures_of
from penstock.cluster.worker import Engines, ShardedTask
from penstock.errors import ConfigError
from penstock.fleet.retry import Retry
from penstock.inputs.source import Source
from penstock.wire.tls import TLS

if TYPE_CHECKING:
    from penstock.cli.generate import GenerateArgs

RESTART_LIMIT = 3600.0
"""Seconds rows wait for engines that are restarted: as long as a start may take."""


@dataclass(frozen=True)
class ShardSource:
    """Opens the rows of a shard, on whichever machine."""

    args: InputArgs
    seed: int | None

    def __call__(self, index: int, count: int) -> Source:
        return replace(self.args, shard=f"{index}/{count}").open(self.seed)


def check(args: GenerateArgs) -> None:
    """Raises ConfigError for what a job on Ray cannot do."""
    given, where = args.ray, args.endpoints
    if sum((where.launches, bool(where.urls), given.ray_name is not None)) != 1:
        raise ConfigError("Say where to generate: --ray-name NAME, --engine ENGINE, or --base-url URL.")
    if where.max_concurrent < 1:
        raise ConfigError("--max-concurrent must be at least 1.")
    if args.source.shard is not None:
        raise ConfigError("--shard is for one shard on this machine: with --ray all are done, leave it out.")
    if args.format != "jsonl" or args.push_to_hub is not None or args.prometheus_port is not None:
        raise ConfigError("--format parquet, --push-to-hub and --prometheus-port cannot be had with --ray.")


async def generate(args: GenerateArgs, console: Console) -> int:
    """Runs the job and tells what became of it. Returns the exit status. Raises PenstockError."""
    seed = args.samples.sampling.seed
    source, form = args.source.open(seed), args.prompt.form()
    if not source.again:
        raise ConfigError(
            f"{source.name} can be read only once: with --ray name a file, a folder or a dataset."
        )
    args.samples.settings(None).check()
    survey = await asyncio.to_thread(source.survey, form)
    limit = None if args.max_failures is None else FailureLimit.parse(args.max_failures)
    with session.connected(args.ray.ray_address):
        _take_back_sigterm()
        async with _engines(args, console) as engines:
            task = ShardedTask(
                settings=JobSettings(
                    out=args.out.absolute(),
                    form=form,
                    num_generations=args.samples.num_generations,
                    max_concurrent=args.endpoints.max_concurrent,
                    retry_failed=args.retry_failed,
                ),
                generation=args.samples.settings(None),
                engines=engines,
                shards=Shards(args.out.absolute(), args.ray.shards),
                source=ShardSource(_absolute(args.source), seed),
                preflight=args.preflight,
            )
            workers = _machines() if args.ray.workers is None else args.ray.workers
            job = ShardedJob(task, workers=workers, rows=survey.rows, max_failures=limit)
            try:
                with watch(job.progress, console):
                    report = await job.run()
            except asyncio.CancelledError:
                console.print("Stopped. What was finished is written: run the same command again to go on.")
                raise
    return _tell(job, report, survey.rows, console)


@asynccontextmanager
async def _engines(args: GenerateArgs, console: Console) -> AsyncIterator[Engines]:
    """Where the workers send their requests; engines that are started end with the block."""
    where = args.endpoints
    options: dict[str, Any] = {
        "max_in_flight": where.max_concurrent,
        "adaptive": where.concurrency == "adaptive",
        "api_key": where.api_key or (None if where.launches else os.environ.get("OPENAI_API_KEY")),
    }
    tls = None
    if where.cacert or where.cert or where.key:
        tls = options["tls"] = TLS(ca=where.cacert, certificate=where.cert, key=where.key)
    if where.urls:
        model = await served_model(where.urls, where.model, options["api_key"], tls)
        yield Engines(urls=tuple(where.urls), model=model, options=options)
        return
    options["retry"] = Retry(outage=RESTART_LIMIT)
    if args.ray.ray_name is not None:
        find(args.ray.ray_name)  # raises where there are none
        yield Engines(registry=args.ray.ray_name, model=where.model, options=options)
        return
    from penstock.cluster.engines import Engines as Started

    assert where.engine is not None
    name = f"generate-{secrets.token_hex(4)}"
    spec = where.launch.spec(where.engine, where.model, api_key=where.api_key)
    display = Display(console, spec, where.launch.replicas)
    started = Started(
        spec,
        replicas=where.launch.replicas,
        name=name,
        ready=1,
        restart=where.launch.restart,
        on_change=display.on_change,
    )
    with display.starting():
        await started.__aenter__()
    async with _left(started):
        yield Engines(registry=name, model=spec.name, options=options)


@asynccontextmanager
async def _left(started: Any) -> AsyncIterator[None]:
    """The rest of a block that was entered."""
    try:
        yield
    except BaseException as error:
        await started.__aexit__(type(error), error, error.__traceback__)
        raise
    await started.__aexit__(None, None, None)


def _take_back_sigterm() -> None:
    """Ray has put a handler of its own in its place, which ends the process at once."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def _absolute(given: InputArgs) -> InputArgs:
    """The paths as other machines see them, whatever folder their processes run in."""
    words = tuple(str(Path(word).absolute()) if Path(word).exists() else word for word in given.input)
    return replace(given, input=words)


def _machines() -> int:
    import ray

    listed: Any = ray.nodes  # it has no types
    return sum(bool(node["Alive"]) for node in listed())


def _tell(job: ShardedJob, report: ShardedReport, rows: int, console: Console) -> int:
    progress, found, out = job.progress, report.total, job.task.shards.out
    accounting = Accounting(rows, found.done, found.failed)
    print_report(
        console,
        GenerateReport(
            accounting=accounting, out=out, failures_path=failures_of(out),
            samples=progress.samples_done - progress.resumed_samples,
            resumed_samples=progress.resumed_samples, dropped_samples=0, failures=dict(progress.failures),
            prompt_tokens=progress.prompt_tokens, completion_tokens=progress.completion_tokens,
            retries=progress.retries, seconds=report.seconds, repaired=0, damaged=0, strays=0,
        ),
    )  # fmt: skip
    if report.lost_workers:
        console.print(f"Workers lost: {report.lost_workers}; others went on with their shards.")
    if report.given_up:
        console.print(
            f"{len(report.given_up)} shards were given up, for their workers were lost again and again: "
            f"{', '.join(map(str, report.given_up))}.",
            soft_wrap=True,
        )
    if (advice := how_to_go_on(accounting)) is not None:
        console.print(advice, highlight=False, soft_wrap=True)
    return 0 if accounting.complete else 1
