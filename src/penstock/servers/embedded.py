"""The embedded engine as a server of its own: `async with EmbeddedServer(model) as server`.

Guarantees: inside the block the engine has said that it is ready; after it, whatever happened, its process
is gone. If this process is killed the engine ends too; if the engine dies, the block is cancelled and ends
with EngineError. That error, as that of a start that fails, has the engine's own last words.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from penstock.errors import EngineError

START_TIMEOUT = 120.0
"""Seconds a start may take; a small model needs about three."""

STOP_TIMEOUT = 5.0
"""Seconds between SIGTERM and SIGKILL."""

READY = "penstock engine ready on "
"""What the engine prints before its base URL."""

LOG_TAIL = 20
"""Lines of the engine's log that are kept for an error."""


MAX_LINE = 1 << 20
"""Bytes of the longest line the engine may print."""


class EmbeddedServer:
    """The embedded engine in a process of its own, on a free port of the loopback address.

    `arguments` are further flags of `penstock engine`. `base_url` is valid inside the block.
    """

    def __init__(self, model: Path, arguments: Sequence[str] = (), *, name: str | None = None) -> None:
        self.model = model
        self.name = name or model.resolve().name
        """What requests call the model."""
        self.base_url = ""
        self._arguments = arguments
        self._log: deque[str] = deque(maxlen=LOG_TAIL)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._guard: asyncio.Task[None] | None = None
        self._died = False

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._command(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # A group of its own: Ctrl-C in the terminal is for the job, which then stops its engine.
            start_new_session=True,
            limit=MAX_LINE,
        )
        self._reader = asyncio.create_task(self._read_log(self._process), name="penstock engine log")
        try:
            async with asyncio.timeout(START_TIMEOUT):
                self.base_url = await self._wait_until_ready(self._process)
        except TimeoutError:
            await self._stop()
            raise EngineError(
                f"The engine was not ready after {START_TIMEOUT:.0f} s.{self._last_words()}"
            ) from None
        except BaseException:
            await self._stop()
            raise
        block = asyncio.current_task()
        assert block is not None
        self._guard = asyncio.create_task(self._watch(self._process, block), name="penstock engine guard")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._guard is not None and self._process is not None
        self._guard.cancel()
        await self._stop()
        if self._died:
            block = asyncio.current_task()
            assert block is not None
            block.uncancel()
            raise EngineError(
                f"The engine died (exit {self._process.returncode}).{self._last_words()}"
            ) from None

    async def _watch(self, process: asyncio.subprocess.Process, block: asyncio.Task[Any]) -> None:
        """Cancels the block if the engine ends before it."""
        await process.wait()
        self._died = True
        block.cancel()

    def _command(self) -> list[str]:
        fixed = [
            "--model",
            str(self.model),
            "--served-model-name",
            self.name,
            "--port",
            "0",
            "--exit-with-parent",
        ]
        return [sys.executable, "-m", "penstock.engine", *fixed, *self._arguments]

    async def _wait_until_ready(self, process: asyncio.subprocess.Process) -> str:
        assert process.stdout is not None and self._reader is not None
        async for line in process.stdout:
            text = line.decode(errors="replace").strip()
            if text.startswith(READY):
                return text.removeprefix(READY)
        await process.wait()
        await self._reader
        raise EngineError(
            f"The engine ended before it was ready (exit {process.returncode}).{self._last_words()}"
        )

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            self._log.append(line.decode(errors="replace").rstrip())

    def _last_words(self) -> str:
        return "".join(f"\n    {line}" for line in self._log)

    async def _stop(self) -> None:
        process, reader = self._process, self._reader
        assert process is not None and reader is not None
        if process.returncode is None:
            _signal_group(process.pid, signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_TIMEOUT):
                    await process.wait()
            except TimeoutError:
                _signal_group(process.pid, signal.SIGKILL)
                await process.wait()
        await reader


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass
