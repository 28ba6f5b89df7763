"""Charts of a training run as one SVG image and one HTML page, from the lines of its metrics file.

Pure: the same lines give the same bytes. A page needs nothing from elsewhere; its points show their figures
under the mouse. The image has no background and colours that read on a light page and on a dark one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Final

Point = tuple[float, float]

WIDTH: Final = 480
HEIGHT: Final = 260
"""Pixels of one panel; two stand beside each other."""
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 46, 34
"""Pixels around what is drawn in a panel."""
INK: Final = "#7d8590"
COLOURS: Final = ("#1a9c5b", "#3b82f6", "#d97706", "#db5a8a")
"""Of the lines of a panel in turn; of a contrast of 3 or more against white and against #0d1117."""
SMOOTHED_OVER: Final = 10
"""Steps whose mean the thick line of a noisy figure shows."""
TICKS: Final = 5
"""Most numbers along an axis."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart: figures of the metrics file over the step."""

    title: str
    lines: Mapping[str, str]
    """Name of a figure in the metrics → what the line is called."""
    percent: bool = False
    smooth: bool = False
    """Draw each figure thin, and its mean over SMOOTHED_OVER steps thick."""
    level: tuple[str, float] | None = None
    """A horizontal line to compare with, and its name."""
    top: float | None = field(default=None)
    """Where the vertical axis ends at least."""


def svg(panels: Sequence[Panel], metrics: Sequence[Mapping[str, Any]]) -> str:
    """An image of the panels, two in a row. metrics: lines with `step` and figures; None is no point."""
    rows = math.ceil(len(panels) / 2)
    width, height = 2 * WIDTH, rows * HEIGHT
    drawn = "".join(
        f'<g transform="translate({place % 2 * WIDTH} {place // 2 * HEIGHT})">{_panel(panel, metrics)}</g>'
        for place, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="12" fill="{INK}">{drawn}</svg>\n'
    )


def page(
    title: str,
    panels: Sequence[Panel],
    metrics: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
) -> str:
    """An HTML page: the image, and facts about the run in a table."""
    table = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2rem auto; padding: 0 1rem; }}
svg {{ width: 100%; height: auto; }}
th {{ text-align: left; font-weight: normal; color: {INK}; padding-right: 2rem; }}
td {{ font-variant-numeric: tabular-nums; }}
</style></head>
<body><h1>{escape(title)}</h1>
<table>{table}</table>
{svg(panels, metrics)}</body></html>
"""


def points_of(metrics: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """(step, figure) wherever there is one."""
    return [(float(line["step"]), float(line[name])) for line in metrics if line.get(name) is not None]


def smoothed(points: Sequence[Point], over: int) -> list[Point]:
    """Each point's mean with up to `over` - 1 before it."""
    values = [y for _, y in points]
    means = []
    for place, (x, _) in enumerate(points):
        window = values[max(0, place - over + 1) : place + 1]
        means.append((x, sum(window) / len(window)))
    return means


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, `most` at most, 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    exponent = math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20, 50):
        gap = factor * 10.0**exponent
        first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
        if last - first < most:
            return [number * gap for number in range(first, last + 1)]
    raise AssertionError("a gap of 50 is always wide enough")


@dataclass(frozen=True, slots=True)
class _Scale:
    """From figures to pixels of a panel."""

    steps: tuple[float, float]
    figures: tuple[float, float]

    def x(self, step: float) -> float:
        low, high = self.steps
        return LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, figure: float) -> float:
        low, high = self.figures
        return HEIGHT - BOTTOM - (figure - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[Point]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def _panel(panel: Panel, metrics: Sequence[Mapping[str, Any]]) -> str:
    lines = {name: points_of(metrics, name) for name in panel.lines}
    steps = [float(line["step"]) for line in metrics] or [0.0]
    figures = [y for points in lines.values() for _, y in points]
    highest = max([*figures, panel.top or 0.0, panel.level[1] if panel.level else 0.0, 1e-9])
    scale = _Scale((min(steps), max(*steps, min(steps) + 1)), (0.0, highest * 1.05))
    parts = [f'<text x="{LEFT}" y="16" font-size="14" font-weight="bold">{escape(panel.title)}</text>']
    parts += _axes(scale, panel.percent)
    at = float(LEFT)
    for place, (name, called) in enumerate(panel.lines.items()):
        colour = COLOURS[place % len(COLOURS)]
        parts.append(f'<text x="{at:.0f}" y="33" fill="{colour}">{escape(called)}</text>')
        at += 7.0 * len(called) + 16
        parts += _line(scale, lines[name], colour, panel)
    if panel.level:
        name, figure = panel.level
        y = scale.y(figure)
        parts.append(
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{INK}" stroke-dasharray="5 4"/>'
            f'<text x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end">{escape(name)}</text>'
        )
    return "".join(parts)


def _axes(scale: _Scale, percent: bool) -> list[str]:
    parts = []
    for figure in ticks(*scale.figures, TICKS):
        y, text = scale.y(figure), _number(figure, percent)
        parts.append(
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{INK}" stroke-opacity=".25"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    whole = [step for step in ticks(*scale.steps, TICKS) if step == int(step)]
    parts += [
        f'<text x="{scale.x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step:g}</text>'
        for step in whole
    ]
    return [*parts, f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>']


def _line(scale: _Scale, points: Sequence[Point], colour: str, panel: Panel) -> list[str]:
    if not points:
        return []
    attributes = f'fill="none" stroke="{colour}" stroke-linejoin="round"'
    thick = f'<polyline points="{{}}" {attributes} stroke-width="2.4"/>'
    parts = [thick.format(scale.path(smoothed(points, SMOOTHED_OVER) if panel.smooth else points))]
    if panel.smooth:
        parts.append(f'<polyline points="{scale.path(points)}" {attributes} stroke-opacity=".35"/>')
    parts += [
        f'<circle cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="4" fill="{colour}" fill-opacity="0">'
        f"<title>step {x:g}: {_number(y, panel.percent)}</title></circle>"
        for x, y in points
    ]
    return parts


def _number(figure: float, percent: bool) -> str:
    return f"{100 * figure:.3g} %" if percent else f"{figure:.3g}"
