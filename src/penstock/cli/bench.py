"""`penstock bench`: load tests through each layer; `penstock bench compare A.json B.json`."""

from __future__ import annotations

import asyncio
import math
import os
import resource
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional

from penstock.cli.launching import engine_flags
from penstock.errors import ConfigError
from penstock.loadtest.arrivals import Shape
from penstock.loadtest.bench import Bench, Result, machine, measure
from penstock.loadtest.dataset import LIMIT, read_dataset, read_trace
from penstock.loadtest.files import load, save, write
from penstock.loadtest.forecast import Scale
from penstock.loadtest.histogram import library
from penstock.loadtest.lengths import Lengths
from penstock.loadtest.live import watch
from penstock.loadtest.metrics import Point
from penstock.loadtest.page import page
from penstock.loadtest.plan import METRICS, Api, Extent, Load
from penstock.loadtest.stand import StandSpec, standing
from penstock.loadtest.tables import print_comparison, print_result
from penstock.loadtest.values import Condition, failures
from penstock.loadtest.workload import DISTINCT, Item, Workload, scaled, synthetic
from penstock.models import ARITHMETIC
from penstock.scripted.chaos import Chaos
from penstock.servers.spec import ServerSpec
from penstock.wire.loop import Stop, run

COMPARE: Final = "compare"
INTERRUPTED: Final = 130
"""Exit status after Ctrl-C or SIGTERM."""
WARMUP: Final = 2.0
"""Seconds of warm-up before a duration, where none is given."""
WIDTH: Final = 100
"""Columns of the tables where there is no terminal."""
DURATION: Final = 30.0
"""Seconds a load is measured where neither a duration nor a number of prompts is given."""

EngineName = Literal["scripted", "embedded", "vllm", "sglang"]


@dataclass(frozen=True, kw_only=True)
class LoadArgs:
    """How much is asked, and when."""

    concurrency: tuple[str, ...] = ()
    """Closed loop: so many requests in flight, one load after the other: 100,500,1000."""
    request_rate: tuple[str, ...] = ()
    """Open loop: requests per second, one load after the other: 50,100,inf. Latency counts from the time a
    request was meant to be sent."""
    burstiness: float = 1.0
    """Shape of the Gamma distribution of the intervals: 1 is Poisson, less is burstier, inf is even."""
    group_size: int = 1
    """Requests with one prompt that are sent at once, as the samples of an RL rollout; in a closed loop the
    next group follows when all of one have ended."""
    ramp: float = 0.0
    """Seconds over which the load rises from nothing. Not measured."""
    warmup: float | None = None
    """Seconds after the ramp that are not measured. Default: 2 with a duration, else 0."""
    duration: float | None = None
    """Seconds that are measured. Default: 30, without a number of prompts; of a trace, all of it."""
    num_prompts: int | None = None
    """Requests that are measured, instead of a duration."""
    drain: float = 60.0
    """Seconds that requests in flight have to end after the last was sent; then they are cut off."""
    pause_every: float = math.inf
    """Seconds of sending between two pauses, as weight updates make them."""
    pause: float = 0.0
    """Seconds of each pause."""

    def loads(self, *, replay: bool) -> list[Load]:
        """Raises ConfigError."""
        if bool(self.concurrency) + bool(self.request_rate) + replay != 1:
            raise ConfigError("give one of --concurrency, --request-rate and --trace")
        shape = Shape(ramp=self.ramp, work=self.pause_every, pause=self.pause)
        if shape.pause and not shape.pauses:
            raise ConfigError("--pause is of no use without --pause-every")
        if replay:
            return [Load(replay=True)]
        if self.concurrency:
            counts = _numbers("concurrency", self.concurrency)
            if any(count != int(count) for count in counts if count < math.inf) or math.inf in counts:
                raise ConfigError("--concurrency takes whole numbers: 100,500,1000")
            return [Load(concurrency=int(count), shape=shape) for count in counts]
        rates = _numbers("request-rate", self.request_rate)
        return [Load(rate=rate, burstiness=self.burstiness, shape=shape) for rate in rates]

    def extent(self, *, trace: int) -> Extent:
        """trace: requests of the trace, 0: there is none. Raises ConfigError."""
        duration, count = self.duration, self.num_prompts
        if duration is None and count is None:
            duration, count = (None, trace) if trace else (DURATION, None)
        warmup = self.warmup
        if warmup is None:
            warmup = 0.0 if duration is None else WARMUP
        return Extent(count=count, duration=duration, warmup=warmup, drain=self.drain)


@dataclass(frozen=True, kw_only=True)
class PromptArgs:
    """What is asked."""

    input_len: str = "128"
    """Words of a synthetic prompt: 128, uniform:64:256, normal:128:32 or lognormal:256:1.2:4096 (median,
    sigma, longest)."""
    output_len: str = "128"
    """max_tokens of a synthetic prompt, in the same form."""
    prefix_len: int = 0
    """Words that synthetic prompts begin with alike."""
    num_prefixes: int = 1
    """How many such beginnings there are."""
    dataset: Path | None = None
    """Prompts from a file instead: a JSON array or JSONL of ShareGPT conversations, or JSONL with prompts."""
    prompt_column: str = "prompt"
    """Column of the prompt in a dataset."""
    trace: Path | None = None
    """Prompts and send times of a recorded trace: JSONL with timestamp (ms), input_length, output_length and
    hash_ids."""
    speed: float = 1.0
    """How many times as fast as it was recorded a trace is replayed."""
    ignore_eos: bool = False
    """Have the engine generate all tokens asked for."""
    temperature: float | None = None
    """Default: the server's."""
    seed: int = 0
    """Of prompts and send times: the same seed asks the same."""

    def workload(self, group: int) -> Workload:
        """Raises ConfigError."""
        if self.dataset is not None and self.trace is not None:
            raise ConfigError("give a dataset or a trace, not both")
        times: tuple[float, ...] = ()
        items: list[Item]
        if self.trace is not None:
            items, times = read_trace(self.trace, seed=self.seed)
            times = scaled(times, self.speed)
        elif self.dataset is not None:
            items = read_dataset(self.dataset, prompt_column=self.prompt_column, limit=LIMIT)
        else:
            items = synthetic(
                Lengths.parse(self.input_len),
                Lengths.parse(self.output_len),
                seed=self.seed,
                distinct=DISTINCT,
                prefix=self.prefix_len,
                prefixes=self.num_prefixes,
            )
        return Workload(
            items, group=group, times=times, ignore_eos=self.ignore_eos, temperature=self.temperature
        )


@dataclass(frozen=True, kw_only=True)
class StandArgs:
    """What is asked of: engines that run already, or that are started and stopped."""

    base_url: tuple[str, ...] = ()
    """Engines that run already."""
    engine: EngineName = "scripted"
    """Otherwise: the engine to start."""
    model: str | None = None
    """What to serve, or what the servers at --base-url call it. Default: the shipped model (embedded), the
    only one there is (--base-url)."""
    num_engines: int = 1
    """Engines to start."""
    tp: int = 1
    """Tensor parallel size of each engine."""
    dp: int = 1
    """Data parallel size of each engine."""
    pp: int = 1
    """Pipeline parallel size of each engine."""
    max_model_len: int | None = None
    """Longest prompt plus completion, in tokens. Default: the engine decides."""
    engine_args: tuple[str, ...] = ()
    """Flags for the engine without their dashes: --engine-args itl=20ms max-num-seqs=64."""
    router_url: str | None = None
    """A router that runs already, in front of the same engines. Default: one is started where needed."""
    router_args: tuple[str, ...] = ()
    """Flags for `penstock route` without their dashes: --router-args policy=prefix_aware."""
    chaos: str = ""
    """What goes wrong at scripted engines, so that the retry path is measured too:
    reset:0.01,stall:0.001,503:0.05,kill:every=20s. Of several engines one is killed at a time."""
    api_key: str | None = None
    """Default: the environment's PENSTOCK_API_KEY."""

    @property
    def key(self) -> str | None:
        return self.api_key or os.environ.get("PENSTOCK_API_KEY") or None

    def spec(self, *, router: bool) -> StandSpec:
        """Raises ConfigError."""
        words = [
            word
            for name, value in engine_flags(self.router_args).items()
            for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
        ]
        Chaos.parse(self.chaos)
        if self.base_url:
            if self.engine_args or self.max_model_len or (self.tp, self.dp, self.pp) != (1, 1, 1):
                raise ConfigError(
                    "--engine-args, --max-model-len, --tp, --dp and --pp are for an engine that is started, "
                    "not for --base-url"
                )
            server = None
        else:
            server = self._server()
        return StandSpec(
            urls=self.base_url,
            spec=server,
            engines=self.num_engines,
            router=router,
            router_url=self.router_url if router else None,
            router_args=words if router else (),
            chaos=self.chaos,
            model=self.model if self.base_url else None,
            api_key=self.key,
        )

    def _server(self) -> ServerSpec:
        model = self.model
        if model is None:
            if self.engine in ("vllm", "sglang"):
                raise ConfigError(
                    f"Which model is {self.engine} to serve? Give --model a folder or a hub's id."
                )
            model = str(ARITHMETIC) if self.engine == "embedded" else "scripted"
        if self.engine == "scripted" and (self.key is not None or (self.tp, self.dp, self.pp) != (1, 1, 1)):
            raise ConfigError("the scripted engine takes no API key and no parallel sizes")
        extra = engine_flags(self.engine_args)
        if self.engine == "sglang":
            extra.setdefault("enable-metrics", True)  # which tell what each engine has served
        if self.engine == "scripted" and self.max_model_len is not None:
            extra.setdefault("max-model-len", str(self.max_model_len))
        return ServerSpec(
            engine=self.engine, model=model, tp=self.tp, dp=self.dp, pp=self.pp,
            max_model_len=self.max_model_len, extra_args=extra, api_key=self.key,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    """Measure engines, the router and the client under load: the same requests through each layer.

    Closed loop, open loop or a recorded trace; a table of every point and of what each layer adds. The first
    line says whether the load generator kept up. Two results: penstock bench compare A.json B.json
    """

    layers: tuple[str, ...] = ("engine",)
    """Which, with commas or spaces between them. engine: the engines alone; router: through the router;
    client: penstock.Client through the router; client-engine: penstock.Client without a router."""
    load: OmitArgPrefixes[LoadArgs] = field(default_factory=LoadArgs)
    prompts: OmitArgPrefixes[PromptArgs] = field(default_factory=PromptArgs)
    stand: OmitArgPrefixes[StandArgs] = field(default_factory=StandArgs)
    api: Api = "chat"
    """chat: /v1/chat/completions; completions: /v1/completions, of the same text without a chat template."""
    stream: bool = True
    """Ask for streams. Without them there is no ttft, tpot and itl."""
    timeout: float | None = None
    """Seconds without a byte, before the answer or in it, after which a request is given up. Default: never
    before it, 600 in it. Without streams the whole generation comes before it."""
    resume_streams: bool = False
    """Have the client continue streams that break off. Default: that is an error, for text has been given."""
    max_in_flight: int | None = None
    """Requests that the client lets be in flight at each URL, in all processes together. Default: all."""
    processes: int = 2
    """Of the load generator. More, when it was the bottleneck."""
    source_addresses: tuple[str, ...] = ()
    """Local addresses to connect from, in turn, beyond the local ports of one: 127.0.0.2 127.0.0.3."""
    goodput: tuple[str, ...] = ()
    """Bounds in ms that a request has to keep to count as good: ttft:200 tpot:50 e2el:5000."""
    out: Path | None = None
    """JSON file for the result."""
    html: Path | None = None
    """HTML file for a report with plots."""
    fail_if: tuple[str, ...] = ()
    """Exit with status 1 if a point is such: 'errors>0' 'p99_e2el>2s' 'invalid>0'."""


@dataclass(frozen=True)
class CompareArgs:
    """Two results of `penstock bench` side by side."""

    first: Positional[Path]
    """A: JSON file."""
    second: Positional[Path]
    """B: JSON file."""


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns 1 when a --fail-if condition is met; 130 after Ctrl-C or SIGTERM, with what
    was measured until then."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    if argv[:1] == [COMPARE]:
        compared = tyro.cli(CompareArgs, prog=f"penstock bench {COMPARE}", args=argv[1:])
        print_comparison(load(compared.first), load(compared.second), console)
        return 0
    args = tyro.cli(BenchArgs, prog="penstock bench", args=argv)
    library()  # said now, not by a process of the generator
    conditions = [Condition.parse(text) for text in args.fail_if]
    bench = bench_of(args)
    stand = args.stand.spec(router=bench.needs_router)
    scale = scale_of(bench, stand)
    if scale is not None:
        scale.check_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    result = Result(settings=settings_of(args), machine=machine())
    try:
        run(_measured(bench, stand, result))
    finally:
        if result.points:
            _report(result, args, console)
    if result.interrupted:
        return INTERRUPTED
    failed = failures(result.points, conditions)
    for sentence in failed:
        console.print(f"failed: {sentence}", markup=False, highlight=False, soft_wrap=True)
    return 1 if failed else 0


def _report(result: Result, args: BenchArgs, console: Console) -> None:
    print_result(result, console)
    if args.out is not None:
        save(result, args.out)
    if args.html is not None:
        write(args.html, page(result).encode())


async def _measured(bench: Bench, spec: StandSpec, result: Result) -> None:
    """Fills the result, point by point, until the last, or Ctrl-C or SIGTERM."""
    work = asyncio.create_task(_all_points(bench, spec, result))
    watched: set[asyncio.Future[None]] = {work}
    if threading.current_thread() is threading.main_thread():  # where signals arrive
        watched.add(Stop().wished)
    await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
    if work.done():
        return work.result()
    result.interrupted = True
    work.cancel()  # which takes down what was brought up
    await asyncio.wait((work,))
    return None


async def _all_points(bench: Bench, spec: StandSpec, result: Result) -> None:
    async with standing(spec) as stand:
        points = len(bench.loads) * len(bench.layers)
        with watch(Console(stderr=True), points, bench.extent) as live:

            def keep(point: Point) -> None:
                result.points.append(point)
                live.point(point)

            await measure(bench, stand, on_point=keep, on_beat=live.beat)


def bench_of(args: BenchArgs) -> Bench:
    """What the command line asks to be measured. Raises ConfigError."""
    workload = args.prompts.workload(args.load.group_size)
    return Bench(
        workload=workload,
        loads=args.load.loads(replay=args.prompts.trace is not None),
        extent=args.load.extent(trace=len(workload.times)),
        layers=_words(args.layers),
        processes=args.processes,
        api=args.api,
        stream=args.stream,
        timeout=args.timeout,
        resume_streams=args.resume_streams,
        max_in_flight=args.max_in_flight,
        goodput=tuple([bound_of(text) for text in args.goodput]),
        seed=args.prompts.seed,
        api_key=args.stand.key,
        source_addresses=args.source_addresses,
    )


def scale_of(bench: Bench, stand: StandSpec) -> Scale | None:
    """What a closed loop needs of this machine; None: an open one tells only when it runs."""
    most = max((load.concurrency or 0 for load in bench.loads), default=0)
    if not most:
        return None
    words = list(stand.router_args)
    processes = words[words.index("--processes") + 1] if "--processes" in words[:-1] else "1"
    return Scale(
        requests=most,
        processes=bench.processes,
        router=stand.router and stand.router_url is None,
        router_processes=int(processes) if processes.isdigit() else 1,
        engines=stand.engines if stand.spec is not None else most,
    )


def _words(given: Sequence[str]) -> list[str]:
    """What stands between commas and spaces, each once."""
    return list(dict.fromkeys(word for text in given for word in text.split(",") if word))


def _numbers(flag: str, given: Sequence[str]) -> list[float]:
    try:
        numbers = [float(word) for word in _words(given)]
    except ValueError:
        numbers = []
    if not numbers or any(math.isnan(number) for number in numbers):
        raise ConfigError(f"--{flag} takes numbers with commas between them, not {' '.join(given)!r}")
    return numbers


def bound_of(text: str) -> tuple[str, float]:
    """Metric and seconds of `ttft:200`. Raises ConfigError."""
    metric, _, number = text.partition(":")
    try:
        milliseconds = float(number)
    except ValueError:
        milliseconds = math.nan
    if metric not in METRICS or not 0 < milliseconds < math.inf:
        raise ConfigError(f"{text!r} is no bound of the goodput: write it as ttft:200, in milliseconds")
    return metric, milliseconds / 1e3


def settings_of(args: BenchArgs) -> dict[str, object]:
    """The settings that are not at their default, without secrets, as the result keeps them."""
    found: dict[str, object] = {}
    for part in (args, args.load, args.prompts, args.stand):
        default = type(part)()
        for name in part.__dataclass_fields__:
            value = getattr(part, name)
            if name in ("load", "prompts", "stand", "api_key") or value == getattr(default, name):
                continue
            found[name] = str(value) if isinstance(value, Path) else value
    return found
