"""A response that is read while it arrives.

It guarantees:
- `read` gives the body in order and without its framing, and b"" only once the body is complete. A body that
  will not be complete ends, after what had arrived of it, in the error that says why;
- memory is bounded: while more than MAX_UNREAD bytes lie unread, nothing is read from the socket;
- a stream closed before its end closes its connection, so that the engine stops generating.

The pieces of the body lie in the list the connection's parser appends to: a chunk costs no object of its own.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final, Protocol

from penstock.errors import ConnectionLost, PenstockError

MAX_UNREAD: Final = 256 << 10
"""Bytes, framing included, that may lie unread before reading from the socket pauses. What one read from the
socket gives (at most 256 KiB with uvloop) may come on top."""


class Link(Protocol):
    """The connection a stream arrives on."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def drop(self) -> None: ...


class Stream:
    """One response, read in pieces by one reader at a time. Made by `Pool.stream`; `async with` closes it."""

    __slots__ = (
        "_error",
        "_link",
        "_loop",
        "_parts",
        "_unread",
        "_waiter",
        "complete",
        "headers",
        "paused",
        "status",
    )

    def __init__(self, link: Link, parts: list[bytes], loop: asyncio.AbstractEventLoop) -> None:
        self._link: Link | None = link
        self._parts = parts
        """The connection's own list until the stream has ended."""
        self._loop = loop
        self._unread = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: PenstockError | None = None
        self.status = 0
        """0 only before the head of the response has arrived."""
        self.headers: dict[bytes, bytes] = {}
        """Names as the server wrote them; of a repeated header the last one. See `header`."""
        self.complete = False
        """All of the body has arrived, though perhaps it has not been read; the connection is free again."""
        self.paused = False
        """Nothing is read from the socket until the reader catches up."""

    def __repr__(self) -> str:
        ended = self.complete or self._link is None
        state = "complete" if self.complete else "ended" if ended else "paused" if self.paused else "open"
        return f"<Stream {self.status} {state}>"

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def header(self, name: bytes) -> bytes | None:
        """The value of the header called `name` (lower-case), whatever case the server wrote it in."""
        return find_header(self.headers, name)

    async def read(self) -> bytes:
        """What has arrived of the body and was not read, at least one byte; b"" at the end of the body.

        Raises ConnectionLost, MalformedResponse or PhaseTimeout when the body will not be complete. A
        cancelled read has taken nothing. A second reader at the same time is a RuntimeError.
        """
        while True:
            parts = self._parts
            if parts:
                data = parts[0] if len(parts) == 1 else b"".join(parts)
                parts.clear()
                self._unread = 0
                if self.paused:
                    self._resume()
                return data
            if self.complete:
                return b""
            if self._error is not None:
                raise self._error.with_traceback(None)
            if self._waiter is not None:
                raise RuntimeError("the stream is being read by another task")
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def close(self) -> None:
        """Gives the stream up; may be called again.

        Closes the connection unless the body is complete. A read in progress ends with ConnectionLost.
        """
        link = self._link
        if link is not None:
            self._parts = []
            message = "the stream was closed before its end"
            self.fail(ConnectionLost(message, response_started=self.status > 0))
            link.drop()

    # -- the connection's side --------------------------------------------------------------------

    async def begun(self) -> None:
        """Waits for the head of the response. Raises what `read` raises."""
        while self.status == 0:
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def begin(self, status: int, headers: dict[bytes, bytes]) -> None:
        """The head has arrived."""
        self.status = status
        self.headers = headers
        self._wake()

    def arrived(self, size: int) -> None:
        """So many bytes have come from the socket, and what is body among them lies in the list."""
        if not self._parts:
            self._unread = 0  # nothing but framing: no reader could make room
            return
        self._unread += size
        if self._unread > MAX_UNREAD and not self.paused and self._link is not None:
            self.paused = True
            self._link.pause()
        self._wake()

    def finish(self, rest: bytes) -> None:
        """The body is complete, and `rest` is what has not been read of it."""
        self._parts = [rest] if rest else []
        self._link = None
        self.complete = True
        self.paused = False
        self._wake()

    def fail(self, error: PenstockError) -> None:
        """The body will not be complete. What has arrived of it can still be read."""
        self._parts = self._parts.copy()
        self._link = None
        self._error = error
        self.paused = False
        self._wake()

    def _resume(self) -> None:
        self.paused = False
        if self._link is not None:
            self._link.resume()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def find_header(headers: dict[bytes, bytes], name: bytes) -> bytes | None:
    """The value of the header called `name` (lower-case), whatever case it was written in."""
    for key, value in headers.items():
        if key.lower() == name:
            return value
    return None
