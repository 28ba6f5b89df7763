"""`penstock slurm … -- generate …` from the submission to the joined output, on the fake Slurm."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cluster.account import read_shards, total
from penstock.cluster.shards import Shards
from tests.chat_server import ChatServer, answer_to
from tests.cluster.ray_cluster import children, until_gone
from tests.cluster.slurm_bin import FakeSlurm

pytestmark = pytest.mark.slow

ROWS, SHARDS = 160, 4


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "home")
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(fake.folder))
    monkeypatch.chdir(tmp_path)
    rows = "".join(f'{{"id": {number}, "prompt": "question {number}"}}\n' for number in range(ROWS))
    (tmp_path / "in.jsonl").write_text(rows)
    return fake


def penstock(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penstock", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def submit(url: str) -> str:
    generate = ["generate", "in.jsonl", "--out", "out dir/traces.jsonl", "--base-url", url]
    done = penstock(
        "slurm", "--time", "1:00:00", "--shards", str(SHARDS), "--max-running", "2", "--",
        *generate, "--max-concurrent", "4", "--id-column", "id",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_task_that_is_stopped_goes_on_and_the_last_job_joins_all(
    fake: FakeSlurm, tmp_path: Path, name: str
) -> None:
    fake.signal(f"1 {name}")
    stopped: list[str] = []

    def behave(message: str, asked: int) -> None:
        number = int(message.rsplit(" ", 1)[1]) if message.startswith("question") else 0
        if number % SHARDS == 1 and number > ROWS / 3 and not stopped:
            stopped.append(message)
            (fake.folder / "ready-1").touch()

    with ChatServer(behave, latency=0.1) as server:
        said = submit(server.url)
        assert "Job 101: 4 of 4 shards; job 102 joins them" in said
        runs = fake.runs(101)
        assert sorted((task, restart) for task, restart, _ in runs) == [
            ("0", 0), ("1", 0), ("1", 1), ("2", 0), ("3", 0)
        ]  # fmt: skip
        assert [status for task, restart, status in runs if (task, restart) != ("1", 0)] == [0] * 4
        assert fake.runs(102) == [("", 0, 0)], (tmp_path / "slurm/generate-traces/102.log").read_text()
        # Asked again was what was in flight or not yet written; each run asks for a token first.
        assert ROWS <= server.asked.total() <= ROWS + 5 + 30
        out = tmp_path / "out dir" / "traces.jsonl"
        written = [json.loads(line) for line in out.read_bytes().splitlines()]
        assert sorted(row["id"] for row in written) == list(range(ROWS))
        assert all(row["generations"] == [answer_to(row["prompt"])] for row in written)
        status = penstock("status", str(out))
        assert status.returncode == 0 and "160 of 160 done" in status.stdout
        assert "is done: join" in submit(server.url), "a second submission finds nothing to do"


def test_only_what_is_owed_is_submitted_again(fake: FakeSlurm, tmp_path: Path) -> None:
    refused = True

    def behave(message: str, asked: int) -> tuple[int, str] | None:
        number = int(message.rsplit(" ", 1)[1]) if message.startswith("question") else 0
        return (401, "no key") if refused and number % SHARDS == 2 and number > 20 else None

    with ChatServer(behave) as server:
        submit(server.url)
        assert {task: status for task, _, status in fake.runs(101)} == {"0": 0, "1": 0, "2": 1, "3": 0}
        assert fake.runs(102) == [("", 0, 1)], "nothing is joined while rows are owed"
        shards = Shards(tmp_path / "out dir" / "traces.jsonl", SHARDS)
        assert not shards.out.exists()
        refused = False
        assert "Job 103: 1 of 4 shards" in submit(server.url)
        assert "--array=2%2" in fake.options(103).splitlines()
        assert fake.runs(104) == [("", 0, 0)]
        assert total(read_shards(shards)).complete and shards.out.exists()


@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_in_an_allocation(fake: FakeSlurm, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ChatServer(latency=0.02) as server:
        done = penstock(
            "slurm", "--time", "1:00:00", "--nodes", "2", "--ray-port", str(port), "--name", "ray", "--",
            "generate", "in.jsonl", "--out", "out.jsonl", "--base-url", server.url, "--ray",
            "--shards", str(SHARDS), "--workers", "2", "--max-concurrent", "8",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        log = tmp_path / "slurm" / "ray" / "101.log"
        assert fake.runs(101) == [("", 0, 0)], log.read_text()
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert sorted(row["id"] for row in written) == list(range(ROWS))
    assert until_gone(lambda: children("raylet", "gcs_server", "ray::")) == []
