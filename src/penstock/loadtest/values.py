"""Values of a point by their names, as conditions, comparisons and tables ask for them.

    errors, error_rate, sent, completed, retries, resets, strays, connections, invalid
    lost, duplicated, orphaned                       where the engines keep account
    request_throughput, output_throughput, goodput   per second
    mean_ttft, p50_e2el, p99.9_itl, …                milliseconds, any percentile of ttft, tpot, itl, e2el

Pure. `Condition` is what `--fail-if` takes: a name, a comparison and a number, with a unit where it has one.
"""

from __future__ import annotations

import base64
import operator
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Final

import msgspec

from penstock.errors import ConfigError
from penstock.loadtest.histogram import Histogram
from penstock.loadtest.metrics import Point
from penstock.loadtest.plan import METRICS

Value = Callable[[Point], float | None]

PLAIN: Final[dict[str, Value]] = {
    "errors": lambda point: point.failed,
    "error_rate": lambda point: point.failed / point.sent if point.sent else None,
    "sent": lambda point: point.sent,
    "completed": lambda point: point.completed,
    "retries": lambda point: point.retries,
    "resets": lambda point: point.resets,
    "strays": lambda point: point.strays,
    "connections": lambda point: point.connections_opened,
    "invalid": lambda point: float(bool(point.invalid)),
    "lost": lambda point: None if point.account is None else point.account.lost,
    "duplicated": lambda point: None if point.account is None else point.account.duplicated,
    "orphaned": lambda point: None if point.account is None else point.account.orphaned,
    "request_throughput": lambda point: point.request_throughput,
    "output_throughput": lambda point: point.output_throughput,
    "goodput": lambda point: point.goodput,
}
"""None: it was not measured."""
UNITS: Final = {"": 1.0, "ms": 1.0, "s": 1e3, "us": 1e-3, "µs": 1e-3}
"""Milliseconds of the units of a latency."""
COMPARISONS: Final[dict[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq,
    "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip

_LATENCY: Final = re.compile(r"(mean|p(\d{1,2}(?:\.\d+)?|100))_(\w+)")
_CONDITION: Final = re.compile(r"\s*([\w.]+)\s*(>=|<=|==|!=|>|<)\s*([0-9.]+(?:e[+-]?\d+)?)\s*(%|[a-zµ]*)\s*")


def value_of(point: Point, name: str) -> float | None:
    """The value called `name`; None: the point does not have it. Raises ConfigError for an unknown name."""
    if name in PLAIN:
        return PLAIN[name](point)
    kind, percent, metric = _latency(name)
    latency = point.latency.get(metric)
    if latency is None:
        return None
    if kind == "mean":
        return latency.mean
    if kind in latency.percentiles:
        return latency.percentiles[kind]
    histogram = Histogram()
    histogram.merge(base64.b64decode(latency.histogram))
    seconds = histogram.percentile(float(percent))
    return None if seconds is None else seconds * 1e3


def is_latency(name: str) -> bool:
    return name not in PLAIN


def _latency(name: str) -> tuple[str, str, str]:
    match = _LATENCY.fullmatch(name)
    if match is not None:
        metric = "e2el" if match[3] == "e2e" else match[3]
        if metric in METRICS:
            return match[1], match[2] or "", metric
    known = [*PLAIN, *(f"p99_{metric}" for metric in METRICS), *(f"mean_{metric}" for metric in METRICS)]
    near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ConfigError(f"there is no value {name!r}; did you mean {near!r}?")


class Condition(msgspec.Struct, frozen=True):
    """`errors>0`, `p99_e2el>2s`, `error_rate>1%`: what a run must not be."""

    text: str
    name: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Raises ConfigError."""
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ConfigError(f"{text!r} is no condition: write it as 'errors>0' or 'p99_e2el>2s'")
        name, comparison, number, unit = match.groups()
        latency = is_latency(name)
        if latency:
            _latency(name)
        factor = UNITS.get(unit) if latency else {"": 1.0, "%": 0.01}.get(unit)
        try:
            bound = float(number)
        except ValueError:
            factor, bound = None, 0.0
        if factor is None:
            units = "ms, s or us" if latency else "nothing, or % for a share,"
            raise ConfigError(
                f"{text!r}: {number}{unit} is no bound of {name}; {units} may follow its number"
            )
        return cls(text.strip(), name, comparison, bound * factor)

    def met_by(self, point: Point) -> bool:
        """Raises ConfigError where the point does not have the value: what is not known cannot pass."""
        value = value_of(point, self.name)
        if value is None:
            raise ConfigError(
                f"{self.text!r} cannot be told of {point.layer} at {point.load}: {self.name} was not measured"
            )
        return COMPARISONS[self.comparison](value, self.bound)


def failures(points: Sequence[Point], conditions: Sequence[Condition]) -> list[str]:
    """A sentence for each point that meets a condition it must not. Raises ConfigError."""
    return [
        f"{point.layer} at {point.load}: {condition.text} ({condition.name} is "
        f"{value_of(point, condition.name):.6g})"
        for point in points
        for condition in conditions
        if condition.met_by(point)
    ]
