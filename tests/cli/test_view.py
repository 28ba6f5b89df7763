"""`penstock view` as a person runs it: a URL, an answer there, and nothing left of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out.jsonl"
    path.write_text('{"id": "one", "prompt": "' + "a" * 60 + '!", "generations": ["x"]}\n')
    return path


@contextmanager
def viewing(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "penstock", "view", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait(10)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return str(answer.read().decode())


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_all_that_it_began(out: Path, number: signal.Signals) -> None:
    with viewing(str(out), "--no-open") as (process, url):
        assert url.startswith("http://127.0.0.1:") and "<title>penstock" in get(url)
        assert '"searching":true' in get(f"{url}api/rows?text=^(a|a)*$&regex=true&where=prompt")
        (search,) = children(process.pid)
        time.sleep(0.5)  # it is at the pattern that never ends
        process.send_signal(number)
        assert process.wait(10) == (0 if number == signal.SIGINT else -number)
        deadline = time.monotonic() + 10
        while Path(f"/proc/{search}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not Path(f"/proc/{search}").exists() or "Z" in Path(f"/proc/{search}/stat").read_text()


def test_a_file_that_is_not_there_is_told_in_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "penstock", "view", str(tmp_path / "no.jsonl"), "--no-open"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ran.returncode == 2 and ran.stderr == f"penstock: There is no file {tmp_path / 'no.jsonl'}.\n"
