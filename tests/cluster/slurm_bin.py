"""A folder for the PATH with `fake_slurm` under the names of Slurm's commands."""

from __future__ import annotations

import sys
import time
from pathlib import Path

FAKE = Path(__file__).with_name("fake_slurm.py")

WAIT = 90.0
"""Seconds a job may take."""


class FakeSlurm:
    """Slurm's commands and what became of the jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        for name in ("sbatch", "scontrol", "srun"):
            script = self.bin / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {FAKE} {name} "$@"\n')
            script.chmod(0o755)

    def signal(self, *lines: str) -> None:
        """Tells which task is sent which signal."""
        (self.folder / "signal").write_text("".join(f"{line}\n" for line in lines))

    def script(self, job: int) -> str:
        return (self.folder / f"job-{job}" / "script").read_text()

    def options(self, job: int) -> str:
        return (self.folder / f"job-{job}" / "options").read_text()

    def runs(self, job: int) -> list[tuple[str, int, int]]:
        """(task, restart, exit status) of each run, after the job has ended."""
        folder = self.folder / f"job-{job}"
        deadline = time.monotonic() + WAIT
        while not (folder / "done").exists():
            assert time.monotonic() < deadline, f"job {job} has not ended: {(folder / 'errors').read_text()}"
            time.sleep(0.02)
        lines = [line.split() for line in (folder / "runs").read_text().splitlines()]
        return [(words[0] if len(words) == 3 else "", int(words[-2]), int(words[-1])) for words in lines]
