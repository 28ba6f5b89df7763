"""What clients may ask of the scripted engine: vLLM's requests, and its refusals field for field.

Bytes in, checked requests out. Sampling parameters that have no meaning without a model are taken and
ignored, as are unknown fields; what decides the shape of an answer is checked as vLLM does.
"""

from __future__ import annotations

from array import array
from typing import Any, Final, NamedTuple

import msgspec

from penstock.scripted.text import VOCAB_SIZE, Start, count_tokens, encode, tail_of_ids, tail_of_text
from penstock.wire.openai_server import (
    DEFAULT_COMPLETION_TOKENS,
    MAX_LOGPROBS,
    MAX_SAMPLES,
    Refused,
    StreamOptions,
    TokenId,
)

RANGES: Final = (
    ("temperature", 0.0, 2.0, "temperature"),
    ("top_p", 1e-9, 1.0, "top_p"),
    ("top_k", -1, 1 << 31, None),
    ("min_p", 0.0, 1.0, None),
    ("presence_penalty", -2.0, 2.0, None),
    ("frequency_penalty", -2.0, 2.0, None),
    ("repetition_penalty", 1e-9, 1e9, None),
)
"""Least and most that a sampling parameter may be, and the `param` of the refusal."""


class Prompt(NamedTuple):
    """A prompt: what its tag is made from, its length in tokens, and what of a completion it ends with."""

    key: bytes
    ids: list[int] | None
    """Where it was given as ids."""
    tokens: int
    start: Start | None

    @classmethod
    def of(cls, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            return cls(
                prompt.encode("utf-8", "surrogatepass"), None, count_tokens(prompt), tail_of_text(prompt)
            )
        if max(prompt) >= VOCAB_SIZE:
            raise Refused(f"Token id {max(prompt)} is out of vocabulary")
        key = array("q", prompt).tobytes()
        return cls(key, prompt, len(prompt), tail_of_ids(prompt))

    def token_ids(self) -> list[int]:
        return encode(self.key.decode("utf-8", "surrogatepass")) if self.ids is None else self.ids


class GenerationRequest(msgspec.Struct, kw_only=True):
    """The fields that chats and completions share."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    n: int | None = 1
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    request_id: str | None = None
    rid: str | None = None
    return_token_ids: bool | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives asked for beside each token's own logprob; None: no logprobs at all."""
        raise NotImplementedError

    def prompts(self) -> list[Prompt]:
        """Raises Refused for what is no prompt."""
        raise NotImplementedError

    @property
    def wanted(self) -> int | None:
        """Tokens asked for at most."""
        return self.max_tokens

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        options = self.stream_options
        return self.includes_usage and options is not None and bool(options.continuous_usage_stats)

    def stops(self) -> tuple[str, ...]:
        """The stop strings. Raises Refused for an empty one."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(stop):
            raise Refused("stop cannot contain an empty string.")
        return stop

    def check(self) -> None:
        """Raises Refused for what vLLM refuses."""
        if self.stream_options and not self.stream:
            raise Refused("Stream options can only be defined when `stream=True`.", param="stream_options")
        wanted = self.wanted
        if wanted is not None and wanted < 1:
            raise Refused(f"max_tokens must be at least 1, got {wanted}.", param="max_tokens")
        if self.min_tokens < 0:
            raise Refused(f"min_tokens must be greater than or equal to 0, got {self.min_tokens}.")
        if wanted is not None and self.min_tokens > wanted:
            raise Refused(f"min_tokens must be less than or equal to max_tokens={wanted}.")
        if self.n is not None and not 1 <= self.n <= MAX_SAMPLES:
            raise Refused(f"n must be from 1 to {MAX_SAMPLES}, got {self.n}.")
        if self.temperature == 0 and (self.n or 1) > 1:
            raise Refused(f"n must be 1 when using greedy sampling, got {self.n}.")
        logprobs = self.wanted_logprobs
        if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
            raise Refused(f"logprobs must be from 0 to {MAX_LOGPROBS}, got {logprobs}.", param="logprobs")
        for name, least, most, param in RANGES:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise Refused(f"{name} is out of range: {value}.", param=param)


class CompletionRequest(GenerationRequest, kw_only=True):
    """/v1/completions."""

    prompt: str | list[TokenId | str | list[TokenId]] | None = None
    max_tokens: int | None = DEFAULT_COMPLETION_TOKENS
    logprobs: int | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[Prompt]:
        """Raises Refused unless all are of one kind and none is empty."""
        prompt = self.prompt
        if prompt is None or prompt == "":
            raise Refused("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
        if prompt == []:
            raise Refused("You must pass at least one prompt")
        items: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        kinds = {type(item) for item in (prompt if isinstance(prompt, list) else items)}
        if len(kinds) > 1:
            raise Refused(
                "prompt must be all text, all token ids or all lists of them.",
                param="body.prompt",
                type="Bad Request",
            )
        if not all(items):
            raise Refused("The decoder prompt cannot be empty")
        return [Prompt.of(item) for item in items]


class ChatRequest(GenerationRequest, kw_only=True):
    """/v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    logprobs: bool | None = False
    top_logprobs: int | None = 0

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        if (self.top_logprobs or 0) < 0:
            raise Refused("`top_logprobs` must not be negative.", param="top_logprobs")
        super().check()
        if self.continue_final_message and self.add_generation_prompt:
            raise Refused("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
        if self.top_logprobs and not self.logprobs:
            raise Refused("when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs")

    def prompts(self) -> list[Prompt]:
        """The conversation as one prompt. Raises Refused."""
        return [Prompt.of(render(self.messages, open=self.continue_final_message))]


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """/tokenize: a text, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    continue_final_message: bool = False
    return_token_strs: bool | None = False

    def text(self) -> str:
        if self.prompt is not None:
            return self.prompt
        if self.messages is None:
            raise Refused("prompt or messages: one is required", param="body.prompt", type="Bad Request")
        return render(self.messages, open=self.continue_final_message)


def render(messages: list[dict[str, Any]], *, open: bool) -> str:
    """The chat template. `open`: the last message has no end yet. Raises Refused."""
    if not messages:
        raise Refused("Cannot apply chat template to an empty conversation. Provide at least one message.")
    parts = [
        f"<{_role(index, message)}>{_content(index, message)}\n" for index, message in enumerate(messages)
    ]
    text = "".join(parts)
    return text[:-1] if open else text + "<assistant>"


def _role(index: int, message: dict[str, Any]) -> str:
    role = message.get("role")
    if not isinstance(role, str):
        raise _unfit(index, "has no role")
    return role


def _content(index: int, message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise Refused(f"messages[{index}] has content other than text.")
        return "\n".join(texts)  # type: ignore[arg-type]
    if not isinstance(content, str | None):
        raise _unfit(index, "has content that is neither text nor a list of parts")
    return content or ""


def _unfit(index: int, why: str) -> Refused:
    return Refused(f"messages[{index}] {why}", param=f"body.messages.{index}", type="Bad Request")
