"""The event loop of penstock's own processes: uvloop, a quiet garbage collector, enough file descriptors.

The library never changes a host process: only our own entry points call `run`.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import threading
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import uvloop

GC_THRESHOLD: Final = 100_000
"""Objects allocated before the youngest generation is collected (CPython's default: 700). At 10,000 requests
in flight the default costs a fifth of the client's CPU."""

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` to its end and returns its result; everything changed for it is put back afterwards.

    What has been imported so far is frozen: the collector does not look at it again.
    """
    threshold, handlers = gc.get_threshold(), _handlers()
    raise_open_files()
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, *threshold[1:])
    try:
        return uvloop.run(main)
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _handlers() -> dict[int, Any]:
    """What answers the signals that a loop may take for itself; a closed one leaves them deaf. Empty in a
    thread, where no loop can take them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    return {number: handler for number, handler in found.items() if handler is not None}


class Stop:
    """SIGTERM or Ctrl-C in a server: the first is a wish to stop, the second one a hurry."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.wished: asyncio.Future[None] = loop.create_future()
        self.hurried: asyncio.Future[None] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.wish)

    def wish(self) -> None:
        """Stop; said again: now."""
        for future in (self.wished, self.hurried):
            if not future.done():
                future.set_result(None)
                return


def raise_open_files() -> int:
    """Raises the soft limit of open files to the hard one, and returns it. Each connection is a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            return soft
    return hard
