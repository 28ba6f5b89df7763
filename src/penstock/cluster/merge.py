"""What the shards of a job wrote, joined to one output.

Guarantees: OUT is either not there, as it was, or whole: it is written beside and renamed when it is on disk.
It holds the rows of the shards in the order of the shards, byte for byte, as many as their journals count.
Done again it changes nothing. The shards stay: they are what a resume goes on from.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from penstock.cluster.account import Total, read_shards, total
from penstock.cluster.shards import Shards, failures_of, journal_of
from penstock.errors import ConfigError, WriteFailed

CHUNK: Final = 4 << 20
"""Bytes copied at a time."""


@dataclass(frozen=True)
class Merged:
    """What became of a job's shards."""

    total: Total
    written: bool
    """Whether OUT was written now: not while rows are owed, and not when it was there already."""


def merge(shards: Shards) -> Merged:
    """Joins the outputs and the failures of all shards, unless rows are owed.

    Raises ConfigError when OUT is the output of another job, or a shard's output is not what its journal
    says; WriteFailed when OUT cannot be written.
    """
    if journal_of(shards.out).exists():
        raise ConfigError(f"{shards.out} has a journal of its own: it was not made from shards.")
    found = total(read_shards(shards))
    if found.begun < found.shards or found.owed:
        return Merged(found, written=False)
    outputs = [shards.newest(index) for index in range(shards.count)]
    _join([failures_of(output) for output in outputs], failures_of(shards.out))
    if _is_there(outputs, shards.out):
        return Merged(found, written=False)
    _join(outputs, shards.out, rows=found.done)
    return Merged(found, written=True)


def _is_there(outputs: Sequence[Path], out: Path) -> bool:
    """Whether `out` was joined from what is there now."""
    try:
        joined = out.stat()
    except FileNotFoundError:
        return False
    parts = [output.stat() for output in outputs]
    newer = any(part.st_mtime_ns > joined.st_mtime_ns for part in parts)
    return not newer and joined.st_size == sum(part.st_size for part in parts)


def _join(parts: Sequence[Path], out: Path, *, rows: int | None = None) -> None:
    """Writes what the parts hold, one after the other, which must be so many `rows`. Parts that are not there
    are passed over; where the number does not matter, nothing at all makes no file."""
    beside = out.with_name(f"{out.name}.joining")
    lines = 0
    try:
        with beside.open("wb") as file:
            for part in parts:
                lines += _append(part, file)
            file.flush()
            os.fsync(file.fileno())
        if rows is not None and lines != rows:
            beside.unlink()
            raise ConfigError(
                f"The shards of {out} hold {lines:,} rows and their journals {rows:,}: run the job again."
            )
        if lines or rows is not None:
            beside.replace(out)
        else:
            beside.unlink()
            out.unlink(missing_ok=True)
        _sync_folder(out.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise WriteFailed(f"{out} could not be written ({error.strerror}); the shards are whole.") from None


def _append(part: Path, file: BinaryIO) -> int:
    lines = 0
    try:
        source = part.open("rb", buffering=0)
    except FileNotFoundError:
        return 0
    with source:
        while data := source.read(CHUNK):
            lines += data.count(b"\n")
            file.write(data)
    return lines


def _sync_folder(folder: Path) -> None:
    """The rename is on disk when this returns."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
