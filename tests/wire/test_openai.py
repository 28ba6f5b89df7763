"""Requests as they are sent, answers of vLLM and SGLang as samples, error bodies as errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from penstock.errors import (
    ConfigError,
    MalformedResponse,
    Overloaded,
    RequestRejected,
    ResponseError,
    ServerFailed,
)
from penstock.sample import Sample, SamplingParams, Usage
from penstock.wire.connection import Response
from penstock.wire.openai import (
    MAX_MESSAGE,
    Origin,
    chat_fields,
    chat_samples,
    context_length,
    detokenized,
    encode,
    model_names,
    response_error,
    text_fields,
    text_samples,
    token_ids,
)

ORIGIN = Origin("http://e", 2, 1.5)


def chat(message: dict[str, Any], choice: dict[str, Any] | None = None, **fields: Any) -> Sample:
    choices = [{"index": 0, "message": message, **(choice or {})}]
    body = orjson.dumps({"id": "c-1", "model": "m", "choices": choices, **fields})
    (sample,) = chat_samples(body, ORIGIN)
    return sample


def text(choice: dict[str, Any], **fields: Any) -> Sample:
    body = orjson.dumps({"id": "c-1", "model": "m", "choices": [choice], **fields})
    (sample,) = text_samples(body, ORIGIN)
    return sample


def test_only_what_was_set_is_sent() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert chat_fields(messages, None, None, None) == {"messages": messages}
    params = SamplingParams(temperature=0.5, stop=("a",), seed=3)
    assert orjson.loads(encode(chat_fields(messages, params, "m", {"top_k": 4, "seed": 5}))) == {
        "model": "m",
        "messages": messages,
        "temperature": 0.5,
        "stop": ["a"],
        "seed": 5,
        "top_k": 4,
    }


def test_logprobs_take_the_form_of_the_route() -> None:
    params = SamplingParams(logprobs=0)
    sent = chat_fields([], params, None, None)
    assert sent == {"messages": [], "logprobs": True, "top_logprobs": 0}
    assert text_fields([1, 2], params, None, None) == {"prompt": [1, 2], "logprobs": 0}


@pytest.mark.parametrize("content", ["\ud800", object(), {1: 2}, 1 << 70])
def test_what_is_not_json_is_refused(content: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        encode(chat_fields([{"role": "user", "content": content}], None, None, None))


def test_a_chat_completion_of_vllm() -> None:
    sample = chat(
        {"role": "assistant", "content": "4", "reasoning": "2+2", "tool_calls": [], "refusal": None},
        {
            "finish_reason": "stop",
            "stop_reason": 7,
            "token_ids": [5, 6],
            "logprobs": {"content": [{"token": "a", "logprob": -0.5, "bytes": [1]}, {"logprob": -1.5}]},
        },
        usage={
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
        prompt_token_ids=[1, 2, 3],
        kv_transfer_params=None,
    )
    assert sample == Sample(
        text="4",
        reasoning="2+2",
        finish_reason="stop",
        stop_reason=7,
        token_ids=(5, 6),
        prompt_token_ids=(1, 2, 3),
        logprobs=(-0.5, -1.5),
        usage=Usage(3, 2, 1),
        model="m",
        request_id="c-1",
        endpoint="http://e",
        attempts=2,
        latency=1.5,
    )


def test_nulls_and_older_names() -> None:
    nulls = {"finish_reason": None, "stop_reason": None, "token_ids": None, "logprobs": None}
    sample = chat({"content": None, "reasoning_content": "why"}, nulls, usage=None, prompt_token_ids=None)
    assert (sample.text, sample.reasoning, sample.usage) == ("", "why", Usage())
    assert chat({"content": "x"}, {"matched_stop": "END"}).stop_reason == "END"
    assert chat({"content": "x"}, usage={"prompt_tokens_details": None}).usage == Usage()


def test_reasoning_falls_back_to_the_tags() -> None:
    assert chat({"content": "<think>why</think>4"}).reasoning == "why"
    assert chat({"content": "why</think>4"}).reasoning == "why"
    assert chat({"content": "<think>why", "reasoning": ""}).reasoning == "why"
    assert chat({"content": "4"}).reasoning is None


def test_a_text_completion_of_vllm() -> None:
    sample = text(
        {
            "index": 0,
            "text": "abc",
            "logprobs": {"tokens": ["a"], "token_logprobs": [None, -0.25], "top_logprobs": [{"a": -1.0}]},
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [9],
            "prompt_token_ids": [1],
        }
    )
    assert (sample.text, sample.finish_reason, sample.token_ids) == ("abc", "length", (9,))
    assert sample.prompt_token_ids == (1,)
    assert sample.logprobs is not None and math.isnan(sample.logprobs[0]) and sample.logprobs[1] == -0.25


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"choices": null}',
        b'{"choices": []}',
        b'{"choices": [{}]}',
        b"<html>",
        b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_what_is_no_completion_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedResponse):
        chat_samples(body, ORIGIN)
    if body != b'{"choices": [{}]}':
        with pytest.raises(MalformedResponse):
            text_samples(body, ORIGIN)


def test_an_error_in_a_200_is_quoted() -> None:
    with pytest.raises(MalformedResponse, match="engine is dead"):
        chat_samples(b'{"error": {"message": "engine is dead", "code": 500}}', ORIGIN)


def choices(*texts: str, **fields: Any) -> list[dict[str, Any]]:
    return [
        {"index": index, "message": {"content": text}, "text": text, **fields}
        for index, text in enumerate(texts)
    ]


@pytest.mark.parametrize("decode", [chat_samples, text_samples])
def test_several_samples_share_one_usage(decode: Callable[[bytes, Origin, int], list[Sample]]) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 9}
    body = orjson.dumps({"choices": choices("a", "b", "c"), "usage": usage})
    samples = decode(body, ORIGIN, 3)
    assert [(sample.index, sample.text) for sample in samples] == [(0, "a"), (1, "b"), (2, "c")]
    # whose tokens they were is not known; that they are nine is
    assert [sample.usage for sample in samples] == [Usage(3, 9), Usage(3, 0), Usage(3, 0)]
    body = orjson.dumps({"choices": choices("a", "b", token_ids=[1, 2, 3]), "usage": usage})
    assert [sample.usage for sample in decode(body, ORIGIN, 2)] == [Usage(3, 3), Usage(3, 3)]


@pytest.mark.parametrize("decode", [chat_samples, text_samples])
@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_samples_than_asked_for(
    decode: Callable[[bytes, Origin, int], list[Sample]], count: int
) -> None:
    body = orjson.dumps({"choices": choices("a", "b")})
    with pytest.raises(ConfigError, match=f"n={count} .* answered 2"):
        decode(body, ORIGIN, count)


def test_tokens_of_both_engines() -> None:
    assert token_ids(b'{"count": 2, "max_model_len": 9, "tokens": [5, 6], "token_strs": null}') == (5, 6)
    assert token_ids(b'{"tokens": []}') == ()
    assert detokenized(b'{"prompt": "ab"}') == "ab"
    assert detokenized(b'{"text": "ab"}') == "ab"
    for body in (b"{}", b'{"tokens": ["a"]}', b"", b"[1]"):
        with pytest.raises(MalformedResponse):
            token_ids(body)
    with pytest.raises(MalformedResponse):
        detokenized(b'{"prompt": 3}')


def test_the_context_length_of_a_model() -> None:
    body = b'{"data": [{"id": "a", "max_model_len": 7}, {"id": "b"}, {"id": "c", "max_model_len": 9}]}'
    assert [context_length(body, name) for name in (None, "a", "b", "c", "d")] == [7, 7, None, 9, None]
    assert context_length(b'{"data": []}', None) is None
    with pytest.raises(MalformedResponse):
        context_length(b"<html>", None)


def test_model_names() -> None:
    assert model_names(b'{"object": "list", "data": [{"id": "a", "root": "/x"}, {"id": "b"}]}') == ["a", "b"]


def error(status: int, body: bytes, headers: dict[bytes, bytes] | None = None) -> ResponseError:
    return response_error(Response(status, headers or {}, body), datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, RequestRejected),
        (400, RequestRejected),
        (401, RequestRejected),
        (404, RequestRejected),
        (408, Overloaded),
        (422, RequestRejected),
        (429, Overloaded),
        (500, ServerFailed),
        (502, ServerFailed),
        (503, Overloaded),
        (599, ServerFailed),
    ],
)
def test_the_status_decides_the_type(status: int, kind: type[ResponseError]) -> None:
    # a prompt that mentions another error must not change what the error is
    assert type(error(status, b'{"error": {"message": "429 rate limit 503"}}')) is kind


def test_the_forms_of_an_error_body() -> None:
    full = error(
        400, b'{"error": {"message": "too long", "type": "T", "param": "input_tokens", "code": 400}}'
    )
    assert (full.message, full.type, full.param, full.code) == ("too long", "T", "input_tokens", 400)
    assert str(full) == "400: too long"
    assert error(400, b'{"error": "plain"}').message == "plain"
    assert error(400, b'{"object": "error", "message": "flat", "code": "x"}').code == "x"
    assert error(404, b'{"detail": "Not Found"}').message == "Not Found"
    fastapi = error(422, b'{"detail": [{"loc": ["body", "n"], "msg": "bad"}]}')
    assert fastapi.message == '[{"loc":["body","n"],"msg":"bad"}]'
    assert error(500, b"Internal Server Error").message == "Internal Server Error"
    assert error(500, b"").message == "the server gave no reason"
    assert error(500, b'{"error": null, "x": 1}').message
    assert error(500, b"\xff\xfe").message
    assert len(error(500, b"x" * 100_000).message) == MAX_MESSAGE
    assert "https://new/v1" in error(301, b"", {b"Location": b"https://new/v1"}).message


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"2", 2.0),
        (b"0.5", 0.5),
        (b"-3", 0.0),
        (b"Thu, 01 Jan 2026 00:01:00 GMT", 60.0),
        (b"Wed, 31 Dec 2025 00:00:00 GMT", 0.0),
        (b"soon", None),
        (b"nan", None),
        (b"inf", None),
        (b"", None),
    ],
)
def test_retry_after(value: bytes, seconds: float | None) -> None:
    assert error(429, b"", {b"Retry-After": value}).retry_after == seconds
    assert error(429, b"").retry_after is None
