"""What the router looks at in a request's body, and only when a policy, model routing or the queue asks.

A body that cannot be read (compressed, not JSON, of another shape) has no fields: it is relayed all the same,
for to judge it is the engine's business.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from penstock.router.prefix import text_blocks, token_blocks

MAX_PRIORITY: Final = 1 << 31


class Peek(msgspec.Struct, gc=False):
    """The fields looked at, of the OpenAI routes and of the engines' own."""

    model: str | None = None
    session_id: str | None = None
    priority: int = 0
    """Lower is earlier, as with vLLM."""
    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    text: msgspec.Raw = msgspec.Raw()
    input_ids: msgspec.Raw = msgspec.Raw()


NOTHING: Final = Peek()

_decode: Final = msgspec.json.Decoder(Peek).decode
_tokens: Final = msgspec.json.Decoder(list[int]).decode
_IDS: Final = re.compile(rb"\[\s*[0-9]")
_MODEL: Final = re.compile(rb'"model"\s*:\s*"([^"\\]*)"')


def peek(body: bytes, *, complete: bool) -> Peek:
    """The fields of a body; of one that is not complete the model at most."""
    if not complete:
        found = _MODEL.search(body)
        return NOTHING if found is None else Peek(model=found[1].decode("utf-8", "replace"))
    try:
        return _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return NOTHING


def blocks_of(seen: Peek) -> list[int]:
    """Hashes of the beginnings of the prompt: token ids by their blocks, text and messages by their bytes."""
    for raw in (seen.prompt, seen.input_ids, seen.messages, seen.text, seen.input):
        data = bytes(raw)
        if not data or data == b"null":
            continue
        if _IDS.match(data):
            try:
                return token_blocks(_tokens(data))
            except (msgspec.DecodeError, OverflowError):
                pass
        return text_blocks(data.rstrip(b"]"))
    return []
