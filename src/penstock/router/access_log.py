"""The access log: a line of JSON for each relayed request, written when its response has ended.

Lines are gathered and written at most FLUSH seconds later; a line is never split. Off unless asked for.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Final

import orjson

from penstock.errors import ConfigError

if TYPE_CHECKING:
    import asyncio

    from penstock.router.relay import Relay
    from penstock.router.router import Router

FLUSH: Final = 0.5
"""Seconds."""


class AccessLogFile:
    """Writes to a file, or with `-` to standard output. Raises ConfigError when it cannot be opened."""

    def __init__(self, path: str, router: Router) -> None:
        self._router = router
        self._lines: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        self._owned = path != "-"
        self._file: BinaryIO = _opened(Path(path)) if self._owned else sys.stdout.buffer

    def __enter__(self) -> AccessLogFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._flush()
        if self._owned:
            self._file.close()

    def __call__(self, relay: Relay, status: int, size: int, arrived: float) -> None:
        attempts = relay.attempts
        worker = relay.worker
        line = {
            "time": time.time(),
            "id": relay.id.decode("latin-1"),
            "method": relay.method.decode("ascii"),
            "path": relay.path.decode("latin-1"),
            "status": status,
            "worker": None if worker is None else worker.name,
            "attempts": 0 if attempts is None else attempts.number,
            "bytes_in": relay.size,
            "bytes_out": size,
            "seconds": round(self._router.clock() - arrived, 6),
        }
        self._lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        if self._timer is None:
            self._timer = self._router.fleet.loop.call_later(FLUSH, self._flush)

    def _flush(self) -> None:
        self._timer = None
        lines, self._lines = self._lines, []
        if lines:
            self._file.write(b"".join(lines))
            self._file.flush()


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("ab", buffering=0)
    except OSError as error:
        raise ConfigError(f"the access log {path} cannot be written: {error.strerror}") from error
