"""The output of a job as Parquet parts, made while it grows.

The JSONL file stays the truth; a part is a copy of a range of its bytes. Guarantees: the parts hold whole
rows without a gap from the first on, each row once; a part is whole when it has its name. When the folder is
opened each part is checked against the bytes it was made of: after a crash, or where the output was written
anew, the first part that does not fit and all after it are made again. At the end all parts have one schema,
that of all rows: those that were made before a column's type grew are made again.
"""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Final

import msgspec

from penstock.batch.columns import Columns, Shape
from penstock.batch.export import part_path
from penstock.batch.parquet import Sized, decode_row, need_pyarrow, write_parquet
from penstock.errors import ConfigError, PenstockError, WriteFailed

PART_BYTES: Final = 256 << 20
"""Bytes of the output in a part, about."""

LOOK_INTERVAL: Final = 5.0
"""Seconds between looks whether there is enough for a part."""

READ_BYTES: Final = 1 << 20
"""Bytes of the output read at a time."""

METADATA: Final = b"penstock.part"
"""Key of a part's `_Made` in its schema's metadata."""


class _Range(msgspec.Struct, frozen=True):
    """Bytes of the output."""

    start: int
    end: int
    crc: int


class _Made(msgspec.Struct, frozen=True):
    """What a part was made of."""

    range: _Range
    shape: Shape
    """What was known of the columns when it was made: all of its rows, and those before."""


def parts_folder(out: Path) -> Path:
    """Where the parts of `out` are: `traces.parquet/` for `traces.jsonl`."""
    name = out.name.removesuffix(".jsonl")
    return out.with_name(f"{name}.parquet")


class Parts:
    """The parts of `out`, which one process makes. Raises ConfigError where the folder cannot be used."""

    def __init__(self, out: Path) -> None:
        need_pyarrow("Writing Parquet")
        self.folder = parts_folder(out)
        self._out = out
        self._lock = Lock()
        self._ranges: list[_Range] = []
        self._columns = Columns()
        try:
            self.folder.mkdir(exist_ok=True)
            for unfinished in self.folder.glob(".part-*.tmp"):
                unfinished.unlink()
            self._take_up()
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be written ({error.strerror}).") from None

    @property
    def end(self) -> int:
        """How many bytes of the output are in parts."""
        return self._ranges[-1].end if self._ranges else 0

    @property
    def as_json(self) -> list[str]:
        """Columns in which rows differ so much that they are JSON text."""
        return self._columns.as_json()

    def advance(self) -> None:
        """Make the parts there are enough bytes for. Raises WriteFailed."""
        with self._lock:
            while self._size() - self.end >= PART_BYTES:
                self._add()

    def finish(self) -> None:
        """Make parts of all rows there are, and give all of them the same schema. Raises WriteFailed."""
        with self._lock:
            while self._add():
                pass
            schema = self._columns.schema()
            for number, range in enumerate(self._ranges):
                made = _made(part_path(self.folder, number))
                # The types alone do not tell text from JSON text.
                if made is None or not Columns(made.shape).schema().equals(schema, check_metadata=True):
                    self._write(number, range)

    def _take_up(self) -> None:
        """What is sound of the parts that are there; the others are removed."""
        numbers = sorted(int(path.stem[5:]) for path in self.folder.glob("part-[0-9]*.parquet"))
        sound = True
        for number in numbers:
            path = part_path(self.folder, number)
            made = _made(path) if sound and number == len(self._ranges) else None
            if made is not None and self._follows(made.range):
                self._ranges.append(made.range)
                self._columns = Columns(made.shape)
            else:
                sound = False
                path.unlink()

    def _add(self) -> bool:
        """One part more; False when there is no row for it."""
        start = end = self.end
        crc = 0
        for line in self._lines(start, self._size()):
            if end - start >= PART_BYTES:
                break
            crc, end = zlib.crc32(line, crc), end + len(line)
            self._columns.see(decode_row(line))
        if end == start:
            return False
        self._write(len(self._ranges), _Range(start, end, crc))
        self._ranges.append(_Range(start, end, crc))
        return True

    def _write(self, number: int, range: _Range) -> None:
        self._sync()
        rows: Iterator[Sized] = (
            (len(line), decode_row(line)) for line in self._lines(range.start, range.end)
        )
        made = msgspec.json.encode(_Made(range, self._columns.shape))
        write_parquet(rows, part_path(self.folder, number), self._columns, {METADATA: made})

    def _follows(self, range: _Range) -> bool:
        """Whether the bytes of `range` are next, and are still what they were."""
        return range.start == self.end and self._crc(range.start, range.end) == range.crc

    def _lines(self, start: int, end: int) -> Iterator[bytes]:
        """The whole lines between `start` and `end`, with their ends."""
        with self._out.open("rb", buffering=READ_BYTES) as file:
            file.seek(start)
            for line in file:
                start += len(line)
                if start > end or not line.endswith(b"\n"):
                    return
                yield line

    def _size(self) -> int:
        return self._out.stat().st_size

    def _crc(self, start: int, end: int) -> int | None:
        """Of these bytes of the output; None where it does not have them."""
        crc = 0
        with self._out.open("rb", buffering=0) as file:
            file.seek(start)
            while start < end and (data := file.read(min(READ_BYTES, end - start))):
                crc, start = zlib.crc32(data, crc), start + len(data)
        return crc if start == end else None

    def _sync(self) -> None:
        """A part must not outlive the rows it was made of."""
        fd = os.open(self._out, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
        except OSError as error:
            raise WriteFailed(f"{self._out} could not be synced to disk ({error.strerror}).") from None
        finally:
            os.close(fd)


def _made(path: Path) -> _Made | None:
    """What the part at `path` was made of; None where it does not say so."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
        return msgspec.json.decode(metadata[METADATA], type=_Made)
    except (OSError, pa.ArrowException, KeyError, msgspec.MsgspecError):
        return None


@asynccontextmanager
async def parts_of(out: Path) -> AsyncIterator[Parts]:
    """Makes parts of `out` while it grows, in a thread, and the rest when it ends, however it ends. To be
    entered when the job has its files open. Raises ConfigError and, at the end, WriteFailed."""
    parts = await asyncio.to_thread(Parts, out)
    follower = asyncio.create_task(_follow(parts), name="penstock parts")
    try:
        yield parts
    except BaseException:
        with suppress(PenstockError):
            await _finish(parts, follower)
        raise
    await _finish(parts, follower)


async def _follow(parts: Parts) -> None:
    while True:
        await asyncio.sleep(LOOK_INTERVAL)
        with suppress(PenstockError, OSError):  # what does not pass is met again by `finish`, which tells it
            await asyncio.to_thread(parts.advance)


async def _finish(parts: Parts, follower: asyncio.Task[None]) -> None:
    follower.cancel()
    await asyncio.wait([follower])
    try:
        await asyncio.to_thread(parts.finish)  # waits for a part that is being made
    except OSError as error:
        raise WriteFailed(f"{parts.folder} could not be written ({error.strerror}).") from None
