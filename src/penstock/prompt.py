"""Rows of a dataset → prompts.

Guarantees: rows are read lazily and in order, and blank lines are no rows. A prompt keeps its row's own
bytes, so what is written out later is what was read. The key of a row is the value of its id column, else
a hash of its content that does not depend on white space or on the order of columns.
`survey` reads the whole input once before anything is generated: it finds every bad line while that is
still cheap, counts the rows, and condenses the input to a digest by which a resumed job knows it again.
Its memory is 16 bytes a row, and only where there is an id column.
"""

from __future__ import annotations

import difflib
import gzip
import io
import re
import zlib
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import msgspec
import orjson
import zstandard

from penstock.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Buffer

Message = dict[str, Any]

KEY_BYTES = 16
"""Length of a content hash: at 2^64 rows a collision is still unlikely."""

RESERVED_COLUMNS = ("generations", "finish_reasons", "api_metadata", "reasonings")
"""Columns of a result, which an input must not have of its own."""

READ_BYTES = 1 << 16
"""Bytes of a compressed file taken at a time: they may become a thousand times as many."""

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")


class Prompt(msgspec.Struct, frozen=True):
    """One row, ready to be sent."""

    position: int
    """Place of the row in the input, from 0."""
    id: str | None
    """Value of the id column, where there is one."""
    messages: list[Message]
    fields: bytes
    """The row itself: one JSON object, without a line end."""

    @property
    def key(self) -> str:
        """The row's name: its id, else the hash of its content."""
        return content_hash(orjson.loads(self.fields)).hex() if self.id is None else self.id


class Survey(msgspec.Struct, frozen=True):
    """What one pass over the input found."""

    rows: int
    digest: str
    """Hash over the content of all rows in order."""


class Template(msgspec.Struct, frozen=True):
    """Text with `{column}` places; `{{` and `}}` stand for braces, any other brace for itself."""

    text: str

    def columns(self) -> set[str]:
        return {name for name in _PLACEHOLDER.findall(self.text) if name}

    def fill(self, values: dict[str, Any]) -> str:
        """The text with each place filled; KeyError(column) where `values` lacks one."""

        def replace(match: re.Match[str]) -> str:
            if (name := match[1]) is None:
                return match[0][0]
            value = values[name]
            return value if isinstance(value, str) else orjson.dumps(value).decode()

        return _PLACEHOLDER.sub(replace, self.text)


class PromptFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How a row becomes a prompt."""

    prompt_column: str = "prompt"
    """A column of text (one user message) or of chat messages (taken as they are)."""
    id_column: str | None = None
    template: Template | None = None
    """The user message; `{prompt}` is the prompt column, `{name}` any column."""
    system_prompt: str | None = None

    def prompt(self, position: int, where: str, line: bytes) -> Prompt:
        """Raises ConfigError, which names `where`, for a row that is no JSON object or lacks a column."""
        row = parse_row(where, line)
        return Prompt(position, self.id(where, row), self.messages(where, row), line)

    def id(self, where: str, row: dict[str, Any]) -> str | None:
        if self.id_column is None:
            return None
        value = _column(where, row, self.id_column)
        if isinstance(value, bool | list | dict) or value is None:
            raise ConfigError(f"{where}: the id column {self.id_column!r} must hold text or a number.")
        return str(value)

    def messages(self, where: str, row: dict[str, Any]) -> list[Message]:
        content = _column(where, row, self.prompt_column)
        if (
            isinstance(content, list)
            and content
            and all(isinstance(m, dict) and "role" in m for m in content)
        ):
            if self.template is not None:
                raise ConfigError(
                    f"{where}: {self.prompt_column!r} holds chat messages: no template applies."
                )
            messages = cast("list[Message]", content)
        elif isinstance(content, str):
            messages = [{"role": "user", "content": self._user_text(where, row, content)}]
        else:
            raise ConfigError(f"{where}: {self.prompt_column!r} must hold text or a list of chat messages.")
        if self.system_prompt is not None:
            return [{"role": "system", "content": self.system_prompt}, *messages]
        return messages

    def _user_text(self, where: str, row: dict[str, Any], prompt: str) -> str:
        if self.template is None:
            return prompt
        try:
            return self.template.fill(row | {"prompt": prompt})
        except KeyError as missing:
            raise ConfigError(
                _missing_column(where, missing.args[0], row, "the prompt template wants")
            ) from None


def parse_row(where: str, line: bytes) -> dict[str, Any]:
    """The JSON object in `line`; raises ConfigError, which names `where`."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON ({error}).") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is JSON but not an object: each line must be one row, {{…}}.")
    return row


def content_hash(row: dict[str, Any]) -> bytes:
    return blake2b(orjson.dumps(row, option=orjson.OPT_SORT_KEYS), digest_size=KEY_BYTES).digest()


def _column(where: str, row: dict[str, Any], name: str) -> Any:
    try:
        return row[name]
    except KeyError:
        raise ConfigError(_missing_column(where, name, row, "there must be")) from None


def _missing_column(where: str, name: str, row: dict[str, Any], wanted: str) -> str:
    near = difflib.get_close_matches(name, row, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}? It has {', '.join(map(repr, row))}" if near else "; it is empty"
    return f"{where}: {wanted} a column {name!r}{hint}."


class JsonlInput(msgspec.Struct, frozen=True):
    """A JSONL file, plain or compressed (.gz, .zst), read again at each call of `lines`."""

    path: Path

    def lines(self) -> Iterator[tuple[str, bytes]]:
        """(where, line) of each row; raises ConfigError when the file cannot be read."""
        count = 0
        try:
            with _open(self.path) as file:
                for count, line in enumerate(file, 1):
                    if stripped := line.strip():
                        yield f"{self.path} line {count}", stripped
        except FileNotFoundError:
            raise ConfigError(f"There is no input file {self.path}.") from None
        except IsADirectoryError:
            raise ConfigError(f"{self.path} is a folder: name a .jsonl file in it.") from None
        except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
            raise ConfigError(f"{self.path} is damaged after line {count} ({error}).") from None
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read ({error.strerror}).") from None

    def survey(self, form: PromptFormat) -> Survey:
        """One pass over the whole input.

        Raises ConfigError for the first line that is not a row with the columns `form` wants, for an empty
        input, and for an id that stands on two rows of different content.
        """
        digest = blake2b(digest_size=KEY_BYTES)
        ids = _IdLedger()
        rows = 0
        for where, line in self.lines():
            row = parse_row(where, line)
            form.messages(where, row)
            if taken := [name for name in RESERVED_COLUMNS if name in row]:
                raise ConfigError(f"{where}: the column {taken[0]!r} is one of the result's own; rename it.")
            content = content_hash(row)
            digest.update(content)
            if (id := form.id(where, row)) is not None:
                ids.add(id, content)
            rows += 1
        if rows == 0:
            raise ConfigError(f"{self.path} holds no rows.")
        if (clash := ids.clash()) is not None:
            raise ConfigError(self._describe_clash(form, clash))
        return Survey(rows, digest.hexdigest())

    def _describe_clash(self, form: PromptFormat, clash: int) -> str:
        seen: dict[str, tuple[str, bytes]] = {}
        for where, line in self.lines():
            row = parse_row(where, line)
            id = form.id(where, row)
            if id is not None and _hash64(id.encode()) == clash:
                content = content_hash(row)
                first, other = seen.setdefault(id, (where, content))
                if other != content:
                    return f"The id {id!r} is used twice with different content: {first} and {where}."
        return f"{self.path} changed while it was read."


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path), READ_BYTES)
    return path.open("rb", buffering=1 << 20)


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


def _hash64(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


class _IdLedger:
    """Finds an id with two contents in 16 bytes a row: hashes in buckets, each looked through on its own."""

    BUCKETS = 256

    def __init__(self) -> None:
        self._buckets = [array("Q") for _ in range(self.BUCKETS)]

    def add(self, id: str, content: bytes) -> None:
        hashed = _hash64(id.encode())
        self._buckets[hashed % self.BUCKETS].extend((hashed, int.from_bytes(content[:8], "little")))

    def clash(self) -> int | None:
        """The hash of an id that came with two contents."""
        for bucket in self._buckets:
            seen: dict[int, int] = {}
            for hashed, content in zip(bucket[::2], bucket[1::2], strict=True):
                if seen.setdefault(hashed, content) != content:
                    return hashed
        return None
