"""Policies: which endpoint with a free slot gets the next request. Pure functions of a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class Load(Protocol):
    """What a policy may look at."""

    @property
    def in_flight(self) -> int: ...


E = TypeVar("E", bound=Load)

Policy = Callable[[Sequence[E], int], E]
"""Takes the endpoints to choose from (at least one) and the number of the decision, which breaks ties."""


def least_in_flight(endpoints: Sequence[E], turn: int) -> E:
    """The endpoint with the fewest requests in flight; among equals each decision starts one further on."""
    least = min([endpoint.in_flight for endpoint in endpoints])
    equal = [endpoint for endpoint in endpoints if endpoint.in_flight == least]
    return equal[turn % len(equal)]
