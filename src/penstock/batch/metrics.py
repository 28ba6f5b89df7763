"""A job's metrics in Prometheus' text format, and the port they are read from.

Names follow Prometheus' conventions, and vLLM's where it has the same: counters end in `_total`, units are
seconds and tokens. Counters begin at 0 with each run; the gauges of rows and samples are those of the job.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from penstock import __version__
from penstock.batch.progress import LATENCY_BOUNDS, Progress, Rates
from penstock.fleet.fleet import FleetStatistics
from penstock.wire.exchange import Exchange
from penstock.wire.server import HttpServer

PREFIX: Final = "penstock_batch_"
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class JobCollector(Collector):
    """Reads the counts when it is asked. `rates` are marked by whoever shows the job, or at each reading."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._name = name
        self._rates = Rates(progress, monotonic())

    def collect(self) -> Iterator[Metric]:
        progress = self._progress
        self._rates.mark(monotonic())
        info = {"version": __version__, "job": self._name}
        yield InfoMetricFamily(f"{PREFIX[:-1]}", "What this job is.", info)
        yield _by("rows", "Rows of the job by what became of them.", "state", _rows(progress))
        yield _by("samples", "Samples of the job by what became of them.", "state", _samples(progress))
        yield _counter("prompt_tokens", "Prompt tokens of finished samples.", progress.prompt_tokens)
        yield _counter(
            "generation_tokens", "Generated tokens of finished samples.", progress.completion_tokens
        )
        yield _counter("dropped_samples", "Samples left out of their rows.", progress.samples_dropped)
        failures = CounterMetricFamily(
            f"{PREFIX}failures", "Samples that failed, by class.", labels=["error"]
        )
        for error, count in progress.failures.items():
            failures.add_metric([error], count)
        yield failures
        yield _latencies(progress)
        if (left := self._rates.eta()) is not None:
            yield GaugeMetricFamily(
                f"{PREFIX}eta_seconds", "Time until nothing is owed, the tail included.", left
            )
        if progress.fleet is not None:
            yield from _fleet(progress.fleet())


def exposition(registry: CollectorRegistry) -> bytes:
    return generate_latest(registry)


@asynccontextmanager
async def served(progress: Progress, name: str, port: int, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """`/metrics` on `port` while the block runs; the port, where 0 asked for any. Raises ConfigError."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(JobCollector(progress, name))

    def answer(exchange: Exchange) -> None:
        if exchange.request.path.partition("?")[0] in ("/metrics", "/"):
            exchange.respond(200, exposition(registry), content_type=CONTENT_TYPE)
        else:
            exchange.respond(404, b"")

    server = HttpServer(answer, host=host, port=port)
    await server.start()
    try:
        yield server.port
    finally:
        await server.close(0.0)


def _rows(progress: Progress) -> dict[str, int]:
    found = {"done": progress.rows_done, "failed": progress.rows_failed}
    if progress.rows is not None:
        found["owed"] = progress.rows - progress.rows_done - progress.rows_failed
    return found


def _samples(progress: Progress) -> dict[str, int]:
    found = {"done": progress.samples_done, "failed": progress.samples_failed}
    if (owed := progress.samples_owed) is not None:
        found["owed"] = owed
    return found


def _fleet(fleet: FleetStatistics) -> Iterator[Metric]:
    yield _by("requests_in_flight", "Requests sent and not answered.", "endpoint", fleet.in_flight)
    limits = {name: limit for name, limit in fleet.limits.items() if limit is not None}
    yield _by("requests_limit", "Requests in flight there may be.", "endpoint", limits)
    up = {name: int(state == "up") for name, state in fleet.states.items()}
    yield _by("endpoint_up", "1 for an endpoint that is given requests.", "endpoint", up)
    yield GaugeMetricFamily(f"{PREFIX}requests_waiting", "Requests that wait for a slot.", fleet.waiting)
    yield _counter("retries", "Attempts that failed and were followed by another.", fleet.retries)


def _latencies(progress: Progress) -> Metric:
    total, buckets = 0, []
    for bound, count in zip([*map(str, LATENCY_BOUNDS), "+Inf"], progress.latency_counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return HistogramMetricFamily(
        f"{PREFIX}sample_latency_seconds",
        "From the first request of a sample to its last byte.",
        buckets=buckets,
        sum_value=progress.latency_sum,
    )


def _by(name: str, help: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}{name}", help, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _counter(name: str, help: str, value: float) -> Metric:
    return CounterMetricFamily(f"{PREFIX}{name}", help, value)
