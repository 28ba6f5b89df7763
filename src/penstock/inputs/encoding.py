"""Values from tables and from Python as JSON.

Guarantees: a row becomes the same bytes each time. Bytes become base64 text, decimals their digits as text
(no digit is lost), dates and times ISO 8601 text, a duration its seconds, NaN and infinity null. What has no
JSON form is named with its row and its column.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from datetime import timedelta
from decimal import Decimal
from typing import Any, Final

import orjson

from penstock.errors import ConfigError

OPTIONS: Final = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


def encode_row(where: str, row: Mapping[str, Any]) -> bytes:
    """`row` as one JSON object. Raises ConfigError, which names `where` and the column."""
    try:
        return orjson.dumps(row, _plain, OPTIONS)
    except TypeError:
        for name, value in row.items():
            try:
                orjson.dumps(value, _plain, OPTIONS)
            except TypeError as error:
                raise ConfigError(f"{where}: the column {name!r} has no form in JSON ({error}).") from None
        raise ConfigError(f"{where}: the names of its columns are not all text.") from None


def _plain(value: Any) -> Any:
    """What orjson does not know, as something it does."""
    if isinstance(value, bytes | bytearray | memoryview):
        return b64encode(value).decode()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"type {type(value).__name__}")
