"""Policies as pure functions: what they choose, how even, how stable."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.fleet.fleet import Fleet
from penstock.fleet.policy import (
    BOUND,
    POLICIES,
    by_session,
    least_in_flight,
    power_of_two,
    random_choice,
    round_robin,
    session_key,
)
from tests.fleet.nowhere import endpoint


@dataclass
class Load:
    key: int
    in_flight: int = 0


loads = st.lists(st.integers(0, 5), min_size=1, max_size=20).map(
    lambda counts: [Load(key, count) for key, count in enumerate(counts)]
)


def fleet_of(count: int) -> list[Load]:
    """Endpoints with the keys real ones have."""
    return [Load(endpoint(number).key) for number in range(count)]


def never() -> float:
    raise AssertionError("this policy takes no chances")


@given(loads)
def test_least_in_flight_takes_the_first_of_the_least(endpoints: list[Load]) -> None:
    chosen = least_in_flight(endpoints, never)
    least = min(one.in_flight for one in endpoints)
    assert chosen is next(one for one in endpoints if one.in_flight == least)


@given(loads)
def test_round_robin_takes_the_one_used_longest_ago(endpoints: list[Load]) -> None:
    assert round_robin(endpoints, never) is endpoints[0]


@given(loads, st.integers(), st.sampled_from(sorted(POLICIES)))
def test_every_policy_chooses_one_that_is_there(endpoints: list[Load], seed: int, name: str) -> None:
    before = list(endpoints)
    policy: Any = POLICIES[name]
    chosen = policy(dict.fromkeys(map(Key, endpoints)), random.Random(seed).random)
    assert chosen.load in before and endpoints == before


class Key:
    """A Load that can be the key of a dict, as endpoints are."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.key = load.key

    @property
    def in_flight(self) -> int:
        return self.load.in_flight


@given(loads, st.integers())
def test_power_of_two_never_takes_the_most_loaded_alone(endpoints: list[Load], seed: int) -> None:
    counts = sorted(one.in_flight for one in endpoints)
    chosen = power_of_two(endpoints, random.Random(seed).random)
    if len(counts) > 1 and counts[-1] > counts[-2]:
        assert chosen.in_flight < counts[-1]


@pytest.mark.parametrize("policy", [power_of_two, random_choice])
def test_chance_reaches_everyone_about_as_often(policy: Any) -> None:
    endpoints, dice = [Load(key) for key in range(10)], random.Random(5)
    found = Counter(policy(endpoints, dice.random).key for _ in range(10_000))
    assert set(found) == set(range(10)) and max(found.values()) < 1.15 * 1000 > min(found.values()) > 850


def test_power_of_two_keeps_the_load_even() -> None:
    endpoints, dice = [Load(key) for key in range(50)], random.Random(5)
    for _ in range(50 * 100):
        power_of_two(endpoints, dice.random).in_flight += 1
    counts = [one.in_flight for one in endpoints]
    assert max(counts) - min(counts) <= 10  # chance alone: about 45


def test_an_unknown_policy_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'fastest'.*least_in_flight.*round_robin"):
        Fleet("h", policy="fastest")


# -- sessions ---------------------------------------------------------------------------------------

SESSIONS = [session_key(f"session-{number}") for number in range(10_000)]


@pytest.mark.parametrize("count", [2, 3, 7, 16])
def test_sessions_are_spread_evenly(count: int) -> None:
    endpoints = fleet_of(count)
    found = Counter(by_session(endpoints, session, 1.0).key for session in SESSIONS)
    mean = len(SESSIONS) / count
    assert all(0.85 * mean < found[one.key] < 1.15 * mean for one in endpoints), found


@pytest.mark.parametrize("count", [3, 10])
def test_only_the_sessions_of_an_endpoint_that_leaves_move(count: int) -> None:
    endpoints = fleet_of(count)
    before = [by_session(endpoints, session, 1.0) for session in SESSIONS]
    gone = endpoints[1]
    fewer = [one for one in endpoints if one is not gone]
    random.Random(1).shuffle(fewer)  # the order in which they were used says nothing
    after = [by_session(fewer, session, 1.0) for session in SESSIONS]
    assert all(new is old for new, old in zip(after, before, strict=True) if old is not gone)
    moved = Counter(new.key for new, old in zip(after, before, strict=True) if old is gone)
    share = sum(moved.values()) / (count - 1)
    assert all(0.7 * share < moved[one.key] < 1.3 * share for one in fewer)  # and not all to the next


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 2**64 - 1))
def test_a_session_goes_to_no_endpoint_above_the_bound(counts: list[int], session: int) -> None:
    endpoints = [Load(endpoint(number).key, count) for number, count in enumerate(counts)]
    mean = (sum(counts) + 1) / len(counts)
    chosen = by_session(endpoints, session, mean)
    assert chosen.in_flight < max(1.0, BOUND * mean)  # there always is one: not all are above the mean
    allowed = [one for one in endpoints if one.in_flight < max(1.0, BOUND * mean)]
    assert chosen is by_session([Load(one.key) for one in allowed], session, 1e9) or chosen.key in {
        one.key for one in allowed
    }
    favourite = by_session([Load(one.key) for one in endpoints], session, 1e9)
    if favourite.key in {one.key for one in allowed}:
        assert chosen.key == favourite.key


def test_one_popular_session_is_spread_as_far_as_the_bound_says() -> None:
    endpoints = fleet_of(4)
    for number in range(400):
        by_session(endpoints, SESSIONS[0], (number + 1) / 4).in_flight += 1
    counts = sorted(one.in_flight for one in endpoints)
    assert sum(counts) == 400 and counts[-1] <= BOUND * 100 + 1


def test_where_all_are_above_the_bound_the_favourite_has_it() -> None:
    endpoints = [Load(endpoint(number).key, 50) for number in range(3)]
    assert by_session(endpoints, SESSIONS[0], 1.0).key == by_session(fleet_of(3), SESSIONS[0], 1.0).key


def test_another_process_chooses_the_same() -> None:
    code = (
        "from tests.fleet.test_policy import *\n"
        "print([fleet.index(by_session(fleet, s, 1.0)) for fleet in [fleet_of(7)] for s in SESSIONS[:200]])"
    )
    endpoints = fleet_of(7)
    here = [endpoints.index(by_session(endpoints, session, 1.0)) for session in SESSIONS[:200]]
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30
        )
        assert done.stdout.strip() == str(here), done.stderr
