"""CPU per row of `penstock generate` beside its peers, in one run, against a server that answers at once.

    python bench/rows.py [--rows 20000] [--concurrency 256] [--rounds 3]
    python bench/rows.py --rows 1000000 --rounds 1 --no-peers         # memory, beside that of --rows 10000

CPU is user + system time of the whole process, start-up included, over its rows: less noisy than seconds.
Every round runs every subject once, in turn; the table shows the median round.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import orjson
import tyro
from rich.console import Console
from rich.table import Table

from stub import serving

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Args:
    """CPU per row, side by side."""

    rows: int = 20_000
    concurrency: int = 256
    rounds: int = 3
    peers: bool = True


@dataclass(frozen=True)
class Run:
    """One subject, once."""

    cpu: float
    """Microseconds of CPU a row."""
    rate: float
    """Rows a second."""
    memory: float
    """Peak, in MB; at least that of this program."""


def subjects(source: Path, out: Path, port: int, args: Args) -> dict[str, list[str]]:
    peer = [sys.executable, str(HERE / "peers.py")]
    rest = [str(source), str(out), f"http://127.0.0.1:{port}/v1/chat/completions", str(args.concurrency)]
    ours = [sys.executable, "-m", "penstock", "generate", str(source), "--out", str(out)]
    ours += ["--prompt-column", "question", "--base-url", f"http://127.0.0.1:{port}"]
    ours += [
        "--max-concurrent",
        str(args.concurrency),
        "--max-tokens",
        "32",
        "--temperature",
        "0.6",
        "--top-p",
        "0.95",
    ]
    if not args.peers:
        return {"penstock generate": ours}
    return {
        "penstock generate": ours,
        "bare aiohttp, nothing written": [*peer, "aiohttp", *rest],
        "open-r1's pattern": [*peer, "open-r1", *rest],
    }


def measure(command: list[str], rows: int) -> Run:
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        late = threading.Timer(600, process.kill)
        late.start()
        _, status, used = os.wait4(process.pid, 0)
        late.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{command} failed:\n{said.read()}")
    seconds = time.perf_counter() - started
    cpu = used.ru_utime + used.ru_stime
    return Run(cpu=cpu / rows * 1e6, rate=rows / seconds, memory=used.ru_maxrss / 1024)


def main() -> None:
    args = tyro.cli(Args)
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.jsonl")
        row = "Natalia sold clips to 48 of her friends in April, and then half as many in May. Number "
        with source.open("wb") as file:
            for number in range(args.rows):
                file.write(orjson.dumps({"question": f"{row}{number}?", "answer": str(number)}) + b"\n")
        for turn in range(args.rounds):
            # The stub is reaped after its round, so its CPU is in no measurement.
            with serving() as stub:
                out = Path(folder, f"out-{turn}.jsonl")
                for name, command in subjects(source, out, stub.port, args).items():
                    runs.setdefault(name, []).append(measure(command, args.rows))
                    check(out, args.rows, name)
    show(runs, args)


def check(out: Path, rows: int, name: str) -> None:
    """What was written is complete; the files make room for the next subject."""
    if "nothing written" not in name:
        with out.open("rb") as file:
            assert sum(1 for _ in file) == rows, f"{name} did not write {rows} rows"
    for path in out.parent.glob(f"{out.name}*"):
        path.unlink()


def show(runs: dict[str, list[Run]], args: Args) -> None:
    ours = statistics.median(run.cpu for run in runs["penstock generate"])
    table = Table(title=f"{args.rows:,} rows, {args.concurrency} in flight, {os.cpu_count()} cores")
    for heading in ("", "CPU µs / row", "× ours", "rows/s", "peak MB"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, found in runs.items():
        cpu = statistics.median(run.cpu for run in found)
        rate = statistics.median(run.rate for run in found)
        memory = statistics.median(run.memory for run in found)
        table.add_row(name, f"{cpu:,.0f}", f"{cpu / ours:.1f}", f"{rate:,.0f}", f"{memory:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
