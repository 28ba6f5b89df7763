"""`penstock serve` as a person runs it: one address, engines that die, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.test_embedded import engines_of

LIMIT = 30.0
"""Seconds anything may take."""


@contextmanager
def serve(tmp_path: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A server of the embedded engine, and the file with what it says on standard error."""
    said = tmp_path / "said"
    command = [sys.executable, "-m", "penstock", "serve", "--engine", "embedded", "--port", "0", *words]
    with said.open("w") as errors:
        process = subprocess.Popen(
            [*command, "--engine-args", "threads=1"], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        yield process, said
    finally:
        process.kill()
        process.communicate(timeout=LIMIT)


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("penstock serves arithmetic on http://127.0.0.1:")
    return line.split()[-1]


def ask(url: str, key: str | None = None) -> int:
    body = {"model": "arithmetic", "messages": [{"role": "user", "content": "1 + 2?"}], "max_tokens": 8}
    headers = {"content-type": "application/json"}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=LIMIT) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def wait_for(said: Path, text: str) -> None:
    deadline = time.monotonic() + LIMIT
    while text not in said.read_text():
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.02)


def assert_stopped(process: subprocess.Popen[str], number: signal.Signals) -> None:
    engines = engines_of(process.pid)
    assert engines
    process.send_signal(number)
    assert process.wait(LIMIT) == 0
    assert not any(Path(f"/proc/{engine}").exists() for engine in engines)


@pytest.mark.slow
def test_the_router_in_front_survives_the_death_of_each_engine(tmp_path: Path) -> None:
    with serve(tmp_path, "--replicas", "2", "--route", "--api-key", "sesame") as (process, said):
        url = url_of(process)
        assert (ask(url), ask(url, "sesame")) == (401, 200)
        for index in range(2):
            wait_for(said, f"embedded {index} (arithmetic): ready")
        for engine in engines_of(process.pid):
            os.kill(engine, signal.SIGKILL)
            # Both may be down in the end: the router then holds requests until one is back.
            assert [ask(url, "sesame") for _ in range(5)] == [200] * 5
            wait_for(said, "The engine died (exit -9)")
        wait_for(said, "embedded 0 (arithmetic): ready again, restart 1")
        wait_for(said, "embedded 1 (arithmetic): ready again, restart 1")
        assert ask(url, "sesame") == 200
        assert_stopped(process, signal.SIGTERM)


def test_one_engine_on_its_own_comes_back_at_its_address_and_ends_by_ctrl_c(tmp_path: Path) -> None:
    with serve(tmp_path) as (process, said):
        url = url_of(process)
        assert ask(url) == 200
        os.kill(engines_of(process.pid)[0], signal.SIGKILL)
        wait_for(said, "ready again, restart 1")
        assert ask(url) == 200
        assert_stopped(process, signal.SIGINT)


def test_a_signal_before_it_is_ready(tmp_path: Path) -> None:
    with serve(tmp_path) as (process, said):
        wait_for(said, "starting")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 130
        assert engines_of(process.pid) == []
        assert "Traceback" not in said.read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--replicas", "2"], "needs --route"),
        (["--model", "./nowhere"], "There is no model at ./nowhere."),
        (["--hosts", "a", "b"], "one machine"),
        (["--ray-address", "auto"], "for vllm"),
        (["--tp", "2"], "one device"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path: Path, words: list[str], says: str) -> None:
    with serve(tmp_path, *words) as (process, said):
        assert process.wait(LIMIT) == 2
        assert says in said.read_text()
        assert len(said.read_text().splitlines()) == 1


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serve(tmp_path, "--port", str(port)) as (process, said):
            assert process.wait(LIMIT) == 2
        assert f"Port {port} of 127.0.0.1 cannot be used" in said.read_text()
