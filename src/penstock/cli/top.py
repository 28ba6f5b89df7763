"""`penstock top`: a job as it goes on, from another terminal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from penstock.batch.progress import Rates
from penstock.batch.report import how_to_go_on
from penstock.batch.status import JobStatus, Watched
from penstock.errors import ConfigError

LIVE_INTERVAL: Final = 0.5
"""Seconds between two pictures on a terminal."""
LOG_INTERVAL: Final = 10.0
"""Seconds between two lines where there is no terminal."""
INTERRUPTED: Final = 130


@dataclass(frozen=True)
class TopArgs:
    """Rows, rates and time left of a running job, from its files: no port, nothing written, nothing locked.

    Ends when the job does, with its account.
    """

    out: Positional[Path]
    """The output of `penstock generate`."""
    interval: float | None = None
    """Seconds between two looks; default: 0.5 on a terminal, 10 elsewhere."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0 when every row is done, 1 when the job ended before, 130 after Ctrl-C."""
    args = tyro.cli(TopArgs, prog="penstock top", args=argv)
    if args.interval is not None and args.interval <= 0:
        raise ConfigError("--interval must be more than 0 seconds.")
    console = Console()
    try:
        status = _watch(args, console)
    except KeyboardInterrupt:
        return INTERRUPTED
    rows = status.accounting
    console.print(
        f"rows {rows.done:,} of {rows.rows:,} done, {rows.failed:,} failed, {rows.owed:,} owed; "
        "the job is not running.",
        highlight=False,
        soft_wrap=True,
    )
    if (advice := how_to_go_on(rows)) is not None:
        console.print(advice, highlight=False, soft_wrap=True)
    return 0 if rows.complete else 1


def _watch(args: TopArgs, console: Console) -> JobStatus:
    """Shows the job until it ends; its account then."""
    watched = Watched(args.out)
    status = watched.look()
    rates = Rates(watched.progress, time.monotonic())
    interval = args.interval or (LIVE_INTERVAL if console.is_terminal else LOG_INTERVAL)
    if not console.is_terminal:
        while status.running is not None:
            time.sleep(interval)
            status = watched.look()
            rates.mark(time.monotonic())
            console.print(_line(watched, status, rates), highlight=False, soft_wrap=True)
        return status
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while status.running is not None:
            live.update(_panel(watched, status, rates), refresh=True)
            time.sleep(interval)
            status = watched.look()
            rates.mark(time.monotonic())
    return status


def _facts(watched: Watched, status: JobStatus, rates: Rates) -> list[tuple[str, str]]:
    rows = status.accounting
    return [
        ("rows", f"{rows.done:,}/{rows.rows:,}"),
        ("samples", f"{status.samples_done:,}/{status.samples:,}"),
        ("samples/s", f"{rates.samples():,.1f}"),
        ("tokens/s", f"{rates.tokens():,.0f}"),
        ("tokens out", f"{watched.progress.completion_tokens:,}"),
        ("failed", f"{rows.failed:,}"),
        ("ETA", _duration(rates.eta())),
    ]


def _line(watched: Watched, status: JobStatus, rates: Rates) -> str:
    return ", ".join(f"{name} {value}" for name, value in _facts(watched, status, rates))


def _panel(watched: Watched, status: JobStatus, rates: Rates) -> Group:
    facts = _facts(watched, status, rates)
    table = Table.grid(padding=(0, 3))
    table.add_row(*(Text(name, style="dim") for name, _ in facts))
    table.add_row(*(Text(value, style="bold") for _, value in facts))
    bar = Table.grid(expand=True)
    bar.add_row(ProgressBar(total=max(status.samples, 1), completed=status.samples_done))
    return Group(bar, table)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
