"""The fleet's dispatch as a router needs it: a bound for all, lanes by model, prefix affinity.

It guarantees, besides what `penstock.fleet.dispatch` does:
- no more than `cap` requests are in flight in the whole fleet;
- a request that names a model meets only endpoints that serve it, or whose models are not known; one that
  waits for its model holds up no request for another;
- among requests of one priority that can be served, the one that has waited longest is next, but for the
  sake of a prefix cache: see `penstock.router.lane`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from typing import Any

from penstock.errors import PenstockError
from penstock.fleet.attempts import Attempts
from penstock.fleet.dispatch import Dispatch, Ticket
from penstock.fleet.endpoint import UNLIMITED, Endpoint
from penstock.fleet.fleet import Fleet
from penstock.fleet.policy import Policy, by_session
from penstock.router.lane import Lane
from penstock.router.prefix import PrefixIndex
from penstock.router.upstream import EngineTransport


class RouterAttempts(Attempts):
    """The attempts at one relayed request. `model`: None: any endpoint will do. `blocks`: of its prompt."""

    __slots__ = ("blocks", "home", "model", "place", "queued")

    home: Endpoint | None
    """While it waits: where its session or the beginning of its prompt is known."""
    place: int
    """While it waits: its place in its lane."""

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
        self.queued = 0.0
        """Seconds it has waited for slots, backoffs among them."""

    @property
    def group(self) -> int | None:
        """Requests with the same are for the same prompt."""
        return self.blocks[-1] if self.blocks else None


Key = tuple[int, str]
"""Of a lane: priority and model, "" for any."""


class RouterDispatch(Dispatch):
    """Slots of the endpoints of a router."""

    def __init__(
        self,
        *,
        policy: Policy[Any],
        random: Callable[[], float],
        cap: int | None,
        prefix_aware: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lanes: dict[Key, Lane[RouterAttempts, Endpoint]] = {}
        """Waiting requests; no lane is empty."""
        self.index: PrefixIndex[Endpoint] | None = PrefixIndex() if prefix_aware else None
        self.cap = UNLIMITED if cap is None else cap
        self._now = clock
        super().__init__(policy=policy, random=random)

    def reconfigure(self, *, policy: Policy[Any], cap: int | None, prefix_aware: bool) -> None:
        """Another policy and another bound from now on; what is in flight stays."""
        self._policy = policy
        self.cap = UNLIMITED if cap is None else cap
        if prefix_aware != (self.index is not None):
            self.index = PrefixIndex() if prefix_aware else None
        self._pump()

    @property
    def waiting(self) -> int:
        return sum(map(len, self.lanes.values()))

    def take(self, ticket: Ticket) -> Endpoint | None:
        if not self._free or self.in_flight >= self.cap:
            return None
        assert isinstance(ticket, RouterAttempts)
        if ticket.model is not None and not any(serves(end, ticket.model) for end in self._free):
            return None
        if ticket.blocks and len(self._free) == 1:
            return self._grant_last(ticket, ticket.blocks)
        return self._grant(ticket)

    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, RouterAttempts)
        key = (ticket.priority, ticket.model or "")
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes[key] = Lane()
        ticket.home = self._home(ticket) if ticket.session is not None or ticket.blocks else None
        lane.add(ticket)

    def withdraw(self, ticket: Ticket) -> None:
        assert isinstance(ticket, RouterAttempts)
        key = (ticket.priority, ticket.model or "")
        lane = self.lanes.get(key)
        if lane is not None and lane.discard(ticket) and not lane:
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
        while self._pump_one():
            pass

    def _pump_one(self) -> bool:
        """Gives a slot to whoever is next; False: there is none, or nobody it could be given to."""
        if not self.lanes or not self._free or self.in_flight >= self.cap:
            return False
        key = self._next()
        if key is None:
            return False
        lane, model = self.lanes[key], key[1]
        free = [end for end in self._free if serves(end, model)] if model else self._free
        ticket = lane.pick(free, self._now)
        self.withdraw(ticket)
        blocks = ticket.blocks if self.index is not None else None
        if blocks and len(self._free) == 1:
            endpoint = self._grant_last(ticket, blocks)
        else:
            endpoint = self._grant(ticket)
        if blocks:
            lane.settle(blocks[-1], endpoint)
        if not ticket.offer(endpoint):
            self._take_back(endpoint, ticket)
        return True

    def _next(self) -> Key | None:
        """The lane that is next of those an endpoint with a slot can serve."""
        best: tuple[int, int] | None = None
        chosen = None
        for key, lane in self.lanes.items():
            priority, model = key
            rank = (priority, lane.head.serial)
            if (best is None or rank < best) and (
                not model or any(serves(endpoint, model) for endpoint in self._free)
            ):
                best, chosen = rank, key
        return chosen

    def _home(self, ticket: RouterAttempts) -> Endpoint | None:
        """Where a request that has to wait would rather go."""
        home = None
        if ticket.session is not None:
            here = [end for end in self.endpoints if end.up and end.current]
            if ticket.model is not None:
                here = [end for end in here if serves(end, ticket.model)]
            home = by_session(here, ticket.session, inf) if here else None
        elif ticket.blocks and self.index is not None:
            home = self.index.owner(ticket.blocks)
        return None if home is ticket.avoid else home

    def _grant_last(self, ticket: RouterAttempts, blocks: list[int]) -> Endpoint:
        """A slot on the only endpoint that has one: there the prompt is known from now on."""
        endpoint = self._grant(ticket)
        if self.index is not None:
            self.index.went(blocks, endpoint)
        return endpoint

    def _choose(self, ticket: Ticket) -> Endpoint:
        assert isinstance(ticket, RouterAttempts)
        free = self._free
        if ticket.model is not None:
            free = {endpoint: None for endpoint in free if serves(endpoint, ticket.model)}
        if ticket.avoid in free and len(free) > 1:
            free = {endpoint: None for endpoint in free if endpoint is not ticket.avoid}
        if ticket.session is None and (not ticket.blocks or self.index is None):
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
