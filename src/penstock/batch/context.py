"""Fitting `max_tokens` to the context: what an engine says when prompt and completion are too long together.

Pure: reads an error, does nothing. The numbers are taken out of the engines' own sentences, matched from the
beginning of the message: text of a prompt that is quoted in one is never taken for them.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from penstock.errors import RequestRejected

REFUSALS: Final = frozenset({400, 413, 422})
"""Statuses of a request that is too long."""

_CONTEXT: Final = r"This model's maximum context length is (?P<context>\d+) tokens"
_PROMPT: Final = r"(?P<least>at least )?(?P<prompt>\d+)"

_SENTENCES: Final = tuple(
    re.compile(pattern)
    for pattern in (
        # OpenAI, vLLM to 0.8, DeepSeek.
        _CONTEXT
        + rf"[.,] [Hh]owever, you requested \d+ tokens \({_PROMPT} in (?:the messages|the prompt|your "
        r"prompt)[,;] \d+ (?:in|for) the completion\)",
        # vLLM from 0.9.
        r"'max_tokens' or 'max_completion_tokens' is too large: \d+\. ?"
        + _CONTEXT
        + rf" and your request has {_PROMPT} input tokens",
        # vLLM from 0.15: "at least" where it stopped counting.
        _CONTEXT
        + rf"\. However, you requested \d+ output tokens and your prompt contains {_PROMPT} input tokens",
        _CONTEXT + rf"\. However, your prompt contains {_PROMPT} input tokens",
        r"max_(?:completion_)?tokens=\d+ cannot be greater than max_model_len=(?P<context>\d+)",
        # SGLang, which wants one token to spare.
        r"Requested token count exceeds the model's maximum context length of (?P<context>\d+) tokens\. You "
        rf"requested a total of \d+ tokens: {_PROMPT} tokens from the (?P<spare>input)",
        rf"The (?P<spare>input) \({_PROMPT} tokens\) is longer than the model's context length "
        r"\((?P<context>\d+) tokens\)",
    )
)


class Overflow(msgspec.Struct, frozen=True):
    """Prompt and completion were longer than the context, all in tokens."""

    context: int
    """The longest prompt and completion the engine takes."""
    prompt: int | None = None
    """The prompt's length, where the engine said it exactly."""


def overflow_of(error: RequestRejected) -> Overflow | None:
    """What the engine said of the lengths; None: it refused for another reason, or in words unknown here."""
    if error.status not in REFUSALS:
        return None
    for sentence in _SENTENCES:
        if (match := sentence.match(error.message)) is not None:
            found = match.groupdict()
            prompt = None if found.get("least") else found.get("prompt")
            context = int(found["context"]) - bool(found.get("spare"))
            return Overflow(context, None if prompt is None else int(prompt))
    return None
