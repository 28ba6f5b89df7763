"""The whole path with the embedded engine in a process of its own, and what is left of it afterwards."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.demo import arithmetic


def write_problems(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in arithmetic.rows(1, count)))
    return path


def command(source: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--prompt-column", "question", "--id-column", "id", "--engine", "embedded"]
    return [sys.executable, "-m", "penstock", "generate", str(source), "--out", str(out), *fixed, *more]


def engines_of(session: int) -> list[int]:
    """Processes of the embedded engine that the job `session` has started: children of its supervisors."""
    parents, engines = {}, []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            words = status.with_name("cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        parents[int(status.parent.name)] = int(fields[1])
        if b"penstock.engine" in words:
            engines.append(int(status.parent.name))
    return [engine for engine in engines if parents.get(parents.get(engine, 0)) == session]


@contextmanager
def job(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def wait_for_engine(process: subprocess.Popen[str]) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if found := engines_of(process.pid):
            return found[0]
        time.sleep(0.02)
    raise AssertionError("no engine was started")


def wait_until_gone(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


def test_traces_with_reasoning_from_the_shipped_model(tmp_path: Path) -> None:
    source, out = write_problems(tmp_path / "in.jsonl", 30), tmp_path / "out.jsonl"
    words = command(source, out, "-n", "2", "--temperature", "0.7", "--max-tokens", "300", "--seed", "5")
    words += ["--engine-args", "threads=1", "max-num-seqs=16"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert {row["id"] for row in rows} == {row["id"] for row in arithmetic.rows(1, 30)}
    verdicts = [arithmetic.verify(text, row["answer"]) for row in rows for text in row["generations"]]
    assert 0.4 < sum(verdicts) / len(verdicts) < 0.95
    assert all(row["reasonings"][0] and "\n" in row["reasonings"][0] for row in rows)
    again = tmp_path / "again.jsonl"
    words[words.index(str(out))] = str(again)
    subprocess.run(words, capture_output=True, timeout=120, check=True)
    texts = {row["id"]: row["generations"] for row in rows}
    assert {
        row["id"]: row["generations"] for row in map(json.loads, again.read_bytes().splitlines())
    } == texts


def kill_once_written(process: subprocess.Popen[str], out: Path) -> None:
    """Kills an engine as soon as the job has written a row."""
    engine = wait_for_engine(process)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(engine, signal.SIGKILL)


def test_an_engine_that_dies_is_restarted_and_the_job_goes_on(tmp_path: Path) -> None:
    source, out = write_problems(tmp_path / "in.jsonl", 300), tmp_path / "out.jsonl"
    words = command(source, out, "--max-concurrent", "16", "--max-tokens", "64", "--engine-args", "threads=1")
    with job(words) as process:
        kill_once_written(process, out)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "The engine died (exit -9)" in said and "Restart 1 in 1 s." in said
    assert "ready again, restart 1" in said
    assert len(out.read_bytes().splitlines()) == 300
    assert engines_of(process.pid) == []


@pytest.mark.slow
def test_an_engine_that_may_not_be_restarted_stops_the_job_at_once_and_loses_nothing(tmp_path: Path) -> None:
    source, out = write_problems(tmp_path / "in.jsonl", 300), tmp_path / "out.jsonl"
    words = command(source, out, "--max-concurrent", "16", "--max-tokens", "64", "--max-restarts", "0")
    with job(words) as process:
        kill_once_written(process, out)
        killed = time.monotonic()
        _, said = process.communicate(timeout=20)
        assert time.monotonic() - killed < 10
    assert process.returncode == 1
    assert "penstock: The engine died (exit -9)" in said
    assert "run the same command again" in said
    assert subprocess.run(words, capture_output=True, timeout=120, check=False).returncode == 0
    assert len(out.read_bytes().splitlines()) == 300


def test_the_engine_ends_with_a_job_that_is_killed(tmp_path: Path) -> None:
    source, out = write_problems(tmp_path / "in.jsonl", 300), tmp_path / "out.jsonl"
    with job(command(source, out)) as process:
        engine = wait_for_engine(process)
        process.kill()
        process.wait(10)
        wait_until_gone(engine, 10)


@pytest.mark.slow
def test_killed_ten_times_over_thousands_of_rows(tmp_path: Path) -> None:
    rows = 4000
    source, out = write_problems(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    words = command(source, out, "--max-tokens", "32", "--max-concurrent", "64")
    generator = random.Random(3)
    for kills in range(10):
        if out.exists() and len(out.read_bytes().splitlines()) == rows:
            assert kills > 1
            break  # no engine is started for a job that is done
        with job(words) as process:
            wait_for_engine(process)
            time.sleep(generator.uniform(1.5, 4.0))
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    written = [json.loads(line)["id"] for line in out.read_bytes().splitlines()]
    assert sorted(written) == sorted(row["id"] for row in arithmetic.rows(1, rows))
