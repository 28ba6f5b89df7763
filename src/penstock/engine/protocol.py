"""What clients may ask, under the names and rules of vLLM's OpenAI server.

Bytes in, checked requests out; what is wrong is a `Refused`, which carries the status and the fields of the
error body. Fields nobody knows are ignored, as vLLM does; fields that vLLM honours and this engine cannot are
refused by name instead of being ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol

import msgspec

from penstock.wire.openai_server import DEFAULT_COMPLETION_TOKENS, Refused, StreamOptions, TokenId

MAX_STOP_STRINGS: Final = 4
"""Stop strings in one request."""

MAX_PROMPTS: Final = 1024
"""Prompts in one completion request."""

Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class GenerationRequest(msgspec.Struct, kw_only=True):
    """The fields that chats and completions share."""

    unsupported: ClassVar[dict[str, tuple[object, ...]]] = {
        "echo": (None, False),
        "logit_bias": (None, {}),
        "allowed_token_ids": (None,),
        "bad_words": (None, []),
        "prompt_logprobs": (None,),
        "logprob_token_ids": (None, []),
        "use_beam_search": (None, False),
        "structured_outputs": (None,),
        "truncate_prompt_tokens": (None,),
        "thinking_token_budget": (None, -1),
        "repetition_detection": (None,),
    }
    """Fields vLLM honours and this engine does not, with the values that ask for nothing."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    min_tokens: int = 0
    seed: Seed | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_weight_versions: bool | None = None
    """Say for each choice which weights made its tokens; vLLM does not know this field."""

    echo: Any = None
    logit_bias: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    prompt_logprobs: Any = None
    logprob_token_ids: Any = None
    use_beam_search: Any = None
    structured_outputs: Any = None
    response_format: Any = None
    truncate_prompt_tokens: Any = None
    thinking_token_budget: Any = None
    repetition_detection: Any = None

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple. Raises Refused for an empty one, or for too many."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MAX_STOP_STRINGS:
            raise Refused(
                f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(stop)}.",
                param="body.stop",
                type="Bad Request",
            )
        if not all(stop):
            raise Refused("stop cannot contain an empty string.")
        return stop

    def check(self) -> None:
        """Raises Refused for fields that contradict each other or ask for what this engine cannot."""
        for name, neutral in self.unsupported.items():
            if getattr(self, name) not in neutral:
                raise Refused(f"{name} is not supported by this engine.", param=name)
        response_format = self.response_format
        kind = response_format.get("type") if isinstance(response_format, dict) else response_format
        if kind not in (None, "text"):
            raise Refused("response_format other than text is not supported.", param="response_format")
        if self.stream_options and not self.stream:
            raise Refused("Stream options can only be defined when `stream=True`.", param="stream_options")


class CompletionRequest(GenerationRequest, kw_only=True):
    """/v1/completions."""

    unsupported: ClassVar[dict[str, tuple[object, ...]]] = GenerationRequest.unsupported | {
        "suffix": (None, ""),
        "prompt_embeds": (None, []),
    }

    prompt: str | list[TokenId | str | list[TokenId]] | None = None
    max_tokens: int | None = DEFAULT_COMPLETION_TOKENS
    n: int = 1
    logprobs: int | None = None
    add_special_tokens: bool = True
    suffix: Any = None
    prompt_embeds: Any = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or its token ids. Raises Refused unless all are of one kind."""
        prompt = self.prompt
        if prompt is None or prompt == "":
            raise Refused("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise Refused("You must pass at least one prompt")
        kind = type(prompt[0])
        for index, item in enumerate(prompt):
            if type(item) is not kind:
                raise Refused(
                    f"prompt must be all text, all token ids or all lists of them; item {index} differs.",
                    param=f"body.prompt.{index}",
                    type="Bad Request",
                )
        if kind is int:
            return [prompt]  # type: ignore[list-item]
        if len(prompt) > MAX_PROMPTS:
            raise Refused(
                f"prompt list length {len(prompt)} exceeds the maximum allowed count of {MAX_PROMPTS}.",
                param="prompt",
            )
        return prompt  # type: ignore[return-value]

    def check(self) -> None:
        """Raises Refused, see GenerationRequest.check."""
        super().check()
        if self.logprobs is not None and self.logprobs < -1:
            raise Refused("`logprobs` must be a positive value or -1.", param="logprobs")


class Templated(Protocol):
    """The fields that say how messages become a prompt."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    tools: list[dict[str, Any]] | None

    def template_arguments(self) -> dict[str, Any]:
        """Further variables of the template."""
        ...


def check_messages(request: Templated) -> None:
    """Raises Refused unless each message is one, and all that is said about the template agrees."""
    if request.continue_final_message and request.add_generation_prompt:
        raise Refused("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    if request.chat_template is not None or (request.chat_template_kwargs or {}).get("chat_template"):
        raise Refused("Chat templates in requests are not trusted: this one is refused.")
    if not request.messages:
        raise Refused("Cannot apply chat template to an empty conversation. Provide at least one message.")
    for index, message in enumerate(request.messages):
        _check_message(index, message)


class ChatRequest(GenerationRequest, kw_only=True):
    """/v1/chat/completions."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = 1
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    add_special_tokens: bool = False
    tool_choice: Any = None
    documents: list[dict[str, str]] | None = None
    reasoning_effort: Effort | None = None

    def check(self) -> None:
        """Raises Refused, see GenerationRequest.check."""
        super().check()
        check_messages(self)
        top = self.top_logprobs or 0
        if top < -1:
            raise Refused("`top_logprobs` must be a positive value or -1.", param="top_logprobs")
        if top and not self.logprobs:
            raise Refused("when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs")
        if self.tools == []:
            raise Refused("`tools` must not be an empty array.", param="tools")
        if (self.tool_choice or ("auto" if self.tools else "none")) != "none":
            raise Refused("Tools can be shown to the model only with tool_choice none: nothing parses calls.")

    def template_arguments(self) -> dict[str, Any]:
        """See Templated; an effort says whether to think where nothing else does."""
        arguments = dict(self.chat_template_kwargs or {})
        if self.documents is not None:
            arguments["documents"] = self.documents
        if self.reasoning_effort is not None:
            arguments["reasoning_effort"] = self.reasoning_effort
            arguments.setdefault("enable_thinking", self.reasoning_effort != "none")
        return arguments


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """/tokenize: a text, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] = msgspec.field(default_factory=list)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = False
    add_special_tokens: bool | None = None

    def template_arguments(self) -> dict[str, Any]:
        """See Templated."""
        return self.chat_template_kwargs or {}

    def check(self) -> None:
        """Raises Refused when there is nothing to tokenize."""
        if self.prompt is None and not self.messages:
            raise Refused("prompt or messages: one is required", param="body.prompt", type="Bad Request")
        if self.prompt is None:
            check_messages(self)


def _check_message(index: int, message: Mapping[str, Any]) -> None:
    def refuse(why: str) -> Refused:
        return Refused(f"messages[{index}] {why}", param=f"body.messages.{index}", type="Bad Request")

    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise refuse("has no role")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict):
                raise refuse("has a part that is no object")
            if not isinstance(part.get("text"), str):
                raise Refused(f"messages[{index}] has content other than text; the model reads only text.")
    elif not isinstance(content, str | None):
        raise refuse(f"has content that is neither text nor a list of parts but {type(content).__name__}")


def plain_message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message as chat templates expect it: text in one string, reasoning under both its names."""
    content = message.get("content")
    if isinstance(content, str) and len(message) == 2:
        return message
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content or ())
    plain = {**message, "content": content}
    reasoning = plain.get("reasoning", plain.get("reasoning_content"))
    if reasoning is not None:
        plain["reasoning"] = plain["reasoning_content"] = reasoning
    return plain
