"""The fleet's dispatch as a router needs it: a bound for all, lanes by model, prefix affinity.

It guarantees, besides what `penstock.fleet.dispatch` does:
- no more than `cap` requests are in flight in the whole fleet;
- a request that names a model meets only endpoints that serve it, or whose models are not known; one that
  waits for its model holds up no request for another;
- among requests of one priority that can be served, the one that has waited longest is next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from penstock.errors import PenstockError
from penstock.fleet.attempts import Attempts
from penstock.fleet.dispatch import Dispatch, Ticket
from penstock.fleet.endpoint import UNLIMITED, Endpoint
from penstock.fleet.fleet import Fleet
from penstock.fleet.policy import Policy, by_session
from penstock.router.prefix import PrefixIndex
from penstock.router.upstream import EngineTransport


class RouterAttempts(Attempts):
    """The attempts at one relayed request. `model`: None: any endpoint will do. `blocks`: of its prompt."""

    __slots__ = ("blocks", "model")

    def __init__(
        self,
        fleet: Fleet,
        *,
        name: str | None = None,
        session: int | None = None,
        deadline: float | None = None,
        model: str | None = None,
        blocks: list[int] | None = None,
        priority: int = 0,
    ) -> None:
        super().__init__(fleet, name=name, priority=priority, session=session, deadline=deadline)
        self.model = model
        self.blocks = blocks


Lane = tuple[int, str]
"""Priority and model, "" for any."""


class RouterDispatch(Dispatch):
    """Slots of the endpoints of a router."""

    def __init__(
        self, *, policy: Policy[Any], random: Callable[[], float], cap: int | None, prefix_aware: bool
    ) -> None:
        self.lanes: dict[Lane, OrderedDict[RouterAttempts, None]] = {}
        """Waiting requests; no lane is empty."""
        self.index: PrefixIndex[Endpoint] | None = PrefixIndex() if prefix_aware else None
        self.cap = UNLIMITED if cap is None else cap
        super().__init__(policy=policy, random=random)

    @property
    def waiting(self) -> int:
        return sum(map(len, self.lanes.values()))

    def take(self, ticket: Ticket) -> Endpoint | None:
        if not self._free or self.in_flight >= self.cap:
            return None
        assert isinstance(ticket, RouterAttempts)
        if ticket.model is not None and not any(serves(end, ticket.model) for end in self._free):
            return None
        return self._grant(ticket)

    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, RouterAttempts)
        self.lanes.setdefault((ticket.priority, ticket.model or ""), OrderedDict())[ticket] = None

    def withdraw(self, ticket: Ticket) -> None:
        assert isinstance(ticket, RouterAttempts)
        key = (ticket.priority, ticket.model or "")
        lane = self.lanes.get(key)
        if lane is not None and lane.pop(ticket, False) is None and not lane:
            del self.lanes[key]

    def give_back(self, endpoint: Endpoint) -> None:
        if self.lanes:
            endpoint.saturated = True
        endpoint.give_back()
        self.in_flight -= 1
        if endpoint not in self._free:
            self.refresh(endpoint)
        elif self.lanes:
            self._pump()

    def remove(self, endpoint: Endpoint) -> None:
        super().remove(endpoint)
        if self.index is not None:
            self.index.forget(endpoint)

    def refuse_all(self, error: PenstockError) -> None:
        lanes, self.lanes = self.lanes, {}
        for lane in lanes.values():
            for ticket in lane:
                ticket.refuse(error)

    # -- inside -----------------------------------------------------------------------------------

    def _pump(self) -> None:
        while self.lanes and self._free and self.in_flight < self.cap:
            ticket = self._next()
            if ticket is None:
                return
            self.withdraw(ticket)
            endpoint = self._grant(ticket)
            if not ticket.offer(endpoint):
                self._take_back(endpoint, ticket)

    def _next(self) -> RouterAttempts | None:
        """Who is next of those an endpoint with a slot can serve."""
        best: tuple[int, int] | None = None
        chosen = None
        for (priority, model), lane in self.lanes.items():
            first = next(iter(lane))
            if (best is None or (priority, first.serial) < best) and (
                not model or any(serves(endpoint, model) for endpoint in self._free)
            ):
                best, chosen = (priority, first.serial), first
        return chosen

    def _choose(self, ticket: Ticket) -> Endpoint:
        assert isinstance(ticket, RouterAttempts)
        free = self._free
        if ticket.model is not None:
            free = {endpoint: None for endpoint in free if serves(endpoint, ticket.model)}
        if ticket.avoid in free and len(free) > 1:
            free = {endpoint: None for endpoint in free if endpoint is not ticket.avoid}
        if ticket.session is None and not ticket.blocks:
            chosen: Endpoint = self._policy(free, self._random)
            return chosen
        return self._affine(ticket, free)

    def _affine(self, ticket: RouterAttempts, free: dict[Endpoint, None]) -> Endpoint:
        mean = (self.in_flight + 1) / len(self.endpoints)
        if ticket.session is not None:
            return by_session(free, ticket.session, mean)
        assert self.index is not None and ticket.blocks
        return self.index.choose(free, ticket.blocks, mean)


def serves(endpoint: Endpoint, model: str) -> bool:
    """Whether it serves the model, or may."""
    assert isinstance(endpoint.transport, EngineTransport)
    models = endpoint.transport.models
    return models is None or model in models
