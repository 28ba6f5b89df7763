"""One completion that the scripted engine generates: its tokens, its end, and how far it has been sent."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Literal

from penstock.scripted.schedule import Sequence
from penstock.scripted.text import token_id, token_text

if TYPE_CHECKING:
    from penstock.scripted.answers import Answer
    from penstock.scripted.protocol import Prompt

Reason = Literal["stop", "length", "abort"]


class Sample(Sequence):
    """A sequence of the batch, with its text. Positions count from the tag, which is 0."""

    __slots__ = (
        "answer",
        "arrived",
        "between",
        "closed",
        "first",
        "front",
        "index",
        "offset",
        "prompt",
        "reason",
        "rest",
        "sent",
        "stop_reason",
        "tag",
        "texts",
    )

    def __init__(self, prompt: Prompt, index: int, tag: str, first: int, length: int, reason: Reason) -> None:
        super().__init__(prompt.tokens, length)
        self.prompt = prompt
        self.index = index
        self.tag = tag
        self.first = first
        """Position of its first token: above 0 when the prompt holds the beginning."""
        self.reason: Reason = reason
        self.stop_reason: str | None = None
        self.texts: list[bytes] | None = None
        """The text of each token, where a stop string cuts some."""
        self.answer: Answer
        self.arrived = 0.0
        """When it was submitted."""
        self.sent = 0
        """Tokens written."""
        self.closed = False
        """Its finish reason has been written."""
        self.offset = 0
        """Characters written, where logprobs are asked for."""
        self.front = b""
        """Of a chunk with one token: what stands before its text,"""
        self.between = b""
        """what stands between its text and its id, or all the rest if ids are not asked for,"""
        self.rest = b""
        """and what stands behind its id."""

    def text(self, start: int, stop: int) -> bytes:
        """The text of its tokens start:stop. Never needs escaping in JSON."""
        if self.texts is not None:
            return b"".join(self.texts[start:stop])
        first, tag = self.first, self.tag
        if stop - start == 1:
            return token_text(tag, first + start)
        return b"".join([token_text(tag, first + place) for place in range(start, stop)])

    def token_ids(self, start: int, stop: int) -> list[int]:
        """The ids of its tokens start:stop."""
        return [token_id(self.tag, self.first + place) for place in range(start, stop)]

    def stop_at(self, stops: Items[str], *, include: bool, min_tokens: int) -> None:
        """Ends the sample at the stop string that is complete first, `min_tokens` tokens or more in."""
        pieces = [self.text(place, place + 1) for place in range(self.length)]
        text = b"".join(pieces)
        shortest = sum(map(len, pieces[:min_tokens]))
        ends = [
            (at + len(wanted), at, stop)
            for stop in stops
            if (wanted := stop.encode("utf-8", "surrogatepass"))
            and (at := text.find(wanted, max(0, shortest - len(wanted) + 1))) >= 0
        ]
        if not ends:
            return
        end, begin, stop = min(ends)
        visible = end if include else begin
        texts: list[bytes] = []
        read = 0
        for piece in pieces:
            texts.append(piece[: max(0, visible - read)])
            read += len(piece)
            if read >= end:
                break
        self.texts = texts
        self.length = len(texts)
        self.reason, self.stop_reason = "stop", stop
