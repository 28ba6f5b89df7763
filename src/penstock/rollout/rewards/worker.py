"""A worker process: scores one job after the other, until it is killed or its owner is gone.

`main` is all that its interpreter runs. On the socket whose number is its argument it reads a `Setup`, then
jobs, and writes replies, each a frame: its length (four bytes, big-endian), then so many bytes. What goes to
a worker is pickled, what comes back is msgpack: nothing that a worker says can run code in its owner.

It guarantees: it dies with its owner (PR_SET_PDEATHSIG); the kernel's out-of-memory killer takes it first;
what a function prints goes to standard error, and cannot get between the frames.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import pickle
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from penstock.rollout.score import Score

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
"""Numbers of prctl(2) options."""

OOM_SCORE: Final = "800"
"""How much sooner than others the kernel ends this process when memory is short, of 1000."""

HEADER: Final = 4
"""Bytes of a frame's length."""


class Setup(msgspec.Struct, frozen=True):
    """What a worker has to know first."""

    owner: int
    """Process id of who started it."""
    path: list[str]
    """Where modules are looked for."""
    memory: int
    """Bytes of address space it may use (RLIMIT_AS)."""


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """Without a field set: the function is loaded, and its time begins."""

    score: Score | None = None
    unusable: str | None = None
    """Why the function cannot be loaded."""
    last: bool = False
    """The worker ends now."""


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(HEADER, "big") + data


def load(target: bytes) -> Callable[..., Any]:
    """A function: pickled, or `module:function`, pickled as text. Raises whatever goes wrong."""
    found = pickle.loads(target)
    if isinstance(found, str):
        module, _, name = found.partition(":")
        found = getattr(importlib.import_module(module), name)
    if not callable(found):
        raise TypeError(f"{found!r} is not a function")
    return found  # type: ignore[no-any-return]


def as_score(value: object) -> Score:
    """What a function returned: a Score, a finite number or a truth value; all else is a failed score."""
    if isinstance(value, Score):
        if value.failed is None and not math.isfinite(value.value):
            return Score.failure(f"the reward is {value.value}, not a finite number")
        return value
    try:
        number = float(value)  # type: ignore[arg-type]  # numpy's numbers too
    except (TypeError, ValueError, OverflowError):
        return Score.failure(f"the reward is a {type(value).__name__}, not a number")
    return Score(number) if math.isfinite(number) else Score.failure(f"the reward is {number}")


class _Worker:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")
        self._functions: dict[bytes, Callable[..., Any]] = {}

    def run(self) -> None:
        setup: Setup = pickle.loads(self._read())
        _confine(setup)
        sys.path[:] = setup.path
        while data := self._read():
            target, arguments = pickle.loads(data)
            if (function := self._function(target)) is not None:
                self._score(function, arguments)

    def _function(self, target: bytes) -> Callable[..., Any] | None:
        function = self._functions.get(target)
        if function is None:
            try:
                function = self._functions[target] = load(target)
            except Exception as error:
                self._write(Reply(unusable=f"{type(error).__name__}: {error}"))
                return None
            self._write(Reply())
        return function

    def _score(self, function: Callable[..., Any], arguments: bytes) -> None:
        try:
            score = as_score(function(*pickle.loads(arguments)))
        except MemoryError:
            # What holds the memory may stay: a fresh process takes over.
            self._write(Reply(Score.failure("the reward ran out of memory"), last=True))
            os._exit(0)
        except Exception as error:
            score = Score.failure(f"the reward raised {type(error).__name__}: {error}")
        self._write(Reply(score))

    def _read(self) -> bytes:
        """The next frame; b"" when the owner is gone."""
        header = self._file.read(HEADER)
        return self._file.read(int.from_bytes(header, "big")) if len(header) == HEADER else b""

    def _write(self, reply: Reply) -> None:
        self._connection.sendall(frame(msgspec.msgpack.encode(reply)))


def _confine(setup: Setup) -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # a program under test must not read our environment
    if os.getppid() != setup.owner:
        os._exit(1)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = setup.memory if hard == resource.RLIM_INFINITY else min(setup.memory, hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    except OSError:
        pass  # another kernel, or /proc is read-only


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, which then ends its workers
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # and at once: what is still in a buffer when the process is killed is lost
    try:
        with socket.socket(fileno=int(sys.argv[1])) as connection:
            _Worker(connection).run()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the owner is gone
