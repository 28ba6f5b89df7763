"""A real vLLM server on a machine without a GPU, from a virtual environment that has vLLM's CPU build."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

STARTUP = 180.0
"""Seconds vLLM may take until it answers; about 20 on a quiet machine."""

SHUTDOWN = 30.0
"""Seconds its processes may take to end."""

SETTINGS = {
    "TORCH_COMPILE_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}
"""Environment without which it compiles for half a minute, takes all cores, or looks for a network."""

READY = "Application startup complete."


@contextmanager
def vllm_server(python: Path, folder: Path, *, name: str, max_model_len: int, log: Path) -> Iterator[int]:
    """Serves a checkpoint folder in float32 and gives the port."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = int(reserved.getsockname()[1])
    flags = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--served-model-name": name,
        "--dtype": "float32",
        "--max-model-len": str(max_model_len),
        "--distributed-executor-backend": "uni",
        "--kv-cache-memory-bytes": "64M",
    }
    arguments = [str(python.parent / "vllm"), "serve", str(folder), "--enforce-eager"]
    arguments += [part for flag in flags.items() for part in flag]
    with log.open("w") as output:
        child = subprocess.Popen(
            arguments, stdout=output, stderr=output, env=os.environ | SETTINGS, start_new_session=True
        )
    try:
        _wait_until_ready(child, port, log)
        yield port
    finally:
        os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(SHUTDOWN)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait(SHUTDOWN)


def _wait_until_ready(child: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + STARTUP
    while READY not in log.read_text():
        if child.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"vLLM did not start:\n{log.read_text()[-4000:]}")
        time.sleep(0.5)
    connection = HTTPConnection("127.0.0.1", port, timeout=STARTUP)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
