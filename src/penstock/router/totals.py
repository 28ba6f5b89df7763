"""Statistics of several processes added up, so that whichever of them is asked shows the whole.

What was counted and what is there now are kept apart: the counts of a process that has died stay in the sum,
so that a counter never falls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.router.upstream import EngineTransport

if TYPE_CHECKING:
    from penstock.router.router import Router

Numbers = dict[str, Any]
"""Numbers, lists of numbers and further Numbers, by name."""

COUNTS = "counts"
GAUGES = "gauges"


def numbers(object: Any) -> Any:
    """What the slots of a statistics object hold."""
    if isinstance(object, int | float | list):
        return object
    return {name: numbers(getattr(object, name)) for name in type(object).__slots__}


def added(one: Any, other: Any) -> Any:
    """Their sum, name by name; what only one has is as there."""
    if isinstance(one, dict):
        both = {name: added(one[name], other[name]) for name in one if name in other}
        return {**one, **other, **both}
    if isinstance(one, list):
        return [a + b for a, b in zip(one, other, strict=True)]
    return one + other


def filled(like: Any, values: Any) -> Any:
    """A statistics object with these numbers."""
    if not isinstance(values, dict):
        return values
    made = type(like)()
    for name, value in values.items():
        setattr(made, name, filled(getattr(like, name), value))
    return made


def told(router: Router, in_flight: int) -> Numbers:
    """The own statistics. `in_flight`: requests that clients of this process wait for."""
    transports = _transports(router)
    return {
        COUNTS: {
            "router": numbers(router.statistics),
            "retries": router.fleet.retries,
            "workers": {name: numbers(transport.counts) for name, transport in transports.items()},
        },
        GAUGES: {
            "in_flight": in_flight,
            "connections": {n: transport.statistics().connections for n, transport in transports.items()},
        },
    }


@contextmanager
def shown(router: Router, others: Iterable[Numbers]) -> Iterator[int]:
    """While the block runs, which must not wait, `router` has the statistics of all processes in place of its
    own. Yields the requests that clients of the others wait for."""
    total: Numbers = {}
    for one in others:
        total = added(total, one)
    counts, gauges = total.get(COUNTS, {}), total.get(GAUGES, {})
    with ExitStack() as stack:

        def put(where: Any, name: str, value: Any) -> None:
            if name in vars(where):
                stack.callback(setattr, where, name, vars(where)[name])
            else:
                stack.callback(delattr, where, name)
            setattr(where, name, value)

        if counts:
            sums = added(numbers(router.statistics), counts["router"])
            put(router, "statistics", filled(router.statistics, sums))
            put(router.fleet, "retries", router.fleet.retries + counts["retries"])
        for name, transport in _transports(router).items():
            if name in counts.get("workers", {}):
                sums = added(numbers(transport.counts), counts["workers"][name])
                put(transport, "counts", filled(transport.counts, sums))
            if name in gauges.get("connections", {}):
                own = transport.statistics()
                here = msgspec.structs.replace(own, connections=own.connections + gauges["connections"][name])
                put(transport, "statistics", lambda here=here: here)
        yield gauges.get("in_flight", 0)


def _transports(router: Router) -> dict[str, EngineTransport]:
    return {
        endpoint.name: endpoint.transport
        for endpoint in router.fleet.endpoints
        if isinstance(endpoint.transport, EngineTransport)
    }
