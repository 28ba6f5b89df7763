"""The engine as a process: how it starts, says so, stops, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

READY = re.compile(r"^penstock engine ready on http://127\.0\.0\.1:(\d+)\n$")
TIMEOUT = 60
"""Seconds anything here may take."""

CRASHING = """
import sys
from penstock.engine import engine
from penstock.engine.args import main
def step(self):
    raise RuntimeError("out of luck")
engine.LLMEngine.step = step
sys.exit(main())
"""


def command(checkpoint: Path, *flags: str, program: tuple[str, ...] = ("-m", "penstock.engine")) -> list[str]:
    model = ("--model", str(checkpoint), "--port", "0", "--max-model-len", "512", "--threads", "1")
    return [sys.executable, *program, *model, *flags]


@contextmanager
def process(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def port_of(child: subprocess.Popen[str]) -> int:
    assert child.stdout is not None
    line = child.stdout.readline()
    match = READY.match(line)
    if match is None:
        child.kill()
        raise AssertionError((line, child.communicate()))
    return int(match[1])


def posted(port: int, body: dict[str, Any]) -> HTTPConnection:
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    return connection


def test_starts_soon_serves_and_stops_cleanly(checkpoint: Path) -> None:
    started = time.monotonic()
    with process(command(checkpoint, "--served-model-name", "small", "other")) as child:
        port = port_of(child)
        took = time.monotonic() - started
        connection = posted(port, {"model": "other", "prompt": "a", "max_tokens": 2})
        answer = json.loads(connection.getresponse().read())
        assert (answer["model"], answer["usage"]["completion_tokens"]) == ("small", 2)
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=TIMEOUT)
        connection.close()
    assert (child.returncode, out, err) == (0, "", "")
    assert took < 30, "far beyond the few seconds a small model takes, even on a busy machine"


def test_request_in_flight_at_a_signal_is_finished(checkpoint: Path) -> None:
    with process(command(checkpoint, "--shutdown-timeout", str(TIMEOUT))) as child:
        port = port_of(child)
        connection = posted(port, {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True})
        response = connection.getresponse()
        response.readline()
        child.send_signal(signal.SIGINT)
        content = response.read()
        connection.close()
        assert content.endswith(b"data: [DONE]\n\n") and b'"finish_reason":"length"' in content
        child.communicate(timeout=TIMEOUT)
        assert child.returncode == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=1)


def test_request_that_outlasts_the_grace_is_told(checkpoint: Path) -> None:
    with process(command(checkpoint, "--shutdown-timeout", "0", "--max-model-len", "2048")) as child:
        port = port_of(child)
        connection = posted(port, {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "n": 8})
        time.sleep(0.3)
        child.send_signal(signal.SIGTERM)
        response = connection.getresponse()
        assert response.status == 500
        assert "shutting down" in json.loads(response.read())["error"]["message"]
        connection.close()
        child.communicate(timeout=TIMEOUT)
        assert child.returncode == 0


def test_signal_ends_a_paused_engine(checkpoint: Path) -> None:
    with process(command(checkpoint, "--shutdown-timeout", "0.1", "--api-key", "sesame", "other")) as child:
        port = port_of(child)
        control = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        control.request("POST", "/pause")
        assert control.getresponse().read() == b'{"status":"paused"}'
        refused = posted(port, {"prompt": "a"})
        assert refused.getresponse().status == 401
        held = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        headers = {"content-type": "application/json", "authorization": "Bearer other"}
        held.request("POST", "/v1/completions", b'{"prompt": "a"}', headers)
        waiting = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        waiting.request("POST", "/sleep?mode=wait")
        waiting.getresponse().read()
        child.send_signal(signal.SIGTERM)
        response = held.getresponse()
        assert response.status == 500
        assert "shutting down" in json.loads(response.read())["error"]["message"]
        child.communicate(timeout=TIMEOUT)
        assert child.returncode == 0
        for connection in (control, refused, held, waiting):
            connection.close()


def test_key_of_the_environment_is_asked_for(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    with process(command(checkpoint)) as child:
        connection = posted(port_of(child), {"prompt": "a"})
        assert connection.getresponse().status == 401
        connection.close()


def test_failed_step_ends_the_process(checkpoint: Path) -> None:
    with process(command(checkpoint, program=("-c", CRASHING))) as child:
        connection = posted(port_of(child), {"prompt": "a"})
        response = connection.getresponse()
        assert response.status == 500
        assert b"out of luck" in response.read()
        connection.close()
        _, err = child.communicate(timeout=TIMEOUT)
        assert child.returncode == 1
        assert "out of luck" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "/nowhere"], "/nowhere"),
        (["--max-num-seqs", "0"], "max_num_seqs"),
        (["--port", "{taken}"], "{taken}"),
    ],
)
def test_what_cannot_work_is_one_sentence(checkpoint: Path, flags: list[str], words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = command(checkpoint, *(flag.format(taken=port) for flag in flags))
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("penstock engine: ") and done.stderr.count("\n") == 1
    assert words.format(taken=port) in done.stderr
