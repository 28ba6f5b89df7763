"""The OpenAI API's messages in the form vLLM and SGLang give them.

Requests are encoded by orjson from what the caller set and nothing else. Answers are decoded by msgspec into
the structs below, which skip what nobody asked for and take null for every optional field; what does not fit
is MalformedResponse. Samples are made here and only here. An error status becomes a ResponseError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar

import msgspec
import orjson

from penstock.errors import (
    ConfigError,
    MalformedResponse,
    Overloaded,
    RequestRejected,
    ResponseError,
    ServerFailed,
)
from penstock.sample import Sample, SamplingParams, Usage, split_reasoning
from penstock.wire.connection import Response

MAX_MESSAGE: Final = 2000
"""Characters of a server's error message that are kept."""
MAX_EXCERPT: Final = 200
"""Characters of an unreadable answer that are quoted."""
UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not the JSON they should be; the last for deep nesting."""


class PromptTokensDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class UsageBody(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptTokensDetails | None = None


class TokenLogprob(msgspec.Struct, gc=False):
    logprob: float | None = None


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob] | None = None


class TextLogprobs(msgspec.Struct):
    token_logprobs: list[float | None] | None = None


class ChatMessage(msgspec.Struct, gc=False):
    """The message of an answer. `reasoning_content` is the older name of `reasoning`."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[dict[str, Any], ...] | None = None


class ChatChoice(msgspec.Struct, gc=False):
    message: ChatMessage
    index: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    matched_stop: str | int | None = None
    """SGLang's name of `stop_reason`."""
    token_ids: tuple[int, ...] | None = None
    response_token_ids: tuple[int, ...] | None = None
    """SGLang's name of `token_ids`."""
    prompt_token_ids: tuple[int, ...] | None = None
    """SGLang has them here, vLLM beside the choices."""
    weight_versions: tuple[tuple[int, int], ...] | None = None
    """The embedded engine's, where it is asked with `return_weight_versions`."""
    logprobs: ChatLogprobs | None = None


class ChatCompletion(msgspec.Struct, gc=False):
    choices: list[ChatChoice]
    id: str | None = None
    model: str | None = None
    usage: UsageBody | None = None
    prompt_token_ids: tuple[int, ...] | None = None


class TextChoice(msgspec.Struct, gc=False):
    text: str | None = None
    index: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    matched_stop: str | int | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    weight_versions: tuple[tuple[int, int], ...] | None = None
    logprobs: TextLogprobs | None = None


class TextCompletion(msgspec.Struct, gc=False):
    choices: list[TextChoice]
    id: str | None = None
    model: str | None = None
    usage: UsageBody | None = None


class ModelCard(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class ModelList(msgspec.Struct):
    data: list[ModelCard]


class Tokenized(msgspec.Struct):
    tokens: tuple[int, ...]


class Detokenized(msgspec.Struct):
    prompt: str | None = None
    text: str = ""


class Origin(msgspec.Struct, frozen=True, gc=False):
    """Who generated a sample, in how many attempts and seconds: what the answer itself does not say."""

    endpoint: str
    attempts: int
    latency: float


T = TypeVar("T")

_decode_chat: Final = msgspec.json.Decoder(ChatCompletion).decode
_decode_text: Final = msgspec.json.Decoder(TextCompletion).decode
_decode_models: Final = msgspec.json.Decoder(ModelList).decode
_decode_tokens: Final = msgspec.json.Decoder(Tokenized).decode
_decode_detokenized: Final = msgspec.json.Decoder(Detokenized).decode


# -- requests -------------------------------------------------------------------------------------


def chat_fields(
    messages: Sequence[Mapping[str, Any]],
    params: SamplingParams | None,
    model: str | None,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The fields of a chat completion request; `extra` is merged in last."""
    fields: dict[str, Any] = {"model": model, "messages": messages} if model else {"messages": messages}
    if params is not None:
        fields.update(params.as_dict())
        if "logprobs" in fields:
            fields["top_logprobs"] = fields["logprobs"]
            fields["logprobs"] = True
    if extra:
        fields.update(extra)
    return fields


def text_fields(
    prompt: str | Sequence[int],
    params: SamplingParams | None,
    model: str | None,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The fields of a text completion request; the prompt is text or token ids."""
    fields: dict[str, Any] = {"model": model, "prompt": prompt} if model else {"prompt": prompt}
    if params is not None:
        fields.update(params.as_dict())
    if extra:
        fields.update(extra)
    return fields


def encode(fields: Mapping[str, Any]) -> bytes:
    """The body of a request. Raises ConfigError when it cannot be written as JSON."""
    try:
        return orjson.dumps(fields)
    except TypeError as error:
        raise ConfigError(f"the request cannot be written as JSON: {error}") from error


def with_rid(body: bytes, request_id: str) -> bytes:
    """The body of a request with SGLang's name for its id."""
    return b'%s,"rid":%s}' % (body[:-1], orjson.dumps(request_id))


# -- answers --------------------------------------------------------------------------------------


def chat_samples(body: bytes, origin: Origin, count: int = 1) -> list[Sample]:
    """The samples in a chat completion, in the order of the answer.

    Raises MalformedResponse, and ConfigError when they are not `count`: the server does not know `n`.
    """
    answer = _decoded(_decode_chat, body, "chat completion")
    if count == 1 == len(answer.choices):
        return [_chat_sample(answer, answer.choices[0], usage_of(answer.usage), origin)]
    usages = _usages(answer.choices, answer.usage, count)
    return [
        _chat_sample(answer, choice, usage, origin)
        for choice, usage in zip(answer.choices, usages, strict=True)
    ]


def _chat_sample(answer: ChatCompletion, choice: ChatChoice, usage: Usage, origin: Origin) -> Sample:
    message = choice.message
    text = message.content or ""
    reasoning = message.reasoning or message.reasoning_content
    logprobs = choice.logprobs.content if choice.logprobs is not None else None
    return Sample(
        text=text,
        reasoning=reasoning or reasoning_of(text),
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason if choice.stop_reason is not None else choice.matched_stop,
        index=choice.index,
        token_ids=choice.token_ids if choice.token_ids is not None else choice.response_token_ids,
        prompt_token_ids=answer.prompt_token_ids or choice.prompt_token_ids,
        logprobs=None if logprobs is None else tuple([number(token.logprob) for token in logprobs]),
        weight_versions=choice.weight_versions,
        tool_calls=message.tool_calls or None,
        usage=usage,
        model=answer.model,
        request_id=answer.id,
        endpoint=origin.endpoint,
        attempts=origin.attempts,
        latency=origin.latency,
    )


def text_samples(body: bytes, origin: Origin, count: int = 1) -> list[Sample]:
    """The samples in a text completion, in the order of the answer.

    Raises MalformedResponse, and ConfigError when they are not `count`: the server does not know `n`.
    """
    answer = _decoded(_decode_text, body, "text completion")
    if count == 1 == len(answer.choices):
        return [_text_sample(answer, answer.choices[0], usage_of(answer.usage), origin)]
    usages = _usages(answer.choices, answer.usage, count)
    return [
        _text_sample(answer, choice, usage, origin)
        for choice, usage in zip(answer.choices, usages, strict=True)
    ]


def _text_sample(answer: TextCompletion, choice: TextChoice, usage: Usage, origin: Origin) -> Sample:
    text = choice.text or ""
    logprobs = choice.logprobs.token_logprobs if choice.logprobs is not None else None
    return Sample(
        text=text,
        reasoning=reasoning_of(text),
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason if choice.stop_reason is not None else choice.matched_stop,
        index=choice.index,
        token_ids=choice.token_ids,
        prompt_token_ids=choice.prompt_token_ids,
        logprobs=None if logprobs is None else tuple([number(value) for value in logprobs]),
        weight_versions=choice.weight_versions,
        usage=usage,
        model=answer.model,
        request_id=answer.id,
        endpoint=origin.endpoint,
        attempts=origin.attempts,
        latency=origin.latency,
    )


def token_ids(body: bytes) -> tuple[int, ...]:
    """The ids in the answer of a /tokenize route. Raises MalformedResponse."""
    return _decoded(_decode_tokens, body, "list of tokens").tokens


def detokenized(body: bytes) -> str:
    """The text in the answer of a /detokenize route: vLLM's `prompt`, SGLang's `text`. Raises
    MalformedResponse."""
    answer = _decoded(_decode_detokenized, body, "text of tokens")
    return answer.prompt if answer.prompt is not None else answer.text


def model_names(body: bytes) -> list[str]:
    """The ids in a model list. Raises MalformedResponse."""
    return [card.id for card in _decoded(_decode_models, body, "model list").data]


def context_length(body: bytes, model: str | None) -> int | None:
    """Tokens the named model (None: the first) takes, prompt and completion, from a model list that says
    so."""
    for card in _decoded(_decode_models, body, "model list").data:
        if model is None or card.id == model:
            return card.max_model_len
    return None


def _decoded(decode: Callable[[bytes], T], body: bytes, what: str) -> T:
    try:
        return decode(body)
    except UNREADABLE as error:
        message = _error_fields(body)[0]
        raise MalformedResponse(f"the answer is not a {what} ({error}): {message[:MAX_EXCERPT]}") from error


def number(value: float | None) -> float:
    """A logprob; NaN where an engine wrote null."""
    return math.nan if value is None else value


def reasoning_of(text: str) -> str | None:
    """What stands between the reasoning tags of a text."""
    return split_reasoning(text)[0] if "think>" in text else None  # most texts have none: one search


def usage_of(body: UsageBody | None) -> Usage:
    if body is None:
        return Usage()
    details = body.prompt_tokens_details
    cached = details.cached_tokens if details is not None else 0
    return Usage(body.prompt_tokens or 0, body.completion_tokens or 0, cached or 0)


def _usages(choices: Sequence[ChatChoice | TextChoice], body: UsageBody | None, count: int) -> list[Usage]:
    """The usage of each choice.

    An answer has one for all: each choice gets its own tokens where they are known, else the first gets all.
    """
    whole = usage_of(body)
    if not choices:
        raise MalformedResponse("the answer holds no choices")
    if len(choices) != count:
        raise ConfigError(
            f"asked for n={count} completions, the server answered {len(choices)}: send that many requests"
        )
    if all(choice.token_ids is not None for choice in choices):
        own = [len(choice.token_ids or ()) for choice in choices]
    else:
        own = [whole.completion_tokens] + [0] * (count - 1)
    return [Usage(whole.prompt_tokens, tokens, whole.cached_tokens) for tokens in own]


# -- error statuses -------------------------------------------------------------------------------


def response_error(response: Response, now: datetime | None = None) -> ResponseError:
    """The error that a status other than 2xx stands for. `now` is what a Retry-After date is held against."""
    status = response.status
    message, kind, param, code = _error_fields(response.body)
    if 300 <= status < 400:
        target = (response.header(b"location") or b"elsewhere").decode("latin-1")
        message = f"the server redirects to {target}; give that as the base URL"
    error: type[ResponseError] = RequestRejected
    if status in (408, 429, 503):
        error = Overloaded
    elif status >= 500:
        error = ServerFailed
    wait = _retry_after(response.header(b"retry-after"), now or datetime.now(UTC))
    return error(status, message[:MAX_MESSAGE], type=kind, param=param, code=code, retry_after=wait)


def _error_fields(body: bytes) -> tuple[str, str | None, str | None, str | int | None]:
    """Message, type, param and code of an error: OpenAI's form, FastAPI's `detail`, a flat one, or text."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        data = None
    if not isinstance(data, dict):
        text = body[: 4 * MAX_MESSAGE].decode("utf-8", "replace").strip()
        return text or "the server gave no reason", None, None, None
    error = data.get("error", data)
    if not isinstance(error, dict):
        return str(error), None, None, None
    message = error.get("message", error.get("detail"))
    if message is None:
        message = orjson.dumps(error).decode()
    elif not isinstance(message, str):
        message = orjson.dumps(message).decode()
    code = error.get("code")
    return (
        message,
        _text(error.get("type")),
        _text(error.get("param")),
        code if isinstance(code, str | int) else None,
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _retry_after(value: bytes | None, now: datetime) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date; None when it holds neither."""
    if value is None:
        return None
    text = value.decode("latin-1").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(text) - now).total_seconds()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
