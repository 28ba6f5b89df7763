"""The router's metrics in Prometheus' text format, written when they are asked for.

Names follow Prometheus' conventions: counters end in `_total`, units are seconds and bytes. A worker's series
end when it leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from penstock import __version__
from penstock.router.snapshot import STATES, Snapshot, WorkerSnapshot, snapshot
from penstock.router.statistics import Histogram

if TYPE_CHECKING:
    from penstock.router.router import Router

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX: Final = "penstock_router_"


def exposition(router: Router, in_flight: int) -> bytes:
    """All metrics. `in_flight`: requests that clients wait for."""
    return written(snapshot(router, in_flight))


def written(shown: Snapshot) -> bytes:
    """The metrics of a snapshot."""
    return ("\n".join([*_of_router(shown), *_of_workers(shown.workers)]) + "\n").encode()


def _of_router(shown: Snapshot) -> Iterator[str]:
    counts = shown.counts
    yield from _header("info", "gauge", "What this router is; always 1.")
    yield f'{_PREFIX}info{{version="{__version__}",policy="{shown.policy}"}} 1'
    for name, help, gauge in (
        ("start_time_seconds", "When the router's process began, since 1970.", round(shown.started, 3)),
        ("requests_in_flight", "Requests whose response has not ended.", shown.in_flight),
        ("slots_taken", "Requests in flight on all workers.", shown.slots),
        ("slots", "Requests in flight there may be on all workers.", _limit(shown.cap)),
        ("queue_depth", "Requests that wait for a slot.", shown.waiting),
    ):
        yield from _single(name, "gauge", help, gauge)
    for name, help, count in (
        ("requests", "Requests to be relayed.", counts.requests),
        ("retries", "Attempts followed by another.", shown.retries),
        ("queue_full", "Requests refused: the queue was full.", counts.queue_full),
        ("queue_timeouts", "Requests that waited too long.", counts.queue_timeouts),
        ("given_up", "Requests answered with an error: no worker had a response.", counts.given_up),
        ("refused", "Requests without a key, or that are not HTTP as it should be.", counts.refused),
        ("client_gone", "Requests whose client went away.", counts.cancelled),
        ("broken", "Responses that broke off.", counts.broken),
        ("resumed", "Streams continued on another worker.", counts.resumed),
    ):
        yield from _single(f"{name}_total", "counter", help, count)
    yield from _header(
        "queue_seconds", "histogram", "Seconds requests waited for a slot, of those that had to."
    )
    yield from _histogram("queue_seconds", "", counts.queued)


def _of_workers(workers: list[WorkerSnapshot]) -> Iterator[str]:
    labelled = [(f'worker="{_escaped(worker.name)}"', worker) for worker in workers]
    yield from _header("worker_in_flight", "gauge", "Requests in flight on a worker.")
    yield from (f"{_PREFIX}worker_in_flight{{{label}}} {worker.in_flight}" for label, worker in labelled)
    yield from _header("worker_limit", "gauge", "Requests in flight there may be on a worker.")
    yield from (f"{_PREFIX}worker_limit{{{label}}} {_limit(worker.limit)}" for label, worker in labelled)
    yield from _header(
        "worker_state", "gauge", "1 for the state a worker is in; open and half open are its breaker's."
    )
    for label, worker in labelled:
        for state in STATES:
            yield f'{_PREFIX}worker_state{{{label},state="{state}"}} {int(worker.state == state)}'
    yield from _header("worker_responses_total", "counter", "Responses by hundreds of their status.")
    for label, worker in labelled:
        for hundreds in range(2, 6):
            name = f"{_PREFIX}worker_responses_total"
            yield f'{name}{{{label},code="{hundreds}xx"}} {worker.counts.responses[hundreds]}'
    for name, attribute, help in (
        ("transport_errors", "transport_errors", "Attempts that brought no whole response."),
        ("retries", "retries", "Attempts that failed here and were followed by another."),
        ("breaker_openings", "openings", "Times a worker's circuit breaker opened."),
        ("bytes_sent", "bytes_sent", "Bytes of request bodies sent."),
        ("bytes_received", "bytes_received", "Bytes of response bodies received."),
    ):
        yield from _header(f"worker_{name}_total", "counter", help)
        for label, worker in labelled:
            yield f"{_PREFIX}worker_{name}_total{{{label}}} {getattr(worker.counts, attribute)}"
    yield from _header("worker_seconds", "histogram", "Seconds from a request sent to its response complete.")
    for label, worker in labelled:
        yield from _histogram("worker_seconds", label, worker.counts.latency)
    yield from _header("worker_first_byte_seconds", "histogram", "Seconds from a request sent to its head.")
    for label, worker in labelled:
        yield from _histogram("worker_first_byte_seconds", label, worker.counts.first_byte)


def _limit(limit: int | None) -> int | str:
    return "+Inf" if limit is None else limit


def _single(name: str, kind: str, help: str, value: float | str) -> Iterable[str]:
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
