"""The journal's format: a text file of records, one a line, each with its CRC-32.

    job   {header}                           the first line: what the job is
    i     {target}                           what this run was asked for: rows of the input, samples of a row
    n     {note}                             what all samples of a run share
    s HASH OCC INDEX {sample}                a finished sample
    f HASH OCC INDEX {failure}               a sample that was given up
    p HASH OCC INDEX {step}                  a step of a sample that is not finished
    w HASH OCC START END CRC OFFSET,…        the row stands at bytes START..END of the output, with this
                                             CRC-32; the OFFSETs say where in the journal the lines of its
                                             samples begin, by index
    t END                                    the output was cut to END bytes; what stood behind is void
    b SAMPLES                                the output was begun anew, with so many samples a row
    d HASH OCC                               the input has no such row any more: its records are forgotten
    r                                        retry: failures so far are forgotten

HASH is 16 hex digits; it and OCC, the occurrence, name the row (see `rows`).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import orjson

VERSION: Final = 2
"""Version of the format, written in the header."""

BODY: Final = 9
"""Where the part of a line begins that its checksum covers."""

HEAD_BYTES: Final = 64
"""Bytes at the start of a line that hold all fields before the payload."""

READ_BYTES: Final = 1 << 20
"""Bytes of the journal read at a time."""

LINE_BYTES: Final = 1 << 14
"""Bytes read first where a single line is wanted: most samples are shorter."""

MOST_SAMPLES: Final = 1 << 14
"""Samples of a row: more are refused."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a job is. A resume must agree in every field of `parameters`."""

    parameters: dict[str, Any]
    version: int = VERSION
    penstock: str = ""
    """The version of penstock that began the job; may differ between a job and its resume."""

    def differences(self, other: Header) -> list[str]:
        """How `other` (asked for now) differs from this header (on disk), a clause each."""
        names = sorted(self.parameters.keys() | other.parameters.keys())
        return [
            f"{name} was {_show(self.parameters.get(name))} and is now {_show(other.parameters.get(name))}"
            for name in names
            if self.parameters.get(name) != other.parameters.get(name)
        ]


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What a run was asked for."""

    samples: int
    """Samples of each row."""
    rows: int | None = None
    """Rows of the input; None: it can be read only once, and was not at its end when this was written."""
    strays: int = 0
    """Rows of the output that the input does not have."""
    stray_samples: int = 0
    """Samples of other rows that the input does not have."""
    digest: str = ""
    """Hash over the content of all rows in order, where that is known."""
    source: str = ""
    """Name of the input."""


class Record(NamedTuple):
    """One line of the journal."""

    offset: int
    """Where the line begins."""
    kind: bytes
    """Empty where the line's checksum does not fit."""
    line: bytes
    """All of it, without its end."""

    @property
    def rest(self) -> bytes:
        """What follows the kind."""
        return self.line[BODY + len(self.kind) + 1 :]

    def payload(self, fields: int) -> bytes:
        """What follows `fields` fields behind the kind. IndexError where there are fewer."""
        return self.line[BODY:].split(b" ", fields + 1)[fields + 1]


def encode(kind: bytes, rest: bytes = b"") -> bytes:
    """One line of the journal."""
    body = b"%b %b" % (kind, rest) if rest else kind
    return b"%08x %b\n" % (zlib.crc32(body), body)


def encode_json(kind: bytes, value: msgspec.Struct | dict[str, Any]) -> bytes:
    return encode(kind, orjson.dumps(msgspec.to_builtins(value)))


def decode(offset: int, line: bytes) -> Record:
    """The record in `line`, which has no line end."""
    try:
        fits = line[8:BODY] == b" " and int(line[:8], 16) == zlib.crc32(memoryview(line)[BODY:])
    except ValueError:
        fits = False
    return Record(offset, line[BODY : BODY + 4].split(b" ", 1)[0] if fits else b"", line)


def records(fd: int, start: int = 0) -> Iterator[Record]:
    """The records of a journal from byte `start`, up to its last whole line. `fd` keeps its position."""
    with Path(f"/proc/self/fd/{fd}").open("rb", buffering=READ_BYTES) as file:
        file.seek(start)
        offset = start
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield decode(offset, line[:-1])
            offset += len(line)


def record_at(fd: int, offset: int) -> Record:
    """The record that begins at `offset`; one without a kind where nothing whole stands there."""
    line = os.pread(fd, LINE_BYTES, offset)
    size = LINE_BYTES
    while (end := line.find(b"\n")) < 0:
        more = os.pread(fd, size, offset + len(line))
        if not more:
            return Record(offset, b"", line)
        line += more
        size *= 2
    return decode(offset, line[:end])


def row_fields(record: Record) -> tuple[int, int, int]:
    """(hash, occurrence, index) of a record `s`, `f` or `p`. ValueError or IndexError where it has none."""
    fields = record.line[BODY:HEAD_BYTES].split(b" ", 4)
    return int(fields[1], 16), int(fields[2]), int(fields[3])


def _show(value: Any) -> str:
    return "unset" if value is None else orjson.dumps(value).decode()
