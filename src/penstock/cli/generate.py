"""`penstock generate`: a dataset in, reasoning traces out."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Annotated, Literal

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional, arg

from penstock.batch.job import Job, JobSettings
from penstock.batch.progress import Progress, watch
from penstock.batch.report import how_to_go_on, print_report
from penstock.cli.launching import Display, LaunchArgs
from penstock.client import Client
from penstock.errors import ConfigError, PenstockError, ResponseError, TransportError
from penstock.fleet.fleet import FleetOptions
from penstock.fleet.monitor import OnOutage
from penstock.fleet.retry import Retry
from penstock.prompt import JsonlInput, PromptFormat, Survey, Template
from penstock.sample import SamplingParams
from penstock.servers.replicas import launch
from penstock.servers.spec import ServerSpec
from penstock.wire.limits import check_local_ports, check_open_files
from penstock.wire.loop import run
from penstock.wire.tls import TLS

NO_MODEL_LIST = 404
"""Status of a server that does not list its models; the name given is then taken on trust."""

RESTART_LIMIT = 3600.0
"""Seconds rows wait for engines that are restarted: as long as a start may take. Engines that cannot be
restarted end the job before."""

INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM: the shell's convention for SIGINT."""


@dataclass(frozen=True)
class GenerateArgs:
    """Generate reasoning traces for the rows of a dataset.

    The job can be killed at any moment; the same command goes on where it was. Each row is written once, with
    its own columns and `generations`, `finish_reasons`, `api_metadata` and, where there is any, `reasonings`.
    """

    input: Positional[Path]
    """JSONL file, plain, .gz or .zst."""
    out: Annotated[Path, arg(aliases=("--output-file",))]
    """JSONL file to write. Beside it: OUT.journal (makes the job resumable) and OUT.failures."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of chat messages."""
    id_column: Annotated[str | None, arg(aliases=("--uuid-column",))] = None
    """Column that names a row. Default: a hash of the row's content."""
    prompt_template: str | None = None
    """The user message, with {prompt} and any {column} of the row in it."""
    system_prompt: str | None = None
    """Put before every conversation."""
    num_generations: Annotated[int, arg(aliases=("-n",))] = 1
    """Samples of each row."""
    max_concurrent: int = 512
    """Requests in flight at most."""
    concurrency: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: as many in flight per server as its engine can use, found from its metrics or its throughput;
    fixed: --max-concurrent."""
    engine: Literal["vllm", "sglang", "embedded", "endpoint"] | None = None
    """Start this engine for the job and stop it afterwards; endpoint, the default with --base-url: use
    servers that run already."""
    launch: OmitArgPrefixes[LaunchArgs] = field(default_factory=LaunchArgs)
    model: str | None = None
    """A checkpoint folder or a hub's id for an engine that is started (embedded: a folder, default the
    shipped model); else the served model's name (default: the only one there is)."""
    base_url: tuple[str, ...] = ()
    """Base URLs of running OpenAI-compatible servers, with or without /v1."""
    api_addr: tuple[str, ...] = ()
    """The same as HOST:PORT."""
    api_key: str | None = None
    """Sent as a bearer token. Default: the environment's OPENAI_API_KEY."""
    cacert: str | None = None
    """PEM file of the authorities to trust for https. Default: the system's."""
    cert: str | None = None
    """PEM file of a client certificate, for servers that ask for one."""
    key: str | None = None
    """PEM file of its private key, if that is not in the same file."""
    source_addresses: tuple[str, ...] = ()
    """Local addresses to connect from, in turn, where one has too few ports."""
    retry_failed: bool = False
    """Take up the rows that failed before."""
    sampling: OmitArgPrefixes[SamplingParams] = field(default_factory=SamplingParams)


def main(argv: list[str]) -> int:
    """Run the command. Returns 0 when every row is done, 1 when some are not, 130 when interrupted."""
    args = tyro.cli(GenerateArgs, prog="penstock generate", args=argv)
    _check(args)
    form = _prompt_format(args)
    source = JsonlInput(args.input)
    try:
        return run(_generate(args, source, source.survey(form), form))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED


async def _generate(args: GenerateArgs, source: JsonlInput, survey: Survey, form: PromptFormat) -> int:
    console = Console(stderr=True)
    with terminated_as_interrupted():
        spec = _spec(args)
        settings = JobSettings(
            out=args.out,
            model=await _served(args) if spec is None else spec.name,
            form=form,
            params=args.sampling,
            num_generations=args.num_generations,
            max_concurrent=args.max_concurrent,
            retry_failed=args.retry_failed,
        )
        with Job(source, survey, settings) as job:
            _tell_repairs(job, console)
            async with _client(args, spec, job, console) as client:
                return await run_job(job, client, console)


@asynccontextmanager
async def _client(
    args: GenerateArgs, spec: ServerSpec | None, job: Job, console: Console
) -> AsyncIterator[Client]:
    """Of the engines that are started here, or of those that run already."""
    options = _options(args)
    options["on_outage"] = _notice(job.progress)
    if spec is None:
        async with Client(_urls(args), model=job.settings.model, **options) as client:
            yield client
        return
    given = args.launch
    display = Display(console, spec, given.replicas)
    async with AsyncExitStack() as stack:
        with display.starting():
            launched = await stack.enter_async_context(
                launch(
                    spec,
                    replicas=given.replicas,
                    devices=given.dealt,
                    ready=1,
                    restart=given.restart,
                    on_change=display.on_change,
                    retry=Retry(outage=RESTART_LIMIT),
                    **options,
                )
            )
        yield await stack.enter_async_context(launched.client())


def _tell_repairs(job: Job, console: Console) -> None:
    if job.repaired:
        console.print(
            f"{job.settings.out}: {job.repaired:,} bytes at its end were not whole and are written again."
        )
    if damaged := job.journal.state.damaged:
        console.print(f"{job.journal.path}: {damaged:,} damaged lines; what they held is done again.")


def _notice(progress: Progress) -> OnOutage:
    def on_outage(seconds: float, error: PenstockError | None) -> None:
        progress.notice = f"no engine has answered for {seconds:.0f} s: {error}" if error else ""

    return on_outage


async def run_job(job: Job, client: Client, console: Console) -> int:
    """Run `job` with an open client, show its progress and its report; returns the exit status."""
    progress = job.progress
    started = monotonic()
    try:
        with watch(progress, console):
            await job.run(client)
    finally:
        accounting = job.accounting()
        print_report(console, job.settings, accounting, progress, monotonic() - started)
        if (advice := how_to_go_on(accounting)) is not None:
            console.print(advice)
    return 0 if accounting.complete else 1


def _check(args: GenerateArgs) -> None:
    if args.num_generations < 1 or args.max_concurrent < 1:
        raise ConfigError("--num-generations and --max-concurrent must be at least 1.")
    if _launches(args) == bool(_urls(args)):
        raise ConfigError(
            "Say where to generate: --engine vllm, sglang or embedded, or --base-url URL (or --api-addr)."
        )
    if not _launches(args) and (given := args.launch.changed()):
        raise ConfigError(f"{given[0]} is for an engine that is started: --base-url names one that runs.")
    check_open_files(args.max_concurrent, raised=True)
    if not args.source_addresses:
        check_local_ports(args.max_concurrent)


def _prompt_format(args: GenerateArgs) -> PromptFormat:
    return PromptFormat(
        prompt_column=args.prompt_column,
        id_column=args.id_column,
        template=None if args.prompt_template is None else Template(args.prompt_template),
        system_prompt=args.system_prompt,
    )


def _launches(args: GenerateArgs) -> bool:
    """Whether engines are started here."""
    return args.engine not in (None, "endpoint")


def _spec(args: GenerateArgs) -> ServerSpec | None:
    """What to start; None: nothing."""
    if args.engine is None or not _launches(args):
        return None
    return args.launch.spec(args.engine, args.model, api_key=args.api_key)


def _api_key(args: GenerateArgs) -> str | None:
    return args.api_key or (None if _launches(args) else os.environ.get("OPENAI_API_KEY"))


def _options(args: GenerateArgs) -> FleetOptions:
    options: FleetOptions = {
        "api_key": _api_key(args),
        "max_in_flight": args.max_concurrent,
        "adaptive": args.concurrency == "adaptive",
        "source_addresses": args.source_addresses,
    }
    if (tls := _tls(args)) is not None:
        options["tls"] = tls
    return options


def _tls(args: GenerateArgs) -> TLS | None:
    if args.cacert is None and args.cert is None and args.key is None:
        return None
    return TLS(ca=args.cacert, certificate=args.cert, key=args.key)


def _urls(args: GenerateArgs) -> list[str]:
    return [*args.base_url, *(f"http://{address}" for address in args.api_addr)]


async def _served(args: GenerateArgs) -> str:
    return await served_model(_urls(args), args.model, _api_key(args), _tls(args))


async def served_model(
    urls: Sequence[str], wanted: str | None, api_key: str | None, tls: TLS | None = None
) -> str:
    """The name requests will call the model, after asking each server what it serves.

    Raises ConfigError when a server does not answer, refuses, or does not serve `wanted`; without it the
    servers must all serve the same single model.
    """
    served = {url: await _models_of(url, wanted, api_key, tls) for url in urls}
    common = set.intersection(*map(set, served.values()))
    if wanted is None and len(common) == 1:
        return common.pop()
    if wanted in common:
        return wanted
    url, names = next((url, names) for url, names in served.items() if wanted not in names)
    offer = ", ".join(names) or "no model at all"
    if wanted is None:
        raise ConfigError(f"Which model? {url} serves {offer}: name one that all servers have with --model.")
    raise ConfigError(f"{url} does not serve the model {wanted!r}: give --model one of {offer}.")


async def _models_of(url: str, wanted: str | None, api_key: str | None, tls: TLS | None) -> list[str]:
    async with Client(url, api_key=api_key, tls=tls) as client:
        try:
            return await client.models()
        except TransportError as error:
            raise ConfigError(f"No engine answers at {url} ({error}): start it, or name another.") from None
        except ResponseError as error:
            if error.status == NO_MODEL_LIST and wanted is not None:
                return [wanted]
            raise ConfigError(
                f"{url} does not say what it serves ({error}): check URL, key and --model."
            ) from None


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
