"""Scripts handed to Slurm: written where their logs go, submitted with sbatch.

Guarantees: a script is readable by its owner only (its command may hold a key), and it is on disk before it
is submitted, so that `sbatch FILE` does the same by hand.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from penstock.errors import ConfigError

SUBMIT_LIMIT: Final = 120.0
"""Seconds sbatch or scontrol may take: a busy controller answers late."""

_JOB: Final = re.compile(r"(\d+)(;\S+)?\Z")
_MAX_ARRAY: Final = re.compile(r"^MaxArraySize\s*=\s*(\d+)", re.MULTILINE)


def write_script(path: Path, text: str) -> None:
    """Raises ConfigError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.touch(mode=0o700)
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}).") from None


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Hands a script to sbatch; the job's number. Raises ConfigError with what sbatch said."""
    said = _run(["sbatch", "--parsable", *options, str(script)]).strip()
    match = _JOB.search(said.splitlines()[-1]) if said else None
    if match is None:
        raise ConfigError(f"sbatch did not say which job it made of {script}, but: {said or 'nothing'}.")
    return match[1]


def max_array_size() -> int | None:
    """One more than the highest number a task of an array may have here; None: Slurm does not say."""
    if shutil.which("scontrol") is None:
        return None
    match = _MAX_ARRAY.search(_run(["scontrol", "show", "config"]))
    return None if match is None else int(match[1])


def _run(words: Sequence[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SUBMIT_LIMIT, check=False)
    except FileNotFoundError:
        raise ConfigError(
            f"There is no {words[0]} on this machine: run this where jobs are submitted, or use --dry-run."
        ) from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{words[0]} has not answered within {SUBMIT_LIMIT:.0f} s.") from None
    if done.returncode != 0:
        raise ConfigError(f"{words[0]} refused: {done.stderr.strip() or f'exit {done.returncode}'}.")
    return done.stdout
