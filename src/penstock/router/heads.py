"""Which header fields pass through the router, and which are its own.

It guarantees:
- fields of one connection (hop by hop) do not pass, nor those a `Connection` field names;
- framing is never copied: content-length and transfer-encoding are written anew from what was parsed;
- every other field passes with its name as it was written, in its order, repeated ones repeated.

Source: RFC 9110, section 7.6.1, and RFC 9112, section 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

PASS: Final = 0
DROP: Final = 1
CONNECTION: Final = 2
HOST: Final = 3
CONTENT_LENGTH: Final = 4
TRANSFER_ENCODING: Final = 5
EXPECT: Final = 6
REQUEST_ID: Final = 7
AUTHORIZATION: Final = 8
SESSION: Final = 9
RESUME: Final = 10
REQUEST_TIMEOUT: Final = 11
CONTENT_TYPE: Final = 12
CONTENT_ENCODING: Final = 13
RETRY_AFTER: Final = 14

_KINDS: Final = {
    b"connection": CONNECTION,
    b"keep-alive": DROP,
    b"proxy-connection": DROP,
    b"proxy-authenticate": DROP,
    b"proxy-authorization": DROP,
    b"te": DROP,
    b"trailer": DROP,
    b"upgrade": DROP,
    b"http2-settings": DROP,
    b"host": HOST,
    b"content-length": CONTENT_LENGTH,
    b"transfer-encoding": TRANSFER_ENCODING,
    b"expect": EXPECT,
    b"x-request-id": REQUEST_ID,
    b"authorization": AUTHORIZATION,
    b"x-session-id": SESSION,
    b"x-penstock-resume": RESUME,
    b"x-request-timeout": REQUEST_TIMEOUT,
    b"content-type": CONTENT_TYPE,
    b"content-encoding": CONTENT_ENCODING,
    b"retry-after": RETRY_AFTER,
}
MAX_SPELLINGS: Final = 4096
"""Spellings of names that are remembered."""

KIND: Final[dict[bytes, int]] = dict(_KINDS)
"""Kind by name as it was written, for the spellings met so far; see `learn`."""

_STATUS_LINES: Final = {
    status.value: b"HTTP/1.1 %d %s\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus
}


def learn(name: bytes) -> int:
    """The kind of a header in a spelling not met before."""
    kind = _KINDS.get(name.lower(), PASS)
    if len(KIND) < MAX_SPELLINGS:
        KIND[name] = kind
    return kind


def status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def without_named(fields: list[bytes], connection: Sequence[bytes]) -> list[bytes]:
    """The fields (name, separator, value, line end, …) without those that `connection` names."""
    named = {name.strip().lower() for value in connection for name in value.split(b",")}
    kept: list[bytes] = []
    for at in range(0, len(fields), 4):
        if fields[at].lower() not in named:
            kept += fields[at : at + 4]
    return kept
