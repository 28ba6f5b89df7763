"""The heads of responses, out of an engine's bytes."""

from __future__ import annotations

from typing import Final

import msgspec

from penstock.router.heads import (
    CONNECTION,
    CONTENT_ENCODING,
    CONTENT_TYPE,
    KIND,
    PASS,
    RETRY_AFTER,
    TRANSFER_ENCODING,
    learn,
    status_line,
    without_named,
)

_PASSING: Final = frozenset({PASS, CONTENT_TYPE, CONTENT_ENCODING, RETRY_AFTER})


class ResponseHead(msgspec.Struct, eq=False):
    """What a head says, but for the value of content-length: responses with the same head share it."""

    status: int = 0
    fields: list[bytes] = []
    """Header fields that pass: name, separator, value and line end in turn."""
    passing: bytes = b""
    """Status line and fields, as they go to the client."""
    chunked: bool = False
    events: bool = False
    """Server-sent events, not compressed."""
    encoded: bool = False
    """The body is compressed."""
    keep_alive: bool = False
    nominated: list[bytes] = []
    """Values of `Connection` other than keep-alive and close."""

    def add(self, name: bytes, value: bytes) -> int:
        """One more field; its kind."""
        kind = KIND.get(name, -1)
        if kind < 0:
            kind = learn(name)
        if kind in _PASSING:
            self.fields += (name, b": ", value, b"\r\n")
            if kind == CONTENT_TYPE:
                self.events = value[:17].lower() == b"text/event-stream"
            elif kind == CONTENT_ENCODING:
                self.encoded = True
        elif kind == TRANSFER_ENCODING:
            self.chunked = True
        elif kind == CONNECTION and value.lower() not in (b"keep-alive", b"close"):
            self.nominated.append(value)
        return kind

    def finish(self, status: int, *, keep_alive: bool) -> None:
        """There are no more fields."""
        self.status, self.keep_alive = status, keep_alive
        if self.nominated:
            self.fields = without_named(self.fields, self.nominated)
        self.events = self.events and not self.encoded
        self.passing = b"".join([status_line(status), *self.fields])
