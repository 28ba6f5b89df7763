"""What the doctor says of a machine, fit or not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from penstock.cli import doctor
from penstock.cli.doctor import GIB, Check
from penstock.loadtest.forecast import Scale

LOAD = Scale(requests=10_000)
FREE = "MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n"
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
    "files for a load": (doctor.check_load_files(21_000, LOAD), "ok", ""),
    "no limit of files for a load": (doctor.check_load_files(-1, LOAD), "ok", ""),
    "few files for the router": (doctor.check_load_files(20_000, LOAD), "problem", "processes=2"),
    "few files for a load": (doctor.check_load_files(4096, LOAD), "problem", "ulimit -Hn 20128"),
    "ports for a load": (doctor.check_ports("32768 60999", LOAD.ports), "ok", ""),
    "few ports for a load": (doctor.check_ports("50000 59998", LOAD.ports), "problem", "--source-addresses"),
    "memory for a load": (doctor.check_memory(FREE, "max\n", LOAD), "ok", ""),
    "little memory for a load": (
        doctor.check_memory("MemAvailable: 500000 kB\n", None, LOAD),
        "problem",
        "fewer",
    ),
    "a small container": (doctor.check_memory(FREE, "900000000\n", LOAD), "problem", "fewer"),
    "memory not told": (doctor.check_memory(None, None, LOAD), "ok", ""),
    "cores for a load": (doctor.check_cpu(8, LOAD), "ok", ""),
    "few cores for a load": (doctor.check_cpu(2, LOAD), "warning", "a token every 240 ms or more"),
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


def test_cores_of_a_container() -> None:
    assert doctor.usable_cores(8, "max 100000\n") == 8
    assert doctor.usable_cores(8, "150000 100000\n") == 1.5
    assert doctor.usable_cores(1, "150000 100000\n") == 1
    assert doctor.usable_cores(4, None) == 4


def test_a_load_this_machine_cannot_carry_is_told_beforehand() -> None:
    def look(load: int) -> tuple[int, str]:
        code = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (700, 700))\n"
        code += "from penstock.cli import main; sys.exit(main(['doctor', '--load', sys.argv[1]]))"
        done = subprocess.run(
            [sys.executable, "-c", code, str(load)], capture_output=True, text=True, timeout=60, check=False
        )
        return done.returncode, done.stdout

    status, printed = look(10_000)
    assert status == 1
    assert "problem  open files" in printed and "allowed: 700." in printed and "ulimit -Hn" in printed
    assert {line[9:23].strip() for line in printed.splitlines()} == {
        "open files", "local ports", "backlog", "memory", "CPU",
    }  # fmt: skip
    assert look(100)[0] == 0
