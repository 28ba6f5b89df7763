"""A load test: each layer under each load, one after the other, with the same requests.

    engine          requests on bare connections to the engines, each in turn
    router          the same to the router in front of them
    client          the same through penstock.Client to the router
    client-engine   through penstock.Client to the engines, without a router

What one layer has more than another is what the part between them adds.
"""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, Literal

import msgspec

from penstock import __version__
from penstock.errors import ConfigError
from penstock.loadtest.account import Account, account
from penstock.loadtest.metrics import Engine, Point, merged, usage_of
from penstock.loadtest.plan import METRICS, Api, Asker, Beat, Extent, Job, Load, Tally, Target
from penstock.loadtest.processes import LEAD, Generators
from penstock.loadtest.stand import Stand
from penstock.loadtest.watching import Watch
from penstock.loadtest.workload import Workload
from penstock.wire.limits import check_local_ports, check_open_files

Layer = Literal["engine", "router", "client", "client-engine"]

LAYERS: Final[dict[str, tuple[Asker, bool]]] = {
    "engine": ("raw", False),
    "router": ("raw", True),
    "client": ("client", True),
    "client-engine": ("client", False),
}
"""Who asks, and whether through the router."""

FORMAT: Final = 1
"""Version of the result's JSON form."""

OnBeat = Callable[[str, Load, Sequence[Beat | None]], None]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured. Raises ConfigError for what cannot be."""

    workload: Workload
    loads: Sequence[Load]
    extent: Extent
    layers: Sequence[str] = ("engine",)
    processes: int = 2
    """Of the generator."""
    api: Api = "chat"
    """chat: /v1/chat/completions. completions: /v1/completions, of the same text."""
    stream: bool = True
    timeout: float | None = None
    """Seconds without a byte after which a request is given up. None: as the client has it."""
    resume_streams: bool = False
    """The client continues streams that break off."""
    max_in_flight: int | None = None
    """Requests the client lets be in flight at each URL, in all processes together. None: all."""
    goodput: tuple[tuple[str, float], ...] = ()
    """(metric, seconds)."""
    seed: int = 0
    api_key: str | None = field(default=None, repr=False)
    source_addresses: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.loads or not self.layers:
            raise ConfigError("a load test needs at least one layer and one load")
        for layer in self.layers:
            if layer not in LAYERS:
                raise ConfigError(f"there is no layer {layer!r}; choose from {', '.join(LAYERS)}")
        if self.processes < 1:
            raise ConfigError(f"the generator needs at least one process, not {self.processes}")
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError(f"the timeout must be positive, not {self.timeout:g}")
        if self.max_in_flight is not None and self.max_in_flight < self.processes:
            raise ConfigError(
                f"each of the {self.processes} processes has at least 1 request in flight at each URL, "
                f"so that there are not at most {self.max_in_flight}"
            )
        for metric, _ in self.goodput:
            if metric not in METRICS or metric == "itl":
                raise ConfigError(f"goodput is over ttft, tpot and e2el, not {metric!r}")
            if metric != "e2el" and not self.stream:
                raise ConfigError(f"{metric} cannot be measured without streaming")
        for load in self.loads:
            if load.rate == float("inf") and self.extent.count is None:
                raise ConfigError("a rate of inf sends all at once: give the number of prompts")
            if load.rate == float("inf") and (self.extent.warmup or load.shape.ramp):
                raise ConfigError("a rate of inf sends all at once: it has no warm-up and no ramp")
            if load.replay and self.workload.group > 1:
                raise ConfigError("a trace has its own requests: it is not replayed in groups")
            if load.replay and not self.workload.times:
                raise ConfigError("a replay needs a trace")
            if load.concurrency is not None:
                check_open_files(-(-load.concurrency // self.processes), raised=True)
                check_local_ports(load.concurrency, max(1, len(self.source_addresses)))

    @property
    def needs_router(self) -> bool:
        return any(LAYERS[layer][1] for layer in self.layers)


class Result(msgspec.Struct, kw_only=True):
    """All points of a load test, as its JSON file has them."""

    format: int = FORMAT
    version: str = __version__
    settings: dict[str, Any] = {}
    """What it was asked to do."""
    machine: dict[str, Any] = {}
    points: list[Point] = []
    interrupted: bool = False
    """It was stopped before the last point."""

    @property
    def invalid(self) -> list[str]:
        """A sentence for each point that cannot be trusted."""
        return [f"{p.layer} at {p.load}: {'; '.join(p.invalid)}" for p in self.points if p.invalid]


async def measure(
    bench: Bench,
    stand: Stand,
    *,
    on_point: Callable[[Point], None] | None = None,
    on_beat: OnBeat | None = None,
) -> list[Point]:
    """Runs a load test against what stands. Raises ConfigError, GeneratorDied.

    on_point: told each point when it is measured. on_beat: told several times a second where the processes
    are.
    """
    points = []
    async with Generators(bench.workload, bench.processes) as generators:
        for load in bench.loads:
            for layer in bench.layers:
                point = await _point(bench, stand, generators, layer, load, on_beat)
                points.append(point)
                if on_point is not None:
                    on_point(point)
    return points


async def _point(
    bench: Bench, stand: Stand, generators: Generators, layer: str, load: Load, on_beat: OnBeat | None
) -> Point:
    asker, routed = LAYERS[layer]
    if routed and stand.router_url is None:
        raise ConfigError(f"the layer {layer!r} needs a router")
    urls = [stand.router_url] if routed and stand.router_url is not None else stand.urls
    target = Target(
        urls=urls,
        asker=asker,
        model=stand.model,
        api_key=bench.api_key,
        api=bench.api,
        stream=bench.stream,
        timeout=bench.timeout,
        resume_streams=bench.resume_streams,
        max_in_flight=None if bench.max_in_flight is None else bench.max_in_flight // bench.processes,
        source_addresses=bench.source_addresses,
    )
    job = Job(
        run=f"bench.{secrets.token_hex(4)}",
        target=target,
        load=load,
        extent=bench.extent,
        seed=bench.seed,
        start=0.0,
        goodput=bench.goodput,
    )
    before = await stand.served()
    start = monotonic() + LEAD
    begin = start + load.shape.ramp + bench.extent.warmup
    async with Watch(stand.pids, stand.router_url if routed else None, stand.held) as watch:
        tallies = await generators.measure(
            job, None if on_beat is None else lambda beats: on_beat(layer, load, beats)
        )
        seen = await _account(stand, job.run, tallies)
    point = merged(
        layer,
        load,
        tallies,
        goodput=bool(bench.goodput),
        asker="client" if asker == "client" else "generator",
    )
    used = _usage(watch, stand, tallies, begin, routed)
    wall = max(tally.wall for tally in tallies)
    return msgspec.structs.replace(
        point,
        account=seen,
        held=watch.held(begin, begin + wall, start),
        engines=_spread(stand.urls, before, await stand.served()),
        usage={**point.usage, **used},
    )


async def _account(stand: Stand, run: str, tallies: Sequence[Tally]) -> Account | None:
    told = await stand.records()
    if told is None:
        return None
    records, forgotten = told
    unanswered = {number for tally in tallies for number in tally.unanswered}
    return msgspec.structs.replace(account(run, unanswered, records), forgotten=forgotten)


def _spread(
    urls: Sequence[str], before: Sequence[tuple[int, int] | None], after: Sequence[tuple[int, int] | None]
) -> list[Engine]:
    engines = []
    for url, first, last in zip(urls, before, after, strict=True):
        known = first is not None and last is not None
        engines.append(Engine(url, last[0] - first[0], last[1] - first[1]) if known else Engine(url))  # type: ignore[index]
    return engines


def _usage(
    watch: Watch, stand: Stand, tallies: Sequence[Tally], begin: float, routed: bool
) -> dict[str, Any]:
    wall = max(tally.wall for tally in tallies)
    done, chunks = sum(tally.cpu_done for tally in tallies), sum(tally.chunks for tally in tallies)
    parts = {}
    for part in stand.pids:
        used = watch.used(part, begin, begin + wall)
        if used is None or (part == "router" and not routed):
            continue
        cpu, seconds, rss = used
        share = seconds / wall if wall > 0 else 0.0  # of what was done, in the time that was looked at
        lag = watch.lag(begin, begin + wall) if part == "router" else None
        parts[part] = usage_of(cpu, seconds, round(done * share), round(chunks * share), rss, lag)
    return parts


def machine() -> dict[str, Any]:
    """Where it ran."""
    return {
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "host": platform.node(),
    }
