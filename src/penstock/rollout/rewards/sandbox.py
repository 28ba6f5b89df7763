"""Runs a Python program that nobody trusts: bounded in all it takes, cut off from all it might reach.

It guarantees, whatever the program does:
- it is over when its wall-clock time is, it never takes more CPU time, memory, output, file size or processes
  than its `Limits`, and when `run` returns none of its processes is left, daemons included;
- it inherits no environment and no file descriptor, and has a folder of its own, which is removed;
- if the process that called `run` is killed, the program is killed too.
Where the machine allows it, `namespaces.py` adds: no network, no files but its own, no sight of other
processes. Which of these hold is part of each result. Without them a program that wants to can do what its
user can, and end the very processes that watch it: then the sandbox holds accidents, not attacks.

Between caller and program stand two processes: one that enters the namespaces, and the keeper, the first
process of the new process namespace, whose end is the end of all others there. Where there is no such
namespace the keeper adopts what the program leaves behind, and kills it.
Call it in a process with one thread, such as a worker: it forks.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from penstock.rollout.rewards import namespaces
from penstock.rollout.rewards.namespaces import Protection
from penstock.servers.supervisor import descendants

KILL_LIMIT: Final = 5.0
"""Seconds in which the processes of a program have to be gone once they are killed."""

CLEAR_POLL: Final = 0.005
"""Seconds between two looks for processes that are being killed."""

CPU_GRACE: Final = 1
"""Seconds between the signal that CPU time is used up, which a program may ignore, and the one it may not."""

READ_SIZE: Final = 64 << 10
"""Bytes of a program's output read at a time."""

OPEN_FILES: Final = 256
"""Files a program may have open."""

ENVIRONMENT: Final = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""All that a program finds in its environment, besides HOME and TMPDIR. A thread for each core of the machine
would be many processes, and much address space."""

_EXEC_FAILED: Final = 127
"""Exit status of a program that could not be executed."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of a program may take."""

    wall: float = 10.0
    """Seconds on the clock."""
    cpu: int = 5
    """Seconds of CPU time, of each of its processes."""
    memory: int = 1 << 30
    """Bytes of address space, of each of its processes."""
    processes: int = 32
    """Processes and threads at a time."""
    files: int = 32 << 20
    """Bytes of a file, and of its folder as a whole."""
    output: int = 1 << 20
    """Bytes it may print."""


DEFAULT: Final = Limits()


class Ran(msgspec.Struct, frozen=True):
    """How a run ended."""

    status: int | None
    """Exit status, negative for a signal; None when it was ended from here."""
    output: bytes
    """What it printed, up to the limit."""
    cpu: float
    """Seconds of CPU time that it and the children it waited for have taken."""
    protection: Protection
    ended: str = ""
    """Why it was ended: `wall` or `output` (its limit); `cpu` when it used up its CPU time."""


class SandboxFailed(Exception):
    """The program could not be run at all, for a reason that is not its own."""


class _Report(msgspec.Struct, frozen=True):
    """What the keeper says of the program."""

    protection: Protection
    keeper: int = 0
    status: int | None = None
    cpu: float = 0.0
    failure: str = ""


def run(program: str, stdin: bytes = b"", limits: Limits = DEFAULT, *, isolate: bool = True) -> Ran:
    """Runs the source text `program` with this Python.

    isolate: False leaves the namespaces out, as on a machine that has none. Raises SandboxFailed.
    """
    folder = tempfile.mkdtemp(prefix="box-")
    (output, output_end), (report, report_end) = os.pipe(), os.pipe()
    caller = os.getpid()
    pid = os.fork()
    if pid == 0:
        with _never_returns():
            box = _Box(folder, program.encode(errors="replace"), stdin, limits, output_end, report_end)
            box.enter(caller, isolate=isolate)
    os.close(output_end)
    os.close(report_end)
    try:
        return _Watch(pid, output, report, limits).result()
    finally:
        os.close(output)
        os.close(report)
        shutil.rmtree(folder, ignore_errors=True)


class _never_returns:  # noqa: N801 - reads as what it says
    """The forked process ends here, whatever happens in it."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> NoReturn:
        os._exit(_EXEC_FAILED)


class _Box:
    """The program's side: what the forked processes do."""

    def __init__(
        self, folder: str, program: bytes, stdin: bytes, limits: Limits, output: int, report: int
    ) -> None:
        self.folder = folder
        self.program = program
        self.stdin = stdin
        self.limits = limits
        self.output = output
        self.report = report
        self.interpreter = str(Path(sys.executable).resolve())
        self.protection = Protection()
        self.guest = 0
        """The user the program runs as, where this process is root's."""

    def enter(self, caller: int, *, isolate: bool) -> None:
        """The outer process: enters the namespaces, starts the keeper, waits for it."""
        namespaces.prctl(namespaces.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != caller:
            return
        namespaces.prctl(namespaces.PR_SET_DUMPABLE, 0)  # the program must not read our environment
        os.setsid()
        self.guest = namespaces.guest()
        with self._failures_told():
            if isolate:
                self.protection = namespaces.enter(self.folder, self.limits.files)
            leash, held = os.pipe()
            keeper = os.fork()
        if keeper == 0:
            with _never_returns(), self._failures_told():
                os.close(held)
                self._keep(leash)
        self._say(_Report(self.protection, keeper=keeper))
        os.close(self.output)
        os.close(self.report)
        os.waitpid(keeper, 0)
        os._exit(0)

    def _keep(self, leash: int) -> None:
        """The keeper: starts the program, says how it ended, leaves nothing behind."""
        alone = self.protection.processes
        if alone:
            namespaces.show_own_processes()
        else:
            namespaces.prctl(namespaces.PR_SET_CHILD_SUBREAPER, 1)
        if not self.protection.files:
            os.chown(self.folder, self.guest, -1)
        root = os.geteuid() == 0
        free = namespaces.give_up_root(self.interpreter, self.guest)
        if not free:  # a root without capabilities owns what it uses
            os.chown(self.folder, 0, 0)
        self.protection = msgspec.structs.replace(self.protection, unprivileged=free)
        signal.signal(signal.SIGTERM, lambda *_: self._clear())
        namespaces.prctl(namespaces.PR_SET_PDEATHSIG, signal.SIGKILL if alone else signal.SIGTERM)
        if select.select([leash], [], [], 0)[0]:  # the outer process is gone already
            return
        # RLIMIT_NPROC counts all of a user's; a guest has only this process, and in a user namespace only
        # those inside count (Linux 5.14).
        others = 1 if root and free else 2 if alone else _threads_of(os.geteuid())
        program = os.fork()
        if program == 0:
            with _never_returns(), self._failures_told():
                self._become_program(others)
        os.close(self.output)
        _, status, usage = os.wait4(program, 0)
        cpu = usage.ru_utime + usage.ru_stime
        self._say(_Report(self.protection, status=os.waitstatus_to_exitcode(status), cpu=cpu))
        if not alone:
            self._clear()
        os._exit(0)

    def _become_program(self, others: int) -> None:
        os.chdir(self.folder)
        Path("main.py").write_bytes(self.program)
        Path("stdin").write_bytes(self.stdin)
        os.dup2(os.open("stdin", os.O_RDONLY), 0)
        os.dup2(self.output, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.closerange(3, self.report)
        os.closerange(self.report + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        _bound(self.limits, others)
        namespaces.give_up_privileges()
        environment = {**ENVIRONMENT, "HOME": self.folder, "TMPDIR": self.folder}
        # By its first argument Python knows the virtual environment it belongs to.
        os.execve(self.interpreter, [sys.executable, "-I", "-B", "main.py"], environment)

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._say(_Report(self.protection, failure=f"{type(error).__name__}: {error}"))
            os._exit(_EXEC_FAILED)

    def _clear(self) -> None:
        """Ends all that the program has left behind, then this process."""
        deadline = time.monotonic() + KILL_LIMIT
        while time.monotonic() < deadline and (left := descendants(os.getpid())):
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(CLEAR_POLL)
        os._exit(0)

    def _say(self, report: _Report) -> None:
        os.write(self.report, msgspec.json.encode(report) + b"\n")


def _bound(limits: Limits, others: int) -> None:
    bounds = {
        resource.RLIMIT_AS: (limits.memory, limits.memory),
        resource.RLIMIT_CPU: (limits.cpu, limits.cpu + CPU_GRACE),
        resource.RLIMIT_FSIZE: (limits.files, limits.files),
        resource.RLIMIT_NPROC: (limits.processes + others, limits.processes + others),
        resource.RLIMIT_NOFILE: (OPEN_FILES, OPEN_FILES),
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, (soft, hard) in bounds.items():
        allowed = resource.getrlimit(kind)[1]
        if allowed != resource.RLIM_INFINITY:
            soft, hard = min(soft, allowed), min(hard, allowed)
        resource.setrlimit(kind, (soft, hard))


def _threads_of(uid: int) -> int:
    """Threads of a user on this machine now."""
    count = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.stat().st_uid == uid:
                count += len(list((path / "task").iterdir()))
        except OSError:
            continue
    return count


class _Watch:
    """The caller's side: reads what comes, ends the program when its time or output is over."""

    def __init__(self, pid: int, output: int, report: int, limits: Limits) -> None:
        self._pid = pid
        self._pipes = {output, report}
        self._output_pipe = output
        self._limits = limits
        self._output = bytearray()
        self._reports = bytearray()
        self._keeper = 0
        self._protection = Protection()
        self._final: _Report | None = None

    def result(self) -> Ran:
        """Raises SandboxFailed."""
        try:
            ended = self._watch(time.monotonic() + self._limits.wall)
        finally:
            self._end()
        return self._judge(ended)

    def _watch(self, deadline: float) -> str:
        while self._final is None and self._pipes:
            left = deadline - time.monotonic()
            ready = select.select(list(self._pipes), [], [], max(0.0, left))[0]
            if not ready:
                return "wall"
            self._read(ready)
            if len(self._output) > self._limits.output:
                return "output"
        while self._output_pipe in self._pipes:  # what was printed before the end lies in the pipe
            if not select.select([self._output_pipe], [], [], 0)[0]:
                break
            self._read([self._output_pipe])
        return "output" if len(self._output) > self._limits.output else ""

    def _read(self, ready: list[int]) -> None:
        for pipe in ready:
            data = os.read(pipe, READ_SIZE)
            if not data:
                self._pipes.discard(pipe)
            elif pipe == self._output_pipe:
                self._output += data
            else:
                self._reports += data
                self._take_reports()

    def _take_reports(self) -> None:
        *lines, rest = self._reports.split(b"\n")
        self._reports = rest
        for line in lines:
            report = msgspec.json.decode(line, type=_Report)
            self._keeper = report.keeper or self._keeper
            self._protection = report.protection
            if (report.status is not None or report.failure) and self._final is None:
                self._final = report

    def _end(self) -> None:
        """Kills what runs; returns when all of it is gone, for the outer process waits for the keeper, and
        the keeper's end is the end of the namespace."""
        if self._final is None:
            number = signal.SIGKILL if self._protection.processes else signal.SIGTERM
            _signal(self._keeper or self._pid, number)
        deadline = time.monotonic() + KILL_LIMIT + 1.0
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                _signal(self._pid, signal.SIGKILL)
                raise SandboxFailed("the processes of the program could not be killed")
            time.sleep(CLEAR_POLL / 5)

    def _judge(self, ended: str) -> Ran:
        final = self._final
        if final is None and not ended:
            raise SandboxFailed("the sandbox ended before the program did")
        if final is not None and final.failure:
            raise SandboxFailed(final.failure)
        status = final.status if final is not None and not ended else None
        cpu = final.cpu if final is not None else 0.0
        killed = status in (-signal.SIGXCPU, -signal.SIGKILL)
        if killed and (status == -signal.SIGXCPU or cpu >= self._limits.cpu):
            ended = "cpu"
        output = bytes(self._output[: self._limits.output])
        return Ran(status, output, cpu, self._protection, ended)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
