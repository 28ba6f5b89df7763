"""What is asked of an engine (`SamplingParams`) and what comes back (`Sample`).

`SamplingParams` holds only what the caller set: a field left at None is not sent, so the server's own
default applies. A `Sample` is one completion of one prompt, whoever generated it.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

THINK_OPEN: Final = "<think>"
THINK_CLOSE: Final = "</think>"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters under vLLM's names; None means: leave it to the server."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None
    """Number of alternatives wanted per token; 0 asks for the sampled token's own logprob."""

    def as_dict(self) -> dict[str, Any]:
        """The fields that were set, by name."""
        fields: dict[str, Any] = msgspec.to_builtins(self)  # leaves out what is None, as the default
        return fields


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Token counts as the engine reported them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens served from the engine's prefix cache."""


class Sample(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One completion of one prompt."""

    text: str
    """The completion as the engine returned it, reasoning tags included where it leaves them in."""
    reasoning: str | None = None
    """The reasoning: the engine's own field, else what stood inside <think>…</think>, else None."""
    finish_reason: str | None = None
    """`stop`, `length`, `abort`, `tool_calls`, `content_filter`, or the engine's own word."""
    stop_reason: str | int | None = None
    index: int = 0
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    """Logprob of each sampled token (natural log), as long as `token_ids`."""
    weight_versions: tuple[tuple[int, int], ...] | None = None
    """(first token, version of the weights that made the tokens from there on) in turn; where it was asked
    for and the engine says it."""
    tool_calls: tuple[dict[str, Any], ...] | None = None
    """What the model wants called, as the OpenAI API has it. Not of streams."""
    usage: Usage = Usage()
    model: str | None = None
    request_id: str | None = None
    """The id the engine gave the response."""
    endpoint: str | None = None
    attempts: int = 1
    """Requests it took: failed ones, and those that continued a stream, are counted."""
    latency: float = 0.0
    """Seconds from the first send to the last byte, retries included."""

    @property
    def answer(self) -> str:
        """The text without its reasoning."""
        return split_reasoning(self.text)[1]


class Delta(msgspec.Struct, frozen=True):
    """What a stream has added to its sample. Never empty but for the last, which may only end it."""

    text: str = ""
    reasoning: str = ""
    """Where the engine tells reasoning from text; else it stands in the text."""
    token_ids: tuple[int, ...] = ()
    """The tokens of this piece, where they were asked for. Those of text that is held back come with it."""
    logprobs: tuple[float, ...] = ()


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Split text into (reasoning, answer) at <think>…</think>.

    Templates that open the tag in the prompt leave only `</think>` in the text; a text cut off while
    thinking is all reasoning and has an empty answer. Text without tags is all answer, reasoning None.
    """
    head, closed, tail = text.partition(THINK_CLOSE)
    before, opened, inside = head.partition(THINK_OPEN)
    if closed:
        reasoning = inside if opened and not before.strip() else head
        return reasoning.strip(), tail.strip()
    if opened and not before.strip():
        return inside.strip(), ""
    return None, text
