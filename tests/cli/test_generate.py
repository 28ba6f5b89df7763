"""The command as a person runs it: a process, its exit status and what it says."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chat_server import MODEL, ChatServer, answer_to

ROWS = 150


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"id": {i}, "q": "question {i}"}}\n' for i in range(ROWS)))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "penstock", "generate", *map(str, arguments)]


def generate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, check=False)


def assert_complete(out: Path, rows: int = ROWS) -> None:
    written = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert sorted(row["id"] for row in written) == list(range(rows))
    assert all(row["generations"] == [answer_to(row["q"])] for row in written)


def test_killed_at_random_moments_and_run_again_every_row_is_there_once(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    generator = random.Random(11)
    with ChatServer(latency=0.05) as server:
        job = command(
            source, "--out", out, "--prompt-column", "q", "--base-url", server.url, "--max-concurrent", 4
        )
        kills = 0
        for _ in range(6):
            process = subprocess.Popen(job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 20
            served = server.asked.total()
            # From the first request on: start-up takes longer than the job's interesting part.
            while server.asked.total() == served and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(generator.uniform(0.0, 0.4))
            if process.poll() is None:
                kills += 1
            process.kill()
            process.wait(10)
        assert kills >= 4
        done = subprocess.run(job, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert_complete(out)
        # Lost work is what was in flight or unflushed at a kill, not what was finished.
        assert server.asked.total() < ROWS + kills * 24


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_job_within_two_seconds_and_it_says_how_to_go_on(
    source: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out.jsonl"
    with ChatServer(latency=0.2) as server:
        job = command(
            source, "--out", out, "--prompt-column", "q", "--base-url", server.url, "--max-concurrent", 8
        )
        process = subprocess.Popen(job, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 20
        while server.asked.total() < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        pressed = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=10)
        assert time.monotonic() - pressed < 2
        assert process.returncode == 130
        assert "run the same command again to go on" in said
        assert "Traceback" not in said
        finished = len(out.read_bytes().splitlines())
        assert finished >= 12
        assert generate(*job[4:]).returncode == 0
    assert_complete(out)


def test_failed_rows_make_the_exit_status_and_are_listed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    def refuse_two(message: str, asked: int) -> tuple[int, str] | None:
        return (400, "prompt too long") if message in ("question 3", "question 90") else None

    with ChatServer(refuse_two) as server:
        done = generate(
            source, "--out", out, "--prompt-column", "q", "--id-column", "id", "--base-url", server.url
        )
    assert done.returncode == 1
    assert "--retry-failed" in done.stderr
    failures = [json.loads(line) for line in (tmp_path / "out.jsonl.failures").read_bytes().splitlines()]
    assert sorted(failure["key"] for failure in failures) == ["3", "90"]
    assert "prompt too long" in failures[0]["message"]
    assert len(out.read_bytes().splitlines()) == ROWS - 2


def test_a_write_that_fails_stops_the_job_and_the_accounting_is_what_was_written(
    source: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for a full disk."""
    out = tmp_path / "out.jsonl"
    with ChatServer(latency=0.02) as server:
        job = command(
            source, "--out", out, "--prompt-column", "q", "--base-url", server.url, "--max-concurrent", 8
        )
        limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "limited", *job]
        stopped = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
        assert stopped.returncode == 1
        assert "could not be written (File too large)" in stopped.stderr
        assert server.asked.total() < ROWS
        assert int(stopped.stderr.split()[1]) <= len(out.read_bytes().splitlines())
        assert generate(*job[4:]).returncode == 0
    assert_complete(out)


def test_open_r1_names_and_templates_and_api_addr(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with ChatServer() as server:
        done = generate(
            *(source, "--output-file", out, "--prompt-column", "q", "--uuid-column", "id"),
            *("--api-addr", f"127.0.0.1:{server.port}", "--model", MODEL, "--num-generations", 1),
            *("--prompt-template", r"Solve in \boxed{}: {prompt}", "--temperature", 0.6, "--top-p", 0.95),
        )
        assert done.returncode == 0, done.stderr
        request = server.requests[0]
        assert request["messages"][0]["content"].startswith(r"Solve in \boxed{}: question ")
        assert (request["temperature"], request["top_p"], request["model"]) == (0.6, 0.95, MODEL)


BAD = {
    "no input": (["none.jsonl", "--base-url", "URL"], "There is no input file none.jsonl."),
    "no engine named": (["in.jsonl"], "--engine vllm, sglang or embedded, or --base-url"),
    "not JSON": (["torn.jsonl", "--base-url", "URL"], "torn.jsonl line 2 is not JSON"),
    "no such column": (["in.jsonl", "--prompt-column", "Q", "--base-url", "URL"], "did you mean 'q'"),
    "id twice": (
        ["twice.jsonl", "--id-column", "id", "--base-url", "URL"],
        "used twice with different content",
    ),
    "output": (["in.jsonl", "--out", "missing/out.jsonl", "--base-url", "URL"], "missing/out.jsonl"),
    "engine not up": (
        ["in.jsonl", "--base-url", "http://127.0.0.1:9"],
        "No engine answers at http://127.0.0.1:9",
    ),
    "wrong model": (["in.jsonl", "--base-url", "URL", "--model", "gpt"], f"give --model one of {MODEL}"),
    "no samples": (["in.jsonl", "--base-url", "URL", "-n", "0"], "must be at least 1"),
    "checkpoint": (["in.jsonl", "--engine", "embedded", "--model", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_before_anything_is_generated(
    case: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("torn.jsonl").write_text('{"q": "x"}\n{"q": "x\n')
    Path("twice.jsonl").write_text('{"id": 1, "q": "x"}\n{"id": 1, "q": "y"}\n')
    arguments, says = BAD[case]
    with ChatServer() as server:
        words = [server.url if word == "URL" else word for word in arguments]
        if "--prompt-column" not in words:
            words += ["--prompt-column", "q"]
        if "--out" not in words:
            words += ["--out", "out.jsonl"]
        done = generate(*words)
        assert server.asked.total() == 0
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= (1 if case != "checkpoint" else 8)


def test_an_unknown_flag_or_command_names_the_nearest(source: Path) -> None:
    done = generate(source, "--out", "x", "--temprature", "1")
    assert done.returncode == 2
    assert "--temperature" in done.stderr
    unknown = subprocess.run(
        [sys.executable, "-m", "penstock", "genrate"], capture_output=True, text=True, timeout=30, check=False
    )
    assert unknown.returncode == 2
    assert "did you mean 'generate'" in unknown.stderr
