"""Files as bytes, plain or packed (.gz, .zst).

Guarantees: a packed file that is cut off raises `DAMAGED` where it ends, never reads as a shorter one; memory
does not depend on how well it was packed.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, cast

import zstandard

if TYPE_CHECKING:
    from typing_extensions import Buffer

READ_BYTES: Final = 1 << 16
"""Bytes of a packed file taken at a time: they may become a thousand times as many."""

PLAIN_BYTES: Final = 1 << 20
"""Bytes of a plain file taken at a time."""

PACKED: Final = (".gz", ".zst")
"""Suffixes of packed files."""

DAMAGED = (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile)
"""What reading a damaged packed file raises."""


def open_file(path: Path) -> BinaryIO:
    """`path` as it reads unpacked. Raises OSError; reading it, `DAMAGED` too."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path), READ_BYTES)
    return path.open("rb", buffering=PLAIN_BYTES)


class _ZstdFile(io.RawIOBase):
    """The content of a .zst file of any number of frames. EOFError where the last one is cut off."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Buffer) -> int:
        target = memoryview(buffer)
        while not self._output:
            self._input = self._input or self._file.read(READ_BYTES)
            if not self._input:
                if self._begun:
                    raise EOFError("its last frame is cut off")
                return 0
            self._decompress()
        count = min(len(target), len(self._output))
        target[:count], self._output = self._output[:count], self._output[count:]
        return count

    def _decompress(self) -> None:
        self._output = memoryview(self._frame.decompress(self._input))
        self._begun, self._input = not self._frame.eof, self._frame.unused_data
        if self._frame.eof:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
