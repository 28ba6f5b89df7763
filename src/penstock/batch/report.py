"""What a job says when it ends."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from penstock.batch.generate import GenerateReport
from penstock.batch.job import Accounting


def print_report(console: Console, report: GenerateReport) -> None:
    """A few lines: what was done in this run, at what rate, and where it lies."""
    seconds, accounting = report.seconds, report.accounting
    samples = f"{report.samples:,} in this run, {report.resumed_samples:,} from before"
    if report.dropped_samples:
        samples += f"; {report.dropped_samples:,} left out: they were cut off"
    table = Table.grid(padding=(0, 2))
    table.add_row("rows", describe(accounting))
    table.add_row("samples", samples)
    table.add_row("tokens", f"{report.prompt_tokens:,} in, {report.completion_tokens:,} out")
    table.add_row(
        "rate",
        f"{_rate(report.completion_tokens, seconds)} tokens/s, {_rate(report.samples, seconds)} samples/s",
    )
    table.add_row("time", f"{seconds:,.1f} s")
    if report.retries:
        table.add_row("retries", f"{report.retries:,}")
    if report.failures:
        table.add_row("failed", ", ".join(f"{count:,} {name}" for name, count in report.failures.items()))
    if report.strays:
        table.add_row("strays", f"{report.strays:,} rows of the output are not in this input")
    table.add_row("output", str(report.out))
    if report.parquet is not None:
        table.add_row("parquet", str(report.parquet))
    if report.as_json:
        table.add_row("JSON text", f"{', '.join(report.as_json)}: their rows differ too much for one type")
    if accounting.failed:
        table.add_row("failures", str(report.failures_path))
    console.print(table, highlight=False, soft_wrap=True)


def describe(rows: Accounting) -> str:
    """Done, failed and owed, in words."""
    if rows.rows is None:
        return f"{rows.done:,} done, {rows.failed:,} failed; the input was not read to its end"
    return f"{rows.done:,} of {rows.rows:,} done, {rows.failed:,} failed, {rows.owed:,} owed"


def how_to_go_on(accounting: Accounting) -> str | None:
    """One sentence on what to do about rows that are not done; None when there are none."""
    if accounting.rows is None:
        return "The input was not read to its end: run the same command again, with the same input, to go on."
    if accounting.owed:
        return f"{accounting.owed:,} rows are owed: run the same command again to go on."
    if accounting.failed:
        return (
            f"{accounting.failed:,} rows failed: run the same command with --retry-failed to try them again."
        )
    return None


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:,.0f}" if seconds > 0 else "–"
