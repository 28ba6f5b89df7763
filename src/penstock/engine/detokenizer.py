"""The visible text of one sample while it grows, and the stop strings in it.

Nothing that could still become part of a stop string is given out: a text that ends with the beginning of
one is held back until the next token decides. What was given out is never taken back.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.engine.tokenizer import TextStream


class Detokenizer:
    """Feeds on token ids, gives text, and says which stop string it met."""

    __slots__ = ("_held", "_include_stop", "_min_tokens", "_ready", "_stop", "_stream", "_tokens", "stopped")

    def __init__(
        self,
        stream: TextStream,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._stream = stream
        self._stop = stop
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._tokens = 0
        self._ready: list[str] = []
        self._held = ""
        self.stopped: str | None = None
        """The stop string that ended the text."""

    def append(self, token_id: int) -> str | None:
        """Take one more token; the stop string it completed, else None.

        A stop string counts only if it ends after the first `min_tokens` tokens.
        """
        piece = self._stream.step(token_id)
        self._tokens += 1
        if not self._stop:
            self._ready.append(piece)
            return None
        if not piece:
            return None
        text = self._held + piece
        found = self._first_stop(text, len(self._held)) if self._tokens > self._min_tokens else None
        if found is not None:
            at, self.stopped = found
            self._ready.append(text[: at + len(self.stopped)] if self._include_stop else text[:at])
            self._held = ""
            return self.stopped
        visible = len(text) - self._undecided(text)
        self._ready.append(text[:visible])
        self._held = text[visible:]
        return None

    def finish(self) -> None:
        """No token follows: what was held back is text."""
        self._ready.append(self._held)
        self._held = ""

    def take(self) -> str:
        """The text that became visible since the last call."""
        text = "".join(self._ready)
        self._ready.clear()
        return text

    def _first_stop(self, text: str, seen: int) -> tuple[int, str] | None:
        """Where the stop string begins that is complete first and ends after `seen` characters.

        Ties go to the one named first.
        """
        matches = [
            (at + len(stop), at, stop)
            for stop in self._stop
            if (at := text.find(stop, max(0, seen - len(stop) + 1))) >= 0
        ]
        if not matches:
            return None
        _, at, stop = min(matches, key=lambda match: match[0])
        return at, stop

    def _undecided(self, text: str) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        for length in range(min(len(text), max(map(len, self._stop)) - 1), 0, -1):
            if any(len(stop) > length and text.endswith(stop[:length]) for stop in self._stop):
                return length
        return 0
