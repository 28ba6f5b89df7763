"""What a person sees of a running job: a live panel on a terminal, else a line of plain text now and then."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from penstock.batch.progress import Progress, Rates
from penstock.fleet.fleet import FleetStatistics

LIVE_INTERVAL: Final = 0.25
"""Seconds between two pictures on a terminal."""

LOG_INTERVAL: Final = 10.0
"""Seconds between two lines where there is no terminal."""

MOST_ENDPOINTS: Final = 8
"""Endpoints that get a line of their own in the panel."""

MOST_FAILURES: Final = 4
"""Classes of failures that are named."""


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
        live.update(panel(progress, rates), refresh=True)
        await asyncio.sleep(LIVE_INTERVAL)


async def _log(progress: Progress, rates: Rates, console: Console) -> None:
    while True:
        await asyncio.sleep(LOG_INTERVAL)
        rates.mark(monotonic())
        console.print(line(progress, rates), highlight=False, markup=False, soft_wrap=True)


def line(progress: Progress, rates: Rates) -> str:
    """The job as it is, in one line of text."""
    fleet = None if progress.fleet is None else progress.fleet()
    facts = [
        f"{name} {value}"
        for name, value in (*_counts(progress, rates, fleet), *_speeds(progress, rates, fleet))
    ]
    if failures := _failures(progress):
        facts.append(f"failures {failures}")
    said = ", ".join(facts)
    return f"{said} – {progress.notice}" if progress.notice else said


def panel(progress: Progress, rates: Rates) -> RenderableType:
    """The job as it is, for a terminal."""
    fleet = None if progress.fleet is None else progress.fleet()
    parts: list[RenderableType] = []
    bar = Table.grid(expand=True)  # on its own a bar does not end its line
    bar.add_row(ProgressBar(total=max(progress.samples or 1, 1), completed=progress.samples_done))
    parts += [bar, _grid(_counts(progress, rates, fleet)), _grid(_speeds(progress, rates, fleet))]
    if failures := _failures(progress):
        parts.append(Text(f"failures: {failures}", style="red"))
    if fleet is not None and len(fleet.in_flight) > 1:
        parts.append(_endpoints(fleet))
    if progress.notice:
        parts.append(Text(progress.notice, style="yellow"))
    return Group(*parts)


def _counts(progress: Progress, rates: Rates, fleet: FleetStatistics | None) -> list[tuple[str, str]]:
    facts = [
        ("rows", _of(progress.rows_done, progress.rows)),
        ("samples", _of(progress.samples_done, progress.samples)),
        ("failed rows", f"{progress.rows_failed:,}"),
        ("retries", f"{progress.retries if fleet is None else fleet.retries:,}"),
        ("ETA", duration(rates.eta())),
    ]
    if progress.samples_dropped:
        facts.insert(2, ("dropped", f"{progress.samples_dropped:,}"))
    return facts


def _speeds(progress: Progress, rates: Rates, fleet: FleetStatistics | None) -> list[tuple[str, str]]:
    facts = [
        ("samples/s", f"{rates.samples():,.1f}"),
        ("tok/s out", f"{rates.tokens():,.0f}"),
        ("tok/s in", f"{rates.prompt_tokens():,.0f}"),
        ("p50", _seconds(rates.latency(0.5))),
        ("p99", _seconds(rates.latency(0.99))),
    ]
    if fleet is not None:
        facts += [
            ("in flight", _in_flight(sum(fleet.in_flight.values()), list(fleet.limits.values()))),
            ("waiting", f"{fleet.waiting:,}"),
        ]
    return facts


def _in_flight(count: int, limits: list[int | None]) -> str:
    known = [limit for limit in limits if limit is not None]
    return f"{count:,}/{sum(known):,}" if known and len(known) == len(limits) else f"{count:,}"


def _endpoints(fleet: FleetStatistics) -> Table:
    """A line for each endpoint, those in trouble first."""
    names = sorted(fleet.in_flight, key=lambda name: (fleet.states.get(name) == "up", name))
    table = Table.grid(padding=(0, 2))
    for name in names[:MOST_ENDPOINTS]:
        state = fleet.states.get(name, "")
        style = "dim" if state == "up" else "yellow"
        count = _in_flight(fleet.in_flight[name], [fleet.limits.get(name)])
        table.add_row(
            Text(name, style=style), Text(f"{count} in flight", style=style), Text(state, style=style)
        )
    if len(names) > MOST_ENDPOINTS:
        table.add_row(Text(f"and {len(names) - MOST_ENDPOINTS} more", style="dim"))
    return table


def _failures(progress: Progress) -> str:
    named = progress.failures.most_common(MOST_FAILURES)
    said = [f"{count:,} {name}" for name, count in named]
    if rest := progress.failures.total() - sum(count for _, count in named):
        said.append(f"{rest:,} others")
    return ", ".join(said)


def _grid(facts: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row(*(Text(name, style="dim", no_wrap=True) for name, _ in facts))
    table.add_row(*(Text(value, style="bold", no_wrap=True) for _, value in facts))
    return table


def _of(count: int, whole: int | None) -> str:
    return f"{count:,}" if whole is None else f"{count:,}/{whole:,}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} s" if value < 10 else f"{value:,.0f} s"


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds; a dash for what is not known."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
