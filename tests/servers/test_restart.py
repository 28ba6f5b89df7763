"""Restarts and dealing of GPUs: rules without processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.servers.devices import deal, visible
from penstock.servers.patterns import Kind
from penstock.servers.restart import Restart, Restarts


def test_backoff_doubles_to_the_cap_and_then_it_is_given_up() -> None:
    restarts = Restarts(Restart(limit=5, base=1.0, cap=6.0))
    assert [restarts.failed(0.0, None) for _ in range(6)] == [1.0, 2.0, 4.0, 6.0, 6.0, None]


def test_one_that_ran_long_starts_anew() -> None:
    restarts = Restarts(Restart(limit=1, base=1.0, forgiven_after=100.0))
    for start in (0.0, 1000.0, 2000.0):
        restarts.ready(start)
        assert restarts.failed(start + 100.0, Kind.KILLED) == 1.0
    restarts.ready(3000.0)
    assert restarts.failed(3099.0, Kind.KILLED) is None
    assert restarts.total == 3


def test_a_cause_that_lasts_is_not_met_twice() -> None:
    assert Restarts(Restart()).failed(0.0, Kind.BAD_FLAG) is None


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 500)), max_size=30), st.integers(0, 4))
def test_never_more_than_the_limit_in_a_row(lives: list[tuple[bool, float]], limit: int) -> None:
    """Each life: whether it became ready, and for how long it ran."""
    restarts, now, short = Restarts(Restart(limit=limit, forgiven_after=300.0)), 0.0, 0
    for ready, seconds in lives:
        if ready:
            restarts.ready(now)
        now += seconds
        long = ready and now - (now - seconds) >= 300.0
        short = 0 if long else short
        given_up = restarts.failed(now, None) is None
        assert given_up == (short >= limit)
        if given_up:
            return
        short += 1


@pytest.mark.parametrize(
    ("named", "found"),
    [
        (None, ("0", "1")),
        ("", ()),
        ("3", ("3",)),
        ("GPU-1, GPU-2", ("GPU-1", "GPU-2")),
        ("1,-1,2", ("1",)),
    ],
)
def test_visible(named: str | None, found: tuple[str, ...]) -> None:
    assert visible(2, {} if named is None else {"CUDA_VISIBLE_DEVICES": named}) == found


@given(st.lists(st.integers(0, 99), unique=True), st.integers(1, 9), st.integers(1, 9))
def test_no_gpu_is_dealt_twice(devices: list[int], servers: int, each: int) -> None:
    if servers * each > len(devices):
        with pytest.raises(ConfigError, match=f"need.* {servers * each}, and there are {len(devices)}"):
            deal(devices, servers, each)
        return
    dealt = deal(devices, servers, each)
    assert [len(hand) for hand in dealt] == [each] * servers
    assert [name for hand in dealt for name in hand] == [str(d) for d in devices[: servers * each]]


def test_a_device_named_twice() -> None:
    with pytest.raises(ConfigError, match="twice"):
        deal(["0", 0], 1, 1)
