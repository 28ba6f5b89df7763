"""One endpoint as the dispatcher sees it: requests in flight, and whether it accepts connections.

`in_flight` is changed only by `take` and `give_back`, is exact and never clamped: a count below zero is a bug
and an AssertionError.
"""

from __future__ import annotations

from typing import Final

from penstock.errors import PenstockError
from penstock.wire.address import Address

FIRST_PROBE: Final = 0.25
"""Seconds from the first refused connection to the first probe."""
MAX_PROBE: Final = 2.0
"""Seconds between two probes of an endpoint that stays down; each wait is twice the one before."""


class Endpoint:
    """State of one address."""

    __slots__ = ("address", "down_since", "error", "in_flight", "index", "name", "next_probe", "probe_delay")

    def __init__(self, index: int, address: Address) -> None:
        self.index = index
        """Position in the fleet."""
        self.address = address
        self.name = str(address)
        self.in_flight = 0
        self.down_since: float | None = None
        """When it first refused a connection; None while it is up."""
        self.error: PenstockError | None = None
        """Why it is down."""
        self.next_probe = 0.0
        self.probe_delay = FIRST_PROBE

    def __repr__(self) -> str:
        return f"<Endpoint {self.name} {'up' if self.up else 'down'} in_flight={self.in_flight}>"

    @property
    def up(self) -> bool:
        return self.down_since is None

    def take(self) -> None:
        self.in_flight += 1

    def give_back(self) -> None:
        self.in_flight -= 1
        assert self.in_flight >= 0, f"{self.name}: more slots given back than taken"

    def refuse(self, error: PenstockError, now: float) -> None:
        """A connection could not be made. A first refusal starts the outage, later ones change nothing."""
        if self.down_since is None:
            self.down_since = now
            self.probe_delay = FIRST_PROBE
            self.next_probe = now + self.probe_delay
            self.error = error

    def fail_probe(self, error: PenstockError, now: float) -> None:
        """A probe found it still down."""
        self.error = error
        self.probe_delay = min(2 * self.probe_delay, MAX_PROBE)
        self.next_probe = now + self.probe_delay

    def accept(self) -> None:
        """A probe was answered."""
        self.down_since = None
        self.error = None
