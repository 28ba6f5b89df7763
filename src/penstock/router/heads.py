"""Which header fields pass through the router, which are its own, and heads that have been parsed before.

It guarantees:
- fields of one connection (hop by hop) do not pass, nor those a `Connection` field names;
- framing is never copied: content-length and transfer-encoding are written anew from what was parsed;
- every other field passes with its name as it was written, in its order, repeated ones repeated;
- a head is known again only by the very bytes the parser took for one, the values of content-length and
  x-request-id excepted: see `KnownHeads`.

Source: RFC 9110, section 7.6.1, and RFC 9112, section 6.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final, Generic, TypeVar

H = TypeVar("H")

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
NO_BODY: Final = frozenset({204, 304})
"""Statuses whose responses have no body, whatever their fields say."""
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


END: Final = b"\r\n\r\n"
"""The end of a head. The parser takes nothing else for one."""
MAX_KNOWN: Final = 1024
"""Heads that are remembered; the next one after these forgets them all."""
MAX_KNOWN_SIZE: Final = 4096
"""Bytes of a head that is remembered."""

_VALUES: Final = re.compile(rb"\r\n(content-length|x-request-id): ([!-~]{1,256})(?=\r\n)", re.IGNORECASE)
_MAX_DIGITS: Final = 15
_MAX_VALUE: Final = 257
"""Bytes within which a value must have ended."""


_visible: Final = re.compile(rb"[!-~]{1,256}").fullmatch


Cut = tuple[bytes, int | None, bytes | None]
"""A head without its values of content-length and x-request-id, and these."""


def cut(head: bytes) -> Cut:
    """A zero byte stands where a value stood. Nothing is left of a head that holds one, which no good head
    does, or whose length is no plain number: it is not to be known."""
    if b"\0" in head:
        return b"", None, None
    parts = _VALUES.split(head)
    length = id = None
    for at in range(2, len(parts), 3):
        value = parts[at]
        if len(parts[at - 1]) == len(b"x-request-id"):
            id = value
        elif value.isdigit() and len(value) <= _MAX_DIGITS:
            length = int(value)
        else:
            return b"", None, None
        parts[at] = b"\0"
    parts[1::3] = [b"\r\n" + name + b": " for name in parts[1::3]]
    return b"".join(parts), length, id


class Known(Generic[H]):
    """A head that was cut, and what the parser made of it."""

    __slots__ = ("head", "last", "pieces")

    def __init__(self, key: bytes, head: H) -> None:
        *pieces, self.last = key.split(b"\0")
        """What comes after the last value."""
        self.pieces = [(piece, piece.lower().endswith(b"\ncontent-length: ")) for piece in pieces]
        """What comes before each value, and whether that is the length."""
        self.head = head

    def fit(self, data: bytes) -> tuple[H, int, int | None, bytes | None] | None:
        """As `KnownHeads.find`, if `data` begins with this head: the pieces, and values between them."""
        length = id = None
        at = 0
        for piece, numeric in self.pieces:
            if not data.startswith(piece, at):
                return None
            at += len(piece)
            end = data.find(b"\r", at, at + _MAX_VALUE)
            value = data[at:end]
            if not numeric and _visible(value):
                id = value
            elif numeric and value.isdigit() and len(value) <= _MAX_DIGITS:
                length = int(value)
            else:
                return None
            at = end
        return (self.head, at + len(self.last), length, id) if data.startswith(self.last, at) else None


class KnownHeads(Generic[H]):
    """What the parser made of heads, to be known again by their bytes.

    Two values differ from one message to the next, and are cut out of those bytes. It is safe to use what is
    known of a head for another that is the same but for them: all else the parser would see is a number of 1
    to 15 digits in the place of another, or an id of visible ASCII in the place of another, and that they
    stand in these two fields is what `remember` makes sure of.
    """

    __slots__ = ("_heads", "_latest")

    def __init__(self) -> None:
        self._heads: dict[bytes, Known[H]] = {}
        self._latest: Known[H] | None = None

    def __len__(self) -> int:
        return len(self._heads)

    def find(self, data: bytes) -> tuple[H, int, int | None, bytes | None] | None:
        """The head `data` begins with, its end, its content-length and its x-request-id; None: not known."""
        latest = self._latest
        if latest is not None and (found := latest.fit(data)) is not None:
            return found
        end = data.find(END) + len(END)
        key, length, id = cut(data[:end]) if end >= len(END) else (b"", None, None)
        known = self._heads.get(key)
        if known is None:
            return None
        self._latest = known
        return known.head, end, length, id

    def remember(self, cut: Cut, length: int | None, id: bytes | None, head: H) -> None:
        """`length` and `id` are the values the parser has found, `head` all else."""
        key, cut_length, cut_id = cut
        if cut_length == length and cut_id == id and 0 < len(key) <= MAX_KNOWN_SIZE:
            if len(self._heads) >= MAX_KNOWN:
                self._heads.clear()
            self._latest = self._heads[key] = Known(key, head)
