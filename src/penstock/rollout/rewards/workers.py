"""A pool of worker processes that run rewards which may hang, crash or eat the machine's memory.

It guarantees:
- a worker runs one score at a time, under a limit of wall-clock time; one that is over its time is killed,
  with all it started in its session, and its job is a failed score;
- a worker that dies fails the job it was at, and the score says by which signal; others go on;
- nothing that a function does raises here, but ConfigError for one that cannot be loaded at all;
- workers are started when there is work for them, and die with this process; after the end of `async with`
  none is left, nor is their scratch folder.

A score costs two small messages and two switches of process; see docs/rewards.md for figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from penstock.errors import ConfigError
from penstock.rollout.rewards.worker import HEADER, Reply, Setup, frame
from penstock.rollout.score import Score

Function = str | Callable[..., object]
"""`module:function`, or a function that pickles: one of a module, not of a script. It returns a Score, a
finite number or a truth value."""

START_LIMIT: Final = 60.0
"""Seconds in which a worker has to have started and loaded a function: sympy takes 1, a busy machine more."""

SECOND_LOOK: Final = 0.05
"""Seconds between the end of a job's time and the kill: if this process itself was late, the result is there
already and is read first."""

FRAME_LIMIT: Final = 16 << 20
"""Bytes of a reply at most."""

REAP_POLL: Final = 0.002
"""Seconds between two looks for the end of a killed worker."""

REAP_LIMIT: Final = 10.0
"""Seconds in which a killed worker has to be gone."""

MEMORY: Final = 4 << 30
"""Bytes of address space a worker may use unless told otherwise."""

START: Final = "from penstock.rollout.rewards.worker import main; main()"
"""What a worker's interpreter runs."""

_decoder: Final = msgspec.msgpack.Decoder(Reply)


class WorkerStatistics(msgspec.Struct, frozen=True):
    """Counts of a pool at one moment."""

    processes: int
    busy: int
    waiting: int
    """Jobs that wait for a worker."""
    started: int
    """Processes since the pool was opened."""
    timeouts: int
    deaths: int
    """Workers that died while they had a job, other than by a timeout."""


class _Job(msgspec.Struct, eq=False):
    target: bytes
    arguments: bytes
    limit: float
    done: asyncio.Future[Score]


class Workers:
    """At most `count` processes (by default one for each core), each with `memory` bytes of address space.

    async with Workers() as workers:
        score = await workers.score("my_rewards:grade", text, answer, limit=5.0)
    """

    def __init__(self, count: int | None = None, *, memory: int = MEMORY) -> None:
        if count is not None and count < 1:
            raise ConfigError(f"there must be at least one worker, not {count}")
        if memory < 1 << 27:
            raise ConfigError(f"a worker needs 128 MiB to start, more than {memory} bytes")
        self.count = count or len(os.sched_getaffinity(0))
        self.memory = memory
        self.scratch: Path | None = None
        """Where workers put temporary files, while the pool is open."""
        self.started = self.timeouts = self.deaths = 0
        self._waiting: deque[_Job] = deque()
        self._idle: list[_Process] = []
        self._processes: set[_Process] = set()
        self._ends: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Workers {self.statistics()}>"

    async def __aenter__(self) -> Self:
        if self.scratch is not None:
            raise ConfigError("the workers are already open")
        self.started = self.timeouts = self.deaths = 0
        self.scratch = Path(tempfile.mkdtemp(prefix="penstock-rewards-"))
        self.scratch.chmod(0o711)  # programs under test may run as another user
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        scratch, self.scratch = self.scratch, None
        assert scratch is not None
        for job in self._waiting:
            _resolve(job, Score.failure("the workers were closed before it was scored"))
        self._waiting.clear()
        for process in list(self._processes):
            process.end("the workers were closed")
        while self._ends:
            await asyncio.wait(self._ends)
        shutil.rmtree(scratch, ignore_errors=True)

    def statistics(self) -> WorkerStatistics:
        return WorkerStatistics(
            processes=len(self._processes),
            busy=len(self._processes) - len(self._idle),
            waiting=len(self._waiting),
            started=self.started,
            timeouts=self.timeouts,
            deaths=self.deaths,
        )

    async def score(self, function: Function, *arguments: object, limit: float) -> Score:
        """What `function` returns for `arguments`, which must pickle, within `limit` seconds from when a
        worker has it loaded. Raises ConfigError when it cannot be loaded.

        When the caller is cancelled, a job that has begun runs on until it ends or its time is over.
        """
        if self.scratch is None:
            raise ConfigError("the workers are not open: use them inside `async with`")
        done: asyncio.Future[Score] = asyncio.get_running_loop().create_future()
        job = _Job(target_of(function), pickle.dumps(arguments, 5), limit, done)
        if self._idle:
            self._idle.pop().begin(job)
        else:
            self._waiting.append(job)
            self._grow()
        return await done

    # -- of its processes ---------------------------------------------------------------------------

    def _grow(self) -> None:
        if not self._waiting or self.scratch is None or len(self._processes) >= self.count:
            return
        try:
            process = _Process(self, self.scratch)
        except OSError as error:
            while self._waiting and not self._processes:  # else those that run take the work
                _resolve(self._waiting.popleft(), Score.failure(f"no worker can be started: {error}"))
            return
        self.started += 1
        self._processes.add(process)
        self._give(process)

    def _give(self, process: _Process) -> None:
        """Work for a process that has none."""
        while self._waiting:
            job = self._waiting.popleft()
            if not job.done.done():
                process.begin(job)
                return
        self._idle.append(process)

    def _lost(self, process: _Process) -> None:
        """It will score no more; it is waited for, and another takes its place."""
        self._processes.discard(process)
        if process in self._idle:
            self._idle.remove(process)
        task = asyncio.get_running_loop().create_task(process.reap(), name="penstock reward worker ends")
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)
        self._grow()


def target_of(function: Function) -> bytes:
    """How a worker finds a function. Raises ConfigError for one that it could not find."""
    if isinstance(function, str):
        module, colon, name = function.partition(":")
        if not (module and colon and name.isidentifier()):
            raise ConfigError(f"{function!r} names no function: write module:function")
        return pickle.dumps(function, 5)
    if getattr(function, "__module__", None) == "__main__":
        raise ConfigError(f"{function!r} is part of a script: put it in a module, where workers find it")
    try:
        return pickle.dumps(function, 5)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(f"{function!r} cannot be sent to a worker ({error})") from None


def _resolve(job: _Job, outcome: Score | ConfigError) -> None:
    if job.done.done():
        return  # the caller was cancelled
    if isinstance(outcome, Score):
        job.done.set_result(outcome)
    else:
        job.done.set_exception(outcome)


class _Process:
    """One worker process, as seen from here."""

    def __init__(self, pool: Workers, scratch: Path) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        try:
            self._child = _spawn(theirs, scratch)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        setup = Setup(os.getpid(), sys.path, pool.memory)
        self._connection = ours
        self._unsent = bytearray(frame(pickle.dumps(setup, 5)))
        self._buffer = bytearray()
        self._known: set[bytes] = set()
        self._job: _Job | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._end_reason: str | None = None
        ours.setblocking(False)
        self._loop.add_reader(ours, self._readable)
        self._loop.add_writer(ours, self._writable)

    def begin(self, job: _Job) -> None:
        self._job = job
        known = job.target in self._known
        self._unsent += frame(pickle.dumps((job.target, job.arguments), 5))
        self._arm(job.limit if known else START_LIMIT)
        self._writable()

    def end(self, reason: str) -> None:
        """Kills it; the job it has fails for this reason."""
        if self._end_reason is not None:
            return
        self._end_reason = reason
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        self._connection.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._pool._lost(self)

    async def reap(self) -> None:
        """Waits for its end, which names the cause of a death, and fails the job."""
        deadline = self._loop.time() + REAP_LIMIT
        while (status := self._child.poll()) is None and self._loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(REAP_POLL)
        job, self._job = self._job, None
        if job is not None:
            _resolve(job, Score.failure(str(self._end_reason).format(death=_death(status))))

    # -- time -----------------------------------------------------------------------------------------

    def _arm(self, limit: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(limit, self._expired, limit)

    def _expired(self, limit: float) -> None:
        self._timer = self._loop.call_later(SECOND_LOOK, self._overdue, limit)

    def _overdue(self, limit: float) -> None:
        assert self._job is not None
        self._pool.timeouts += 1
        loaded = self._job.target in self._known
        what = "the reward took" if loaded else "the worker was not ready to score after"
        self.end(f"timeout: {what} {'more than ' if loaded else ''}{limit:g} s")

    # -- bytes ----------------------------------------------------------------------------------------

    def _writable(self) -> None:
        try:
            sent = self._connection.send(self._unsent) if self._unsent else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self._died()
            return
        del self._unsent[:sent]
        if self._unsent:
            self._loop.add_writer(self._connection, self._writable)
        else:
            self._loop.remove_writer(self._connection)

    def _readable(self) -> None:
        try:
            data = self._connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._died()
            return
        self._buffer += data
        while self._end_reason is None and len(self._buffer) >= HEADER:
            size = int.from_bytes(self._buffer[:HEADER], "big")
            if size > FRAME_LIMIT:
                self.end("the worker's reply makes no sense")
            elif len(self._buffer) < HEADER + size:
                return
            else:
                reply = bytes(self._buffer[HEADER : HEADER + size])
                del self._buffer[: HEADER + size]
                self._replied(reply)

    def _replied(self, data: bytes) -> None:
        job = self._job
        try:
            reply = _decoder.decode(data)
        except msgspec.DecodeError:
            self.end("the worker's reply makes no sense")
            return
        if job is None:
            self.end("the worker spoke unasked")
        elif reply.score is None and reply.unusable is None:
            self._known.add(job.target)
            self._arm(job.limit)
        else:
            assert self._timer is not None
            self._timer.cancel()
            self._job = None
            name = pickle.loads(job.target) if reply.unusable else ""
            _resolve(job, reply.score or ConfigError(f"the reward {name} cannot be used: {reply.unusable}"))
            if reply.last:
                self.end("the worker has ended")
            else:
                self._pool._give(self)

    def _died(self) -> None:
        if self._job is not None:
            self._pool.deaths += 1
        self.end("the worker died while it scored: {death}")


def _spawn(connection: socket.socket, scratch: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", START, str(connection.fileno())],
        pass_fds=[connection.fileno()],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(scratch)},
        start_new_session=True,  # one signal ends it and what it started
    )


def _death(status: int | None) -> str:
    if status is None:
        return f"it could not be killed within {REAP_LIMIT:g} s"
    if status >= 0:
        return f"it exited with status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
