"""Where engines go: never more than there is, whole where they fit, spread, as many as there is room for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cluster.placement import Need, Node, Place, Share, capacity, check_room, place
from penstock.errors import ConfigError


def node(name: str, gpus: float = 0, cpus: float = 8, free: float | None = None) -> Node:
    return Node(name, cpus, gpus, cpus, gpus if free is None else free)


def after(nodes: list[Node], found: Place) -> list[Node]:
    """The nodes with what a place takes taken."""
    taken = {share.node: share for share in found.shares}
    return [
        Node(
            one.id,
            one.cpus,
            one.gpus,
            one.free_cpus - (taken[one.id].cpus if one.id in taken else 0),
            one.free_gpus - (taken[one.id].gpus if one.id in taken else 0),
        )
        for one in nodes
    ]


def fill(need: Need, nodes: list[Node]) -> list[Place]:
    """As many engines as find a place."""
    found: list[Place] = []
    on: Counter[str] = Counter()
    while (one := place(need, nodes, on)) is not None:
        nodes = after(nodes, one)
        on[one.shares[0].node] += 1
        found.append(one)
        assert len(found) < 1000
    return found


def test_replicas_are_spread_and_each_is_on_one_node() -> None:
    nodes = [node("a", gpus=8), node("b", gpus=8), node("c", gpus=4)]
    found = fill(Need(2, 1), nodes)
    assert all(one.strategy == "STRICT_PACK" and len(one.shares) == 1 for one in found)
    assert [one.shares[0].node for one in found[:3]] == ["a", "b", "c"]
    assert Counter(one.shares[0].node for one in found) == {"a": 4, "b": 4, "c": 2}


def test_without_gpus_cpus_decide() -> None:
    found = fill(Need(0, 2), [node("a", cpus=1), node("b", cpus=4), node("c", cpus=5)])
    assert Counter(one.shares[0].node for one in found) == {"b": 2, "c": 2}


def test_what_fits_on_no_node_is_packed_on_the_fewest() -> None:
    nodes = [node("a", gpus=4), node("b", gpus=8), node("c", gpus=8)]
    found = place(Need(16, 1, splits=True), nodes, {})
    assert found == Place("PACK", (Share("b", 1, 8), Share("c", 0.0, 8)))
    assert place(Need(16, 1), nodes, {}) is None, "this engine cannot be split"


def test_what_would_fit_waits_for_a_whole_node() -> None:
    nodes = [node("a", gpus=8, free=3), node("b", gpus=8, free=4)]
    assert place(Need(6, 1, splits=True), nodes, {}) is None


def test_a_doubtful_node_comes_last() -> None:
    nodes = [node("a", gpus=8), node("b", gpus=8)]
    assert place(Need(1, 1), nodes, {"b": 5}, avoid={"a"}) == Place("STRICT_PACK", (Share("b", 1, 1),))
    full = [nodes[0], node("b", gpus=8, free=0)]
    assert place(Need(1, 1), full, {}, avoid={"a"}) == Place("STRICT_PACK", (Share("a", 1, 1),))


def test_what_can_never_be_is_refused_in_a_sentence() -> None:
    nodes = [node("a", gpus=2), node("b", gpus=4)]
    with pytest.raises(ConfigError, match=r"No node .* engine of 8 GPUs and 1 CPU: the largest has 4 GPUs"):
        check_room(Need(8, 1), nodes, 1)
    with pytest.raises(ConfigError, match=r"4 engines of 2 GPUs and 1 CPU each .* 2 nodes: .* room for 3"):
        check_room(Need(2, 1), nodes, 4)
    with pytest.raises(ConfigError, match=r"engine of 9 CPUs: the largest has 8 CPUs"):
        check_room(Need(0, 9), nodes, 1)
    check_room(Need(2, 1), nodes, 3)
    check_room(Need(6, 1, splits=True), nodes, 1)


NODES = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 16), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6
).map(
    lambda rows: [
        Node(f"n{index}", float(cpus), float(gpus), float(int(cpus * a)), float(int(gpus * b)))
        for index, (gpus, cpus, a, b) in enumerate(rows)
    ]
)
NEEDS = st.builds(Need, st.integers(0, 10), st.sampled_from([0.5, 1.0, 2.0]), st.booleans()).map(
    lambda need: need if need.gpus > 1 else Need(need.gpus, need.cpus)
)


@given(NODES, NEEDS)
def test_nothing_is_taken_twice_and_nothing_is_left_that_would_do(nodes: list[Node], need: Need) -> None:
    found = fill(need, nodes)
    by_id = {one.id: one for one in nodes}
    for name, one in by_id.items():
        shares = [share for each in found for share in each.shares if share.node == name]
        assert sum(share.gpus for share in shares) <= one.free_gpus
        assert sum(share.cpus for share in shares) <= one.free_cpus + 1e-9
    for each in found:
        assert sum(share.gpus for share in each.shares) == need.gpus
        assert each.shares[0].cpus == need.cpus
        assert (each.strategy == "PACK") == (len(each.shares) > 1) or each.strategy == "STRICT_PACK"
        if each.strategy == "PACK":
            assert all(one.gpus < need.gpus for one in nodes), "it fits on a node"
    if all(one.strategy == "STRICT_PACK" for one in found):
        whole = [
            min(
                int(one.free_cpus // need.cpus),
                int(one.free_gpus // need.gpus) if need.gpus else 10**6,
            )
            for one in nodes
        ]
        assert len(found) == sum(whole), "as many as there is room for"
        counts = Counter(each.shares[0].node for each in found)
        least = min(
            (counts[one.id] for one, room in zip(nodes, whole, strict=True) if counts[one.id] < room),
            default=None,
        )
        assert least is None or max(counts.values(), default=0) <= least + 1, "spread"
    assert len(found) <= max(capacity(need, nodes), 0)
