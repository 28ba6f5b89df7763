"""The report of a load test: one HTML page that needs nothing from elsewhere.

Latency and throughput over the load, distributions, the course of each load, and what each layer adds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Final

from penstock.loadtest.bench import LAYERS, Result
from penstock.loadtest.metrics import Point
from penstock.loadtest.plots import COLOURS, INK, Line, bar_chart, line_chart
from penstock.loadtest.tables import UNKNOWN, added, headlines, notes, verdict
from penstock.loadtest.values import value_of

COLUMNS: Final = (
    ("requests/s", "request_throughput"), ("tokens/s", "output_throughput"), ("goodput", "goodput"),
    ("errors", "errors"), ("lost", "lost"), ("duplicated", "duplicated"), ("orphaned", "orphaned"),
    ("ttft p50", "p50_ttft"), ("p99", "p99_ttft"), ("tpot p50", "p50_tpot"), ("p99", "p99_tpot"),
    ("itl p50", "p50_itl"), ("p99", "p99_itl"), ("e2el p50", "p50_e2el"), ("p90", "p90_e2el"),
    ("p99", "p99_e2el"), ("p99.9", "p99.9_e2el"),
)  # fmt: skip

STYLE: Final = f"""
:root {{ color-scheme: light dark; --page: #fff; --text: #1f2328; --rule: #d0d7de; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #0d1117; --text: #e6edf3; --rule: #30363d; }} }}
body {{ background: var(--page); color: var(--text); font: 14px/1.5 system-ui, sans-serif;
  margin: 2em auto; max-width: 1240px; padding: 0 1em; }}
h1 {{ font-size: 1.4em; }} h2 {{ font-size: 1.1em; margin: 2em 0 .5em; }}
.valid, .invalid {{ padding: .6em 1em; border-left: 4px solid #1a9c5b; }}
.invalid {{ border-color: #d9483b; }}
.wide {{ overflow-x: auto; }} .wide table {{ font-size: 12.5px; }}
.charts {{ display: flex; flex-wrap: wrap; gap: 24px; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }}
td, th {{ padding: .15em .5em; text-align: right; border-bottom: 1px solid var(--rule); }}
td:nth-child(-n+2), th:nth-child(-n+2) {{ text-align: left; }}
svg {{ max-width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: {INK}; }}
svg .t {{ font-size: 13px; font-weight: 600; fill: var(--text); }} svg .g {{ stroke: var(--rule); }}
pre {{ overflow-x: auto; }}
"""


def page(result: Result) -> str:
    """The whole page."""
    points = result.points
    kind = "invalid" if result.invalid else "valid"
    reasons = "".join(f"<br>{escape(sentence)}" for sentence in result.invalid)
    sections = [
        f'<p class="{kind}"><b>{escape(verdict(result))}</b>{reasons}</p>',
        *([f"<p>{'<br>'.join(map(escape, told))}</p>"] if (told := headlines(result)) else []),
        _section("Points (latencies in ms)", [f'<div class="wide">{_points(points)}</div>']),
        f"<p>{'<br>'.join(map(escape, notes(points)))}</p>",
        _section("What each part used", [f'<div class="wide">{_used(points)}</div>' if points else ""]),
        _section("Over the load", over_load(points)),
        _section("What each layer adds", [_added(points), *stacks(points)]),
        _section("Distributions", distributions(points)),
        _section("Course", courses(points)),
        _section("Settings", [f"<pre>{escape(_settings(result))}</pre>"]),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>penstock bench</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style></head><body><h1>penstock bench</h1>{''.join(sections)}</body></html>\n"
    )


def over_load(points: Sequence[Point]) -> Iterator[str]:
    """Charts of latency and throughput over concurrency or rate; none where there is a single load."""
    loads = {_load(point) for point in points}
    if None in loads or len(loads) < 2:
        return
    x = "in flight" if points[0].concurrency is not None else "requests/s asked for"
    for metric in ("e2el", "ttft"):
        lines = [
            Line(
                name=layer if kind == "p50" else f"{layer} {kind}",
                points=found,
                colour=_colour(layer),
                dashed=kind != "p50",
            )
            for layer in _layers(points)
            for kind in ("p50", "p99")
            if (found := _values(points, layer, f"{kind}_{metric}"))
        ]
        yield line_chart(f"{metric} over load: p50, dashed p99", lines, x=x, y="ms")
    for name, unit in (("output_throughput", "tokens/s"), ("request_throughput", "requests/s")):
        lines = [
            Line(name=layer, points=_values(points, layer, name), colour=_colour(layer))
            for layer in _layers(points)
        ]
        yield line_chart(f"{unit} over load", lines, x=x, y=unit)


def stacks(points: Sequence[Point]) -> Iterator[str]:
    """Bars of what the engine, the router and the client each have of latency and CPU, load by load."""
    for name in ("p50_ttft", "p50_e2el", "p99_e2el"):
        bars = []
        for load, by_layer in _by_load(points).items():
            before, parts = 0.0, []
            for layer in ("engine", "router", "client"):
                value = value_of(by_layer[layer], name) if layer in by_layer else None
                if value is not None:
                    parts.append((layer, value - before))
                    before = max(before, value)
            if len(parts) > 1:
                bars.append((load, parts))
        yield bar_chart(f"{name} by layer", bars, unit="ms")
    bars = []
    for load, by_layer in _by_load(points).items():
        top = by_layer.get("client") or by_layer.get("router") or next(iter(by_layer.values()))
        parts = [
            (part, usage.cpu_us_per_request)
            for part in ("engine", "router", "client", "generator")
            if (usage := top.usage.get(part)) is not None and usage.cpu_us_per_request is not None
        ]
        bars.append((f"{load}", parts))
    yield bar_chart("CPU per request by part", bars, unit="µs")


def distributions(points: Sequence[Point]) -> Iterator[str]:
    """The share of requests that took no longer, for each load."""
    for load, by_layer in _by_load(points).items():
        for metric in ("e2el", "ttft"):
            lines = [
                Line(name=layer, points=curve, colour=_colour(layer), steps=True)
                for layer, point in by_layer.items()
                if metric in point.latency and (curve := _positive(point.latency[metric].curve))
            ]
            yield line_chart(f"{metric} at {load}: share within", lines, x="ms", y="share", top=1.0)


def courses(points: Sequence[Point]) -> Iterator[str]:
    """Requests answered, the slowest of them, and those at the engines, second by second."""
    for load, by_layer in _by_load(points).items():
        done = [
            Line(name=layer, points=[(m.second, m.done) for m in point.timeline], colour=_colour(layer))
            for layer, point in by_layer.items()
        ]
        failed = [
            Line(
                name=f"{layer} errors",
                points=[(m.second, m.failed) for m in point.timeline],
                colour=_colour(layer),
                dashed=True,
            )
            for layer, point in by_layer.items()
            if any(m.failed for m in point.timeline)
        ]
        held = [
            Line(name=layer, points=point.held, colour=_colour(layer))
            for layer, point in by_layer.items()
            if point.held
        ]
        late = [
            Line(
                name=layer,
                points=[(m.second, m.p99_ms) for m in point.timeline if m.p99_ms is not None],
                colour=_colour(layer),
            )
            for layer, point in by_layer.items()
        ]
        kinds = "answered, dashed errors" if failed else "answered"
        yield line_chart(f"requests {kinds}, at {load}", done + failed, x="s", y="requests/s", log_x=False)
        yield line_chart(f"p99 e2el at {load}", late, x="s", y="ms", log_x=False)
        yield line_chart(f"requests at the engines, at {load}", held, x="s", y="", log_x=False)


def _points(points: Sequence[Point]) -> str:
    known = [
        (head, name) for head, name in COLUMNS if any(value_of(point, name) is not None for point in points)
    ]
    rows = [
        [
            point.layer + (" (invalid)" if point.invalid else ""),
            point.load,
            *(_cell(value_of(point, name)) for _, name in known),
        ]
        for point in points
    ]
    return _table(["layer", "load", *(head for head, _ in known)], rows)


def _used(points: Sequence[Point]) -> str:
    rows = [
        [
            f"{point.layer} at {point.load}",
            part,
            *map(_cell, (used.cores, used.cpu_us_per_request, used.cpu_us_per_chunk, used.rss_mib)),
            _cell(used.lag_p99_ms),
        ]
        for point in points
        for part, used in point.usage.items()
    ]
    heads = ["point", "part", "cores", "CPU µs/request", "CPU µs/chunk", "memory MiB", "lag p99 ms"]
    return _table(heads, rows)


def _added(points: Sequence[Point]) -> str:
    """A row for each part that lies between two layers, at each load."""
    heads = [
        "part",
        "load",
        "ttft p50 ms",
        "p99",
        "e2el p50",
        "p99",
        "CPU µs/request",
        "CPU µs/chunk",
        "errors",
    ]
    rows = [
        [step.part, step.load, *(UNKNOWN if value is None else f"{value:+,.2f}" for value in step[2:8])]
        + [f"{step.errors:+d}"]
        for step in added(points)
    ]
    return f'<div class="wide">{_table(heads, rows)}</div>' if rows else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    return f"<table>{row(heads, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def _section(title: str, parts: Iterable[str]) -> str:
    shown = [part for part in parts if part]
    return f'<h2>{escape(title)}</h2><div class="charts">{"".join(shown)}</div>' if shown else ""


def _settings(result: Result) -> str:
    return json.dumps({"version": result.version, **result.settings, "machine": result.machine}, indent=1)


def _cell(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def _by_load(points: Sequence[Point]) -> dict[str, dict[str, Point]]:
    found: dict[str, dict[str, Point]] = {}
    for point in points:
        found.setdefault(point.load, {})[point.layer] = point
    return found


def _layers(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.layer for point in points))


def _load(point: Point) -> float | None:
    return point.request_rate if point.concurrency is None else float(point.concurrency)


def _values(points: Sequence[Point], layer: str, name: str) -> list[tuple[float, float]]:
    found = []
    for point in points:
        load, value = _load(point), value_of(point, name)
        if point.layer == layer and load is not None and value is not None:
            found.append((load, value))
    return sorted(found)


def _positive(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """On a logarithmic axis there is no zero."""
    return [(max(milliseconds, 1e-3), share) for milliseconds, share in curve]


def _colour(layer: str) -> str:
    names = list(LAYERS)
    return COLOURS[(names.index(layer) if layer in names else len(names)) % len(COLOURS)]
