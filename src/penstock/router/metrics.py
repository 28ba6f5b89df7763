"""The router's metrics in Prometheus' text format, written when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from penstock.fleet.endpoint import Endpoint
from penstock.router.statistics import Histogram, WorkerStatistics
from penstock.router.upstream import EngineTransport

if TYPE_CHECKING:
    from penstock.router.router import Router

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_STATES: Final = ("UP", "DOWN", "OPEN", "HALF_OPEN")
_PREFIX: Final = "penstock_router_"


def exposition(router: Router, in_flight: int) -> bytes:
    """All metrics. `in_flight`: requests that clients wait for."""
    lines = [*_of_router(router, in_flight), *_of_workers(router.fleet.endpoints)]
    return ("\n".join(lines) + "\n").encode()


def _of_router(router: Router, in_flight: int) -> Iterator[str]:
    counted, dispatch = router.statistics, router.fleet.dispatch
    yield from _single("requests_total", "counter", "Requests to be relayed.", counted.requests)
    yield from _single("requests_in_flight", "gauge", "Requests whose response has not ended.", in_flight)
    yield from _single("slots_taken", "gauge", "Requests in flight on all workers.", dispatch.in_flight)
    yield from _single("queue_depth", "gauge", "Requests that wait for a slot.", dispatch.waiting)
    yield from _single(
        "queue_full_total", "counter", "Requests refused: the queue was full.", counted.queue_full
    )
    yield from _single(
        "queue_timeouts_total", "counter", "Requests that waited too long.", counted.queue_timeouts
    )
    yield from _single("retries_total", "counter", "Attempts followed by another.", router.fleet.retries)
    yield from _single(
        "refused_total", "counter", "Requests without a key, or that are not HTTP as it should be.",
        counted.refused,
    )  # fmt: skip
    yield from _single("client_gone_total", "counter", "Requests whose client went away.", counted.cancelled)
    yield from _single("broken_total", "counter", "Responses that broke off.", counted.broken)
    yield from _single("resumed_total", "counter", "Streams continued on another worker.", counted.resumed)
    yield from _header("queue_seconds", "histogram", "Seconds requests waited for a slot.")
    yield from _histogram("queue_seconds", "", counted.queued)


def _of_workers(endpoints: list[Endpoint]) -> Iterator[str]:
    workers = [(f'worker="{_escaped(end.name)}"', end, _counts(end)) for end in endpoints]
    yield from _header("worker_in_flight", "gauge", "Requests in flight on a worker.")
    yield from (f"{_PREFIX}worker_in_flight{{{label}}} {end.in_flight}" for label, end, _ in workers)
    yield from _header("worker_limit", "gauge", "Requests in flight there may be on a worker.")
    for label, end, _ in workers:
        limit = "+Inf" if end.shown_limit is None else end.shown_limit
        yield f"{_PREFIX}worker_limit{{{label}}} {limit}"
    yield from _header("worker_state", "gauge", "1 for the state a worker is in.")
    for label, end, _ in workers:
        for state in _STATES:
            here = int(end.health.state.name == state)
            yield f'{_PREFIX}worker_state{{{label},state="{state.lower()}"}} {here}'
    yield from _header("worker_responses_total", "counter", "Responses by hundreds of their status.")
    for label, _, counts in workers:
        for hundreds in range(2, 6):
            name = f"{_PREFIX}worker_responses_total"
            yield f'{name}{{{label},code="{hundreds}xx"}} {counts.responses[hundreds]}'
    for name, help in (
        ("transport_errors", "Attempts that brought no whole response."),
        ("retries", "Attempts that failed here and were followed by another."),
        ("bytes_sent", "Bytes of request bodies sent."),
        ("bytes_received", "Bytes of response bodies received."),
    ):
        yield from _header(f"worker_{name}_total", "counter", help)
        yield from (
            f"{_PREFIX}worker_{name}_total{{{label}}} {getattr(counts, name)}" for label, _, counts in workers
        )
    yield from _header("worker_seconds", "histogram", "Seconds from a request sent to its response complete.")
    for label, _, counts in workers:
        yield from _histogram("worker_seconds", label, counts.latency)
    yield from _header("worker_first_byte_seconds", "histogram", "Seconds from a request sent to its head.")
    for label, _, counts in workers:
        yield from _histogram("worker_first_byte_seconds", label, counts.first_byte)


def _counts(endpoint: Endpoint) -> WorkerStatistics:
    assert isinstance(endpoint.transport, EngineTransport)
    return endpoint.transport.counts


def _single(name: str, kind: str, help: str, value: float) -> Iterable[str]:
    return [*_header(name, kind, help), f"{_PREFIX}{name} {value}"]


def _header(name: str, kind: str, help: str) -> Iterable[str]:
    return [f"# HELP {_PREFIX}{name} {help}", f"# TYPE {_PREFIX}{name} {kind}"]


def _histogram(name: str, label: str, histogram: Histogram) -> Iterator[str]:
    total = 0
    comma = "," if label else ""
    for bound, count in zip([*map(repr, histogram.bounds()), "+Inf"], histogram.counts, strict=True):
        total += count
        yield f'{_PREFIX}{name}_bucket{{{label}{comma}le="{bound}"}} {total}'
    braces = f"{{{label}}}" if label else ""
    yield f"{_PREFIX}{name}_sum{braces} {histogram.total:.6f}"
    yield f"{_PREFIX}{name}_count{braces} {total}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
