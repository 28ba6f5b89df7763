"""Looking through the texts of all rows, in a process of its own.

A pattern that never ends, or a file of gigabytes, then neither slows the page nor keeps it from being
cancelled: the process is killed. It reads the file by itself, tells the numbers of the rows that hold what
is looked for as it finds them, and goes on with what the file grows by. It ends with the process
that asked, however that ends.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import select
import signal
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from penstock.batch.status import prompt_format
from penstock.errors import ConfigError
from penstock.viewer.lines import Lines, Replaced
from penstock.viewer.trace_row import decode_row, searched

Where = Literal["all", "prompt", "answer", "reasoning", "id"]

POLL: Final = 0.5
"""Seconds between two looks at a file that has not grown."""
TELL: Final = 0.1
"""Seconds between two reports while nothing is found."""
MOST_TOLD: Final = 1000
"""Rows told of in one line, which a stream's reader must be able to take."""
_NICE: Final = 5
_PR_SET_PDEATHSIG: Final = 1


class Pattern(msgspec.Struct, frozen=True):
    """What is looked for. Text is found whatever its case; a regular expression says so itself: `(?i)`."""

    text: str
    regex: bool = False
    where: Where = "all"

    def matcher(self) -> Callable[[str], object]:
        """Truth for a text that holds it. Raises ConfigError for a wrong regular expression."""
        if self.regex:
            try:
                return re.compile(self.text).search
            except (re.error, RecursionError, OverflowError) as error:
                raise ConfigError(f"This is not a regular expression: {error}.") from None
        needle = self.text.casefold()
        return lambda text: needle in text.casefold()


class _Task(msgspec.Struct, frozen=True):
    path: str
    job: str
    """The output whose journal says what the prompt is."""
    pattern: Pattern


class Search:
    """A search under way. `run` is to be a task of the caller's; cancelling it ends the process."""

    def __init__(self, path: Path, job: Path, pattern: Pattern) -> None:
        self._task = _Task(str(path), str(job), pattern)
        self.hits = array("I")
        """Rows found, ascending."""
        self.scanned = 0
        """Bytes looked through."""
        self.is_over = False
        """The process has ended: what is found is all there will be."""

    async def run(self) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            __name__,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(self._task) + b"\n")
            while line := await process.stdout.readline():
                scanned, *rows = map(int, line.split())
                self.hits.extend(rows)
                self.scanned = scanned
        finally:
            self.is_over = True
            if process.returncode is None:
                process.kill()
            await process.wait()


def main() -> None:
    """The process: a task on stdin; on stdout lines of bytes looked through and the rows found in them."""
    os.nice(_NICE)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=_Task)
    matches, where, form = task.pattern.matcher(), task.pattern.where, prompt_format(Path(task.job))
    lines = Lines(Path(task.path))
    number, told = 0, 0.0
    found: list[int] = []
    try:
        while True:
            for _, line in lines.fresh():
                row = decode_row(line)
                if row is not None and any(matches(text) for text in searched(row, where, form)):
                    found.append(number)
                number += 1
                if len(found) >= MOST_TOLD or time.monotonic() - told > TELL:
                    told = _tell(lines.end, found)
            told = _tell(lines.size, found)
            if select.select([sys.stdin], [], [], POLL)[0]:
                return  # who asked has gone
    except (Replaced, BrokenPipeError, KeyboardInterrupt):
        os._exit(0)  # nobody is left to be told


def _tell(scanned: int, found: list[int]) -> float:
    sys.stdout.buffer.write(b" ".join(b"%d" % number for number in (scanned, *found)) + b"\n")
    sys.stdout.buffer.flush()
    found.clear()
    return time.monotonic()


if __name__ == "__main__":
    main()
