"""The one queue of a fleet: a request meets its endpoint only when that endpoint has a slot for it.

It guarantees:
- first come, first served; nobody overtakes a request that waits;
- no endpoint has more than `max_in_flight` requests, and an endpoint that is down gets none: while all are
  down, requests wait;
- every slot taken is given back exactly once, by `give_back`; a withdrawn ticket never takes one.

Taking, giving back and withdrawing are O(1) in the requests that wait, O(endpoints) in the fleet. There is no
event loop in here: a waiting request hands in a `Ticket`, whose methods are called when its turn has come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from penstock.errors import PenstockError
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.policy import Policy, least_in_flight
from penstock.wire.address import Address


class Ticket(Protocol):
    """A request that waits for a slot. Hashed by identity."""

    avoid: Endpoint | None
    """An endpoint it would rather not meet again."""

    def offer(self, endpoint: Endpoint) -> bool:
        """The slot is yours. False: nobody is there to take it any longer."""
        ...

    def refuse(self, error: PenstockError) -> None:
        """There will be no slot."""
        ...


class Dispatch:
    """Slots of the endpoints at `addresses` (at least one, each once)."""

    def __init__(
        self,
        addresses: Sequence[Address],
        *,
        max_in_flight: int | None = None,
        policy: Policy[Endpoint] = least_in_flight,
    ) -> None:
        self.endpoints = [Endpoint(index, address) for index, address in enumerate(addresses)]
        self.max_in_flight = max_in_flight
        """Requests in flight per endpoint; None: no limit."""
        self._policy = policy
        self._turn = 0
        self._queue: OrderedDict[Ticket, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Dispatch {self.endpoints} waiting={self.waiting}>"

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def down_since(self) -> float | None:
        """Since when no endpoint has been up; None while one is."""
        moments = [endpoint.down_since for endpoint in self.endpoints]
        known = [moment for moment in moments if moment is not None]
        return max(known) if len(known) == len(moments) else None

    def take(self, avoid: Endpoint | None = None) -> Endpoint | None:
        """A slot, if there is one and nobody waits for it already; else hand in a ticket."""
        if self._queue:
            return None
        endpoint = self._choose(avoid)
        if endpoint is not None:
            endpoint.take()
        return endpoint

    def wait(self, ticket: Ticket) -> None:
        """Queues the ticket, which is then offered a slot, refused one, or withdrawn."""
        self._queue[ticket] = None

    def withdraw(self, ticket: Ticket) -> None:
        self._queue.pop(ticket, None)

    def give_back(self, endpoint: Endpoint) -> None:
        endpoint.give_back()
        self._pump()

    def refused(self, endpoint: Endpoint, error: PenstockError, now: float) -> None:
        """A connection to the endpoint could not be made: it gets no more requests until a probe succeeds."""
        endpoint.refuse(error, now)

    def accepted(self, endpoint: Endpoint) -> None:
        """A probe of the endpoint succeeded."""
        endpoint.accept()
        self._pump()

    def refuse_all(self, error: PenstockError) -> None:
        """Every waiting request ends with this error."""
        queue, self._queue = self._queue, OrderedDict()
        for ticket in queue:
            ticket.refuse(error)

    def _pump(self) -> None:
        while self._queue:
            ticket = next(iter(self._queue))
            endpoint = self._choose(ticket.avoid)
            if endpoint is None:
                return
            del self._queue[ticket]
            if ticket.offer(endpoint):
                endpoint.take()

    def _choose(self, avoid: Endpoint | None) -> Endpoint | None:
        limit = self.max_in_flight
        free = [
            endpoint
            for endpoint in self.endpoints
            if endpoint.down_since is None and (limit is None or endpoint.in_flight < limit)
        ]
        if len(free) > 1:
            self._turn += 1
            return self._policy([endpoint for endpoint in free if endpoint is not avoid], self._turn)
        return free[0] if free else None
