"""Charts as inline SVG: lines over a linear or a logarithmic axis, and stacked bars.

Pure: the same figures give the same text. Colours read on a light page and on a dark one; a point shows its
figures under the mouse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 520
HEIGHT: Final = 278
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 60, 40
"""Pixels of a chart, and around what is drawn in it."""
BAR: Final = 34
"""Pixels from one bar to the next."""
INK: Final = "#7d8590"
COLOURS: Final = ("#3b82f6", "#1a9c5b", "#d97706", "#db5a8a", "#8b5cf6", "#0891b2")
"""In turn; each has a contrast of 3 or more against white and against #0d1117."""
TICKS: Final = 5
"""Most numbers along an axis."""
MAX_MARKS: Final = 40
"""Points up to which each has a mark."""
LOG_FROM: Final = 15.0
"""Ratio of the largest to the smallest from which on an axis is logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False
    steps: bool = False
    """The value holds up to the next point."""


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def line_chart(
    title: str, lines: Sequence[Line], *, x: str, y: str, log_x: bool | None = None, top: float | None = None
) -> str:
    """A chart of lines; `x`, `y`: what the axes say. log_x: None decides by the range. top: end of the
    vertical axis. A dashed line beside a solid one of its colour is not in the legend: the title says it."""
    xs = [point[0] for line in lines for point in line.points]
    ys = [point[1] for line in lines for point in line.points]
    if not xs:
        return ""
    positive = min(xs) > 0
    log = positive and (max(xs) / min(xs) > LOG_FROM if log_x is None else log_x)
    high = max(ys) * 1.05 if top is None else top
    across = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, log and max(xs) > min(xs))
    up = Axis(0.0, high or 1.0, HEIGHT - BOTTOM, TOP)
    parts = [_grid(across, up, x, y)]
    parts += [_line(line, across, up, x, y) for line in lines]
    solid = {line.colour for line in lines if not line.dashed}
    names = [
        (line.name, line.colour, line.dashed) for line in lines if not line.dashed or line.colour not in solid
    ]
    return _framed(title, names, "".join(parts), HEIGHT)


def bar_chart(title: str, bars: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, unit: str) -> str:
    """Horizontal bars, each stacked of (part, value); parts below zero are not drawn but told."""
    totals = [sum(max(0.0, value) for _, value in parts) for _, parts in bars]
    if not totals or max(totals) <= 0:
        return ""
    names = list(dict.fromkeys(name for _, parts in bars for name, _ in parts))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    across = Axis(0.0, max(totals) * 1.12, LEFT + 60, WIDTH - RIGHT)
    height = TOP + BAR * len(bars) + BOTTOM
    drawn = []
    for tick in across.ticks():
        place = across.place(tick)
        drawn.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{height - BOTTOM}" class="g"/>')
        drawn.append(_text(place, height - BOTTOM + 16, short(tick), "middle"))
    drawn.append(_text(WIDTH - RIGHT, height - 6, unit, "end"))
    for row, (label, parts) in enumerate(bars):
        y = TOP + BAR * row + 6
        drawn.append(_text(across.begin - 8, y + 15, label, "end"))
        at = 0.0
        for name, value in parts:
            width = across.place(at + max(0.0, value)) - across.place(at)
            told = escape(f"{label}, {name}: {value:.4g} {unit}")
            drawn.append(
                f'<rect x="{across.place(at):.1f}" y="{y}" width="{width:.1f}" height="{BAR - 12}" '
                f'fill="{colours[name]}"><title>{told}</title></rect>'
            )
            at += max(0.0, value)
        drawn.append(_text(across.place(at) + 5, y + 15, short(at), "start"))
    return _framed(title, [(name, colours[name], False) for name in names], "".join(drawn), height)


def ticks(low: float, high: float) -> list[float]:
    """At most TICKS round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2 and 5 times powers of ten between two positive bounds, thinned to what fits."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in decades for factor in factors]
        found = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(found) <= TICKS + 3:
            break
    return found or [low, high]


def short(value: float) -> str:
    """A number as an axis has it."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * size or (unit == "M" and abs(value) >= size):
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _grid(across: Axis, up: Axis, x: str, y: str) -> str:
    parts = []
    for tick in up.ticks():
        place = up.place(tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}" class="g"/>')
        parts.append(_text(LEFT - 6, place + 4, short(tick), "end"))
    below = HEIGHT - BOTTOM + 16
    parts += [_text(across.place(tick), below, short(tick), "middle") for tick in across.ticks()]
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 6, x, "end"))
    parts.append(_text(LEFT, TOP - 8, y, "start"))
    return "".join(parts)


def _line(line: Line, across: Axis, up: Axis, x: str, y: str) -> str:
    places: list[tuple[float, float]] = []
    for point in line.points:
        place = (across.place(point[0]), up.place(min(point[1], up.high)))
        if line.steps and places:
            places.append((place[0], places[-1][1]))
        places.append(place)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    path = " ".join(f"{left:.1f},{down:.1f}" for left, down in places)
    parts = [f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="1.8"{dash}/>']
    if len(line.points) <= MAX_MARKS:
        for point in line.points:
            told = escape(f"{line.name}: {point[1]:.4g} {y} at {point[0]:.4g} {x}")
            left, down = across.place(point[0]), up.place(min(point[1], up.high))
            parts.append(
                f'<circle cx="{left:.1f}" cy="{down:.1f}" r="3" fill="{line.colour}"><title>{told}</title>'
                "</circle>"
            )
    return "".join(parts)


def _framed(title: str, names: Sequence[tuple[str, str, bool]], drawn: str, height: float) -> str:
    parts, left = [], float(LEFT)
    for name, colour, dashed in names:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        parts.append(
            f'<line x1="{left:.0f}" x2="{left + 16:.0f}" y1="30" y2="30" stroke="{colour}" '
            f'stroke-width="3"{dash}/>' + _text(left + 20, 34, name, "start")
        )
        left += 32 + 6.6 * len(name)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(title)}"><text x="0" y="14" class="t">{escape(title)}</text>'
        f"{''.join(parts)}{drawn}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
