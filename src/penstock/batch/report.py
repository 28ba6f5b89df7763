"""What a job says when it ends."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from penstock.batch.job import Accounting, JobSettings
from penstock.batch.progress import Progress


def print_report(
    console: Console, settings: JobSettings, accounting: Accounting, progress: Progress, seconds: float
) -> None:
    """A few lines: what was done in this run, at what rate, and where it lies."""
    samples = progress.samples_done - progress.resumed_samples
    table = Table.grid(padding=(0, 2))
    done, failed, owed = accounting.done, accounting.failed, accounting.owed
    table.add_row("rows", f"{done:,} of {accounting.rows:,} done, {failed:,} failed, {owed:,} owed")
    table.add_row("samples", f"{samples:,} in this run, {progress.resumed_samples:,} from before")
    table.add_row("tokens", f"{progress.prompt_tokens:,} in, {progress.completion_tokens:,} out")
    table.add_row(
        "rate", f"{_rate(progress.completion_tokens, seconds)} tokens/s, {_rate(samples, seconds)} samples/s"
    )
    table.add_row("time", f"{seconds:,.1f} s")
    if progress.retries:
        table.add_row("retries", f"{progress.retries:,}")
    table.add_row("output", str(settings.out))
    if accounting.failed:
        table.add_row("failures", str(settings.failures_path))
    console.print(table, highlight=False, soft_wrap=True)


def how_to_go_on(accounting: Accounting) -> str | None:
    """One sentence on what to do about rows that are not done; None when there are none."""
    if accounting.owed:
        return f"{accounting.owed:,} rows are owed: run the same command again to go on."
    if accounting.failed:
        return (
            f"{accounting.failed:,} rows failed: run the same command with --retry-failed to try them again."
        )
    return None


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:,.0f}" if seconds > 0 else "–"
