"""Rewards that do what a worker process has to survive, and some that behave."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from penstock.prompt import Prompt
from penstock.rollout.score import Score
from penstock.sample import Sample


def same(value: object) -> object:
    return value


def hang() -> float:
    while True:
        pass


def hang_deaf() -> float:
    """Not even a signal handler, or a lock of the interpreter, helps against this one."""
    ctypes.PyDLL(None).sleep(1000)
    return 1.0


def hang_with_child(pid_file: str) -> float:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(pid_file).write_text(f"{os.getpid()} {child.pid}")
    return hang()


def slow(seconds: float) -> float:
    time.sleep(seconds)
    return 1.0


def segfault() -> float:
    ctypes.string_at(0)
    return 1.0


def leave() -> float:
    os._exit(7)


def leave_politely() -> float:
    sys.exit(0)


def eat_memory() -> float:
    held = []
    while True:
        held.append(bytearray(1 << 26))


def wrong() -> float:
    raise KeyError("x")


def loud() -> float:
    print("\0\0\0\1 this must not get between the frames")  # noqa: T201
    return 1.0


def babble() -> float:
    """Writes into the worker's own socket."""
    for descriptor in range(3, 1000):
        try:
            with socket.socket(fileno=os.dup(descriptor)) as found:
                found.send(b"\0\0\0\5hello")
        except OSError:
            continue
    return 1.0


def pid() -> float:
    return float(os.getpid())


def heavy() -> float:
    return float("torch" in sys.modules)


def by_length(prompt: Prompt, sample: Sample) -> Score:
    return Score(float(len(sample.text)), {"position": float(prompt.position)})
