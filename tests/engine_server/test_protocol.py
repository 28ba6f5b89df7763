"""Whatever a body holds, it is a request or a refusal that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.params import Defaults, Limits, completion_length, sampling_params
from penstock.engine.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    plain_message,
)
from penstock.errors import ConfigError
from penstock.wire.openai_server import Reader, Refused

LIMITS = Limits(max_model_len=100, vocab_size=50)
CHAT, COMPLETION = Reader(ChatRequest), Reader(CompletionRequest)
SCALARS = st.none() | st.booleans() | st.integers(-5, 200) | st.floats(allow_nan=False) | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
FIELDS = sorted({*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__})
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5)


@given(body=BODIES, messages=VALUES)
def test_any_chat_body_is_accepted_or_refused(body: dict[str, Any], messages: Any) -> None:
    accepted_or_refused(CHAT, {"messages": messages} | body)
    accepted_or_refused(CHAT, {"messages": [{"role": "user", "content": "a"}]} | body)


@given(body=BODIES)
def test_any_completion_body_is_accepted_or_refused(body: dict[str, Any]) -> None:
    accepted_or_refused(COMPLETION, {"prompt": "a"} | body)


@given(content=st.binary(max_size=30))
def test_any_bytes_are_refused_or_read(content: bytes) -> None:
    for reader in (CHAT, COMPLETION):
        try:
            reader.read(content)
        except Refused as refused:
            assert refused.code == 400 and str(refused.param).startswith("body")


def accepted_or_refused(
    reader: Reader[ChatRequest] | Reader[CompletionRequest], body: dict[str, Any]
) -> None:
    try:
        request = reader.read(json.dumps(body).encode())
        request.check()
        request.stop_strings()
        if isinstance(request, CompletionRequest):
            assert all(isinstance(prompt, str | list) for prompt in request.prompts())
        else:
            assert all(isinstance(plain_message(message)["content"], str) for message in request.messages)
        wanted = completion_length(request, LIMITS)
        params = sampling_params(request, Defaults(), LIMITS, 20 if wanted is None else min(wanted, 20))
    except Refused as refused:
        assert refused.code == 400 and str(refused)
    else:
        assert 1 <= params.max_tokens <= 20 and params.min_tokens <= params.max_tokens
        assert params.n == 1 or params.temperature > 0
        assert params.logprobs is None or 0 <= params.logprobs <= 20


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": "x"}, "body.max_tokens"),
        ({"max_tokens": [1]}, "body.max_tokens"),
        ({"stop": {"a": 1}}, "body.stop"),
        ({"stop_token_ids": [1, "x"]}, "body.stop_token_ids.1"),
        ({"prompt": [[1, 2], [3, "x"]]}, "body.prompt.1.1"),
        ({"stream_options": {"include_usage": "x"}}, "body.stream_options.include_usage"),
        ({"seed": 2**70}, "body.seed"),
        ({"n": None}, "body.n"),
    ],
)
def test_refusal_names_the_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as caught:
        COMPLETION.read(json.dumps({"prompt": "a"} | body).encode())
    assert caught.value.param == param
    assert param.removeprefix("body.").partition(".")[0] in str(caught.value)


@pytest.mark.parametrize("name", [*GenerationRequest.unsupported, "suffix", "prompt_embeds"])
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    with pytest.raises(Refused) as caught:
        COMPLETION.read(json.dumps({"prompt": "a", name: 5}).encode()).check()
    assert caught.value.param == name
    COMPLETION.read(json.dumps({"prompt": "a", name: None}).encode()).check()


def test_defaults_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    settings = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True, "max_new_tokens": 7}
    assert Defaults.load(tmp_path) == Defaults()
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    defaults = Defaults.load(tmp_path)
    request = COMPLETION.read(b'{"prompt": "a", "top_p": 0.5}')
    params = sampling_params(request, defaults, LIMITS, 5)
    assert (params.temperature, params.top_k, params.top_p, defaults.max_new_tokens) == (0.6, 20, 0.5, 7)
    (tmp_path / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(ConfigError, match="temperature"):
        Defaults.load(tmp_path)


def test_small_temperatures_are_raised_and_zero_is_greedy() -> None:
    def temperature(value: float) -> float:
        request = COMPLETION.read(json.dumps({"prompt": "a", "temperature": value}).encode())
        return sampling_params(request, Defaults(), LIMITS, 5).temperature

    assert [temperature(value) for value in (0, 0.001, 0.5)] == [0, 0.01, 0.5]
