"""`penstock demo`: arithmetic problems → traces, with the embedded engine and the shipped model, checked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import tyro
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from penstock.cli import generate
from penstock.demo import arithmetic

COUNT = 300
"""Problems, none of which the model was trained on."""

GENERATIONS = 4
"""Samples of each problem."""


@dataclass(frozen=True)
class DemoArgs:
    """Generate reasoning traces for arithmetic problems with the embedded engine, and check the answers."""

    out: Path = Path("demo-out")
    """Folder for problems.jsonl and traces.jsonl; those of an earlier demo are replaced."""
    seed: int = 0
    """Chooses the problems and the samples."""


def main(argv: list[str]) -> int:
    """Run the command. Returns what `penstock generate` returned."""
    args = tyro.cli(DemoArgs, prog="penstock demo", args=argv)
    problems, traces = args.out / "problems.jsonl", args.out / "traces.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("traces.jsonl*"):
        old.unlink()
    rows = arithmetic.rows(args.seed, COUNT)
    problems.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    command = [
        *(str(problems), "--out", str(traces), "--engine", "embedded"),
        *("--prompt-column", "question", "--id-column", "id", "-n", str(GENERATIONS)),
        *("--temperature", "0.6", "--max-tokens", "512", "--seed", str(args.seed)),
    ]
    console = Console()
    console.print(Text("penstock generate " + " ".join(command), style="dim"))
    status = generate.main(command)
    if traces.exists():
        _show(console, [orjson.loads(line) for line in traces.read_bytes().splitlines()], traces)
    return status


def _show(console: Console, rows: Sequence[dict[str, Any]], traces: Path) -> None:
    table = Table(title="Are the answers right?")
    for heading in ("level", "problems", "accuracy", f"solved in {GENERATIONS} tries"):
        table.add_column(heading, justify="left" if heading == "level" else "right")
    by_level: dict[str, list[list[bool]]] = defaultdict(list)
    for row in rows:
        by_level[row["level"]].append([arithmetic.verify(text, row["answer"]) for text in row["generations"]])
    for level, verdicts in sorted(by_level.items()):
        table.add_row(level, *_scores(verdicts))
    table.add_row("all", *_scores([verdict for verdicts in by_level.values() for verdict in verdicts]))
    console.print(table)
    for row in _specimens(rows):
        console.print(_trace_panel(row))
    console.print(f"{len(rows)} rows in {traces}", highlight=False)


def _specimens(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Three rows worth a look: of the hard ones a sum and a problem in two steps, and one that went wrong."""
    hard = [row for row in rows if row["level"] == "hard"]
    choices = (
        [row for row in hard if row["kind"] == "addition" and _is_right(row)],
        [row for row in hard if row["kind"] == "two_step" and _is_right(row)],
        [row for row in hard if not _is_right(row)],
    )
    return [found[0] for found in choices if found]


def _is_right(row: dict[str, Any]) -> bool:
    """Whether the first sample is."""
    return arithmetic.verify(row["generations"][0], row["answer"])


def _scores(verdicts: Sequence[Sequence[bool]]) -> tuple[str, str, str]:
    samples = [right for verdict in verdicts for right in verdict]
    solved = sum(map(any, verdicts))
    return str(len(verdicts)), f"{sum(samples) / len(samples):.1%}", f"{solved / len(verdicts):.1%}"


def _trace_panel(row: dict[str, Any]) -> Panel:
    right = _is_right(row)
    verdict = "right" if right else f"wrong, it is {row['answer']}"
    return Panel(
        Text(row["generations"][0]),
        title=Text(row["question"]),
        subtitle=f"{row['finish_reasons'][0]}, {verdict}",
        border_style="green" if right else "red",
    )
