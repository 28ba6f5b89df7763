"""One request and the response to it, on the server's side.

`Exchange` writes to an `Outlet` (a connection) and tells it when the response has ended; it never reads. What
is written after the client has gone is ignored, a second response to one request is a RuntimeError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Final, Protocol

LARGE_BODY: Final = 64 << 10
"""Bytes from which a body is written on its own instead of being copied behind its head."""

_STATUS_LINES: Final = {
    status.value: b"HTTP/1.1 %d %s\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus
}
_BODYLESS: Final = frozenset({204, 304})


class Outlet(Protocol):
    """The connection an exchange writes to."""

    retiring: bool
    """The connection is to close after this response."""

    def write(self, data: bytes) -> None: ...

    async def drained(self) -> None: ...

    def exchange_ended(self, close: bool) -> None: ...

    def exchange_broken(self) -> None:
        """It will not be ended: the connection closes once what was written has been sent."""
        ...


class Request:
    """One complete request. Header names are lower-case; of a repeated header the last one counts."""

    __slots__ = ("body", "headers", "http10", "keep_alive", "method", "path", "query")

    def __init__(self, method: str, path: str, query: str, headers: dict[str, str], body: bytes) -> None:
        self.method = method
        self.path = path
        """Percent-decoded, without the query."""
        self.query = query
        """As sent, without the question mark."""
        self.headers = headers
        self.body = body
        self.keep_alive = True
        self.http10 = False

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.path} {len(self.body)} bytes>"


class Exchange:
    """One request and the response to it: either `respond`, or `start`, `send`…, `end`.

    Whatever is written after the client has gone is ignored. Two responses to one request are a RuntimeError.
    """

    __slots__ = ("_connection", "_ended", "_framing", "on_disconnect", "request")

    def __init__(self, connection: Outlet, request: Request) -> None:
        self._connection: Outlet | None = connection
        self._ended = False
        self._framing: _Framing | None = None
        self.request = request
        self.on_disconnect: Callable[[], None] | None = None
        """Called once if the client goes away before the response has ended."""

    @property
    def disconnected(self) -> bool:
        """The client has gone before the response ended."""
        return self._connection is None and not self._ended

    @property
    def started(self) -> bool:
        """A response has begun, or the client has gone."""
        return self._framing is not None or self._connection is None

    def respond(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Sends the whole response."""
        connection = self._open()
        if connection is None:
            return
        request = self.request
        close = not request.keep_alive or connection.retiring
        head = response_head(status, content_type, headers, close, b"content-length: %d\r\n\r\n" % len(body))
        if request.method == "HEAD" or status in _BODYLESS:
            connection.write(head)
        elif len(body) < LARGE_BODY:
            connection.write(head + body)
        else:
            connection.write(head)
            connection.write(body)
        self._finish(connection, close)

    def start(self, status: int, content_type: str, headers: Mapping[str, str] | None = None) -> None:
        """Begins a response of unknown length: chunked, or up to the close for an HTTP/1.0 client."""
        connection = self._open()
        if connection is None:
            return
        request = self.request
        close = not request.keep_alive or connection.retiring
        self._framing = _Framing(chunked=not request.http10, silent=request.method == "HEAD", close=close)
        framing = b"\r\n" if request.http10 else b"transfer-encoding: chunked\r\n\r\n"
        connection.write(response_head(status, content_type, headers, close, framing))

    def send(self, data: bytes) -> None:
        """Sends a piece of the body. Not waited for: see `drain`."""
        connection, framing = self._connection, self._framing
        if connection is None:
            return
        if framing is None:
            raise RuntimeError("send() before start()")
        if not data or framing.silent:
            return
        connection.write(b"%x\r\n%s\r\n" % (len(data), data) if framing.chunked else data)

    async def drain(self) -> None:
        """Waits while the write buffer is above its high-water mark. Bounded by WRITE_STALL."""
        if self._connection is not None:
            await self._connection.drained()

    def end(self) -> None:
        """Ends the response begun by `start`."""
        connection, framing = self._connection, self._framing
        if connection is None:
            return
        if framing is None:
            raise RuntimeError("end() before start()")
        if framing.chunked and not framing.silent:
            connection.write(b"0\r\n\r\n")
        self._finish(connection, framing.close)

    def break_off(self) -> None:
        """Gives up a response begun by `start`: the connection closes without its end."""
        connection = self._connection
        if connection is not None:
            self._ended = True
            self._connection = None
            self.on_disconnect = None
            connection.exchange_broken()

    def _open(self) -> Outlet | None:
        if self._ended or self._framing is not None:
            raise RuntimeError("the response has already been started")
        return self._connection

    def _finish(self, connection: Outlet, close: bool) -> None:
        self._ended = True
        self._connection = None
        self.on_disconnect = None
        connection.exchange_ended(close)

    def lost(self) -> None:
        """The client has gone: called by the connection."""
        self._connection = None
        callback, self.on_disconnect = self.on_disconnect, None
        if callback is not None:
            callback()


class _Framing:
    """How the body of a started response is delimited."""

    __slots__ = ("chunked", "close", "silent")

    def __init__(self, *, chunked: bool, silent: bool, close: bool) -> None:
        self.chunked = chunked
        self.silent = silent
        self.close = close


def response_head(
    status: int, content_type: str, headers: Mapping[str, str] | None, close: bool, framing: bytes
) -> bytes:
    """Status line and headers; `framing` is the last header and the empty line."""
    line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    extra = b"connection: close\r\n" if close else b""
    for name, value in (headers or {}).items():
        if "\n" in value or "\r" in value or "\n" in name or "\r" in name:
            raise ValueError(f"line break in header {name!r}")
        extra += f"{name}: {value}\r\n".encode("latin-1")
    if status in _BODYLESS:
        return line + extra + b"\r\n"
    return b"%scontent-type: %s\r\n%s%s" % (line, content_type.encode("latin-1"), extra, framing)


def error_body(status: int, message: str, kind: str | None = None) -> bytes:
    """The OpenAI form of an error."""
    kind = kind or ("internal_server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": None, "code": status}
    return json.dumps({"error": error}).encode()
