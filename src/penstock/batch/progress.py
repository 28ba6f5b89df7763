"""How far a job is, and how it is shown.

`Progress` only counts; the clock is handed in. `watch` draws it: a live panel on a terminal, else a line of
plain text now and then.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from penstock.errors import PenstockError
from penstock.sample import Sample

RATE_WINDOW = 15.0
"""Seconds over which rates are measured."""

LIVE_INTERVAL = 0.25
"""Seconds between two pictures on a terminal."""

LOG_INTERVAL = 10.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """Counts of one job. `samples` = samples_done + samples_failed + samples owed."""

    def __init__(
        self,
        *,
        rows: int,
        rows_done: int,
        rows_failed: int,
        samples: int,
        samples_done: int,
        samples_failed: int,
    ) -> None:
        self.rows = rows
        self.rows_done = rows_done
        self.rows_failed = rows_failed
        self.samples = samples
        self.samples_done = samples_done
        self.resumed_samples = samples_done
        """Samples that were there when this run began."""
        self.samples_failed = samples_failed
        self.in_flight: Callable[[], int] = lambda: 0
        """Asks how many requests are sent and not answered now."""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.retries = 0
        self.failures: Counter[str] = Counter()
        self.notice = ""
        """One line about something the person should know now, such as an engine that does not answer."""

    @property
    def samples_owed(self) -> int:
        return self.samples - self.samples_done - self.samples_failed

    def add_sample(self, sample: Sample) -> None:
        self.samples_done += 1
        self.prompt_tokens += sample.usage.prompt_tokens
        self.completion_tokens += sample.usage.completion_tokens
        self.retries += sample.attempts - 1

    def add_failure(self, error: PenstockError, *, new_row: bool) -> None:
        self.samples_failed += 1
        self.rows_failed += new_row
        self.failures[type(error).__name__] += 1


class Rates:
    """Tokens and samples per second over the last `RATE_WINDOW` seconds."""

    def __init__(self, progress: Progress, now: float) -> None:
        self._progress = progress
        self._marks = deque([(now, progress.completion_tokens, progress.samples_done)])

    def mark(self, now: float) -> None:
        progress = self._progress
        self._marks.append((now, progress.completion_tokens, progress.samples_done))
        while self._marks[1][0] < now - RATE_WINDOW:
            self._marks.popleft()

    def tokens(self) -> float:
        return self._rate(1)

    def samples(self) -> float:
        return self._rate(2)

    def eta(self) -> float | None:
        """Seconds until nothing is owed, at the rate of now; None while nothing is known."""
        if not self._progress.samples_owed:
            return 0.0
        rate = self.samples()
        return self._progress.samples_owed / rate if rate > 0 else None

    def _rate(self, which: int) -> float:
        first, last = self._marks[0], self._marks[-1]
        return (last[which] - first[which]) / (last[0] - first[0]) if last[0] > first[0] else 0.0


@contextmanager
def watch(progress: Progress, console: Console) -> Iterator[None]:
    """Show `progress` while the block runs. Needs a running event loop."""
    rates = Rates(progress, monotonic())
    if not console.is_terminal:
        task = asyncio.create_task(_log(progress, rates, console), name="penstock progress")
        try:
            yield
        finally:
            task.cancel()
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        task = asyncio.create_task(_draw(progress, rates, live), name="penstock progress")
        try:
            yield
        finally:
            task.cancel()


async def _draw(progress: Progress, rates: Rates, live: Live) -> None:
    while True:
        rates.mark(monotonic())
        live.update(_panel(progress, rates), refresh=True)
        await asyncio.sleep(LIVE_INTERVAL)


async def _log(progress: Progress, rates: Rates, console: Console) -> None:
    while True:
        await asyncio.sleep(LOG_INTERVAL)
        rates.mark(monotonic())
        console.print(_line(progress, rates), highlight=False, soft_wrap=True)


def _facts(progress: Progress, rates: Rates) -> list[tuple[str, str]]:
    failures = ", ".join(f"{count} {name}" for name, count in progress.failures.most_common(3))
    return [
        ("rows", f"{progress.rows_done:,}/{progress.rows:,}"),
        ("samples", f"{progress.samples_done:,}/{progress.samples:,}"),
        ("tokens/s", f"{rates.tokens():,.0f}"),
        ("in flight", f"{progress.in_flight():,}"),
        ("retries", f"{progress.retries:,}"),
        ("failed", f"{progress.rows_failed:,}" + (f" ({failures})" if failures else "")),
        ("ETA", _duration(rates.eta())),
    ]


def _line(progress: Progress, rates: Rates) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in _facts(progress, rates))
    return f"{facts} – {progress.notice}" if progress.notice else facts


def _panel(progress: Progress, rates: Rates) -> Group:
    facts = _facts(progress, rates)
    table = Table.grid(padding=(0, 3))
    table.add_row(*(Text(name, style="dim") for name, _ in facts))
    table.add_row(*(Text(value, style="bold") for _, value in facts))
    bar = Table.grid(expand=True)  # on its own a bar does not end its line
    bar.add_row(ProgressBar(total=max(progress.samples, 1), completed=progress.samples_done))
    return Group(bar, table, *([Text(progress.notice, style="yellow")] if progress.notice else []))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
