"""What is wrong, and whose it is: each symptom is laid at the lowest layer that shows it.

Pure. A layer that shows no more of a symptom than the layer beneath it under the same load is not at fault:
it passes on what it gets. Where the layer beneath was not measured, both parts are named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from typing import Final, NamedTuple

from penstock.loadtest.account import UNSEEN
from penstock.loadtest.metrics import Point
from penstock.loadtest.plan import UNFINISHED
from penstock.loadtest.values import value_of

BENEATH: Final = {
    "engine": (),
    "router": ("engine",),
    "client": ("router", "client-engine", "engine"),
    "client-engine": ("engine",),
}
"""The layers a layer may be held against, the nearest first."""
PARTS: Final = {
    ("engine", ""): "engine",
    ("router", "engine"): "router",
    ("router", ""): "router or engine",
    ("client", "router"): "client",
    ("client", "client-engine"): "router",
    ("client", "engine"): "client or router",
    ("client", ""): "client, router or engine",
    ("client-engine", "engine"): "client",
    ("client-engine", ""): "client or engine",
}
"""What lies between a layer and the one it is held against."""
SLOWER: Final = 0.1
"""Share of the throughput beneath that a layer may lose before it is named as a bottleneck."""
HELD_BACK: Final = 0.75
"""A layer that lets less than this share of what the layer beneath does be at the engines holds it back."""
FADED: Final = 0.5
"""Share of what was at the engines in the first half of a load that is left at its end when slots leak."""
STUCK: Final = frozenset({UNFINISHED, "PhaseTimeout"})
"""Errors of requests that nobody goes on with."""
FEWEST: Final = 8
"""Requests at the engines from which such shares say something."""
LOOKS: Final = 4
"""Looks at the engines from which the most that was seen says something."""


class Finding(NamedTuple):
    """One thing that is wrong."""

    part: str
    """engine, router or client; with `or` between them where that cannot be told."""
    what: str

    def __str__(self) -> str:
        return f"{self.part}: {self.what}"


COUNTED: Final = {
    "lost": "generations lost: completed, but not answered,",
    "duplicated": "generations done more than once",
    "orphaned": "generations that run for nobody",
    "strays": "answers nobody had asked for",
    "errors": "failed",
}
"""What is counted in requests, under the name of its value, and how it is said."""


def findings(points: Sequence[Point]) -> list[Finding]:
    """What is wrong, the gravest first; a line for each part and symptom."""
    by_load: dict[str, dict[str, Point]] = {}
    for point in points:
        by_load.setdefault(point.load, {})[point.layer] = point
    found: dict[str, dict[str, list[str]]] = {}
    for layers in by_load.values():
        for point in layers.values():
            for part, symptom, said in _of(point, layers):
                found.setdefault(symptom, {}).setdefault(part, []).append(f"{said} at {point.load}")
    order = [*COUNTED, "leak", "held back", "slower"]
    return [
        Finding(part, "; ".join(dict.fromkeys(said)))
        for symptom in order
        for part, said in found.get(symptom, {}).items()
    ]


def _of(point: Point, layers: Mapping[str, Point]) -> Iterator[tuple[str, str, str]]:
    """(part, symptom, words) of one point, held against the others of the same load."""
    name = next((name for name in BENEATH.get(point.layer, ()) if name in layers), "")
    beneath = layers.get(name)
    part = PARTS.get((point.layer, name), point.layer)
    for symptom in COUNTED:
        number = round(value_of(point, symptom) or 0)
        if symptom == "errors" and number and meant(point):
            yield "engine, on purpose", symptom, _counted(point, number, symptom)
            continue
        share = 0.0
        if beneath is not None and beneath.sent:
            share = (value_of(beneath, symptom) or 0) / beneath.sent
        if number and exceeds(number, share * point.sent):
            yield part, symptom, _counted(point, number, symptom)
    yield from _of_engines(part, point, beneath)
    if beneath is None or point.invalid or beneath.invalid:
        return
    if point.request_throughput < (1 - SLOWER) * beneath.request_throughput:
        lost = 1 - point.request_throughput / beneath.request_throughput
        yield part, "slower", f"{lost:.0%} fewer requests/s than without it{_cores(part, point)}"


def _of_engines(part: str, point: Point, beneath: Point | None) -> Iterator[tuple[str, str, str]]:
    """What can be seen of how many requests were at the engines."""
    if point.concurrency is None or point.layer == "engine":
        return
    if _fades(point) and not (beneath is not None and _fades(beneath)):
        first, last = halves(point)
        yield part, "leak", f"slots leak: {first} requests at the engines at first, {last} in the end,"
    most = peak(point)
    allowed = point.concurrency if beneath is None else peak(beneath)
    if most is None or allowed is None:
        return
    if allowed >= FEWEST and most < HELD_BACK * allowed:
        without = "" if beneath is None else f" ({allowed} without it)"
        yield part, "held back", f"no more than {most} requests reach the engines{without}"


def meant(point: Point) -> bool:
    """All that failed met a fault on purpose; who kills engines means them not to be reached either."""
    seen = point.account
    if seen is None or not seen.faults or not seen.unanswered:
        return False
    known = {*seen.faults, *([UNSEEN] if "kill" in seen.faults else [])}
    return known.issuperset(seen.unanswered)


def exceeds(number: int, expected: float) -> bool:
    """More than the layer beneath explains: by three standard deviations of a Poisson count."""
    return number > expected + 3 * sqrt(expected)


def peak(point: Point) -> int | None:
    """The most requests that were at the engines at a time; None: it was not looked at often enough."""
    return max(count for _, count in point.held) if len(point.held) >= LOOKS else None


def halves(point: Point) -> tuple[int, int]:
    """The most requests that were at the engines in the first half of a load, and in its last quarter."""
    counts = [count for _, count in point.held]
    if len(counts) < LOOKS:
        return 0, 0
    return max(counts[: len(counts) // 2]), max(counts[-(len(counts) // 4) :])


def _fades(point: Point) -> bool:
    """Fewer and fewer requests are at the engines, and the others wait for ever."""
    first, last = halves(point)
    stuck = sum(count for kind, count in point.errors.items() if kind in STUCK)
    return first >= FEWEST and last < FADED * first and stuck >= FADED * (first - last)


def _counted(point: Point, number: int, symptom: str) -> str:
    if symptom != "errors":
        return f"{number:,} {COUNTED[symptom]}"
    kinds = sorted(point.errors.items(), key=lambda pair: -pair[1])
    named = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
    return f"{number:,} of {point.sent:,} failed ({named})"


def _cores(part: str, point: Point) -> str:
    used = point.usage.get(part)
    return "" if used is None else f" (it used {used.cores:.2f} cores)"
