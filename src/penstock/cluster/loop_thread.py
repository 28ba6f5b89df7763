"""An event loop in a thread of its own, for code that is called from other threads.

Guarantees: the loop turns whatever the callers do, so that connections are looked after between two calls;
`close` ends what still runs and joins the thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import uvloop

CLOSE_LIMIT: Final = 30.0
"""Seconds what still runs has to end when the thread is closed."""

T = TypeVar("T")


class LoopThread:
    """A context manager; it runs from the beginning."""

    def __init__(self, name: str) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._turn, name=name, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Begins the work; its result is in the future. Cancelling the future cancels the work."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of the work, waited for."""
        return self.start(work).result()

    def close(self) -> None:
        """Cancels what still runs, waits for its end (at most `CLOSE_LIMIT` seconds), and ends the thread."""
        if self._loop.is_closed() or not self._thread.is_alive():
            return
        try:
            self.start(self._cancel_all()).result(CLOSE_LIMIT)
        except TimeoutError:
            pass
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_LIMIT)

    def _turn(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
