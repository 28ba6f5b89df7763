"""`penstock top` and `penstock status` beside a job that runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.chat_server import ChatServer

ROWS = 120


def test_a_running_job_is_followed_to_its_end_from_its_files(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"id": {i}, "q": "question {i}"}}\n' for i in range(ROWS)))
    penstock = [sys.executable, "-m", "penstock"]
    with ChatServer(latency=0.2) as server:
        where = ["--prompt-column", "q", "--base-url", server.url, "--max-concurrent", "6"]
        job = subprocess.Popen(
            [*penstock, "generate", str(source), "--out", str(out), *where], stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 20
            while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.01)
            server.latency = 2.0  # until both have looked, however slow the machine is
            top = subprocess.Popen(
                [*penstock, "top", str(out), "--interval", "0.2"], stdout=subprocess.PIPE, text=True
            )
            asked = subprocess.run(
                [*penstock, "status", "--json", str(out), "--input", str(source)],
                capture_output=True, timeout=60, check=False,
            )  # fmt: skip
            assert top.stdout is not None
            first = top.stdout.readline()
            server.latency = 0.1
            rest, _ = top.communicate(timeout=60)
            said = first + rest
            assert job.wait(30) == 0
        finally:
            job.kill()
            job.wait(10)
    status = json.loads(asked.stdout)
    assert asked.returncode == 1 and status["running"] and status["pid"] == job.pid
    assert status["input"]["rows"]["input"] == ROWS and status["input"]["strays"] == 0
    rows = status["rows"]
    assert rows["input"] == ROWS == rows["done"] + rows["failed"] + rows["owed"] and 0 < rows["done"] < ROWS
    *lines, end = said.splitlines()
    done = [int(line.split("/")[0].removeprefix("rows ")) for line in lines]
    assert len(done) > 3 and done == sorted(done) and done[-1] == ROWS and 0 < done[0] < ROWS
    assert any("ETA 0:00:" in line and "tokens/s 0," not in line for line in lines)
    assert top.returncode == 0 and end.startswith(f"rows {ROWS} of {ROWS} done, 0 failed, 0 owed")
