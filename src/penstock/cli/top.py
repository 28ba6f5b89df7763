"""`penstock top`: a job as it goes on, from another terminal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tyro
from rich.console import Console
from rich.live import Live
from tyro.conf import Positional

from penstock.batch.display import line, panel
from penstock.batch.progress import Rates
from penstock.batch.report import describe, how_to_go_on
from penstock.batch.status import JobStatus, Watched
from penstock.cluster.shards import Shards
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
    if Shards.found(args.out) is not None:
        raise ConfigError(f"{args.out} is done in shards: penstock status {args.out} adds them up.")
    console = Console()
    try:
        status = _watch(args, console)
    except KeyboardInterrupt:
        return INTERRUPTED
    rows = status.accounting
    console.print(f"rows {describe(rows)}; the job is not running.", highlight=False, soft_wrap=True)
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
            console.print(line(watched.progress, rates), highlight=False, soft_wrap=True)
        return status
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while status.running is not None:
            live.update(panel(watched.progress, rates), refresh=True)
            time.sleep(interval)
            status = watched.look()
            rates.mark(time.monotonic())
    return status
