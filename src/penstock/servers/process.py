"""An engine as a child process: started, heard, ended with everything it started.

Between this process and the engine stands a supervisor (`supervisor.py`) that adopts all the engine's
descendants. It guarantees:
- after `stop` no process of the engine is left, or EngineError names those that could not be killed;
- if this process dies, also by SIGKILL, the engine and all it started are killed;
- if the supervisor is killed, the engine dies with it, and what it started is found by its session, its
  process group or a mark in its environment, and killed. Only who kills this process and the supervisor in
  the same moment leaves processes behind.

A start that is cancelled leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Final, Self

from penstock.errors import EngineError
from penstock.servers import supervisor

MARK: Final = "PENSTOCK_SERVER"
"""Environment variable by which an engine's processes are known. SPT_NOENV keeps setproctitle, by which
engines name their processes, from writing over it."""

START_LIMIT: Final = 30.0
"""Seconds until the supervisor has to have executed the engine's command; it takes about 0.05."""

STOP_MARGIN: Final = supervisor.KILL_LIMIT + 10.0
"""Seconds beyond the grace in which a stop has to be over."""

OUTPUT_LIMIT: Final = 2.0
"""Seconds in which the rest of an engine's output is read once its processes are gone."""

REAP_POLL: Final = 0.002
"""Seconds between two looks for the end of a supervisor that has said its last word."""

READ_SIZE: Final = 64 << 10
"""Bytes read from the engine's output at a time."""


class Process:
    """A running engine. `on_output` gets what it prints, as read, and b"" at the end."""

    def __init__(
        self,
        keeper: subprocess.Popen[bytes],
        mark: str,
        on_output: Callable[[bytes], None],
        pipes: tuple[Pipe, Pipe],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.pid = 0
        """Of the engine."""
        self.exited: asyncio.Future[int | None] = loop.create_future()
        """The engine's exit status, negative for a signal, once it has ended; None: not known."""
        self._keeper = keeper
        self._mark = mark
        self._on_output = on_output
        self._started: asyncio.Future[None] = loop.create_future()
        self._left = ""
        self._cleared = False
        events, output = pipes
        self._events = loop.create_task(self._read_events(events), name="penstock engine events")
        self._output = loop.create_task(self._read_output(output), name="penstock engine output")

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        on_output: Callable[[bytes], None],
    ) -> Self:
        """Raises EngineError when the command cannot be executed."""
        # A start that is cancelled half-way would leave a supervisor that nobody holds.
        starting = asyncio.ensure_future(cls._start(command, environment, on_output))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            while not starting.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([starting])
            if starting.exception() is None:
                await starting.result().stop(0.0)
            raise

    @classmethod
    async def _start(
        cls, command: Sequence[str], environment: Mapping[str, str], on_output: Callable[[bytes], None]
    ) -> Self:
        mark = secrets.token_hex(8)
        keeper = _spawn(command, {**environment, MARK: mark, "SPT_NOENV": "1"})
        assert keeper.stdout is not None and keeper.stderr is not None
        try:
            pipes = await _connect(keeper.stdout), await _connect(keeper.stderr)
        except BaseException:
            keeper.kill()
            raise
        process = cls(keeper, mark, on_output, pipes)
        try:
            async with asyncio.timeout(START_LIMIT):
                await process._started
        except TimeoutError:
            await process.stop(0.0)
            raise EngineError(f"{command[0]} was not executed within {START_LIMIT:g} s.") from None
        except EngineError:
            await process.stop(0.0)
            raise
        return process

    @property
    def alive(self) -> bool:
        return not self.exited.done()

    @property
    def tree(self) -> list[int]:
        """The engine's processes that run now, its own first. Empty where there is no /proc."""
        return supervisor.descendants(self._keeper.pid)

    async def stop(self, grace: float) -> None:
        """Ends the engine: SIGTERM, and after `grace` seconds SIGKILL to all its processes; 0: at once.

        May be called again, by another task too; the shorter grace counts. Raises EngineError when
        processes could not be killed.
        """
        self._say(f"stop {grace:.3f}\n" if grace > 0 else "kill\n")
        try:
            async with asyncio.timeout(grace + STOP_MARGIN):
                await asyncio.shield(self._ended())
        except TimeoutError:
            self._keeper.kill()
            raise EngineError("The engine could not be stopped: its supervisor does not answer.") from None
        if self._left:
            raise EngineError(
                f"Processes of the engine could not be killed: {self._left}. They wait for a driver or a "
                "file system; if they stay, the machine has to be restarted."
            )

    def hurry(self) -> None:
        """A stop that is under way gives no more grace."""
        self._say("kill\n")

    async def _ended(self) -> None:
        await self._events
        # All who could write are gone, unless some could not be killed or found.
        await asyncio.wait([self._output], timeout=OUTPUT_LIMIT)
        self._output.cancel()

    def _say(self, command: str) -> None:
        assert self._keeper.stdin is not None
        try:
            os.write(self._keeper.stdin.fileno(), command.encode())
        except (OSError, ValueError):
            pass  # it has ended

    async def _read_events(self, pipe: Pipe) -> None:
        """Until the supervisor has ended; then nothing of the engine is left."""
        async for line in pipe.reader:
            word, _, value = line.decode().strip().partition(" ")
            self._event(word, value)
        pipe.close()
        while self._keeper.poll() is None:  # noqa: ASYNC110 - it closes its pipe by ending
            await asyncio.sleep(REAP_POLL)
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        if not self._cleared:  # the supervisor was killed: nobody else ends what the engine has started
            await self._clear()
        self._settle(None)

    def _event(self, word: str, value: str) -> None:
        if word == "started":
            self.pid = int(value)
            self._begin()
        elif word == "failed":
            if not self._started.done():
                self._started.set_exception(EngineError(f"Cannot execute {value}."))
        elif word == "exit":
            self._settle(int(value))
        elif word in ("gone", "left"):
            self._cleared, self._left = True, value

    def _begin(self) -> None:
        if not self._started.done():
            self._started.set_result(None)

    def _settle(self, status: int | None) -> None:
        if not self.exited.done():
            self.exited.set_result(status)
        self._begin()

    async def _clear(self) -> None:
        deadline = asyncio.get_running_loop().time() + supervisor.KILL_LIMIT
        while left := _stray(self._mark, {self._keeper.pid, self.pid}):
            for pid in left:
                _kill(pid)
            if asyncio.get_running_loop().time() > deadline:
                self._left = " ".join(map(str, left))
                return
            await asyncio.sleep(supervisor.POLL)

    async def _read_output(self, pipe: Pipe) -> None:
        while data := await pipe.reader.read(READ_SIZE):
            self._on_output(data)
        pipe.close()
        self._on_output(b"")


class Pipe:
    """The end of a pipe that is read here."""

    def __init__(self, reader: asyncio.StreamReader, transport: asyncio.BaseTransport) -> None:
        self.reader = reader
        self._transport = transport

    def close(self) -> None:
        self._transport.close()


async def _connect(file: IO[bytes]) -> Pipe:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
    return Pipe(reader, transport)


def _spawn(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # Not by the loop: uvloop forks, which can hang in a process with threads (torch). This one uses vfork,
    # and it needs no handler for SIGCHLD, so that it works in a loop of any thread.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", supervisor.__file__, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=environment,
        # A session of its own: Ctrl-C in the terminal is for this process, which then stops its engine.
        start_new_session=True,
    )


def _stray(mark: str, leaders: set[int]) -> list[int]:
    """Running processes with this mark, or of a session or process group that one of these leaders began."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_bytes().rpartition(b")")[2].split()
            group, session = int(fields[2]), int(fields[3])
            ours = bool({group, session} & leaders) or wanted in (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if ours and fields[0] != b"Z":
            found.append(int(path.name))
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
