"""A source read ahead of the job that uses it.

Guarantees: reading is done in a thread of its own (an async iterable: in a task on the loop), so a slow disk
or hub never stops the event loop; rows come in order, each once, and as soon as they are there; at most
`AHEAD_ROWS` rows and about `AHEAD_BYTES` bytes wait to be taken. What goes wrong in reading is raised from
`batch`, after the rows that were read before it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from penstock.inputs.source import AsyncSource, Source

AHEAD_ROWS: Final = 4096
"""Rows read ahead at most."""

AHEAD_BYTES: Final = 8 << 20
"""Bytes of rows read ahead at most (and one row more)."""

CLOSE_TIME: Final = 1.0
"""Seconds `close` waits for the reading thread: one that hangs in a read is left behind, as a daemon."""

Numbered = tuple[int, str, bytes]
"""A row as a job takes it: its position in the source from 0, where it stands, the row."""


class Feed:
    """The rows of `source`, a batch at a time. Must be made, used and closed on one event loop."""

    def __init__(self, source: Source | AsyncSource) -> None:
        self._loop = asyncio.get_running_loop()
        self._rows: list[Numbered] = []
        self._size = 0
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._space = threading.Condition(self._lock)
        self._waiting = False
        self._there = asyncio.Event()
        """There are rows, or the end: set on the loop."""
        self._room = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._task: asyncio.Task[None] | None = None
        if isinstance(source, AsyncSource):
            self._task = self._loop.create_task(self._await_rows(source), name="penstock feed")
        else:
            self._thread = threading.Thread(
                target=self._read_rows, args=(source,), name="penstock feed", daemon=True
            )
            self._thread.start()

    async def batch(self) -> Sequence[Numbered]:
        """The rows that are there, at least one; empty at the end. Raises what reading raised."""
        while True:
            with self._lock:
                rows, ended = self._rows, self._ended
                if rows:
                    self._rows, self._size = [], 0
                    self._space.notify()
                elif not ended:
                    self._there.clear()
                    self._waiting = True
            if rows:
                self._room.set()
                return rows
            if ended:
                if self._error is not None:
                    raise self._error
                return ()
            await self._there.wait()

    async def close(self) -> None:
        """Stop reading. Rows that were not taken are dropped."""
        with self._lock:
            self._closed = True
            self._space.notify()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, CLOSE_TIME)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _read_rows(self, source: Source) -> None:
        """The thread. Its lines are closed in it, too."""
        lines = source.lines()
        try:
            for position, (where, line) in enumerate(lines):
                with self._lock:
                    while self._is_full and not self._closed:
                        self._space.wait()
                    if self._closed:
                        return
                    self._rows.append((position, where, line))
                    self._size += len(line)
                    wake, self._waiting = self._waiting, False
                if wake:
                    self._wake()
        except BaseException as error:  # whatever it is, `batch` raises it
            self._error = error
        finally:
            if (close := getattr(lines, "close", None)) is not None:
                close()
            with self._lock:
                self._ended = True
            self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._there.set)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more

    @property
    def _is_full(self) -> bool:
        return len(self._rows) >= AHEAD_ROWS or self._size >= AHEAD_BYTES

    async def _await_rows(self, source: AsyncSource) -> None:
        """The task."""
        position = 0
        try:
            async for where, line in source.async_lines():
                while self._is_full:
                    self._room.clear()
                    await self._room.wait()
                self._rows.append((position, where, line))
                self._size += len(line)
                position += 1
                self._there.set()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # whatever it is, `batch` raises it
            self._error = error
        finally:
            self._ended = True
            self._there.set()
