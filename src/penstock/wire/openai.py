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


class PromptTokensDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class UsageBody(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptTokensDetails | None = None


class TokenLogprob(msgspec.Struct, gc=False):
    logprob: float | None = None


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob] | None = None


class TextLogprobs(msgspec.Struct):
    token_logprobs: list[float | None] | None = None


class ChatMessage(msgspec.Struct):
    """The message of an answer. `reasoning_content` is the older name of `reasoning`."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatChoice(msgspec.Struct):
    message: ChatMessage
    index: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    matched_stop: str | int | None = None
    """SGLang's name of `stop_reason`."""
    token_ids: tuple[int, ...] | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletion(msgspec.Struct):
    choices: list[ChatChoice]
    id: str | None = None
    model: str | None = None
    usage: UsageBody | None = None
    prompt_token_ids: tuple[int, ...] | None = None


class TextChoice(msgspec.Struct):
    text: str | None = None
    index: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    matched_stop: str | int | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    logprobs: TextLogprobs | None = None


class TextCompletion(msgspec.Struct):
    choices: list[TextChoice]
    id: str | None = None
    model: str | None = None
    usage: UsageBody | None = None


class ModelCard(msgspec.Struct):
    id: str


class ModelList(msgspec.Struct):
    data: list[ModelCard]


class Origin(msgspec.Struct, frozen=True, gc=False):
    """Who generated a sample, in how many attempts and seconds: what the answer itself does not say."""

    endpoint: str
    attempts: int
    latency: float


T = TypeVar("T")

_decode_chat: Final = msgspec.json.Decoder(ChatCompletion).decode
_decode_text: Final = msgspec.json.Decoder(TextCompletion).decode
_decode_models: Final = msgspec.json.Decoder(ModelList).decode


# -- requests -------------------------------------------------------------------------------------


def chat_request(
    messages: Sequence[Mapping[str, Any]],
    params: SamplingParams | None,
    model: str | None,
    extra: Mapping[str, Any] | None,
) -> bytes:
    """The body of a chat completion request. Raises ConfigError when it cannot be written as JSON."""
    fields = params.as_dict() if params is not None else {}
    if "logprobs" in fields:
        fields["top_logprobs"] = fields["logprobs"]
        fields["logprobs"] = True
    return _encode({"model": model, "messages": messages, **fields}, extra)


def text_request(
    prompt: str | Sequence[int],
    params: SamplingParams | None,
    model: str | None,
    extra: Mapping[str, Any] | None,
) -> bytes:
    """The body of a text completion request; the prompt is text or token ids."""
    fields = params.as_dict() if params is not None else {}
    return _encode({"model": model, "prompt": prompt, **fields}, extra)


def _encode(fields: dict[str, Any], extra: Mapping[str, Any] | None) -> bytes:
    if fields["model"] is None:
        del fields["model"]
    if extra:
        fields.update(extra)
    try:
        return orjson.dumps(fields)
    except TypeError as error:
        raise ConfigError(f"the request cannot be written as JSON: {error}") from error


# -- answers --------------------------------------------------------------------------------------


def chat_sample(body: bytes, origin: Origin) -> Sample:
    """The sample in a chat completion. Raises MalformedResponse."""
    answer = _decoded(_decode_chat, body, "chat completion")
    choice = _only(answer.choices)
    message = choice.message
    text = message.content or ""
    reasoning = message.reasoning or message.reasoning_content
    logprobs = choice.logprobs.content if choice.logprobs is not None else None
    return Sample(
        text=text,
        reasoning=reasoning or _reasoning(text),
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason if choice.stop_reason is not None else choice.matched_stop,
        index=choice.index,
        token_ids=choice.token_ids,
        prompt_token_ids=answer.prompt_token_ids,
        logprobs=None if logprobs is None else tuple([_number(token.logprob) for token in logprobs]),
        usage=_usage(answer.usage),
        model=answer.model,
        request_id=answer.id,
        endpoint=origin.endpoint,
        attempts=origin.attempts,
        latency=origin.latency,
    )


def text_sample(body: bytes, origin: Origin) -> Sample:
    """The sample in a text completion. Raises MalformedResponse."""
    answer = _decoded(_decode_text, body, "text completion")
    choice = _only(answer.choices)
    text = choice.text or ""
    logprobs = choice.logprobs.token_logprobs if choice.logprobs is not None else None
    return Sample(
        text=text,
        reasoning=_reasoning(text),
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason if choice.stop_reason is not None else choice.matched_stop,
        index=choice.index,
        token_ids=choice.token_ids,
        prompt_token_ids=choice.prompt_token_ids,
        logprobs=None if logprobs is None else tuple([_number(value) for value in logprobs]),
        usage=_usage(answer.usage),
        model=answer.model,
        request_id=answer.id,
        endpoint=origin.endpoint,
        attempts=origin.attempts,
        latency=origin.latency,
    )


def model_names(body: bytes) -> list[str]:
    """The ids in a model list. Raises MalformedResponse."""
    return [card.id for card in _decoded(_decode_models, body, "model list").data]


def _decoded(decode: Callable[[bytes], T], body: bytes, what: str) -> T:
    try:
        return decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        message = _error_fields(body)[0]
        raise MalformedResponse(f"the answer is not a {what} ({error}): {message[:MAX_EXCERPT]}") from error


def _only(choices: list[T]) -> T:
    if not choices:
        raise MalformedResponse("the answer holds no choices")
    return choices[0]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _reasoning(text: str) -> str | None:
    return split_reasoning(text)[0] if "think>" in text else None  # most texts have none: one search


def _usage(body: UsageBody | None) -> Usage:
    if body is None:
        return Usage()
    details = body.prompt_tokens_details
    cached = details.cached_tokens if details is not None else 0
    return Usage(body.prompt_tokens or 0, body.completion_tokens or 0, cached or 0)


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
