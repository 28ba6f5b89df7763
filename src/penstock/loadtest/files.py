"""Results in files: JSON, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from penstock.errors import ConfigError, WriteFailed
from penstock.loadtest.bench import FORMAT, Result

_decode: Final = msgspec.json.Decoder(Result).decode


def save(result: Result, path: Path) -> None:
    """Raises WriteFailed."""
    write(path, msgspec.json.format(msgspec.json.encode(result), indent=1))


def load(path: Path) -> Result:
    """Raises ConfigError when it is no result, or one of another version."""
    try:
        result = _decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no result of penstock bench ({error}).") from None
    if result.format != FORMAT:
        raise ConfigError(f"{path} has format {result.format}; this version reads {FORMAT}.")
    return result


def write(path: Path, data: bytes) -> None:
    """Writes a file through a neighbour of it. Raises WriteFailed."""
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    except OSError as error:
        raise WriteFailed(f"{path} cannot be written: {error.strerror}.") from None
