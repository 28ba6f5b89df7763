"""What the router looks at in a request's body, and only when a policy, model routing or the queue asks.

A body that cannot be read (compressed, not JSON, of another shape) has no fields: it is relayed all the same,
for to judge it is the engine's business.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from penstock.router.prefix import text_blocks, token_blocks


class _SessionParams(msgspec.Struct, gc=False):
    """SGLang's way to name a session."""

    session_id: str | None = None


class Peek(msgspec.Struct, gc=False):
    """The fields looked at, of the OpenAI routes and of the engines' own."""

    model: str | None = None
    session_id: str | None = None
    session_params: _SessionParams | None = None
    user: str | None = None
    priority: int = 0
    """Lower is earlier, as with vLLM."""
    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    text: msgspec.Raw = msgspec.Raw()
    input_ids: msgspec.Raw = msgspec.Raw()

    @property
    def session(self) -> str | None:
        """What its session is called: `session_id`, SGLang's `session_params`, else the `user`."""
        inner = None if self.session_params is None else self.session_params.session_id
        return self.session_id or inner or self.user


class _Loose(Peek):
    """The same where some have other types than they should (a null priority): those count as absent."""

    model: Any = None
    session_id: Any = None
    session_params: Any = None
    user: Any = None
    priority: Any = 0

    def typed(self) -> Peek:
        if type(self.model) is not str:
            self.model = None
        if type(self.session_id) is not str:
            self.session_id = str(self.session_id) if type(self.session_id) is int else None
        inner = self.session_params.get("session_id") if type(self.session_params) is dict else None
        self.session_params = _SessionParams(inner) if type(inner) is str else None
        if type(self.user) is not str:
            self.user = None
        if type(self.priority) is not int:
            self.priority = 0
        return self


NOTHING: Final = Peek()

_decode: Final = msgspec.json.Decoder(Peek).decode
_decode_loose: Final = msgspec.json.Decoder(_Loose).decode
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
    except msgspec.ValidationError:
        return _decode_loosely(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return NOTHING


def _decode_loosely(body: bytes) -> Peek:
    try:
        return _decode_loose(body).typed()
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
