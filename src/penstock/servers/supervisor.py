"""Keeps one engine and everything it starts: when the owner goes, or says so, nothing of it is left.

Run as a script, between the owner (who started this process) and the engine. It guarantees:
- this process adopts whatever the engine starts, also what has left its process group, session and parent
  (PR_SET_CHILD_SUBREAPER), so that all of it can be found and ended;
- if the owner dies, however, its end of the pipe on standard input closes and everything is killed;
- if this process dies, the kernel kills the engine (PR_SET_PDEATHSIG);
- when the engine has ended, what it left behind is ended too, and then this process ends.

Standard input takes commands, a line each: `stop SECONDS` (SIGTERM to the engine, SIGKILL to all after that
time) and `kill`. Standard output gives events, a line each: `started PID` (it is being executed), `failed
REASON` (it could not be), `exit STATUS` (of the engine, negative for a signal), `left PID…` (could not be
killed), `gone`. The engine writes to this process's standard error. Only the standard library is imported,
nothing of penstock.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from typing import Final

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
"""Numbers of prctl(2) options."""

PARENT_CHECK: Final = 1.0
"""Seconds between two looks at whether the owner lives: a fork of it may hold its end of the pipe open."""

LEFTOVER_GRACE: Final = 2.0
"""Seconds that processes the engine left behind have between SIGTERM and SIGKILL."""

CLEANER_GRACE: Final = 1.0
"""Seconds that Python's resource trackers, which remove shared memory once all others are gone, have more."""

KILL_LIMIT: Final = 15.0
"""Seconds in which a killed process has to be gone; one that waits for a driver may never be."""

TERMINATED_GRACE: Final = 5.0
"""Seconds the engine has when this process itself is asked to end by SIGTERM."""

POLL: Final = 0.02
"""Seconds between two looks for processes that are being ended."""

CLEANER: Final = b"multiprocessing.resource_tracker"


def children() -> dict[int, list[int]]:
    """The children of each process of this machine that has any. Empty where there is no /proc."""
    found: dict[int, list[int]] = {}
    try:
        names = os.listdir("/proc")  # noqa: PTH208 - pathlib costs a third of this script's start
    except OSError:
        return found
    for name in names:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields[:1] != [b"Z"]:
                found.setdefault(int(fields[1]), []).append(int(name))
    return found


def descendants(pid: int) -> list[int]:
    """Processes started by `pid`, and by those, and so on; parents first. Zombies are not counted."""
    tree, found = children(), []
    waiting = list(tree.get(pid, ()))
    while waiting:
        current = waiting.pop(0)
        found.append(current)
        waiting.extend(tree.get(current, ()))
    return found


def prctl(option: int, value: int) -> None:
    """Sets a process option; does nothing where the system has no prctl."""
    try:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
    except (OSError, AttributeError):
        pass


class Supervisor:
    """One engine's keeper."""

    def __init__(self, command: list[str], events: int) -> None:
        self._command = command
        self._events = events
        self._owner = os.getppid()
        self._engine = 0
        self._status: int | None = None
        self._deadline: float | None = None
        """When everything is killed; None: not asked to stop."""
        self._buffer = b""
        self._wake, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: self._stop(TERMINATED_GRACE))
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def run(self) -> int:
        """Starts the engine, returns when nothing of it is left: 0, or 1 when something cannot be killed."""
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._start()
        while self._status is None:
            left = PARENT_CHECK if self._deadline is None else self._deadline - time.monotonic()
            if left <= 0:
                break
            ready, _, _ = select.select([0, self._wake], [], [], min(left, PARENT_CHECK))
            if self._wake in ready:
                os.read(self._wake, 4096)
            if 0 in ready:
                self._read_commands()
            self._reap()
            if os.getppid() != self._owner:
                self._deadline = 0.0
        return self._clear(gently=self._status is not None and self._deadline != 0.0)

    # -- the engine -------------------------------------------------------------------------------

    def _start(self) -> None:
        keeper = os.getpid()
        told, tell = os.pipe()  # closed by a successful exec
        self._engine = os.fork()
        if self._engine == 0:
            self._become_engine(keeper, tell)
        os.close(tell)
        failure = os.read(told, 4096)
        os.close(told)
        self._tell(f"failed {failure.decode()}" if failure else f"started {self._engine}")

    def _become_engine(self, keeper: int, tell: int) -> None:
        try:
            os.setpgid(0, 0)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != keeper:
                os._exit(1)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            os.dup2(2, 1)
            os.execvp(self._command[0], self._command)
        except OSError as error:
            os.write(tell, f"{self._command[0]}: {error.strerror}".encode(errors="replace"))
        finally:
            os._exit(127)

    def _reap(self) -> bool:
        """Takes note of children that have ended; False when there are none left at all."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._engine:
                self._status = os.waitstatus_to_exitcode(status)
                self._tell(f"exit {self._status}")

    # -- the end ----------------------------------------------------------------------------------

    def _read_commands(self) -> None:
        data = os.read(0, 4096)
        if not data:  # the owner is gone
            self._deadline = 0.0
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            word, _, value = line.partition(b" ")
            if word == b"stop":
                self._stop(float(value))
            elif word == b"kill":
                self._deadline = 0.0

    def _stop(self, grace: float) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + grace
            if self._status is None:
                _signal(self._engine, signal.SIGTERM)

    def _clear(self, *, gently: bool) -> int:
        if gently and self._reap():
            for pid in descendants(os.getpid()):
                if not _is_cleaner(pid):
                    _signal(pid, signal.SIGTERM)
            self._wait_until_gone(LEFTOVER_GRACE, hurried=True)
        deadline = time.monotonic() + KILL_LIMIT
        while self._reap() and time.monotonic() < deadline:
            left = descendants(os.getpid())
            others = [pid for pid in left if not _is_cleaner(pid)]
            for pid in others:
                _signal(pid, signal.SIGKILL)
            if not others:
                self._wait_until_gone(CLEANER_GRACE, hurried=False)
                for pid in left:
                    _signal(pid, signal.SIGKILL)
            time.sleep(POLL / 4)
        if self._reap() and (left := descendants(os.getpid())):
            self._tell("left " + " ".join(map(str, left)))
            return 1
        self._tell("gone")
        return 0

    def _wait_until_gone(self, seconds: float, *, hurried: bool) -> None:
        """Until no child is left; `hurried`: or the owner wants no more grace."""
        deadline = time.monotonic() + seconds
        while self._reap() and time.monotonic() < deadline:
            ready, _, _ = select.select([0] if hurried else [], [], [], POLL)
            if ready:
                self._read_commands()
                hurried = self._deadline != 0.0
                if not hurried:
                    return

    def _tell(self, event: str) -> None:
        try:
            os.write(self._events, event.encode(errors="replace") + b"\n")
        except OSError:
            pass  # the owner is gone; the end of its pipe says so


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def _is_cleaner(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123
            return CLEANER in file.read()
    except OSError:
        return False


def main(arguments: list[str]) -> int:
    """`arguments` is the engine's command."""
    os.set_inheritable(0, False)
    return Supervisor(arguments, os.dup(1)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
