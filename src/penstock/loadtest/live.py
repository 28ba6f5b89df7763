"""The load test while it runs: which point is measured, how far it is, what has gone wrong so far.

A line that is drawn over on a terminal; elsewhere a line of plain text for each point.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from penstock.loadtest.metrics import Point
from penstock.loadtest.plan import Beat, Extent, Load

RATE_WINDOW: Final = 3.0
"""Seconds over which rates are measured."""
INTERVAL: Final = 0.25
"""Seconds between two pictures."""


class Display:
    """Takes what `measure` tells. The clock is handed in."""

    def __init__(self, console: Console, points: int, extent: Extent) -> None:
        self._console = console
        self._points = points
        self._extent = extent
        self._done = 0
        self._live: Live | None = None
        self._began = 0.0
        self._drawn = 0.0
        self._what = ""
        self._marks: deque[tuple[float, int, int]] = deque()

    def on(self, live: Live) -> None:
        """From now on it draws here."""
        self._live = live

    def beat(self, layer: str, load: Load, beats: Sequence[Beat | None], now: float | None = None) -> None:
        """Where the processes are."""
        now = monotonic() if now is None else now
        if self._live is None or now < self._drawn + INTERVAL:
            return
        what = f"{layer} at {load.name}"
        if what != self._what:
            self._what, self._began = what, now
            self._marks.clear()
        self._drawn = now
        self._live.update(self._picture(load, whole(beats), now), refresh=True)

    def point(self, point: Point) -> None:
        """A point has been measured."""
        self._done += 1
        if self._live is None:
            trouble = f", {point.failed} errors" if point.failed else ""
            trouble += ", INVALID" if point.invalid else ""
            self._console.print(
                f"{self._done}/{self._points} {point.layer} at {point.load}: "
                f"{point.request_throughput:,.1f} requests/s{trouble}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def share(self, load: Load, beat: Beat, seconds: float) -> float:
        """How much of the point is done, 0 to 1, so many seconds after its beginning."""
        extent = self._extent
        lead = load.shape.ramp + extent.warmup
        if extent.duration is not None:
            return min(1.0, seconds / (lead + extent.duration))
        return min(1.0, (beat.done + beat.failed) / (extent.count or 1))

    def _picture(self, load: Load, beat: Beat, now: float) -> Group:
        self._marks.append((now, beat.done, beat.tokens))
        while self._marks[0][0] < now - RATE_WINDOW:
            self._marks.popleft()
        first, last = self._marks[0], self._marks[-1]
        seconds = last[0] - first[0] or 1.0
        facts = [
            ("point", f"{self._done + 1}/{self._points} {self._what}"),
            ("in flight", f"{beat.in_flight:,}"),
            ("requests/s", f"{(last[1] - first[1]) / seconds:,.1f}"),
            ("tokens/s", f"{(last[2] - first[2]) / seconds:,.0f}"),
            ("answered", f"{beat.done:,}"),
            ("errors", f"{beat.failed:,}"),
        ]
        table = Table.grid(padding=(0, 3))
        table.add_row(*(Text(name, style="dim") for name, _ in facts))
        table.add_row(*(Text(value, style="bold") for _, value in facts))
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=1.0, completed=self.share(load, beat, now - self._began)))
        return Group(bar, table)


@contextmanager
def watch(console: Console, points: int, extent: Extent) -> Iterator[Display]:
    """Shows a load test of so many points while the block runs."""
    display = Display(console, points, extent)
    if not console.is_terminal:
        yield display
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        display.on(live)
        yield display


def whole(beats: Sequence[Beat | None]) -> Beat:
    """Of all processes together."""
    known = [beat for beat in beats if beat is not None]
    return Beat(
        sent=sum(beat.sent for beat in known),
        done=sum(beat.done for beat in known),
        failed=sum(beat.failed for beat in known),
        tokens=sum(beat.tokens for beat in known),
        in_flight=sum(beat.in_flight for beat in known),
    )
