"""Policies: which of the endpoints that have a slot gets the next request.

Pure functions of a snapshot. `endpoints` holds at least one, the one used longest ago first. O(endpoints) for
`least_in_flight` and `session`, at C speed for the first; O(1) for the others but a copy of the list.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from hashlib import blake2b
from operator import attrgetter
from typing import Final, Protocol, TypeVar

BOUND: Final = 1.25
"""How far above the mean in flight an endpoint may be and still get a request for the sake of its session."""


class Load(Protocol):
    """What a policy may look at."""

    in_flight: int
    key: int


E = TypeVar("E", bound=Load)

Policy = Callable[[Collection[E], Callable[[], float]], E]
"""Takes the endpoints to choose from and a source of random numbers in [0, 1)."""

_in_flight: Final = attrgetter("in_flight")
_WORD: Final = (1 << 64) - 1
_MIX_1: Final = 0xBF58476D1CE4E5B9
_MIX_2: Final = 0x94D049BB133111EB


def least_in_flight(endpoints: Collection[E], random: Callable[[], float]) -> E:
    """The endpoint with the fewest requests in flight; among equals the one used longest ago."""
    return min(endpoints, key=_in_flight)


def power_of_two(endpoints: Collection[E], random: Callable[[], float]) -> E:
    """The less loaded of two taken by chance.

    Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.
    """
    choices = list(endpoints)
    first = choices.pop(int(random() * len(choices)))
    if not choices:
        return first
    second = choices[int(random() * len(choices))]
    return second if second.in_flight < first.in_flight else first


def round_robin(endpoints: Collection[E], random: Callable[[], float]) -> E:
    """The endpoint used longest ago."""
    return next(iter(endpoints))


def random_choice(endpoints: Collection[E], random: Callable[[], float]) -> E:
    return list(endpoints)[int(random() * len(endpoints))]


def session_key(session: str) -> int:
    """A session as a number, the same in every process."""
    return int.from_bytes(blake2b(session.encode(), digest_size=8).digest(), "little")


def by_session(endpoints: Collection[E], session: int, mean: float) -> E:
    """The endpoint a session belongs to, or the next in its order while that one is too busy.

    Rendezvous hashing, so that a session keeps its endpoint whoever joins or leaves, with bounded load: an
    endpoint with BOUND × `mean` in flight or more is passed over. `mean`: in flight per endpoint of the
    fleet, this request included. Sources: Thaler and Ravishankar, "Using name-based mappings to increase hit
    rates", 1998; Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads", 2018.
    """
    bound = max(BOUND * mean, 1.0)
    free = [endpoint for endpoint in endpoints if endpoint.in_flight < bound]
    return max(free or endpoints, key=lambda endpoint: _mixed(session ^ endpoint.key))


def _mixed(number: int) -> int:
    """64 bits of which each depends on all of `number`: Python's hash of a tuple leaves some endpoints with
    half their share of the sessions.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014 (its last step).
    """
    number = number * _MIX_1 & _WORD
    number = (number ^ number >> 32) * _MIX_2 & _WORD
    return number ^ number >> 29


POLICIES: Final[dict[str, Policy[Load]]] = {
    "least_in_flight": least_in_flight,
    "power_of_two": power_of_two,
    "random": random_choice,
    "round_robin": round_robin,
}
