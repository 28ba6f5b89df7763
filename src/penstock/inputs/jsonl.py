"""JSON lines: a file, plain or packed, or standard input.

A row is the line's own bytes; blank lines are no rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from penstock.errors import ConfigError
from penstock.inputs.compressed import DAMAGED, PACKED, PLAIN_BYTES, open_file
from penstock.inputs.source import Row, Source

STDIN = 0
"""The file descriptor of standard input."""


class JsonlInput(Source):
    """A JSONL file, plain or packed (.gz, .zst), read again at each call of `lines`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.again = path.is_file() or not path.exists()  # False for a pipe

    @property
    def seekable(self) -> bool:
        return self.path.suffix not in PACKED and self.again

    def lines(self) -> Iterator[Row]:
        """(where, line) of each row; raises ConfigError when the file cannot be read."""
        path = str(self.path)
        for count, line in self._numbered():
            if stripped := line.strip():
                yield f"{path} line {count}", stripped

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(line number, byte offset, length in bytes) of each row. Raises ConfigError as `lines` does."""
        offset = 0
        for count, line in self._numbered():
            if not line.isspace():
                yield count, offset, len(line)
            offset += len(line)

    def _numbered(self) -> Iterator[tuple[int, bytes]]:
        count = 0
        try:
            with open_file(self.path) as file:
                for count, line in enumerate(file, 1):
                    yield count, line
        except FileNotFoundError:
            raise ConfigError(f"There is no input file {self.path}.") from None
        except IsADirectoryError:
            raise ConfigError(f"{self.path} is a folder: name a .jsonl file in it.") from None
        except DAMAGED as error:
            raise ConfigError(f"{self.path} is damaged after line {count} ({error}).") from None
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read ({error.strerror}).") from None


class StdinInput(Source):
    """Standard input as JSONL; it can be read once."""

    name = "stdin"
    again = False

    def lines(self) -> Iterator[Row]:
        try:
            with _open_stdin() as file:
                for count, line in enumerate(file, 1):
                    if stripped := line.strip():
                        yield f"stdin line {count}", stripped
        except OSError as error:
            raise ConfigError(f"stdin cannot be read ({error.strerror}).") from None


def _open_stdin() -> BinaryIO:
    """A reader of its own: when the interpreter ends it waits for the lock of `sys.stdin`, and a thread that
    reads a silent pipe would hold it."""
    return open(STDIN, "rb", buffering=PLAIN_BYTES, closefd=False)
