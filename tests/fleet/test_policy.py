"""Policies as pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from penstock.fleet.policy import least_in_flight


@dataclass(frozen=True)
class Load:
    name: int
    in_flight: int


loads = st.lists(st.integers(0, 5), min_size=1, max_size=20).map(
    lambda counts: [Load(name, count) for name, count in enumerate(counts)]
)


@given(loads, st.integers(0, 1000))
def test_least_in_flight_takes_one_of_the_least(endpoints: list[Load], turn: int) -> None:
    chosen = least_in_flight(endpoints, turn)
    assert chosen in endpoints
    assert chosen.in_flight == min(endpoint.in_flight for endpoint in endpoints)


@given(loads)
def test_equals_take_turns(endpoints: list[Load]) -> None:
    least = min(endpoint.in_flight for endpoint in endpoints)
    equal = {endpoint for endpoint in endpoints if endpoint.in_flight == least}
    assert {least_in_flight(endpoints, turn) for turn in range(len(equal))} == equal
