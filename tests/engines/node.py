"""One of two hosts: `python -m tests.engines.node ray|sglang RANK FOLDER HOST HOST`, a line for what it saw.

The head works, then ends; the other one waits for its end.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from penstock.servers.launched import LifeCycle
from penstock.servers.nodes import Nodes
from penstock.servers.ray import RayNode
from tests.engines.engines import START_LIMIT, sglang

RAY_ENV = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5", "RAY_DISABLE_MEMORY_MONITOR": "1"}
"""A node waits so long for a head that is gone; Ray's own minute is long for a test."""


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


async def ray(nodes: Nodes, life: LifeCycle) -> None:
    async with RayNode(nodes, os.environ["PENSTOCK_RAY_PYTHON"], env=RAY_ENV, life=life) as node:
        if nodes.is_head:
            say("nodes", node.joined)
        else:
            say("ended", (await node.ended()).status)


async def two_parts(nodes: Nodes, life: LifeCycle) -> None:
    server = sglang(tp=2, nodes=nodes, life=life)
    async with server:
        if nodes.is_head:
            async with server.client() as client:
                sample = await client.complete("7 + 5 =")
            say("tokens", sample.usage.completion_tokens)
        else:
            say("ended", type(await asyncio.shield(server.died)).__name__)


async def main() -> None:
    what, rank, folder, *hosts = sys.argv[1:]
    nodes = Nodes(hosts=tuple(hosts), rank=int(rank))
    life = LifeCycle(log_folder=Path(folder) / "logs", start_timeout=START_LIMIT, on_death=lambda error: None)
    async with asyncio.timeout(2 * START_LIMIT):
        await {"ray": ray, "sglang": two_parts}[what](nodes, life)
    say("left")


if __name__ == "__main__":
    asyncio.run(main())
