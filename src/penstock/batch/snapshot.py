"""What a journal said up to some byte, so that a resume need not read all of it again.

It is only a cache, in a file beside the journal: one that is missing, damaged, or not of this very journal is
not used, and the journal is read from its beginning.
"""

from __future__ import annotations

import os
import zlib
from array import array
from collections import deque
from pathlib import Path
from typing import Final

import msgspec

from penstock.batch.records import Target
from penstock.batch.state import State, Written

SUFFIX: Final = ".index"
"""Of the file, behind the journal's own name."""

CHECKED_BYTES: Final = 1 << 16
"""Bytes of the journal before the place where a snapshot was taken, by which it is known again."""

LEAST_GROWTH: Final = 32 << 20
"""Bytes the journal grows by between two snapshots, at least: they are read in a tenth of a second."""

GROWTH_PER_BYTE: Final = 8
"""Bytes the journal grows by between two snapshots for each byte of a snapshot, at least."""

_FORMAT: Final = 1


class _Meta(msgspec.Struct, frozen=True, array_like=True):
    """All of a state but its arrays."""

    format: int
    place: int
    """Where in the journal it was taken."""
    check: int
    """CRC-32 of the journal's bytes before it."""
    crc: int
    """CRC-32 of the arrays."""
    sizes: list[int]
    """Bytes of each array."""
    numbers: dict[str, int]
    tail: list[Written]
    target: Target | None
    befores: list[int]
    cuts: list[tuple[int, int]]
    rows: int


NUMBERS: Final = ("samples", "done", "failed", "kept_samples", "failed_samples", "end", "damaged", "begun")


def path_beside(journal: Path) -> Path:
    return journal.with_name(journal.name + SUFFIX)


def save(journal: Path, fd: int, place: int, state: State) -> int:
    """Write what `state` says of the journal `fd` up to `place`; returns the size of the file in bytes, 0
    where nothing was written: the output has a hole. Raises OSError."""
    if state.gap is not None or state.needs_rescan:
        return 0
    arrays = [memoryview(part).cast("B") for part in state.arrays()]
    crc = 0
    for part in arrays:
        crc = zlib.crc32(part, crc)
    numbers: dict[str, int] = {name: getattr(state, name) for name in NUMBERS}
    meta = _Meta(
        _FORMAT,
        place,
        _check(fd, place),
        crc,
        [len(part) for part in arrays],
        numbers | {"before_tail": state.before_tail, "free": state.free},
        list(state.tail),
        state.target,
        state.befores,
        state.cuts,
        len(state.rows),
    )
    head = msgspec.json.encode(meta)
    target = path_beside(journal)
    fresh = target.with_name(target.name + ".new")
    try:
        with fresh.open("wb") as file:
            file.write(b"%08x %b\n" % (zlib.crc32(head), head))
            for part in arrays:
                file.write(part)
        fresh.replace(target)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    return len(head) + sum(meta.sizes)


def load(journal: Path, fd: int, samples: int | None) -> tuple[State, int] | None:
    """(state, where to read on) of the journal `fd`, when `samples` of a row make it done (None: any number).
    None where there is no snapshot that fits."""
    try:
        with path_beside(journal).open("rb") as file:
            line = file.readline()
            if int(line[:8], 16) != zlib.crc32(line[9:-1]):
                return None
            meta = msgspec.json.decode(line[9:-1], type=_Meta)
            if meta.format != _FORMAT or (samples is not None and meta.numbers["samples"] != samples):
                return None
            if os.fstat(fd).st_size < meta.place or _check(fd, meta.place) != meta.check:
                return None
            state = State(meta.numbers["samples"])
            crc, parts = 0, []
            for size, like in zip(meta.sizes, state.arrays(), strict=True):
                data = file.read(size)
                crc = zlib.crc32(data, crc)
                parts.append(bytearray(data) if isinstance(like, bytearray) else array(like.typecode, data))
            if crc != meta.crc or [len(part) * _item(part) for part in parts] != meta.sizes:
                return None
    except (OSError, ValueError, KeyError, msgspec.MsgspecError):
        return None
    for name in NUMBERS:
        setattr(state, name, meta.numbers[name])
    state.tail = deque(meta.tail)
    state.target, state.befores, state.cuts = meta.target, meta.befores, meta.cuts
    state.restore(parts, meta.rows, meta.numbers["before_tail"], meta.numbers["free"])
    state.rows.begin_pass()
    return state, meta.place


def _item(part: array[int] | bytearray) -> int:
    return 1 if isinstance(part, bytearray) else part.itemsize


def _check(fd: int, place: int) -> int:
    start = max(0, place - CHECKED_BYTES)
    return zlib.crc32(os.pread(fd, place - start, start))
