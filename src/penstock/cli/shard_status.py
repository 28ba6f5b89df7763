"""What `penstock status` says of a job that is done in shards."""

from __future__ import annotations

import sys

import orjson
from rich.console import Console
from rich.table import Table

from penstock.batch.job import Accounting
from penstock.batch.report import describe
from penstock.cluster.account import ShardStatus, Total, read_shards, total
from penstock.cluster.shards import Shards, journal_of
from penstock.errors import ConfigError


def show(shards: Shards, *, as_json: bool) -> int:
    """Prints the account. Returns 0 when every row is done, 1 when some are not. Raises ConfigError."""
    if journal_of(shards.out).exists():
        raise ConfigError(f"{shards.out} has a journal and shards ({shards.folder}): move one of them away.")
    found = read_shards(shards)
    counted = total(found)
    if as_json:
        sys.stdout.buffer.write(orjson.dumps(_json(shards, found, counted)) + b"\n")
    else:
        _print(shards, found, counted)
    return 0 if counted.complete else 1


def _json(shards: Shards, found: list[ShardStatus], counted: Total) -> dict[str, object]:
    rows = {"input": counted.rows, "done": counted.done, "failed": counted.failed, "owed": counted.owed}
    return {
        "complete": counted.complete,
        "counted": False,
        "rows": rows,
        "merged": shards.out.exists(),
        "shards": {"all": counted.shards, "begun": counted.begun, "settled": counted.settled},
        "unsettled": [shard.index for shard in found if not shard.settled],
    }


def _print(shards: Shards, found: list[ShardStatus], counted: Total) -> None:
    console = Console()
    table = Table.grid(padding=(0, 2))
    of_begun = "" if counted.begun == counted.shards else ", in the shards that are begun"
    table.add_row("rows", describe(Accounting(counted.rows, counted.done, counted.failed)) + of_begun)
    table.add_row("shards", f"{counted.settled} of {counted.shards} owe nothing, {counted.begun} are begun")
    if counted.running:
        table.add_row("job", f"{counted.running} shards are worked on, on this machine")
    table.add_row("output", str(shards.out) if shards.out.exists() else f"not joined yet; in {shards.folder}")
    console.print(table, highlight=False, soft_wrap=True)
    if counted.settled < counted.shards:
        console.print("Run the same command again to go on.", highlight=False)
    elif counted.failed:
        console.print("Run the same command with --retry-failed to try the failed rows again.")
    elif not shards.out.exists():
        console.print(f"penstock merge {shards.out} joins them.", highlight=False, soft_wrap=True)
