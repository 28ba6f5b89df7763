"""Results as tables for a terminal: every point, what each layer adds, and two results side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from rich.console import Console
from rich.table import Table

from penstock.loadtest.bench import Result
from penstock.loadtest.findings import findings
from penstock.loadtest.metrics import PERCENTILES, Point
from penstock.loadtest.values import is_latency, value_of

STEPS: Final = (
    ("router", "engine", "router"),
    ("client", "router", "client"),
    ("client alone", "engine", "client-engine"),
)
"""A part's name, the layer without it, the layer with it."""
COMPARED: Final = (
    "request_throughput", "output_throughput", "goodput", "p50_ttft", "p99_ttft", "p50_tpot", "p99_itl",
    "p50_e2el", "p99_e2el", "errors", "lost", "duplicated", "orphaned",
)  # fmt: skip
NOT_COMPARED: Final = frozenset({"out", "html", "fail_if", "layers", "concurrency", "request_rate"})
"""Settings that change nothing about a point."""
SAME: Final = 0.02
"""Relative difference that is not worth a sign."""
UNKNOWN: Final = "–"


class Added(NamedTuple):
    """What a part adds at one load: milliseconds, µs of its CPU, failed requests. None: not known."""

    part: str
    load: str
    ttft_p50: float | None
    ttft_p99: float | None
    e2el_p50: float | None
    e2el_p99: float | None
    cpu_us_per_request: float | None
    cpu_us_per_chunk: float | None
    errors: int


def added(points: Sequence[Point]) -> list[Added]:
    """What each layer adds to the one beneath it, at each load that both were measured at.

    The CPU of a router is its own. The client's is what it costs beyond the bare connections of the layer
    beneath, which send the same requests.
    """
    found = []
    for load in dict.fromkeys(point.load for point in points):
        by_layer = {point.layer: point for point in points if point.load == load}
        for part, beneath, above in STEPS:
            if beneath in by_layer and above in by_layer:
                found.append(_added(part, by_layer[beneath], by_layer[above]))
    return found


def _added(part: str, low: Point, high: Point) -> Added:
    if part == "router":
        used = high.usage.get("router")
        costs = (None, None) if used is None else (used.cpu_us_per_request, used.cpu_us_per_chunk)
    else:
        ours, bare = high.usage["client"], low.usage["generator"]
        costs = (
            _difference(ours.cpu_us_per_request, bare.cpu_us_per_request),
            _difference(ours.cpu_us_per_chunk, bare.cpu_us_per_chunk),
        )

    def later(name: str) -> float | None:
        return _difference(value_of(high, name), value_of(low, name))

    return Added(
        part=part,
        load=low.load,
        ttft_p50=later("p50_ttft"),
        ttft_p99=later("p99_ttft"),
        e2el_p50=later("p50_e2el"),
        e2el_p99=later("p99_e2el"),
        cpu_us_per_request=costs[0],
        cpu_us_per_chunk=costs[1],
        errors=high.failed - low.failed,
    )


def print_result(result: Result, console: Console) -> None:
    """The whole result; its first line says whether it can be trusted."""
    console.print(verdict(result), markup=False, highlight=False, soft_wrap=True)
    for sentence in result.invalid:
        console.print(f"  {sentence}", markup=False, highlight=False, soft_wrap=True)
    for line in headlines(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(_points(result.points))
    console.print(_latencies(result.points))
    console.print(_used(result.points))
    steps = added(result.points)
    if steps:
        console.print(_steps(steps))
    for line in notes(result.points):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def verdict(result: Result) -> str:
    """The first line."""
    if not result.points:
        return "nothing was measured"
    bad = len(result.invalid)
    end = "; stopped before the last one" if result.interrupted else ""
    if bad:
        return f"INVALID: the load generator was the bottleneck in {bad} of {len(result.points)} points{end}"
    return f"valid: the load generator kept up in all {len(result.points)} points{end}"


def headlines(result: Result) -> list[str]:
    """What was found wrong and in which part, or what was looked for in vain."""
    found = [str(finding) for finding in findings(result.points)]
    accounts = [point.account for point in result.points if point.account is not None]
    if not accounts or len(accounts) < len(result.points):
        return found
    total = sum(account.generated for account in accounts)
    astray = sum(account.lost + account.duplicated + account.orphaned for account in accounts)
    if total and not astray and not any(account.forgotten for account in accounts):
        found.append(f"none of {total:,} generations was lost, duplicated or orphaned")
    return found


def print_comparison(first: Result, second: Result, console: Console) -> None:
    """The points that both results have, which only one has, and the settings that are not the same."""
    for name, result in (("A", first), ("B", second)):
        console.print(f"{name}: {verdict(result)}", markup=False, highlight=False, soft_wrap=True)
    for name in sorted({*first.settings, *second.settings} - NOT_COMPARED):
        one, two = (result.settings.get(name, "default") for result in (first, second))
        if one != two:
            console.print(f"{name}: A {one}, B {two}", markup=False, highlight=False, soft_wrap=True)
    others = {(point.layer, point.load): point for point in second.points}
    for point in first.points:
        other = others.pop((point.layer, point.load), None)
        if other is None:
            console.print(f"only in A: {point.layer} at {point.load}", markup=False, highlight=False)
        else:
            console.print(_comparison(point, other))
    for layer, load in others:
        console.print(f"only in B: {layer} at {load}", markup=False, highlight=False)


def notes(points: Iterable[Point]) -> Iterator[str]:
    """What went wrong, point by point, and how the engines shared."""
    for point in points:
        where = f"{point.layer} at {point.load}: "
        if point.errors:
            counts = sorted(point.errors.items(), key=lambda pair: -pair[1])
            yield where + "errors: " + ", ".join(f"{count} {name}" for name, count in counts)
        if point.resets or point.retries:
            yield f"{where}{point.resets} resets, {point.retries} retries"
        if not point.request_throughput and not point.errors:
            yield where + "nothing was answered in the time that was measured: let it last longer"
        if point.strays:
            yield f"{where}{point.strays} answers nobody had asked for"
        seen = point.account
        if seen is not None and seen.faults:
            struck = ", ".join(f"{count} {name}" for name, count in sorted(seen.faults.items()))
            yield f"{where}faults on purpose: {struck}; {seen.recovered} requests were answered all the same"
        if seen is not None and seen.unanswered:
            kinds = ", ".join(f"{count} {name}" for name, count in sorted(seen.unanswered.items()))
            yield f"{where}without an answer, by what the engines say of them: {kinds}"
        if seen is not None and (seen.lost or seen.duplicated or seen.orphaned):
            named = "; ".join(f"{kind}: {', '.join(ids)}" for kind, ids in seen.examples.items())
            yield f"{where}{seen.lost} lost, {seen.duplicated} duplicated, {seen.orphaned} orphaned ({named})"
        if seen is not None and seen.forgotten:
            yield f"{where}the engines have forgotten {seen.forgotten} requests: lost ones may be missed"
        shares = [engine.requests for engine in point.engines if engine.requests is not None]
        if len(shares) > 1:
            mean = sum(shares) / len(shares)
            spread = f", {(max(shares) - min(shares)) / mean:.1%} apart" if mean else ""
            yield f"{where}engines served {', '.join(map(str, shares))} requests{spread}"


def _points(points: Sequence[Point]) -> Table:
    goodput = any(point.goodput is not None for point in points)
    heads = ["requests/s", "tokens/s", *(["goodput"] if goodput else [])]
    table = _table("throughput", [*heads, "errors", "connections", "resets", "retries"])
    for point in points:
        table.add_row(
            point.layer + (" (invalid)" if point.invalid else ""),
            point.load,
            f"{point.request_throughput:,.1f}",
            f"{point.output_throughput:,.0f}",
            *([_shown(point.goodput)] if goodput else []),
            *(f"{n:,}" for n in (point.failed, point.connections_opened, point.resets, point.retries)),
        )
    return table


def _used(points: Sequence[Point]) -> Table:
    table = _table("what each part used", ["", "cores", "µs/request", "µs/chunk", "MiB", "lag p99 ms"])
    for point in points:
        for number, (part, usage) in enumerate(point.usage.items()):
            table.add_row(
                *((point.layer, point.load) if number == 0 else ("", "")),
                part,
                f"{usage.cores:.2f}",
                _shown(usage.cpu_us_per_request),
                _shown(usage.cpu_us_per_chunk),
                _shown(usage.rss_mib),
                _shown(usage.lag_p99_ms),
            )
    return table


def _latencies(points: Sequence[Point]) -> Table:
    table = _table("latencies in ms", ["", *(name for name, _ in PERCENTILES), "mean"])
    for point in points:
        for number, (metric, latency) in enumerate(point.latency.items()):
            table.add_row(
                *((point.layer, point.load) if number == 0 else ("", "")),
                metric,
                *(_shown(value) for value in latency.percentiles.values()),
                _shown(latency.mean),
            )
    return table


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for head in ("layer", "load"):
        table.add_column(head, no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _steps(steps: Sequence[Added]) -> Table:
    heads = ["ttft p50", "ttft p99", "e2el p50", "e2el p99", "µs/request", "µs/chunk", "errors"]
    table = _table("what each layer adds: ms, and µs of CPU", heads)
    for step in steps:
        table.add_row(step.part, step.load, *(_signed(value) for value in step[2:8]), f"{step.errors:+d}")
    return table


def _comparison(first: Point, second: Point) -> Table:
    table = Table(title=f"{first.layer} at {first.load}", title_justify="left", box=None)
    for head in ("", "A", "B", "change"):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for name in COMPARED:
        one, two = value_of(first, name), value_of(second, name)
        if one is not None or two is not None:
            unit = " ms" if is_latency(name) else ""
            table.add_row(name, _shown(one) + unit, _shown(two) + unit, change(one, two))
    return table


def change(one: float | None, two: float | None) -> str:
    """From one value to another, in words of a table."""
    if one is None or two is None:
        return UNKNOWN
    if one == two:
        return "="
    if one == 0:
        return f"{two - one:+,.3g}"
    relative = two / one - 1
    return "≈" if abs(relative) < SAME else f"{relative:+.1%}"


def _difference(high: float | None, low: float | None) -> float | None:
    return None if high is None or low is None else high - low


def _shown(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"


def _signed(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:+,.2f}" if abs(value) < 10 else f"{value:+,.0f}"
