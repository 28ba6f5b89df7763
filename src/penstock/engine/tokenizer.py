"""Text to token ids and back, on `tokenizer.json` alone.

Text of a growing sample comes piece by piece from `stream`; the pieces joined equal `text` of the whole.
A character that is still incomplete at the end of a sample is not part of its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from penstock.engine.config import read_json
from penstock.errors import ConfigError

INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"
"""What a decoder puts in place of bytes that are no character, or not yet."""

CONTEXT_TOKENS: Final = 6
"""Prompt tokens a decoder is given before the first generated one: decoders treat the start of a text in a
special way (a leading space is dropped), and a generated text does not start there."""

CHARACTER_TOKENS: Final = 4
"""The most tokens one character can be spread over: UTF-8 has up to four bytes."""


class TextStream:
    """The text of one sample, a token at a time."""

    __slots__ = ("_skip_special_tokens", "_stream", "_tokenizer")

    def __init__(self, tokenizer: FastTokenizer, context: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(ids=list(context), skip_special_tokens=skip_special_tokens)

    def step(self, token_id: int) -> str:
        """The text that became certain with this token; empty while a character is incomplete."""
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception:
            # Invalid UTF-8 can change how bytes before it are decoded, which are out already: start afresh.
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            return self._stream.step(self._tokenizer, token_id) or ""


class Tokenizer:
    """The tokenizer of one checkpoint folder. Raises ConfigError when the folder has none."""

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"{folder} has no tokenizer.json")
        try:
            self._fast = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigError(f"{file} cannot be read: {error}") from error
        self._fast.no_truncation()
        self._fast.no_padding()
        vocabulary = self._fast.get_vocab(with_added_tokens=True)
        self.longest_token = max(map(len, vocabulary), default=1)
        """Characters in the longest token of the vocabulary: no text can have fewer tokens than its length
        divided by this."""
        eos = special_tokens(folder).get("eos_token")
        self.eos_token_id: int | None = None if eos is None else vocabulary.get(eos)
        """The token the tokenizer's own settings call the end of text; a checkpoint may have more of them."""
        self._texts: dict[int, str] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; special tokens are added by the checkpoint's own post-processor."""
        # The batch call is the one that does not compute offsets: half the time of the plain one.
        (encoding,) = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of the ids on their own, incomplete characters shown as U+FFFD."""
        text: str = self._fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The entries of the vocabulary as they stand in it; empty for ids outside it."""
        return [self._fast.id_to_token(token_id) or "" for token_id in token_ids]

    def stream(self, prompt: Sequence[int], *, skip_special_tokens: bool) -> TextStream:
        """A stream of the text that is generated after the prompt."""
        return TextStream(self._fast, self._context(prompt), skip_special_tokens)

    def text(self, prompt: Sequence[int], token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The whole text generated after the prompt, equal to what `stream` gives piece by piece."""
        context = self._context(prompt)
        before = self.decode(context, skip_special_tokens=skip_special_tokens)
        whole = self.decode([*context, *token_ids], skip_special_tokens=skip_special_tokens)
        if INCOMPLETE in whole or not whole.startswith(before):
            stream = self.stream(prompt, skip_special_tokens=skip_special_tokens)
            return "".join(map(stream.step, token_ids))
        return whole[len(before) :]

    def token_text(self, token_id: int, preceding: Sequence[int]) -> str:
        """The text of one token for a list of logprobs, special tokens included.

        A token that holds a part of a character is empty, save the one that completes the character with
        the tokens before it (`preceding`): that one has the whole of it.
        """
        text = self._single(token_id)
        return self._completed(token_id, preceding) if text.endswith(INCOMPLETE) else text

    def _single(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    def _completed(self, token_id: int, preceding: Sequence[int]) -> str:
        for size in range(1, min(CHARACTER_TOKENS, len(preceding)) + 1):
            window = list(preceding[-size:])
            whole = self.decode([*window, token_id], skip_special_tokens=False)
            if not whole.endswith(INCOMPLETE):
                while window and self._single(window[-1]).endswith(INCOMPLETE):
                    window.pop()
                return whole[len(self.decode(window, skip_special_tokens=False)) :]
        return ""

    def _context(self, prompt: Sequence[int]) -> list[int]:
        context = list(prompt[-CONTEXT_TOKENS:])
        if self.decode(context, skip_special_tokens=True).endswith(INCOMPLETE):
            return []
        return context


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts of bos_token, eos_token and the like, as the files of a checkpoint folder name them."""
    named = (read_json(folder / "special_tokens_map.json") or {}) | (
        read_json(folder / "tokenizer_config.json") or {}
    )
    return {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in named.items()
        if name.endswith("_token")
        and (isinstance(value, str) or isinstance(value, dict) and "content" in value)
    }
