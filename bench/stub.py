"""The stub server of the benchmarks: compiles stub.c and runs it.

    python bench/stub.py [--port 0] [--latency-ms 0] [--chunks 50] [--chunk-ms 0]

It prints its port and serves until its standard input ends.

It is written in C so that it costs less than any client: what is measured is who asks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
BINARY = SOURCE.parents[1] / "build" / "bench" / "stub"

TEXT = "Seven times eight is fifty-six. " * 10
"""The content of every answer."""


@dataclass(frozen=True)
class Stub:
    """A stub that serves on 127.0.0.1."""

    port: int

    def statistics(self) -> dict[str, int]:
        """What it has counted so far."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats", timeout=30) as response:
            counts: dict[str, int] = json.load(response)
            return counts


def build() -> Path:
    """The stub, compiled if it is not yet or no longer up to date."""
    if not BINARY.exists() or BINARY.stat().st_mtime < SOURCE.stat().st_mtime:
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            sys.exit("the benchmarks need a C compiler: install gcc or clang, or name one in CC")
        BINARY.parent.mkdir(parents=True, exist_ok=True)
        scratch = BINARY.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-o", scratch, SOURCE], check=True)
        scratch.replace(BINARY)
    return BINARY


@contextmanager
def serving(
    *, latency_ms: int = 0, core: int | None = None, chunks: int = 50, chunk_ms: int = 0
) -> Iterator[Stub]:
    """A stub in a process of its own, on one core if that is given. A stream has so many chunks, so far
    apart."""
    command = [str(build()), "--latency-ms", str(latency_ms)]
    command += ["--chunks", str(chunks), "--chunk-ms", str(chunk_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        try:
            yield Stub(int(process.stdout.readline()))
        finally:
            process.stdin.close()


if __name__ == "__main__":
    os.execv(build(), ["stub", *sys.argv[1:]])
