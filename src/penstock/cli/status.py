"""`penstock status`: the exact account of a job, running or not."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import orjson
import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from penstock.batch.job import Accounting
from penstock.batch.report import how_to_go_on
from penstock.batch.status import JobStatus, count_rows, format_of, read_header, read_status
from penstock.prompt import JsonlInput


@dataclass(frozen=True)
class StatusArgs:
    """What is done, failed and owed of a job, from its files: input = done + failed + owed.

    Nothing is written and nothing is locked: it can be asked while the job runs.
    """

    out: Positional[Path]
    """The output of `penstock generate`."""
    input: Path | None = None
    """The job's input: checks that it still is what the job was begun with. Where there is no journal, its
    rows are counted against those of the output."""
    json: bool = False
    """One line of JSON."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0 when every row is done, 1 when some are not."""
    args = tyro.cli(StatusArgs, prog="penstock status", args=argv)
    if args.input is not None and read_header(args.out) is None:
        return _count(args, count_rows(args.out, JsonlInput(args.input)))
    status = read_status(args.out)
    same = None if args.input is None else _same_input(args.out, args.input)
    if args.json:
        sys.stdout.buffer.write(orjson.dumps(as_json(status, same)) + b"\n")
    else:
        _print(Console(), args, status, same)
    return 0 if status.accounting.complete and same is not False else 1


def _count(args: StatusArgs, rows: Accounting) -> int:
    if args.json:
        counts = {"input": rows.rows, "done": rows.done, "failed": rows.failed, "owed": rows.owed}
        sys.stdout.buffer.write(
            orjson.dumps({"complete": rows.complete, "rows": counts, "counted": True}) + b"\n"
        )
    else:
        sys.stdout.write(
            f"rows  {rows.done:,} of {rows.rows:,} in the output, by their number alone: "
            f"there is no journal of {args.out}.\n"
        )
    return 0 if rows.complete else 1


def as_json(status: JobStatus, same_input: bool | None) -> dict[str, Any]:
    """The account as it is printed with --json. Rows and samples each: all = done + failed + owed."""
    rows = status.accounting
    return {
        "complete": rows.complete,
        "counted": False,
        "rows": {"input": rows.rows, "done": rows.done, "failed": rows.failed, "owed": rows.owed},
        "samples": {
            "input": status.samples,
            "done": status.samples_done,
            "failed": status.samples_failed,
            "owed": status.samples_owed,
            "kept": status.samples_kept,
        },
        "running": status.running is not None,
        "pid": status.running or None,
        "input_unchanged": same_input,
        "damaged": status.damaged,
        "parameters": status.parameters,
    }


def _print(console: Console, args: StatusArgs, status: JobStatus, same: bool | None) -> None:
    rows = status.accounting
    table = Table.grid(padding=(0, 2))
    table.add_row("rows", f"{rows.done:,} of {rows.rows:,} done, {rows.failed:,} failed, {rows.owed:,} owed")
    table.add_row(
        "samples",
        f"{status.samples_done:,} of {status.samples:,} done, {status.samples_failed:,} failed, "
        f"{status.samples_owed:,} owed",
    )
    if status.samples_kept:
        table.add_row("", f"{status.samples_kept:,} of the done ones belong to rows that are not complete")
    table.add_row("job", _running(status))
    if status.damaged:
        table.add_row("journal", f"{status.damaged:,} damaged lines; what they held is owed")
    if same is not None:
        table.add_row("input", "as it was when the job began" if same else f"{args.input} is another one")
    console.print(table, highlight=False, soft_wrap=True)
    advice = None if status.running is not None else how_to_go_on(rows)
    if advice is not None:
        console.print(advice, highlight=False, soft_wrap=True)


def _running(status: JobStatus) -> str:
    if status.running is None:
        return "not running on this machine"
    return f"running, process {status.running}" if status.running else "running"


def _same_input(out: Path, source: Path) -> bool:
    """Whether `source` is the input the job was begun with. Raises ConfigError when it is no input."""
    header = read_header(out)
    assert header is not None  # else it was counted
    survey = JsonlInput(source).survey(format_of(header))
    return msgspec.structs.astuple(survey) == (header.rows, header.digest)
