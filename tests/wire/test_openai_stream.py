"""Streamed completions in the chunks of vLLM and of SGLang, cut in any way, and garbage."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import MalformedResponse, Overloaded, RequestRejected, ResponseError, ServerFailed
from penstock.sample import Delta, Sample, Usage
from penstock.wire.openai import Origin
from penstock.wire.openai_stream import Partial

ORIGIN = Origin("http://e", 1, 0.5)
HEAD = {"id": "cmpl-1", "object": "x", "created": 1, "model": "m"}


def chunk(choice: dict[str, Any] | None = None, **fields: Any) -> bytes:
    choices = [] if choice is None else [{"index": 0, "logprobs": None, "finish_reason": None, **choice}]
    return orjson.dumps({**HEAD, "choices": choices, **fields})


def chat(content: str | None, **fields: Any) -> bytes:
    return chunk({"delta": {"content": content}, **fields})


def read(*events: bytes) -> tuple[Partial, list[Delta]]:
    partial = Partial()
    deltas = [delta for event in events if (delta := partial.feed(event)) is not None]
    return partial, deltas


def test_a_chat_of_vllm() -> None:
    logprobs = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]}
    usage = {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3}
    partial, deltas = read(
        chunk({"delta": {"role": "assistant", "content": ""}}, prompt_token_ids=[1, 2, 3], prompt_text=None),
        chunk({"delta": {"reasoning": "why", "reasoning_content": "why"}, "token_ids": [4]}),
        chunk({"delta": {"content": "a"}, "logprobs": logprobs, "token_ids": [5]}, usage=None),
        chunk({"delta": {"content": ""}, "finish_reason": "stop", "stop_reason": 7, "token_ids": [6]}),
        chunk(usage={**usage, "prompt_tokens_details": {"cached_tokens": 2}}, system_fingerprint="f"),
    )
    assert deltas == [
        Delta("", "why", (4,)),
        Delta("a", "", (5,), (-0.5,)),
        Delta("", "", (6,)),
    ]
    assert partial.finished
    assert partial.sample(ORIGIN) == Sample(
        text="a",
        reasoning="why",
        finish_reason="stop",
        stop_reason=7,
        token_ids=(4, 5, 6),
        prompt_token_ids=(1, 2, 3),
        logprobs=(-0.5,),
        usage=Usage(3, 3, 2),
        model="m",
        request_id="cmpl-1",
        endpoint="http://e",
        latency=0.5,
    )


def test_a_text_completion_of_vllm() -> None:
    logprobs = {"text_offset": [0], "token_logprobs": [None], "tokens": ["a"], "top_logprobs": [{"a": -1.0}]}
    continuous = {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1}
    last = {"text": "", "finish_reason": "length", "stop_reason": None, "token_ids": [5]}
    partial, deltas = read(
        chunk({"text": "", "prompt_token_ids": [9], "token_ids": [3]}),
        chunk(
            {"text": "a", "logprobs": logprobs, "prompt_token_ids": None, "token_ids": [4]}, usage=continuous
        ),
        chunk(last, usage={**continuous, "completion_tokens": 3}),
    )
    # the token that gave no text comes with the next one that does
    assert [(delta.text, delta.token_ids) for delta in deltas] == [("a", (3, 4)), ("", (5,))]
    sample = partial.sample(ORIGIN)
    assert (sample.token_ids, sample.prompt_token_ids, sample.usage) == ((3, 4, 5), (9,), Usage(1, 3))
    assert sample.logprobs is not None and math.isnan(sample.logprobs[0])


def test_a_chat_of_sglang() -> None:
    partial, deltas = read(
        chunk({"delta": {"role": "assistant", "content": "", "reasoning_content": None}}, usage=None),
        chunk({"delta": {"role": None, "content": None, "reasoning_content": "hm"}, "matched_stop": None}),
        chat("a", matched_stop=None),
        chat(None, finish_reason="stop", matched_stop="END"),
        chunk(usage={"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": None}),
    )
    assert [(delta.text, delta.reasoning) for delta in deltas] == [("", "hm"), ("a", ""), ("", "")]
    sample = partial.sample(ORIGIN)
    assert (sample.text, sample.reasoning, sample.stop_reason) == ("a", "hm", "END")
    assert (sample.token_ids, sample.logprobs, sample.usage) == (None, None, Usage(3, 4))


def test_one_piece_without_ids_leaves_none() -> None:
    partial, _ = read(chat("a", token_ids=[1]), chat("b", token_ids=None), chat("", finish_reason="stop"))
    assert partial.sample(ORIGIN).token_ids is None
    # but a chunk that only ends the stream has no tokens to name
    partial, _ = read(chat("a", token_ids=[1]), chat("", finish_reason="stop"))
    assert partial.sample(ORIGIN).token_ids == (1,)


def test_tags_become_reasoning_where_the_engine_leaves_them() -> None:
    partial, deltas = read(chat("<think>why</"), chat("think>4"), chat("", finish_reason="stop"))
    assert [delta.reasoning for delta in deltas] == ["", "", ""]
    assert partial.sample(ORIGIN).reasoning == "why"
    assert partial.sample(ORIGIN).text == "<think>why</think>4"


def test_what_breaks_off_is_not_finished_and_drops_what_it_held() -> None:
    partial, deltas = read(chat("a", token_ids=[1]), chat("", token_ids=[2]))
    assert not partial.finished and len(deltas) == 1
    partial.drop_held()
    partial.feed(chat("b", token_ids=[3]))
    assert partial.token_ids == [1, 3]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "bad", "type": "BadRequestError", "code": 400}, RequestRejected),
        ({"message": "dead", "type": "InternalServerError", "code": 500}, ServerFailed),
        ({"message": "busy", "type": "x", "param": None, "code": 503}, Overloaded),
        ({"object": "error", "message": "abort", "code": "400"}, ServerFailed),
        ({"message": "odd", "code": 200}, ServerFailed),
        ({"message": "odd", "code": None}, ServerFailed),
        ({"message": "odd", "code": 4.5}, ServerFailed),
        ({}, ServerFailed),
        ("boom", ServerFailed),
    ],
)
def test_an_error_event(error: Any, kind: type[ResponseError]) -> None:
    partial, _ = read(chat("a"))
    with pytest.raises(kind) as caught:
        partial.feed(orjson.dumps({"error": error}))
    message = error if isinstance(error, str) else error.get("message", "{}")
    assert caught.value.message == message
    assert partial.text == ["a"] and not partial.finished


def test_no_error_is_no_error() -> None:
    assert read(chunk({"delta": {"content": "a"}}, error=None))[1] == [Delta("a")]


GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff",
    b"<html>",
    b"[DONE",
    b'{"choices": null}',
    b'{"choices": [3]}',
    b'{"choices": [{"delta": {"content": 3}}]}',
    b'{"choices": [{"text": "a", "token_ids": ["x"]}]}',
    b'{"choices": [{"text": "a", "logprobs": 7}]}',
    b'{"choices": [{"text": "a", "logprobs": {"token_logprobs": [1e999]}}]}',
    b'{"choices": [{"text": "\\ud800"}]}',
    b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"error":{"code":"\xff"}}',
    b'{"choices": [{"text": "a", "logprobs": ' + b"[" * 5000 + b"]" * 5000 + b"}]}",
]


@pytest.mark.parametrize("event", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage(event: bytes) -> None:
    with pytest.raises((MalformedResponse, ResponseError)):
        Partial().feed(event)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
NAMES = ["delta", "text", "finish_reason", "stop_reason", "matched_stop", "token_ids", "logprobs", "index"]
CHOICE = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4)
EVENT = st.fixed_dictionaries(
    {},
    optional={
        "choices": st.lists(CHOICE | JSON, max_size=2) | JSON,
        "error": JSON,
        "usage": JSON,
        "prompt_token_ids": JSON,
        "id": JSON,
    },
)


@given(st.lists(st.binary(max_size=40) | EVENT, max_size=4))
def test_no_garbage_raises_anything_else(events: list[bytes | dict[str, Any]]) -> None:
    partial = Partial()
    for event in events:
        try:
            data = event if isinstance(event, bytes) else orjson.dumps(event)
        except TypeError:  # an integer no JSON has
            continue
        try:
            partial.feed(data)
        except (MalformedResponse, ResponseError):
            pass
    assert partial.sample(ORIGIN)


TOKEN = st.tuples(st.text(max_size=3), st.integers(0, 99), st.floats(-20, 0))


@st.composite
def cut(draw: st.DrawFn) -> tuple[list[tuple[str, int, float]], list[int], bool]:
    """A completion, where it is cut into chunks, and whether as chat."""
    tokens = draw(st.lists(TOKEN, min_size=1, max_size=12))
    places = draw(st.sets(st.integers(0, len(tokens))))
    return tokens, sorted({0, len(tokens), *places}), draw(st.booleans())


@given(cut(), st.booleans(), st.booleans())
def test_the_sample_is_the_same_however_it_is_cut(
    completion: tuple[list[tuple[str, int, float]], list[int], bool], split_end: bool, usage_alone: bool
) -> None:
    tokens, cuts, as_chat = completion
    usage = {"prompt_tokens": 2, "completion_tokens": len(tokens)}
    events = [chunk({"delta": {"role": "assistant", "content": ""}}, prompt_token_ids=[7])] if as_chat else []
    for start, end in pairwise(cuts):
        piece = tokens[start:end]
        values = [logprob for _, _, logprob in piece]
        logprobs: dict[str, Any] = {"token_logprobs": values}
        body: dict[str, Any] = {"text": "".join(text for text, _, _ in piece)}
        if as_chat:
            logprobs = {"content": [{"logprob": value} for value in values]}
            body = {"delta": {"content": body["text"]}}
        elif not events:
            body["prompt_token_ids"] = [7]
        ending = {} if split_end or end < len(tokens) else {"finish_reason": "stop"}
        ids = [id for _, id, _ in piece]
        last = not usage_alone and ending
        events.append(
            chunk({**body, "token_ids": ids, "logprobs": logprobs, **ending}, usage=usage if last else None)
        )
    if split_end:
        events.append(chunk({"delta": {}, "text": None, "finish_reason": "stop"}))
    if usage_alone or split_end:
        events.append(chunk(usage=usage))
    partial, deltas = read(*events)
    sample = partial.sample(ORIGIN)
    assert sample.text == "".join(text for text, _, _ in tokens)
    assert sample.token_ids == tuple(id for _, id, _ in tokens)
    assert sample.logprobs == tuple(logprob for _, _, logprob in tokens)
    assert (sample.finish_reason, sample.usage) == ("stop", Usage(2, len(tokens)))
    assert sample.prompt_token_ids == (7,)
    # together the deltas are the sample, and none but the last is empty
    assert "".join(delta.text for delta in deltas) == sample.text
    assert sum((delta.token_ids for delta in deltas), ()) == sample.token_ids
    assert sum((delta.logprobs for delta in deltas), ()) == sample.logprobs
    assert all(delta.text for delta in deltas[:-1])
