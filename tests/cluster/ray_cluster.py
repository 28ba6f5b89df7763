"""Ray clusters of several nodes on this machine, and what they must not leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray would otherwise warn about

STORE = 80 << 20
"""Bytes of each node's object store: the least Ray takes."""


@contextmanager
def local_cluster(nodes: int = 3, cpus: int = 2) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` with a head of 1 CPU that is one of the nodes; this process is connected.

    Afterwards nothing of it may be left: no process, no address for others to join.
    """
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    import ray

    from penstock.cluster import session
    from penstock.cluster.nodes import all_nodes

    small = {"include_dashboard": False, "object_store_memory": STORE}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **small})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=cpus, object_store_memory=STORE)
        session.connect(cluster.address)
        until_gone(lambda: nodes - sum(node["Alive"] for node in all_nodes()))
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        end_agents()
        left = until_gone(lambda: children("raylet", "gcs_server", "penstock.engine", "ray::"))
        assert not left, f"left behind: {left}"
        with contextlib.suppress(FileNotFoundError):  # another cluster's may be there
            assert cluster.address not in Path("/tmp/ray/ray_current_cluster").read_text()


def end_agents() -> None:
    """Ray's own helpers, which stay after the end of a cluster whose head was restarted."""
    for line in children("ray::DashboardAgent", "ray::RuntimeEnvAgent"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line.split()[0]), signal.SIGKILL)


def here() -> str:
    """The node this process is connected to: killing it would end the registry with it, as in life."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def kill_node(cluster: Any, node_id: str) -> None:
    """A node is gone from one moment to the next, with all that runs on it."""
    (node,) = [one for one in cluster.worker_nodes if one.node_id == node_id]
    cluster.remove_node(node, allow_graceful=False)


def add_node(cluster: Any, cpus: int = 2) -> None:
    cluster.add_node(num_cpus=cpus, object_store_memory=STORE)


def placement_groups() -> list[str]:
    """Those that hold something."""
    from ray.util import placement_group_table

    return [name for name, one in placement_group_table().items() if one["state"] != "REMOVED"]


def children(*words: str) -> list[str]:
    """Command lines of running processes with one of the words, which this process or a child of it began."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if any(word in line for word in words) and MARK in (path / "environ").read_bytes():
                found.append(f"{path.name} {line[:120]}")
    return found


MARK = f"PENSTOCK_TEST={os.getpid()}".encode()
os.environ["PENSTOCK_TEST"] = str(os.getpid())


def until_gone(look: Any, limit: float = 30.0) -> Any:
    """What is left when it does not go away within `limit` seconds."""
    deadline = time.monotonic() + limit
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
