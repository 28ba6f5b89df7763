"""Stands for an interpreter that has Ray: `ray start` writes its node down and stays."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def main(words: list[str]) -> int:
    folder = Path(os.environ["FAKE_RAY"])
    if words[0] == "-c":
        sys.stdout.write(f"alive {len(list(folder.glob('node-*')))}\n")
        return 0
    if (folder / "refuse").exists():
        sys.stdout.write("the address is taken\n")
        return 1
    own = folder / ("node-head" if "--head" in words else "node-worker")
    own.touch()
    sys.stdout.write("Ray runtime started.\n")
    sys.stdout.flush()
    while not (folder / "end").exists():
        time.sleep(0.01)
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
