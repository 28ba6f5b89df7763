"""The access log: a line of JSON for each request to be relayed, written when its response has ended.

Lines are gathered and written at most FLUSH seconds later; a line is never split. Off unless asked for. No
key, no query and nothing of a body is in it. Its fields:

    time                 the end, seconds since 1970
    id, client           the request's X-Request-Id, kept or made; address and port of the client's connection
    method, path         as sent; the path without its query
    status               that the client got; 499: it went away, 502: the response broke off
    worker, attempts     the last worker (null: none) and how many attempts there were
    bytes_in, bytes_out  of the bodies, as the client sent and the engine answered
    queue_seconds        of waiting for slots, backoffs among them
    first_byte_seconds   from the request to the head of the last response; null: there was none
    seconds              from the request to the end of its response
"""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterator
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
        attempts, worker, headed = relay.attempts, relay.worker, relay.headed_at
        line = {
            "time": round(time.time(), 6),
            "id": relay.id.decode("latin-1"),
            "client": relay.client,
            "method": relay.method.decode("ascii"),
            "path": relay.path.decode("latin-1"),
            "status": status,
            "worker": None if worker is None else worker.name,
            "attempts": 0 if attempts is None else attempts.number,
            "bytes_in": relay.size,
            "bytes_out": size,
            "queue_seconds": 0.0 if attempts is None else round(attempts.queued, 6),
            "first_byte_seconds": None if not headed else round(headed - arrived, 6),
            "seconds": round(self._router.clock() - arrived, 6),
        }
        self._lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        if self._timer is None:
            self._timer = self._router.fleet.loop.call_later(FLUSH, self._flush)

    def _flush(self) -> None:
        self._timer = None
        lines, self._lines = self._lines, []
        for piece in _joined(lines, 1 << 30 if self._owned else select.PIPE_BUF):
            self._file.write(piece)
            self._file.flush()


def _joined(lines: list[bytes], bound: int) -> Iterator[bytes]:
    """The lines in pieces of `bound` bytes at most: what several processes write to one pipe is not torn."""
    piece = b""
    for line in lines:
        if piece and len(piece) + len(line) > bound:
            yield piece
            piece = b""
        piece += line
    if piece:
        yield piece


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("ab", buffering=0)
    except OSError as error:
        raise ConfigError(f"the access log {path} cannot be written: {error.strerror}") from error
