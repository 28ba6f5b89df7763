"""The plot of clients.py: CPU per request over connections, both logarithmic, a panel for each latency.

Drawn on nothing, in colours that read on a light page and on a dark one; each line is named at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

Lines = dict[int, dict[str, dict[int, float]]]
"""Latency in ms → client → connections → CPU µs per request."""

INK = "#7d8590"
COLOURS = {
    "penstock": "#1a9c5b",
    "wrk": INK,
    "aiohttp": "#3b82f6",
    "openai": "#d97706",
    "httpx": "#db5a8a",
}
"""Of a contrast of 3 or more against white and against #0d1117."""
LABEL_GAP = 0.055
"""Least distance between two labels, as a share of the height of a panel."""


def draw(lines: Lines, path: Path) -> None:
    """Writes an SVG or a PNG, the same bytes for the same figures."""
    with mpl.rc_context({"svg.hashsalt": "penstock", "font.size": 10, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(9.6, 4.2))
        panels = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
        for axes, (latency, clients) in zip(panels, sorted(lines.items()), strict=True):
            panel(axes, latency, clients)
        panels[0].set_ylabel("CPU µs per request", color=INK)
        panels[0].get_ylim()  # now the shared axis knows all lines
        for axes, (_, clients) in zip(panels, sorted(lines.items()), strict=True):
            axes.get_xlim()
            label_ends(axes, clients)
        figure.tight_layout(w_pad=2.5, rect=(0, 0.04, 1, 1))
        ends = [{max(points) for points in clients.values()} for clients in lines.values()]
        if any(len(levels) > 1 for levels in ends):
            note = "Where a line ends early, more connections did not finish in time."
            figure.text(0.99, 0.015, note, color=INK, size=8, horizontalalignment="right")
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, transparent=True, metadata=metadata, dpi=150)


def panel(axes: Axes, latency: int, clients: Mapping[str, Mapping[int, float]]) -> None:
    levels = sorted({level for points in clients.values() for level in points})
    for name, points in clients.items():
        ours = name == "penstock"
        axes.plot(
            list(points),
            list(points.values()),
            color=COLOURS.get(name, INK),
            linewidth=2.6 if ours else 1.6,
            marker="o",
            markersize=5 if ours else 4,
            zorder=3 if ours else 2,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title("answers at once" if latency == 0 else f"answers after {latency} ms", color=INK)
    axes.set_xlabel("connections", color=INK)
    axes.xaxis.set_major_locator(FixedLocator(levels))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.8)
    axes.tick_params(colors=INK, labelleft=True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)


def label_ends(axes: Axes, clients: Mapping[str, Mapping[int, float]]) -> None:
    """Names each line to the right of its last point, with its figure there; keeps the names apart."""
    to_axes = axes.transScale + axes.transLimits
    ends = sorted((max(points), points[max(points)], name) for name, points in clients.items())
    last = ends[-1][0]
    lowest: dict[int, float] = {}
    for level, value, name in ends:
        x, y = to_axes.transform((level, value))
        y = max(y, lowest.get(level, 0.0))
        lowest[level] = y + LABEL_GAP
        axes.text(
            x + 0.025,
            y,
            f"{name} {value:,.0f}",
            transform=axes.transAxes,
            color=COLOURS.get(name, INK),
            weight="bold" if name == "penstock" else "normal",
            size=10 if level == last else 9,
            verticalalignment="center",
        )
