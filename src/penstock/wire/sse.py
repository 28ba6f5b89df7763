"""Server-sent events, incrementally: bytes in as they arrive, the data of each complete event out.

The result does not depend on how the bytes were split. Every line ending of the standard is understood (LF,
CR, CRLF, also split in two); comments and the fields event, id and retry are skipped; an event that the
stream's end cuts off is dropped. Cost is linear in the bytes, memory bounded by `max_event`.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

from typing import Final

from penstock.errors import MalformedResponse

MAX_EVENT: Final = 16 << 20
"""Bytes of one event."""

_BOM: Final = b"\xef\xbb\xbf"


class EventParser:
    """Parser of one stream."""

    __slots__ = ("_data", "_first", "_max_event", "_rest", "_size", "_skip_lf")

    def __init__(self, max_event: int = MAX_EVENT) -> None:
        self._max_event = max_event
        self._rest: list[bytes] = []
        """Pieces of the line that has not ended yet."""
        self._data: list[bytes] = []
        """Data lines of the event that has not ended yet."""
        self._size = 0
        self._first = True
        self._skip_lf = False
        """The last line ended in CR: an LF that comes next belongs to it."""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of every event completed by `chunk`. Raises MalformedResponse over `max_event` bytes."""
        if self._skip_lf and chunk:
            self._skip_lf = False
            if chunk.startswith(b"\n"):
                chunk = chunk[1:]
        if not chunk:
            return []
        self._size += len(chunk)
        events: list[bytes] = []
        if b"\n" in chunk or b"\r" in chunk:
            self._rest.append(chunk)
            lines = b"".join(self._rest).splitlines(keepends=True)
            self._rest.clear()
            if not lines[-1].endswith((b"\n", b"\r")):
                self._rest.append(lines.pop())
            self._skip_lf = chunk.endswith(b"\r")
            for line in lines:
                self._line(line.rstrip(b"\r\n"), events)
        else:
            self._rest.append(chunk)
        if self._size > self._max_event:
            raise MalformedResponse(f"an event of the stream is larger than {self._max_event} bytes")
        return events

    def _line(self, line: bytes, events: list[bytes]) -> None:
        if self._first:
            self._first = False
            line = line.removeprefix(_BOM)
        if line.startswith(b"data:"):
            self._data.append(line[6:] if line.startswith(b" ", 5) else line[5:])
        elif line == b"data":
            self._data.append(b"")
        elif not line:
            if self._data:
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data.clear()
            self._size = sum(map(len, self._rest))
