"""Every row in exactly one shard, a shuffle is a permutation, and both stay what they are."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.inputs.selection import Picked, Window, parse_shard, permutation


@given(st.integers(0, 60), st.integers(0, 20), st.none() | st.integers(0, 60), st.integers(1, 9))
def test_shards_partition_what_skip_and_limit_leave(
    count: int, skip: int, limit: int | None, shards: int
) -> None:
    rows = list(range(count))
    wanted = rows[skip:] if limit is None else rows[skip : skip + limit]
    parts = [rows[Window.of(skip, limit, (i, shards)).of_count(count)] for i in range(shards)]
    assert sorted(row for part in parts for row in part) == wanted
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    # Whoever takes rows group by group takes the same ones.
    for index, part in enumerate(parts):
        window = Window.of(skip, limit, (index, shards))
        for size in (1, 4, 7):
            groups = range(0, count, size)
            found = [first + i for first in groups for i in window.within(first, min(size, count - first))]
            assert found == part


@given(st.sets(st.integers(0, 50)), st.integers(1, 9))
def test_picked_rows_are_found_group_by_group(indices: set[int], size: int) -> None:
    picked = Picked(array("Q", sorted(indices)))
    found = [first + i for first in range(0, 51, size) for i in picked.within(first, size)]
    assert found == sorted(indices)
    assert picked.stop == (max(indices) + 1 if indices else 0)


@given(st.integers(0, 200), st.integers(0, 2**31))
def test_a_shuffle_is_a_permutation_that_the_seed_decides(count: int, seed: int) -> None:
    order = permutation(count, seed)
    assert sorted(order) == list(range(count))
    assert order == permutation(count, seed)


def test_the_order_of_a_seed_never_changes() -> None:
    """A resumed job shuffles with another Python: written down once."""
    assert list(permutation(10, 7)) == [2, 7, 4, 6, 8, 9, 0, 5, 1, 3]
    assert permutation(1000, 1) != permutation(1000, 2)


def slurm(task: int, first: int, last: int, count: int, step: int = 1) -> dict[str, str]:
    names = {"ID": task, "MIN": first, "MAX": last, "COUNT": count, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


@pytest.mark.parametrize(
    ("text", "environment", "shard"),
    [
        ("3/8", {}, (3, 8)),
        ("slurm", slurm(5, 3, 10, 8), (2, 8)),
        ("slurm", slurm(20, 0, 40, 5, 10), (2, 5)),
        ("slurm/8", {"SLURM_ARRAY_TASK_ID": "7"}, (7, 8)),
    ],
)
def test_shards_are_named(text: str, environment: dict[str, str], shard: tuple[int, int]) -> None:
    assert parse_shard(text, environment) == shard


@pytest.mark.parametrize(
    ("text", "environment", "says"),
    [
        ("8/8", {}, "the first is 0 and the last 7"),
        ("1/0", {}, "no shard 1/0"),
        ("one", {}, "INDEX/NUMBER"),
        ("slurm", {}, "SLURM_ARRAY_TASK_ID is not set"),
        ("slurm", slurm(7, 0, 9, 3), "do not follow evenly"),
        ("slurm/8", {"SLURM_ARRAY_TASK_ID": "8"}, "--array=0-7"),
    ],
)
def test_a_shard_that_is_none_is_refused(text: str, environment: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_shard(text, environment)
