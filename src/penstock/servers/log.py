"""What an engine prints: cut into lines, secrets masked, kept in a rotated file.

A line reaches nobody, neither file nor caller, before its secrets are masked. Files are bounded in size and
number. A log that cannot be written (disk full) is dropped, never the engine.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Final

MAX_LINE: Final = 16 << 10
"""Characters of a line that are kept."""

MAX_FILE: Final = 16 << 20
"""Bytes of a log file before a new one is begun."""

OLD_FILES: Final = 3
"""Full files of one log that are kept beside the current one, as NAME.1 (the newest) to NAME.3."""

LOGS_KEPT: Final = 50
"""Logs of earlier servers that are kept in a folder."""

SHORTEST_SECRET: Final = 6
"""Characters; what is shorter is not masked by value, or masking `1` would make the log unreadable."""

MASK: Final = "***"

_SECRET_NAME: Final = re.compile(r"(?i)(?:^|_)(?:(?:API|ACCESS|SECRET|PRIVATE)_?KEY|TOKEN|SECRET|PASSWORD)$")
_SECRET_FORM: Final = re.compile(
    r"(?i)(\bbearer\s+)[^\s'\",\])}]+"
    r"|(\bapi[-_]?key['\"]?\s*[=:]\s*(?:\[\s*)?['\"]?)(?!None\b)[^\s'\",\])}]{4,}"
    r"|(--(?:[a-z-]+-)?(?:api-key|token)[= ])\S+"
    r"|()\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,})"
)


class Mask:
    """Replaces secrets in text: the given values, and what has the form of a key or a token."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        values = sorted({secret for secret in secrets if len(secret) >= SHORTEST_SECRET}, key=len)
        self._values = re.compile("|".join(map(re.escape, reversed(values)))) if values else None

    @classmethod
    def of(cls, environment: Mapping[str, str], *secrets: str | None) -> Mask:
        """Masks `secrets` and the values of variables whose names say that they are secret."""
        named = (value for name, value in environment.items() if _SECRET_NAME.search(name))
        return cls([*named, *(secret for secret in secrets if secret)])

    def __call__(self, text: str) -> str:
        if self._values is not None:
            text = self._values.sub(MASK, text)
        return _SECRET_FORM.sub(_masked, text)


def _masked(match: re.Match[str]) -> str:
    return next((group for group in match.groups() if group), "") + MASK


class LineSplitter:
    """Bytes in, lines out. A carriage return ends a line too: progress bars are written with it."""

    def __init__(self) -> None:
        self._rest = b""
        self._overlong = False

    def feed(self, data: bytes) -> list[str]:
        """The lines that are now complete, without empty ones; what goes beyond MAX_LINE is cut off."""
        *pieces, rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        lines = []
        for piece in pieces:
            if not self._overlong and piece.strip():
                lines.append(_text(piece))
            self._overlong = False
        self._rest = rest
        if len(rest) > MAX_LINE:
            if not self._overlong:
                lines.append(_text(rest))
            self._overlong, self._rest = True, b""
        return lines

    def end(self) -> list[str]:
        """The last line, if it was not ended."""
        return self.feed(b"\n")


def _text(piece: bytes) -> str:
    return piece[:MAX_LINE].decode(errors="replace").rstrip()


class LogFile:
    """A file that begins anew when it is full; the full ones are numbered."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_FILE, old_files: int = OLD_FILES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._old_files = old_files
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO | None = path.open("ab")
        self._size = path.stat().st_size

    def write(self, lines: Iterable[str]) -> None:
        """Appends lines. After a failure nothing more is written."""
        if self._file is None:
            return
        try:
            for line in lines:
                data = line.encode(errors="replace") + b"\n"
                if self._size and self._size + len(data) > self._max_bytes:
                    self._file = self._rotated(self._file)
                self._file.write(data)
                self._size += len(data)
            self._file.flush()
        except OSError:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                pass
            self._file = None

    def _rotated(self, full: BinaryIO) -> BinaryIO:
        full.close()
        for number in range(self._old_files, 0, -1):
            older = self._numbered(number)
            newer = self._numbered(number - 1) if number > 1 else self.path
            if newer.exists():
                newer.replace(older)
        self._size = 0
        return self.path.open("wb")

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


class EngineLog:
    """The log of one server: masked lines to a file and to `tail`, the last ones in memory."""

    def __init__(self, mask: Mask, file: LogFile | None, *, lines: int) -> None:
        self.tail: deque[str] = deque(maxlen=lines)
        self.file = file
        self._mask = mask
        self._splitter = LineSplitter()

    def feed(self, data: bytes) -> list[str]:
        """Takes what was read from the engine; the new lines, masked. Empty `data`: it has ended."""
        lines = self._splitter.feed(data) if data else self._splitter.end()
        masked = [self._mask(line) for line in lines]
        self.tail.extend(masked)
        if self.file is not None:
            self.file.write(masked)
        return masked

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def default_folder() -> Path:
    """Where logs go when no folder is named."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "penstock" / "logs"


def prune(folder: Path, kind: str, keep: int = LOGS_KEPT) -> None:
    """Removes the oldest logs of servers of this kind from a folder."""
    found: dict[str, float] = {}
    for path in folder.glob(f"{kind}-*.log*"):
        name = path.name.partition(".log")[0]
        try:
            found[name] = max(found.get(name, 0.0), path.stat().st_mtime)
        except OSError:
            continue
    for name in sorted(found, key=found.__getitem__, reverse=True)[keep:]:
        for path in folder.glob(f"{name}.log*"):
            path.unlink(missing_ok=True)
