"""The router and its workers at one moment: what metrics and dashboard are written from, and nothing else.

The counts in a snapshot are the live ones: it is written out at once, in the same step of the event loop.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

from penstock.fleet.endpoint import Endpoint
from penstock.fleet.health import State
from penstock.router.statistics import RouterStatistics, WorkerStatistics
from penstock.router.upstream import EngineTransport

if TYPE_CHECKING:
    from penstock.router.router import Router

STATES: Final = tuple(state.name.lower() for state in State)
"""A worker is in one of them: up, down, its breaker open, or half open."""
STARTED: Final = time.time()
"""When this process began, seconds since 1970."""


class WorkerSnapshot(msgspec.Struct):
    """One worker."""

    name: str
    state: str
    """One of STATES."""
    error: str | None
    """Why it is not up."""
    in_flight: int
    limit: int | None
    """Requests in flight there may be, None: no limit."""
    counts: WorkerStatistics


class Snapshot(msgspec.Struct):
    """The router and its workers."""

    policy: str
    started: float
    """When the router began, seconds since 1970."""
    in_flight: int
    """Requests whose response has not ended, those to the router itself among them."""
    slots: int
    """Requests in flight on all workers."""
    cap: int | None
    """How many of these there may be, None: no limit but the workers' own."""
    waiting: int
    """Requests that wait for a slot."""
    retries: int
    """Attempts that failed and were followed by another."""
    counts: RouterStatistics
    workers: list[WorkerSnapshot]


def snapshot(router: Router, in_flight: int) -> Snapshot:
    """`in_flight`: requests that clients wait for."""
    dispatch = router.fleet.dispatch
    return Snapshot(
        policy=router.args.policy,
        started=STARTED,
        in_flight=in_flight,
        slots=dispatch.in_flight,
        cap=router.args.max_concurrent_requests,
        waiting=dispatch.waiting,
        retries=router.fleet.retries,
        counts=router.statistics,
        workers=[_worker(endpoint) for endpoint in router.fleet.endpoints],
    )


def _worker(endpoint: Endpoint) -> WorkerSnapshot:
    health, transport = endpoint.health, endpoint.transport
    assert isinstance(transport, EngineTransport)
    return WorkerSnapshot(
        name=endpoint.name,
        state=health.state.name.lower(),
        error=None if health.error is None else str(health.error),
        in_flight=endpoint.in_flight,
        limit=endpoint.shown_limit,
        counts=transport.counts,
    )
