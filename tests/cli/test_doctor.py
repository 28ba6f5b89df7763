"""What the doctor says of a machine, fit or not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from penstock.cli import doctor
from penstock.cli.doctor import GIB, Check

CASES = {
    "python": (doctor.check_python((3, 12), "3.12.1"), "ok", ""),
    "old python": (doctor.check_python((3, 10), "3.10.2"), "problem", "3.11 or newer"),
    "files": (doctor.check_open_files(4096, 4096, 1000), "ok", ""),
    "no limit of files": (doctor.check_open_files(-1, -1, 100_000), "ok", ""),
    "low soft limit": (doctor.check_open_files(1024, 65536, 1000), "warning", "ulimit -n 1128"),
    "low hard limit": (doctor.check_open_files(1024, 1024, 1000), "problem", "ulimit -Hn 1128"),
    "ports": (doctor.check_ports("32768\t60999\n", 1000), "ok", ""),
    "few ports": (doctor.check_ports("60000\t60999\n", 1001), "problem", "ip_local_port_range"),
    "ports not told": (doctor.check_ports(None, 1000), "ok", ""),
    "backlog": (doctor.check_backlog("4096\n", 100_000), "ok", ""),
    "short backlog": (doctor.check_backlog("128\n", 1000), "warning", "somaxconn"),
    "backlog for few": (doctor.check_backlog("128\n", 100), "ok", ""),
    "shared memory": (doctor.check_shared_memory(8 * GIB), "ok", ""),
    "little shared memory": (doctor.check_shared_memory(64 << 20), "warning", "--shm-size"),
    "no shared memory": (doctor.check_shared_memory(None), "warning", "tensor parallelism"),
    "cache": (doctor.check_cache("/c", 100 * GIB), "ok", ""),
    "full disk": (doctor.check_cache("/c", GIB), "warning", "HF_HOME"),
    "cache not ours": (doctor.check_cache("/c", None), "problem", "XDG_CACHE_HOME"),
    "no gpu": (doctor.check_gpus([], False, {}), "ok", ""),
    "gpus not shown": (doctor.check_gpus([], True, {}), "problem", "--gpus all"),
    "gpus": (doctor.check_gpus(["H", "H"], True, {}), "ok", ""),
    "gpus hidden": (doctor.check_gpus(["H"], True, {"CUDA_VISIBLE_DEVICES": ""}), "problem", "Unset"),
    "torch": (doctor.check_torch("2.1"), "ok", ""),
    "no torch": (doctor.check_torch(None), "warning", "penstock[engine]"),
    "compiler": (doctor.check_compiler("/usr/bin/cc"), "ok", ""),
    "no compiler": (doctor.check_compiler(None), "warning", "gcc"),
    "vllm": (doctor.check_engine("vLLM", "0.32, /py", None), "ok", ""),
    "no vllm": (doctor.check_engine("vLLM", None, None), "ok", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_verdict_and_advice(case: str) -> None:
    check, state, advice = CASES[case]
    assert check.state == state
    assert advice in check.advice
    assert bool(check.advice) == (state != "ok")
    assert check.found


def test_an_engine_that_was_named_and_is_not_there_is_a_problem() -> None:
    assert doctor.check_engine("vLLM", None, "has no vLLM") == Check("problem", "vLLM", "has no vLLM")


def test_counts_of_gpus_are_shown() -> None:
    assert doctor.check_gpus(["B", "A", "B"], True, {}).found == "1 × A, 2 × B"
    shown = doctor.check_gpus(["A", "A"], True, {"CUDA_VISIBLE_DEVICES": "1"}).found
    assert shown == "2 × A; CUDA_VISIBLE_DEVICES leaves 1"


@pytest.mark.parametrize(("connections", "status"), [("1", 0), ("999999999", 1)])
def test_a_line_a_check_and_the_exit_status(connections: str, status: int) -> None:
    words = [sys.executable, "-m", "penstock", "doctor", "--connections", connections]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stdout
    lines = done.stdout.splitlines()
    assert all(line.split()[0] in ("ok", "warning", "problem") for line in lines)
    assert len(lines) == 11
