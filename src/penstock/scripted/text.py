"""What the scripted engine says, and its token ids.

A completion is a tag of six hexadecimal digits, which follows from the engine's seed, the prompt, the
request's seed and id and the index of the sample, and then the numbers from 1 on: `3fa29c 1 2 3 …`. So a
reader sees at once whether a stream is whole and in order, and whose it is. A prompt that ends with the
beginning of a completion is continued where it stopped, whether it is given as text or as ids.

Ids and text go into each other and back: a tag is one token, a number behind one is one token, all else is
cut into pieces of three bytes of UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final, NamedTuple

PIECE: Final = 3
"""Bytes of a token of ordinary text."""

_PIECES_OF: Final = (0, 0, 1 << 8, (1 << 8) + (1 << 16))
"""First id of the pieces of so many bytes."""

NUMBERS: Final = 1 << 25
"""Id of the number 0; behind it those of all others."""

TAGS: Final = 1 << 26
"""Id of the tag 000000; behind it those of all others."""

TAG_DIGITS: Final = 6
VOCAB_SIZE: Final = TAGS + 16**TAG_DIGITS

_TAIL: Final = re.compile(r"([0-9a-f]{6})((?: [1-9][0-9]{0,6})*)\Z")
_LAST_TOKEN: Final = re.compile(r"[0-9a-f]{6}\Z| [1-9][0-9]{0,6}\Z")

_numbers: list[bytes] = [b""]
"""By position in a completion: the text of that token. Grows as it is asked for."""


def number_text(position: int) -> bytes:
    """The token at a position from 1 on, with its leading blank."""
    while len(_numbers) <= position:
        _numbers.append(b" %d" % len(_numbers))
    return _numbers[position]


class Start(NamedTuple):
    """Where a completion begins: which tag, and how many of its tokens are in the prompt already."""

    tag: str
    position: int


def tag_of(seed: int, prompt: bytes, request: str, index: int) -> str:
    """The tag of a sample."""
    digest = blake2b(prompt, digest_size=TAG_DIGITS // 2, key=f"{seed}/{index}".encode()[:64])
    digest.update(request.encode())
    return digest.hexdigest()


def tail_of_text(text: str) -> Start | None:
    """The completion that a text ends with the beginning of."""
    if _LAST_TOKEN.search(text, max(0, len(text) - 10)) is None:
        return None
    match = _TAIL.search(text, max(0, text.rfind("\n")))
    if match is None:
        return None
    count = match[2].count(" ")
    whole = b"".join(number_text(position) for position in range(1, count + 1)).decode()
    return Start(match[1], count + 1) if match[2] == whole else None


def tokens_if_whole(text: str) -> int | None:
    """How many tokens a completion has; None if a token is missing, doubled or out of place."""
    tail = tail_of_text(text)
    return tail.position if tail is not None and not _head(text, tail) else None


def tail_of_ids(ids: Sequence[int]) -> Start | None:
    """The completion that token ids end with the beginning of."""
    last = ids[-1] if ids else 0
    count = last - NUMBERS if NUMBERS < last < TAGS else 0
    if count >= len(ids) or not TAGS <= ids[-1 - count] < VOCAB_SIZE:
        return None
    expected = range(NUMBERS + 1, NUMBERS + count + 1)
    if list(ids[len(ids) - count :]) != list(expected):
        return None
    return Start(f"{ids[-1 - count] - TAGS:06x}", count + 1)


def count_tokens(text: str) -> int:
    """How many tokens a text has."""
    tail = tail_of_text(text)
    if tail is None:
        return _pieces(len(text) if text.isascii() else len(text.encode()))
    return _pieces(len(_head(text, tail).encode())) + tail.position


def encode(text: str) -> list[int]:
    """The token ids of a text."""
    tail = tail_of_text(text)
    data = text.encode() if tail is None else _head(text, tail).encode()
    ids = []
    for at in range(0, len(data), PIECE):
        piece = data[at : at + PIECE]
        ids.append(_PIECES_OF[len(piece)] + int.from_bytes(piece, "big"))
    if tail is not None:
        ids += [token_id(tail.tag, position) for position in range(tail.position)]
    return ids


def decode(ids: Sequence[int]) -> str:
    """The text of token ids. Ids of no token are left out."""
    parts: list[bytes] = []
    for id in ids:
        if id >= TAGS:
            parts.append(b"%06x" % (id - TAGS) if id < VOCAB_SIZE else b"")
        elif id >= NUMBERS:
            parts.append(b" %d" % (id - NUMBERS))
        else:
            size = 3 if id >= _PIECES_OF[3] else 2 if id >= _PIECES_OF[2] else 1
            value = id - _PIECES_OF[size]
            parts.append(value.to_bytes(size, "big") if value < 256**size else b"")
    return b"".join(parts).decode("utf-8", "replace")


def token_id(tag: str, position: int) -> int:
    """The id of the token at a position of a completion."""
    return NUMBERS + position if position else TAGS + int(tag, 16)


def token_text(tag: str, position: int) -> bytes:
    """The text of the token at a position of a completion. Never needs escaping in JSON."""
    return number_text(position) if position else tag.encode()


def _pieces(size: int) -> int:
    return -(-size // PIECE)


def _head(text: str, tail: Start) -> str:
    """The text before the tail."""
    length = TAG_DIGITS + sum(len(number_text(position)) for position in range(1, tail.position))
    return text[: len(text) - length]
