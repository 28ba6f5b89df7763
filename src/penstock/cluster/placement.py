"""On which nodes an engine's GPUs (or, without any, its CPUs) are taken: a pure function.

It guarantees:
- never more is taken of a node than it has free;
- an engine that fits on one node is on one node (STRICT_PACK), its replicas on different nodes as evenly as
  there is room (SPREAD);
- one that fits on no node, if it may be split, lies on as few nodes as can hold it (PACK);
- a node that is avoided is taken only when there is no other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import msgspec

from penstock.errors import ConfigError

Strategy = Literal["STRICT_PACK", "PACK"]

EPSILON = 1e-6
"""Ray counts in ten-thousandths: what differs by less is equal."""


class Node(msgspec.Struct, frozen=True):
    """A node and what it has: all of it, and what is free."""

    id: str
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float


class Need(msgspec.Struct, frozen=True):
    """What one engine takes."""

    gpus: int
    cpus: float
    splits: bool = False
    """It can run on several nodes."""

    def __str__(self) -> str:
        cpus = f"{self.cpus:g} CPU{'' if self.cpus == 1 else 's'}"
        return f"{self.gpus} GPU{'' if self.gpus == 1 else 's'} and {cpus}" if self.gpus else cpus


class Share(msgspec.Struct, frozen=True):
    """What is taken of one node."""

    node: str
    cpus: float
    gpus: int


class Place(msgspec.Struct, frozen=True):
    """Where an engine is; the first share is its server's."""

    strategy: Strategy
    shares: tuple[Share, ...]


def place(
    need: Need, nodes: Sequence[Node], replicas: Mapping[str, int], avoid: Collection[str] = ()
) -> Place | None:
    """Where one more engine goes; None: there is no room now.

    replicas: engines that are on each node already.
    """
    fitting = [node for node in nodes if _fits(need, node.free_cpus, node.free_gpus)]
    if fitting:
        best = min(fitting, key=lambda node: (*_rank(node, avoid), replicas.get(node.id, 0), *_fuller(node)))
        return Place("STRICT_PACK", (Share(best.id, need.cpus, need.gpus),))
    if not need.splits or any(_fits(need, node.cpus, node.gpus) for node in nodes):
        return None  # it waits for a node that holds it as a whole
    return _split(need, nodes, avoid)


def capacity(need: Need, nodes: Sequence[Node]) -> int:
    """Engines that have room when all of every node is free."""
    whole = sum(_times(need, node) for node in nodes)
    if whole or not need.splits:
        return whole
    return int(sum(node.gpus for node in nodes) + EPSILON) // need.gpus


def check_room(need: Need, nodes: Sequence[Node], replicas: int) -> None:
    """Raises ConfigError when so many cannot be, whatever else goes on in the cluster."""
    room = capacity(need, nodes)
    if room >= replicas:
        return
    if not room and not need.splits and any(node.gpus for node in nodes) >= bool(need.gpus):
        most = max((node.gpus if need.gpus else node.cpus for node in nodes), default=0)
        what = "GPUs" if need.gpus else "CPUs"
        raise ConfigError(
            f"No node of the Ray cluster can hold an engine of {need}: the largest has {most:g} {what}."
        )
    raise ConfigError(
        f"{replicas} engines of {need} each do not fit into the Ray cluster of {len(nodes)} nodes: "
        f"there is room for {room}."
    )


def _split(need: Need, nodes: Sequence[Node], avoid: Collection[str]) -> Place | None:
    """The fewest nodes whose free GPUs together are enough: those with the most."""
    shares: list[Share] = []
    owed = need.gpus
    for node in sorted(nodes, key=lambda node: (*_rank(node, avoid), -node.free_gpus, node.id)):
        cpus = need.cpus if not shares else 0.0
        taken = min(owed, int(node.free_gpus + EPSILON))
        if taken < 1 or node.free_cpus + EPSILON < cpus:
            continue
        shares.append(Share(node.id, cpus, taken))
        owed -= taken
        if not owed:
            return Place("PACK", tuple(shares))
    return None


def _fits(need: Need, cpus: float, gpus: float) -> bool:
    return cpus + EPSILON >= need.cpus and gpus + EPSILON >= need.gpus


def _times(need: Need, node: Node) -> int:
    each = [(node.cpus, need.cpus), (node.gpus, float(need.gpus))]
    return min((int((has + EPSILON) // one) for has, one in each if one > 0), default=0)


def _rank(node: Node, avoid: Collection[str]) -> tuple[bool]:
    return (node.id in avoid,)


def _fuller(node: Node) -> tuple[float, float, str]:
    """Of nodes that are alike, the one with the most free."""
    return (-node.free_gpus, -node.free_cpus, node.id)
