"""Engines on two hosts, each a network namespace of its own: SGLang's parts, and Ray's nodes for vLLM.

vLLM itself has no Ray on a CPU. PENSTOCK_RAY_PYTHON names an interpreter that has Ray.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engines.conftest import available
from tests.engines.engines import START_LIMIT
from tests.servers.fakes import TAG, nothing_left

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CARD = "eth0"
"""Of each host. The machine's name leads to another address in there, so that Gloo must be told."""
SGLANG_ENV = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "GLOO_SOCKET_IFNAME": CARD}
ROOT = Path(__file__).parents[2]
RAY_FOLDER = Path("/tmp/ray")
"""All nodes of a cluster use the head's folder, which is this."""
SHARED_MEMORY = Path("/dev/shm")
"""Processes that find each other's shared memory take themselves for being on one machine."""
OWN_FOLDERS = ["unshare", "-m", "sh", "-c"] + [
    "".join(f"mount -t tmpfs tmpfs {folder} && " for folder in (RAY_FOLDER, SHARED_MEMORY)) + 'exec "$@"',
    "sh",
]
"""What two hosts do not share."""

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
    ),
]


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """The names of two namespaces with a cable between them."""
    names = [f"penstock{os.getpid()}{letter}" for letter in "ab"]
    ends = [f"ps{os.getpid() % 100_000}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "link", "set", end, "name", CARD)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", CARD)
            for card in ("lo", CARD):
                ip("-n", name, "link", "set", card, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=10)


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], check=False, timeout=10, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"`ip {' '.join(words)}` is not allowed here: {done.stderr.strip()}")


def run(what: str, logs: Path) -> list[list[str]]:
    """The lines that each of the two nodes printed. They leave no process behind."""
    RAY_FOLDER.mkdir(exist_ok=True)
    with nothing_left() as tag, two_hosts() as hosts:
        nodes = [
            subprocess.Popen(
                ["ip", "netns", "exec", host, *OWN_FOLDERS, sys.executable, "-m", "tests.engines.node"]
                + [what, str(rank), str(logs), *ADDRESSES],
                env={**os.environ, TAG: tag, "SGLANG_HOST_IP": ADDRESSES[rank], **SGLANG_ENV},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, host in enumerate(hosts)
        ]
        try:
            return [node.communicate(timeout=2 * START_LIMIT)[0].splitlines() for node in nodes]
        finally:
            for node in nodes:
                node.kill()
                node.wait()


@pytest.mark.skipif(not available("sglang"), reason="PENSTOCK_SGLANG_PYTHON is not set")
def test_sglang_on_two_hosts(tmp_path: Path) -> None:
    head, other = run("sglang", tmp_path)
    assert head[0].startswith("tokens ") and int(head[0].split()[1]) > 0
    assert head[1] == "left"
    assert other == ["ended EngineDied", "left"], "a part without its head ends"


@pytest.mark.skipif("PENSTOCK_RAY_PYTHON" not in os.environ, reason="PENSTOCK_RAY_PYTHON is not set")
def test_ray_on_two_hosts(tmp_path: Path) -> None:
    head, other = run("ray", tmp_path)
    assert head == ["nodes 2", "left"]
    assert other == ["ended 1", "left"], "a node without its head ends"
