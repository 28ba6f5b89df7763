"""`penstock export`: the rows of a job, running or not, as JSONL, Parquet or a Hugging Face dataset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from tyro.conf import Positional

from penstock.batch.export import Target, export
from penstock.batch.exported import JobRows
from penstock.batch.hub import push
from penstock.errors import ConfigError
from penstock.inputs.opened import open_source
from penstock.inputs.source import Source


@dataclass(frozen=True)
class ExportArgs:
    """Write the rows of a job, as far as they are done, to a file or a folder, or push them to the hub.

    The job may be running: what its journal vouches for is read.
    """

    out: Positional[Path]
    """The output of `penstock generate`."""
    to: str
    """x.jsonl (.gz, .zst), x.parquet, FOLDER/ (Parquet in parts) or hf:FOLDER (a dataset for
    load_from_disk)."""
    per_sample: bool = False
    """A row a sample, instead of lists with all samples of a row."""
    partial: bool = False
    """The samples of rows that are not finished, too. They need the job's input."""
    input: tuple[str, ...] = ()
    """The job's input, for --partial: files, folders, or the name of a dataset."""
    overwrite: bool = False
    """Replace an earlier export."""
    push_to_hub: str | None = None
    """Put the Parquet parts of FOLDER/ into this dataset (OWNER/NAME) of the hub. Where FOLDER/ is there
    already, and there is no --overwrite, it is pushed as it is."""
    private: bool = False
    """A dataset that is made on the hub is private."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0 when all is written and pushed."""
    args = tyro.cli(ExportArgs, prog="penstock export", args=argv)
    console = Console(stderr=True)
    target = Target.parse(args.to)
    if args.push_to_hub is not None and target.kind != "folder":
        raise ConfigError("--push-to-hub pushes Parquet parts: export --to FOLDER/.")
    if args.private and args.push_to_hub is None:
        raise ConfigError("--private is for --push-to-hub.")
    if args.push_to_hub is None or args.overwrite or not _is_there(target):
        _export(args, target, console)
    else:
        console.print(f"{target.path} is there and is pushed as it is.", highlight=False)
    if args.push_to_hub is not None:
        console.print(
            f"pushed to {push(target.path, args.push_to_hub, private=args.private)}", highlight=False
        )
    return 0


def _is_there(target: Target) -> bool:
    return target.path.is_dir() and any(target.path.glob("*.parquet"))


def _export(args: ExportArgs, target: Target, console: Console) -> None:
    target.check(args.overwrite)
    if target.path.resolve() == args.out.resolve():
        raise ConfigError(f"{args.out} is the job's own output: export to another file.")
    job = JobRows(args.out)
    source = _input(args, job) if args.partial else None

    def rows() -> Iterator[bytes]:
        yield from job.samples() if args.per_sample else job.lines()
        if source is not None:
            yield from job.unfinished(source, each=args.per_sample)

    written = export(rows, target)
    console.print(
        f"{written.rows:,} {'samples' if args.per_sample else 'rows'} in {target.path}", highlight=False
    )
    if written.as_json:
        console.print(
            f"The rows differ in {', '.join(map(repr, written.as_json))}: there, values are JSON text.",
            highlight=False,
        )


def _input(args: ExportArgs, job: JobRows) -> Source:
    if not job.has_journal:
        raise ConfigError(
            f"There is no journal of {args.out}: nothing is known of rows that are not finished."
        )
    words = args.input or job.input()
    if not words:
        raise ConfigError("--partial needs the job's --input: its journal does not say where it is.")
    source = open_source(words)
    if not source.again:
        raise ConfigError("--input can be read only once: name a file, a folder or a dataset.")
    return source
