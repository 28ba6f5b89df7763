"""How long a job of a million rows takes to find out where it was, and how much memory that takes.

    python bench/resume.py [--rows 1000000] [--row-bytes 4096] [--samples 1] [--folder /tmp]

The files of a finished job are written straight from the journal's format: an output of rows x row-bytes,
and a journal as large. Then the job is opened as a resume opens it, in its own process: first without the
snapshot that a job leaves beside its journal, then with it. What was written is removed at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import orjson
import tyro
from rich.console import Console
from rich.table import Table

from penstock.batch.records import Header, Target, encode, encode_json
from penstock.batch.trace import Metadata, Trace, encode_trace, row_line
from penstock.prompt import PromptFormat

FORM = PromptFormat(prompt_column="question")

OPEN = """
import sys, time
from pathlib import Path
from penstock.batch.job import Job, JobSettings
from penstock.inputs.jsonl import JsonlInput
from penstock.prompt import PromptFormat
folder, samples = Path(sys.argv[1]), int(sys.argv[2])
form = PromptFormat(prompt_column="question")
source = JsonlInput(folder / "in.jsonl")
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
before = peak()
start = time.perf_counter()
survey = source.survey(form)
surveyed = time.perf_counter()
settings = JobSettings(out=folder / "out.jsonl", form=form, num_generations=samples)
with Job(source, settings, {}, survey) as job:
    opened = time.perf_counter()
    assert job.accounting().complete, job.accounting()
print(surveyed - start, opened - surveyed, time.process_time(), peak() - before)
"""


@dataclass(frozen=True)
class Args:
    """The resume of a large job."""

    rows: int = 1_000_000
    row_bytes: int = 4096
    """Of one row in the output."""
    samples: int = 1
    """Of each row."""
    folder: Path = Path("/tmp")
    """Where the files are put."""


def write_files(folder: Path, args: Args) -> None:
    """The input, output and journal of a job that is done."""
    text = "Seven times eight is fifty-six. " * (args.row_bytes // (32 * args.samples))
    trace = Trace(
        text=text,
        finish_reason="stop",
        metadata=Metadata(prompt_tokens=30, completion_tokens=900, total_tokens=930, model="m", latency=9.5),
    )
    payload = encode_trace(trace)
    lines = bytearray(encode_json(b"job", Header(parameters=FORM.parameters())))
    lines += encode_json(b"i", Target(samples=args.samples, rows=args.rows))
    place = end = 0
    buffer = 16 << 20
    with (
        Path(folder, "in.jsonl").open("wb", buffering=buffer) as source,
        Path(folder, "out.jsonl").open("wb", buffering=buffer) as out,
        Path(folder, "out.jsonl.journal").open("wb", buffering=buffer) as journal,
    ):
        for number in range(args.rows):
            fields = orjson.dumps({"question": f"What is 7 x 8 + {number}?", "answer": str(56 + number)})
            source.write(fields + b"\n")
            name = b"%016x 0" % FORM.hash("", orjson.loads(fields))
            places = []
            for index in range(args.samples):
                places.append(b"%d" % (place + len(lines)))
                lines += encode(b"s", b"%b %d %b" % (name, index, payload))
            line = row_line(fields, [trace] * args.samples) + b"\n"
            out.write(line)
            start, end = end, end + len(line)
            written = (name, start, end, zlib.crc32(line), b",".join(places))
            lines += encode(b"w", b"%b %d %d %d %b" % written)
            journal.write(lines)
            place += len(lines)
            lines.clear()


def main() -> None:
    args = tyro.cli(Args)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_files(Path(folder), args)
        sizes = [Path(folder, name).stat().st_size / 1e9 for name in ("out.jsonl", "out.jsonl.journal")]
        command = [sys.executable, "-c", OPEN, folder, str(args.samples)]
        runs = []
        for _ in range(2):
            ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
            runs.append([float(number) for number in ran.stdout.split()])
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "penstock", "status", f"{folder}/out.jsonl"],
            stdout=subprocess.DEVNULL, check=True, timeout=600,
        )  # fmt: skip
        status = time.perf_counter() - start
    table = Table(title=f"{args.rows:,} rows of {sizes[0]:.2f} GB, {os.cpu_count()} cores")
    for heading in ("", "from the journal", "with the snapshot"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = ("look through the input (s)", f"read {sizes[1]:.2f} GB of journal, check the output (s)")
    for name, found in zip((*rows, "CPU in all (s)", "memory (MB)"), zip(*runs, strict=True), strict=True):
        table.add_row(name, *(f"{number:.1f}" for number in found))
    table.add_row("penstock status (s)", "", f"{status:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
