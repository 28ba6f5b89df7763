"""An engine that fails leaves nobody waiting: every request gets its error, and health says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.engine.engine import LLMEngine, Output
from penstock.engine.tokenizer import Tokenizer
from tests.engine_server.running import Running, engine_of, running
from tests.engine_server.test_in_flight import COMPLETIONS, LONG, Posted, busy


class FailingEngine(LLMEngine):
    """The engine, with a step that fails when told to."""

    doomed = False

    def step(self) -> list[Output]:
        if self.doomed:
            raise RuntimeError("out of luck")
        return super().step()


@pytest.fixture
def engine(checkpoint: Path) -> FailingEngine:
    engine = engine_of(checkpoint, FailingEngine)
    assert isinstance(engine, FailingEngine)
    return engine


@pytest.fixture
def server(engine: FailingEngine) -> Iterator[Running]:
    with running(engine) as server:
        yield server


def test_failed_step_is_told_to_everyone(engine: FailingEngine, server: Running) -> None:
    assert server.send("GET", "/health")[0] == 200
    plain = [Posted(server, COMPLETIONS, LONG) for _ in range(3)]
    several = Posted(server, COMPLETIONS, LONG | {"prompt": ["a", "b"]})
    stream = Posted(server, COMPLETIONS, LONG | {"stream": True})
    server.wait_until(lambda: busy(server) == 6, "all at work")
    engine.doomed = True
    for request in (*plain, several, stream):
        request.join(30)
        assert not request.is_alive()
    for request in (*plain, several):
        error = json.loads(request.content)["error"]
        assert (request.status, error["code"], error["type"]) == (500, 500, "InternalServerError")
        assert "out of luck" in error["message"]
    *events, error_event, last, end = stream.content.decode().split("\n\n")
    assert stream.status == 200 and len(events) > 0
    assert json.loads(error_event.removeprefix("data: "))["error"]["code"] == 500
    assert (last, end) == ("data: [DONE]", "")
    server.wait_until(lambda: server.send("GET", "/health")[0] == 503, "unhealthy")
    status, content = server.send("POST", COMPLETIONS, LONG)
    assert (status, json.loads(content)["error"]["code"]) == (500, 500)
    assert server.metric("request_success_total", 'finished_reason="error"') == 6


def test_request_the_engine_refuses_is_the_clients_fault(checkpoint: Path) -> None:
    with running(engine_of(checkpoint, num_gpu_blocks_override=8, max_model_len=64)) as server:
        status, content = server.send("POST", COMPLETIONS, LONG | {"prompt": [40] * 64})
        assert (status, json.loads(content)["error"]["type"]) == (400, "BadRequestError")
        assert server.post(COMPLETIONS, LONG | {"prompt": [40] * 60, "max_tokens": 4})


def test_answer_that_cannot_be_written_is_an_error(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise ValueError("no words")

    monkeypatch.setattr(Tokenizer, "text", fail)
    status, content = server.send("POST", COMPLETIONS, LONG | {"max_tokens": 3})
    assert (status, json.loads(content)["error"]["code"]) == (500, 500)
    assert "no words" in json.loads(content)["error"]["message"]


def test_closing_tells_those_in_flight(engine: FailingEngine) -> None:
    with running(engine) as server:
        request = Posted(server, COMPLETIONS, LONG | {"n": 5, "temperature": 1.0})
        server.wait_until(lambda: busy(server) == 5, "at work")
        server.app.engine._command(server.app.engine._stop)
        request.join(30)
        assert request.status == 500
        assert "shutting down" in json.loads(request.content)["error"]["message"]
