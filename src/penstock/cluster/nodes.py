"""What the Ray cluster has, and how a part of it is held: the edge between placement and Ray."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from penstock.cluster.placement import Node, Place

HOLD: Final = 10.0
"""Seconds in which a node that has room has to hold it for us."""
NODE_LABEL: Final = "ray.io/node-id"
"""By which Ray says which node it is."""


async def ask_nodes() -> list[Node]:
    """The nodes that are alive, as Ray knows them now."""
    return await asyncio.to_thread(_nodes)


def _nodes() -> list[Node]:
    from ray._private import state

    untyped: Any = state
    free = untyped.available_resources_per_node()
    found = []
    for node in all_nodes():
        if not node["Alive"]:
            continue
        total, left = node["Resources"], free.get(node["NodeID"], {})
        found.append(
            Node(
                id=node["NodeID"],
                cpus=total.get("CPU", 0.0),
                gpus=total.get("GPU", 0.0),
                free_cpus=left.get("CPU", 0.0),
                free_gpus=left.get("GPU", 0.0),
            )
        )
    return found


async def reserve(place: Place) -> Any:
    """A placement group that holds the place; None when it was not there within HOLD seconds.

    Of a place on several nodes only the server's CPUs: vLLM itself takes the GPUs, in a placement group of
    its own.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    first = place.shares[0]
    bundle = {"CPU": first.cpus} if first.cpus else {}
    if place.strategy == "STRICT_PACK" and first.gpus:
        bundle["GPU"] = float(first.gpus)
    if not bundle:
        bundle = {f"node:{await asyncio.to_thread(address_of, first.node)}": 0.001}
    group = placement_group(
        [bundle], strategy="STRICT_PACK", bundle_label_selector=[{NODE_LABEL: first.node}]
    )
    try:
        async with asyncio.timeout(HOLD):
            await group.ready()
    except (TimeoutError, ray.exceptions.RayError):
        remove_placement_group(group)
        return None
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def address_of(node: str) -> str:
    """The address of a node. Raises LookupError."""
    for one in all_nodes():
        if one["NodeID"] == node:
            return str(one["NodeManagerAddress"])
    raise LookupError(node)


def all_nodes() -> list[dict[str, Any]]:
    """Those there have been, as Ray tells them."""
    import ray

    untyped: Any = ray
    found: list[dict[str, Any]] = untyped.nodes()
    return found
