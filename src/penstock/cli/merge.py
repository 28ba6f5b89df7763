"""`penstock merge`: the shards of a job, joined to its output."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from penstock.cluster.merge import merge
from penstock.cluster.shards import Shards, folder_of
from penstock.errors import ConfigError


@dataclass(frozen=True)
class MergeArgs:
    """Join what the shards of a job wrote (penstock generate --shard I/N --out OUT) to OUT and OUT.failures.

    Nothing is written while rows are owed. Done again it changes nothing; the shards stay.
    """

    out: Positional[Path]
    """The --out of the job."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0 when OUT holds every row of the input, 1 when rows failed or are owed."""
    args = tyro.cli(MergeArgs, prog="penstock merge", args=argv)
    shards = Shards.found(args.out)
    if shards is None:
        raise ConfigError(f"There are no shards of {args.out}: {folder_of(args.out)} holds none.")
    merged = merge(shards)
    found = merged.total
    lines = [f"rows  {found.done:,} of {found.rows:,} done, {found.failed:,} failed, {found.owed:,} owed"]
    if found.begun < found.shards:
        lines.append(f"{found.shards - found.begun} of {found.shards} shards are not begun.")
    if found.owed or found.begun < found.shards:
        lines.append(f"Nothing was joined to {args.out}: run the job again to go on.")
    elif merged.written:
        lines.append(f"{found.shards} shards joined to {args.out}.")
    else:
        lines.append(f"{args.out} is joined already.")
    if found.failed and not found.owed:
        lines.append("Rows failed: run the job again with --retry-failed to try them again.")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if found.complete else 1
