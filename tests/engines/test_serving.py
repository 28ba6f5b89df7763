"""What every engine does while it serves: the same requests to the embedded engine, vLLM and SGLang."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from penstock.models import ARITHMETIC
from penstock.wire.sse import EventParser
from tests.engines.engines import CONTEXT
from tests.engines.live import Live

pytestmark = pytest.mark.engines

PROMPT = "What is 12 + 30?"
LONG = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True}
"""A completion that takes a while."""


def need(live: Live, what: str) -> None:
    """Skips a test of what the engine has no route for."""
    if live.control(what) is None:
        pytest.skip(f"{live.engine.name} has no route for: {what}")


def test_ready(live: Live) -> None:
    assert live.call(live.server.is_ready())
    assert live.call(live.server._health()) == 200
    models = json.loads(live.ask("GET", "/v1/models").body)
    assert [model["id"] for model in models["data"]] == ["arithmetic"]
    assert live.server.stage == "ready" and live.server.log_file is not None
    if live.engine.name != "embedded":
        assert live.server.log_file.stat().st_size > 1000


def test_chat(live: Live) -> None:
    async def ask() -> Any:
        async with live.server.client() as client:
            return await client.chat([{"role": "user", "content": PROMPT}])

    sample = live.call(ask())
    assert "42" in sample.text and sample.finish_reason == "stop"


def test_completion_with_token_ids_and_logprobs(live: Live) -> None:
    ids = [10, 20, 30, 40]
    answer = live.complete(prompt=ids, max_tokens=5, logprobs=0, return_token_ids=True, ignore_eos=True)
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]["token_logprobs"]
    assert len(logprobs) == 5 and all(-50 < value <= 0 for value in logprobs)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    if "completion token ids" not in live.engine.missing:
        assert (len(choice["token_ids"]), choice["prompt_token_ids"]) == (5, ids)


def test_a_prompt_of_ids_is_scored_as_the_same_text(live: Live) -> None:
    tokens = json.loads(live.ask("POST", "/tokenize", {"model": live.server.name, "prompt": PROMPT}).body)
    texts = [
        live.complete(prompt=prompt, max_tokens=8, logprobs=0)["choices"][0]
        for prompt in (PROMPT, tokens["tokens"])
    ]
    assert texts[0]["text"] == texts[1]["text"]
    pairs = zip(*(choice["logprobs"]["token_logprobs"] for choice in texts), strict=True)
    assert all(math.isclose(first, second, abs_tol=1e-4) for first, second in pairs)


def test_stream(live: Live) -> None:
    whole = live.complete(prompt=PROMPT, max_tokens=24)["choices"][0]["text"]
    response = live.call(live.completion(prompt=PROMPT, max_tokens=24, stream=True))
    assert response.status == 200
    events = [data.decode() for data in EventParser().feed(response.body)]
    assert events[-1] == "[DONE]"
    parts = [json.loads(event)["choices"] for event in events[:-1]]
    assert "".join(choices[0]["text"] for choices in parts if choices) == whole
    assert len(parts) > 3


def test_n(live: Live) -> None:
    answer = live.complete(prompt=PROMPT, max_tokens=48, n=8, temperature=2.0)
    assert sorted(choice["index"] for choice in answer["choices"]) == list(range(8))
    assert len({choice["text"] for choice in answer["choices"]}) > 1


def test_a_prompt_that_is_too_long_is_refused_and_harms_nobody(live: Live) -> None:
    response = live.call(live.completion(prompt=[7] * (CONTEXT + 50), max_tokens=4))
    assert response.status == 400
    assert live.complete(prompt=PROMPT, max_tokens=2)["choices"]


def test_metrics_count_what_is_computed(live: Live) -> None:
    request = live.begin(live.completion(**LONG))
    live.wait_until(lambda: live.metric(live.engine.running) == 1, "one request runs")
    request.cancel()
    live.wait_until(lambda: live.metric(live.engine.running) == 0, "the client went away, and it ends")


def test_abort(live: Live) -> None:
    request = live.begin(live.completion(**LONG))
    live.wait_until(lambda: live.metric(live.engine.running) == 1, "one request runs")
    assert live.control("abort") is not None
    response = request.result(30)
    said = json.loads(response.body)
    if response.status == 200:
        assert said["choices"][0]["finish_reason"] == "abort"
        assert said["usage"]["completion_tokens"] < 1900
    live.wait_until(lambda: live.metric(live.engine.running) == 0, "nothing runs")


def test_pause_ends_what_runs_and_resume_serves_again(live: Live) -> None:
    need(live, "resume")
    request = live.begin(live.completion(**LONG))
    live.wait_until(lambda: live.metric(live.engine.running) == 1, "one request runs")
    paused = live.control("pause")
    try:
        assert paused is not None and paused.status == 200
        request.result(30)
        waiting = live.begin(live.completion(prompt=PROMPT, max_tokens=2))
        with pytest.raises(TimeoutError):
            waiting.result(1.0)
    finally:
        resumed = live.control("resume")
    assert resumed is not None and resumed.status == 200
    assert waiting.result(30).status == 200


def test_a_pause_that_keeps_goes_on_where_it_was(live: Live) -> None:
    need(live, "resume")
    body = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True}
    expected = live.complete(**body)["choices"][0]["text"]
    request = live.begin(live.completion(**body))
    live.wait_until(lambda: live.metric(live.engine.running) == 1, "one request runs")
    paused = live.control("pause keep")
    resumed = live.control("resume")
    assert paused is not None and resumed is not None and paused.status == resumed.status == 200
    answer = json.loads(request.result(60).body)
    assert answer["choices"][0]["text"] == expected


def test_sleep_and_wake(live: Live) -> None:
    need(live, "wake")
    before = live.complete(prompt=PROMPT, max_tokens=12)["choices"][0]["text"]
    slept = live.control("sleep")
    assert slept is not None and slept.status == 200
    woken = live.control("wake")
    assert woken is not None and woken.status == 200
    assert live.complete(prompt=PROMPT, max_tokens=12)["choices"][0]["text"] == before
    assert live.call(live.server.is_ready())


def test_prefix_reset(live: Live) -> None:
    prompt = list(range(1, 200))
    first = live.complete(prompt=prompt, max_tokens=4)["choices"][0]["text"]
    answer = live.control("reset")
    assert answer is not None and answer.status == 200, answer
    assert live.complete(prompt=prompt, max_tokens=4)["choices"][0]["text"] == first


def other_weights(folder: Path) -> Path:
    """The same model with the rows of its output layer in another order: it says something else."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(ARITHMETIC, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(1, 0).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_are_reloaded_and_back(live: Live, tmp_path: Path) -> None:
    def says() -> Any:
        return live.complete(prompt=PROMPT, max_tokens=6, ignore_eos=True, logprobs=0)["choices"][0][
            "logprobs"
        ]

    def load(folder: Path) -> None:
        answer = live.control("reload", folder=str(folder))
        if answer is None:
            pytest.skip(f"{live.engine.name} has no route for: reload")
        assert answer.status == 200, answer.body
        live.control("reset")

    before = says()["token_logprobs"]
    load(other_weights(tmp_path / "other"))
    changed = says()["token_logprobs"]
    load(ARITHMETIC)
    back = says()["token_logprobs"]
    assert any(abs(one - two) > 1e-3 for one, two in zip(before, changed, strict=True))
    assert all(math.isclose(one, two, abs_tol=1e-5) for one, two in zip(before, back, strict=True))
