"""`penstock status`: the exact account of a job, running or not."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from penstock.batch.job import Accounting
from penstock.batch.report import describe, how_to_go_on
from penstock.batch.status import (
    Against,
    JobStatus,
    count_rows,
    read_against,
    read_header,
    read_status,
)
from penstock.cli.shard_status import show
from penstock.cluster.shards import Shards
from penstock.errors import ConfigError
from penstock.inputs.opened import open_source
from penstock.inputs.source import Source


@dataclass(frozen=True)
class StatusArgs:
    """What is done, failed and owed of a job, from its files: input = done + failed + owed.

    Nothing is written and nothing is locked: it can be asked while the job runs.
    """

    out: Positional[Path]
    """The output of `penstock generate`."""
    input: str | None = None
    """The job's input, as it is now: how many of its rows are done. Where there is no journal, its rows are
    counted against those of the output."""
    json: bool = False
    """One line of JSON."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0 when every row is done, 1 when some are not."""
    args = tyro.cli(StatusArgs, prog="penstock status", args=argv)
    source = None if args.input is None else _open(args.input)
    against = None
    if (shards := Shards.found(args.out)) is not None:
        if source is not None:
            raise ConfigError("--input is for a job that is not done in shards.")
        return show(shards, as_json=args.json)
    if source is None:
        status = read_status(args.out)
    elif read_header(args.out) is None:
        return _count(args, count_rows(args.out, source))
    else:
        status, against = read_against(args.out, source)
    if args.json:
        sys.stdout.buffer.write(orjson.dumps(as_json(status, against)) + b"\n")
    else:
        _print(Console(), args, status, against)
    if against is not None:
        return 0 if against.accounting.complete and not against.strays else 1
    return 0 if status.accounting.complete else 1


def _open(name: str) -> Source:
    source = open_source([name])
    if not source.again:
        raise ConfigError(f"--input {name} can be read only once: name a file, a folder or a dataset.")
    return source


def _count(args: StatusArgs, rows: Accounting) -> int:
    if args.json:
        counts = {"complete": rows.complete, "rows": _counts(rows), "counted": True}
        sys.stdout.buffer.write(orjson.dumps(counts) + b"\n")
    else:
        sys.stdout.write(
            f"rows  {rows.done:,} of {rows.rows:,} in the output, by their number alone: "
            f"there is no journal of {args.out}.\n"
        )
    return 0 if rows.complete else 1


def _counts(rows: Accounting) -> dict[str, int | None]:
    return {"input": rows.rows, "done": rows.done, "failed": rows.failed, "owed": rows.owed}


def as_json(status: JobStatus, against: Against | None) -> dict[str, Any]:
    """The account as it is printed with --json. Rows and samples each: all = done + failed + owed; null is
    what is not known before an input that can be read only once is at its end."""
    rows = status.accounting
    return {
        "complete": rows.complete,
        "counted": False,
        "rows": _counts(rows),
        "samples": {
            "input": status.samples,
            "done": status.samples_done,
            "failed": status.samples_failed,
            "owed": status.samples_owed,
            "kept": status.samples_kept,
        },
        "running": status.running is not None,
        "pid": status.running or None,
        "strays": status.strays,
        "input": None if against is None else {"rows": _counts(against.accounting), "strays": against.strays},
        "damaged": status.damaged,
        "parameters": status.parameters,
    }


def _print(console: Console, args: StatusArgs, status: JobStatus, against: Against | None) -> None:
    rows = status.accounting
    table = Table.grid(padding=(0, 2))
    table.add_row("rows", describe(rows))
    table.add_row("samples", describe(Accounting(status.samples, status.samples_done, status.samples_failed)))
    if status.samples_kept:
        table.add_row("", f"{status.samples_kept:,} of the done ones belong to rows that are not complete")
    table.add_row("job", _running(status))
    if status.damaged:
        table.add_row("journal", f"{status.damaged:,} damaged lines; what they held is owed")
    if status.strays:
        table.add_row("", f"{status.strays:,} more rows in the output were not in the input")
    if against is not None:
        table.add_row("input", f"of the rows of {args.input} as it is now, {describe(against.accounting)}")
        if against.strays:
            table.add_row("", f"{against.strays:,} rows of the job are not in it: it is not this job's input")
    console.print(table, highlight=False, soft_wrap=True)
    advice = None if status.running is not None else how_to_go_on(rows)
    if advice is not None:
        console.print(advice, highlight=False, soft_wrap=True)


def _running(status: JobStatus) -> str:
    if status.running is None:
        return "not running on this machine"
    return f"running, process {status.running}" if status.running else "running"
