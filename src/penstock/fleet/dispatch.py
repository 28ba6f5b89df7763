"""The one queue of a fleet: a request meets its endpoint only when that endpoint has a slot for it.

It guarantees:
- first come, first served within a priority, lower numbers first; nobody overtakes an equal that waits;
- no endpoint has more requests than its limit, and one that is not up gets none but the one on trial: while
  there is none with a slot, requests wait, and as soon as there is one, nobody does;
- every slot taken is given back exactly once, by `give_back`; a withdrawn ticket never takes one.

Taking, giving back and withdrawing are O(1) in the requests that wait, and in the fleet as its policy is.
There is no event loop in here: a waiting request hands in a `Ticket`, whose methods are called when its turn
has come.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from penstock.errors import PenstockError
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.policy import Policy, by_session, least_in_flight


class Ticket(Protocol):
    """A request that wants a slot. Hashed by identity."""

    priority: int
    """Lower is earlier."""
    session: int | None
    """Requests of one session go to one endpoint where that can be."""
    avoid: Endpoint | None
    """An endpoint it would rather not meet again."""
    trial: int
    """Set with the slot: not 0 when this request decides about a half open breaker."""

    def offer(self, endpoint: Endpoint) -> bool:
        """The slot is yours. False: nobody is there to take it any longer."""
        ...

    def refuse(self, error: PenstockError) -> None:
        """There will be no slot."""
        ...


class Dispatch:
    """Slots of the endpoints that have been added."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint] = (),
        *,
        policy: Policy[Any] = least_in_flight,
        random: Callable[[], float],
    ) -> None:
        self.endpoints: dict[Endpoint, None] = {}
        self.in_flight = 0
        """Requests in flight on all endpoints, those that have left included."""
        self._free: dict[Endpoint, None] = {}
        """Those that admit a request, the one used longest ago first."""
        self._policy = policy
        self._random = random
        self._queues: dict[int, OrderedDict[Ticket, None]] = {}
        """Waiting tickets by priority; no queue is empty."""
        self._priorities: list[int] = []
        """The keys of the queues, sorted."""
        for endpoint in endpoints:
            self.add(endpoint)

    def __repr__(self) -> str:
        return f"<Dispatch {list(self.endpoints)} waiting={self.waiting}>"

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return sum(map(len, self._queues.values()))

    # -- endpoints --------------------------------------------------------------------------------

    def add(self, endpoint: Endpoint) -> None:
        self.endpoints[endpoint] = None
        self.refresh(endpoint)

    def remove(self, endpoint: Endpoint) -> None:
        """Takes it out; what it has in flight is given back as ever."""
        endpoint.draining = True
        self.endpoints.pop(endpoint, None)
        self._free.pop(endpoint, None)

    def refresh(self, endpoint: Endpoint) -> None:
        """Its limit or its health has changed."""
        if not endpoint.admits or endpoint not in self.endpoints:
            self._free.pop(endpoint, None)
        else:
            self._free.setdefault(endpoint)
            self._pump()

    # -- slots ------------------------------------------------------------------------------------

    def take(self, ticket: Ticket) -> Endpoint | None:
        """A slot if there is one, and then nobody waits for it; else the ticket must be handed in."""
        return self._grant(ticket) if self._free else None

    def wait(self, ticket: Ticket) -> None:
        """Queues the ticket, which is then offered a slot, refused one, or withdrawn."""
        queue = self._queues.get(ticket.priority)
        if queue is None:
            queue = self._queues[ticket.priority] = OrderedDict()
            insort(self._priorities, ticket.priority)
        queue[ticket] = None

    def withdraw(self, ticket: Ticket) -> None:
        queue = self._queues.get(ticket.priority)
        if queue is not None and ticket in queue:
            del queue[ticket]
            if not queue:
                self._drop_queue(ticket.priority)

    def give_back(self, endpoint: Endpoint) -> None:
        if self._queues:
            endpoint.saturated = True
        endpoint.give_back()
        self.in_flight -= 1
        if endpoint not in self._free:
            self.refresh(endpoint)

    def refuse_all(self, error: PenstockError) -> None:
        """Every waiting request ends with this error."""
        queues, self._queues, self._priorities = self._queues, {}, []
        for queue in queues.values():
            for ticket in queue:
                ticket.refuse(error)

    # -- inside -----------------------------------------------------------------------------------

    def _pump(self) -> None:
        while self._free and self._priorities:
            priority = self._priorities[0]
            queue = self._queues[priority]
            ticket, _ = queue.popitem(last=False)
            if not queue:
                self._drop_queue(priority)
            endpoint = self._grant(ticket)
            if not ticket.offer(endpoint):
                self._take_back(endpoint, ticket)

    def _drop_queue(self, priority: int) -> None:
        del self._queues[priority]
        self._priorities.remove(priority)

    def _grant(self, ticket: Ticket) -> Endpoint:
        """A slot on the endpoint of choice; there is one."""
        free = self._free
        endpoint = next(iter(free)) if len(free) == 1 else self._choose(ticket)
        trial = ticket.trial = endpoint.take()
        self.in_flight += 1
        if trial or endpoint.in_flight >= endpoint.limit:  # it admitted this one, and now no other
            del free[endpoint]
        elif len(free) > 1:
            del free[endpoint]
            free[endpoint] = None
        return endpoint

    def _choose(self, ticket: Ticket) -> Endpoint:
        free = self._free
        if ticket.avoid in free:
            others = dict.fromkeys(endpoint for endpoint in free if endpoint is not ticket.avoid)
            free = others or free
        if ticket.session is not None:
            return by_session(free, ticket.session, (self.in_flight + 1) / len(self.endpoints))
        chosen: Endpoint = self._policy(free, self._random)
        return chosen

    def _take_back(self, endpoint: Endpoint, ticket: Ticket) -> None:
        """Nobody was there to take the slot."""
        endpoint.health.dropped(ticket.trial)
        endpoint.give_back()
        self.in_flight -= 1
        if endpoint.admits:
            self._free.setdefault(endpoint)
