"""The life of an engine server that is started here: start, stages, ready, watched, stopped.

It guarantees:
- inside the block the server is healthy and it is ours that answers; otherwise entering raises StartFailed,
  with the diagnosis, and nothing is left of what was started;
- after the block, whatever happened in it, no process of the server is left;
- when the engine dies, what was asked of it ends at once, and either the block is cancelled and ends with
  EngineDied, or `on_death` is told;
- no start waits for a fixed time: it is given up when the process ends, when the log says that it is lost, or
  when nothing new is logged for `quiet_timeout`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self

from penstock.errors import ConfigError, EngineError, PenstockError, PhaseTimeout, TransportError
from penstock.servers import ports
from penstock.servers.compile_lock import CompileLock
from penstock.servers.diagnosis import (
    Diagnosis,
    EngineDied,
    StartFailed,
    diagnose,
    ending,
    killed,
    recognise,
    stage_of,
)
from penstock.servers.log import EngineLog, LogFile, Mask, default_folder, prune
from penstock.servers.patterns import Kind, Stage
from penstock.servers.process import Process
from penstock.servers.server import Server
from penstock.servers.spec import ServerSpec

TICK: Final = 0.5
"""Seconds between two looks at a server that starts."""

FATAL_GRACE: Final = 10.0
"""Seconds an engine has to end by itself once its log says that it is lost: the cause may be printed yet."""

HEALTH_LIMIT: Final = 5.0
"""Seconds within which a server that has come up answers /health."""

NOTICE: Final = 0.5
"""Seconds that a request whose connection broke waits to learn whether the server has died."""

LAST_WORDS: Final = 1.0
"""Seconds a server has to end by itself after its engine has died: its log may say more yet."""

LINES_KEPT: Final = 2000
"""Lines of the log that are kept in memory, for the diagnosis."""

TAIL: Final = 100
"""Lines of the log that an error carries."""


@dataclass(frozen=True, kw_only=True)
class LifeCycle:
    """How a server is started, watched and stopped."""

    start_timeout: float | None = 3600.0
    """Seconds a start may take in all, without the wait for another server to compile; None: no limit."""
    quiet_timeout: float = 600.0
    """Seconds without a new line in the log after which a start is given up."""
    stop_grace: float = 10.0
    """Seconds between SIGTERM and SIGKILL."""
    log_folder: Path | None = None
    """Where the log goes; None: a folder in the user's cache."""
    on_stage: Callable[[str], None] | None = None
    """Told each stage of the start."""
    on_death: Callable[[EngineDied], None] | None = None
    """Told when the server dies; without it the block is cancelled."""

    def __post_init__(self) -> None:
        for name in ("start_timeout", "quiet_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, not {value}.")
        if self.stop_grace < 0:
            raise ConfigError(f"stop_grace must not be negative, not {self.stop_grace}.")


class LaunchedServer(Server):
    """An engine server in processes of its own. Raises ConfigError for what cannot be started at all."""

    kind: ClassVar[str]
    """The engine, as file names have it."""
    ready_line: ClassVar[str]
    """Part of the line by which the engine says that it is ready."""

    def __init__(self, spec: ServerSpec, life: LifeCycle | None) -> None:
        super().__init__(spec.name, spec.api_key)
        self.spec = spec
        self.life = life or LifeCycle()
        self.stage: Stage | None = None
        self.log_file: Path | None = None
        self._log: EngineLog | None = None
        self._process: Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._block: asyncio.Task[Any] | None = None
        self._cancelled = False
        self._last_line = 0.0
        self._lines = 0
        """Lines of the log since the server was started, or since it is ready."""
        self._lost: Diagnosis | None = None
        """What the log says that the engine cannot go on after."""
        self.ended = asyncio.Event()
        """Set as soon as the engine is known to be dead; `died` follows once nothing of it is left."""
        self._alarm = asyncio.Event()
        """Set by a log line that says something: ready, or lost."""

    # -- what each engine says --------------------------------------------------------------------

    @abstractmethod
    async def _command(self, spec: ServerSpec, environment: Mapping[str, str]) -> list[str]:
        """The command that starts the engine. Raises ConfigError when it is not installed."""

    def _environment(self, spec: ServerSpec) -> dict[str, str]:
        """The engine's environment."""
        return {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **spec.env}

    def _compile_lock(self, spec: ServerSpec, environment: Mapping[str, str]) -> CompileLock | None:
        """What servers that would compile the same thing wait for; None: this one compiles nothing."""
        return None

    # -- the block --------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._process is not None or self._pool is not None:
            raise ConfigError("The server is already started: make one for each block.")
        self._block = asyncio.current_task()
        self._cancelled, self._lost = False, None
        self.ended.clear()
        try:
            await self._start()
        except BaseException:
            await self._finish(0.0)
            raise
        self._watcher = asyncio.create_task(self._watch(), name=f"penstock {self.kind} watch")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watcher, self._watcher = self._watcher, None
        assert watcher is not None and self._block is not None and self._died is not None
        watcher.cancel()
        if self._cancelled:
            left = self._block.uncancel()
            if kind is None or not issubclass(kind, asyncio.CancelledError):
                # Our cancellation has not arrived yet: it would hit the next wait.
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)
            await self._finish(0.0)
            if left:
                return  # somebody else wants this task to end, too: that goes first
            raise self._died.result() from None
        await self._finish(self.life.stop_grace)

    @property
    def log_tail(self) -> tuple[str, ...]:
        return () if self._log is None else tuple(self._log.tail)[-TAIL:]

    @property
    def pid(self) -> int | None:
        """Of the engine's first process; None when it does not run."""
        return self._process.pid if self._process is not None and self._process.alive else None

    # -- start ------------------------------------------------------------------------------------

    async def _start(self) -> None:
        environment = self._environment(self.spec)
        # The port does not matter here: what cannot be started is refused before anything is waited for.
        await self._command(self.spec, environment)
        lock = self._compile_lock(self.spec, environment)
        try:
            async with contextlib.AsyncExitStack() as stack:
                if lock is not None:
                    lock.on_wait = lambda: self._enter(Stage.WAITING)
                    await stack.enter_async_context(lock)
                async with asyncio.timeout(self.life.start_timeout):
                    await self._launch(environment)
                if lock is not None:
                    lock.compiled()
        except TimeoutError:
            error = self._failure(f"was not ready after {self.life.start_timeout:g} s.", None)
            raise error from None

    async def _launch(self, environment: Mapping[str, str]) -> None:
        with ports.ReservedPort(self.spec.host, self.spec.port) as reserved:
            spec = replace(self.spec, port=reserved.port)
            command = await self._command(spec, environment)
            self._begin(spec.base_url)
            self._log = EngineLog(Mask.of(environment, spec.api_key), self._open_log(spec), lines=LINES_KEPT)
            self._enter(Stage.STARTING)
            self._last_line = time.monotonic()
            self._process = await Process.start(command, environment=environment, on_output=self._hear)
            await self._until_ready(self._process, spec.port)
        self._lines = 0
        self._lost = None
        self._alarm.clear()
        self._enter(Stage.READY)

    def _open_log(self, spec: ServerSpec) -> LogFile | None:
        folder = self.life.log_folder or default_folder()
        # The folder may be shared by several machines.
        name = f"{self.kind}-{time.strftime('%Y%m%d-%H%M%S')}-{spec.port}-{os.getpid()}.log"
        try:
            file = LogFile(folder / name)
            prune(folder, self.kind)
        except OSError as error:
            if self.life.log_folder is not None:
                raise ConfigError(f"The log folder {folder} cannot be written: {error.strerror}.") from None
            return None
        self.log_file = file.path
        return file

    async def _until_ready(self, process: Process, port: int) -> None:
        given_up: float | None = None
        while True:
            await self._rouse(process, TICK)
            now = time.monotonic()
            if not process.alive:
                raise await self._ended(process, "ended before it was ready")
            if self._lost is not None:
                given_up = given_up or now + FATAL_GRACE
                if now > given_up:
                    raise await self._ended(process, "cannot become ready")
            elif now - self._last_line > self.life.quiet_timeout:
                raise await self._ended(
                    process, f"has logged nothing for {self.life.quiet_timeout:g} s", Kind.STALLED
                )
            elif await self._answers(process, port):
                return

    async def _rouse(self, process: Process, limit: float | None) -> None:
        """Until something is worth a look: a line of the log, the end of the process, or `limit` seconds."""
        alarm = asyncio.ensure_future(self._alarm.wait())
        worth: set[asyncio.Future[Any]] = {alarm, process.exited}
        try:
            await asyncio.wait(worth, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            alarm.cancel()
        self._alarm.clear()

    async def _answers(self, process: Process, port: int) -> bool:
        """Whether /health is 200, and the one who says so is ours."""
        if ports.can_tell() and not ports.listens(_lazily(process), port):
            return False
        try:
            return (await self._ask("/health", HEALTH_LIMIT)).status == 200
        except PenstockError:
            return False

    # -- log --------------------------------------------------------------------------------------

    def _hear(self, data: bytes) -> None:
        assert self._log is not None
        lines = self._log.feed(data)
        if not lines:
            return
        self._last_line = time.monotonic()
        self._lines += len(lines)
        for line in lines:
            if self.stage is Stage.READY:
                self._hear_serving(line)
            else:
                self._hear_starting(line)

    def _hear_starting(self, line: str) -> None:
        if self.ready_line in line:
            self._alarm.set()
        elif (stage := stage_of(line)) is not None:
            self._enter(stage)
        elif (found := recognise(line)) is not None and found[1].fatal and self._lost is None:
            self._lost = found[0]
            self._alarm.set()

    def _hear_serving(self, line: str) -> None:
        # Most lines are an access log's. One that speaks of an end is not believed: it may quote a prompt.
        if "INFO" not in line[:48] and (found := recognise(line)) is not None and found[1].fatal:
            self._lost = found[0]
            self._alarm.set()

    def _enter(self, stage: Stage) -> None:
        if stage is not self.stage:
            self.stage = stage
            if self.life.on_stage is not None:
                self.life.on_stage(stage.value)

    # -- death and stop ---------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Until the engine has died."""
        process = self._process
        assert process is not None and self._died is not None and self._block is not None
        while process.alive:
            await self._rouse(process, None)
            if process.alive and self._lost is not None:
                if await self._sick():
                    # Its own end says more than we could: vLLM's server follows its engine in a second.
                    await asyncio.wait([process.exited], timeout=LAST_WORDS)
                    break
                self._lost = None
        self.ended.set()
        status = process.exited.result() if process.exited.done() else None
        how = f" ({ending(status)})" if process.exited.done() else ": its server answers no longer"
        note = await self._clear(process, 0.0)
        error = self._failure(f"died{how}.{note}", status, kind=EngineDied)
        assert isinstance(error, EngineDied)
        self._died.set_result(error)
        if self._pool is not None:
            await self._pool.close()
        if self.life.on_death is not None:
            self.life.on_death(error)
        else:
            self._cancelled = True
            self._block.cancel()

    async def _death(self) -> EngineDied | None:
        # A process that dies closes its connections a moment before its end is known here.
        if self._watcher is not None and self._died is not None:
            await asyncio.wait([self._died], timeout=NOTICE)
        return await super()._death()

    async def _sick(self) -> bool:
        """Whether the server itself says that it is not well, or is gone; that it is slow says nothing."""
        try:
            return (await self._ask("/health")).status >= 500
        except PhaseTimeout:
            return False
        except TransportError:
            return True

    async def _ended(self, process: Process, what: str, kind: Kind | None = None) -> EngineError:
        """The error for a start that failed, once nothing of it is left and all of its log has been read."""
        status = process.exited.result() if process.exited.done() else None
        how = f" ({ending(status)})" if process.exited.done() else ""
        note = await self._clear(process, 0.0)
        return self._failure(f"{what}{how}.{note}", status, stalled=kind is Kind.STALLED)

    async def _clear(self, process: Process, grace: float) -> str:
        """Ends all processes; what to say when that was not possible."""
        try:
            await process.stop(grace)
        except EngineError as error:
            return f" {error}"
        return ""

    def _failure(
        self,
        what: str,
        status: int | None,
        *,
        kind: type[StartFailed] | type[EngineDied] = StartFailed,
        stalled: bool = False,
    ) -> StartFailed | EngineDied:
        tail = () if self._log is None else tuple(self._log.tail)
        reason = diagnose(tail[-self._lines :] if self._lines else ()) or self._lost or killed(status)
        if reason is None and stalled:
            reason = Diagnosis(
                Kind.STALLED,
                "It hangs, or loads from a very slow disk.",
                "Look at what its processes do (py-spy dump); if they are only slow, raise quiet_timeout.",
            )
        return kind(
            f"The engine {what}",
            diagnosis=reason,
            log_tail=tail[-TAIL:],
            log_file=self.log_file,
            status=status,
        )

    async def _finish(self, grace: float) -> None:
        """Leaves nothing behind, however often it is interrupted."""
        process, self._process = self._process, None
        interrupted = False
        try:
            if process is not None:
                interrupted = await _insist(process, grace)
        finally:
            await self._close_pool()
            if self._log is not None:
                self._log.close()
        if interrupted:
            raise asyncio.CancelledError


def _lazily(process: Process) -> Iterator[int]:
    yield from process.tree


async def _insist(process: Process, grace: float) -> bool:
    """Stops a process; whoever cancels this is told afterwards (True), and shortens the grace to nothing."""
    stopping = asyncio.ensure_future(process.stop(grace))
    interrupted = False
    while not stopping.done():
        try:
            await asyncio.wait([stopping])
        except asyncio.CancelledError:
            interrupted = True
            process.hurry()
    stopping.result()
    return interrupted
