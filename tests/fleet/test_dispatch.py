"""The dispatch queue as a state machine: counts, order, limits, outages."""

from __future__ import annotations

import time
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.errors import ConnectFailed, FleetDown, PenstockError
from penstock.fleet.dispatch import Dispatch
from penstock.fleet.endpoint import FIRST_PROBE, MAX_PROBE, Endpoint
from penstock.wire.address import Address


class Ticket:
    def __init__(self, avoid: Endpoint | None = None, *, deaf: bool = False) -> None:
        self.avoid = avoid
        self.deaf = deaf
        self.endpoint: Endpoint | None = None
        self.error: PenstockError | None = None

    def offer(self, endpoint: Endpoint) -> bool:
        assert self.endpoint is None and self.error is None
        if self.deaf:
            return False
        self.endpoint = endpoint
        return True

    def refuse(self, error: PenstockError) -> None:
        assert self.endpoint is None and self.error is None
        self.error = error


def dispatch_of(count: int, max_in_flight: int | None = None) -> Dispatch:
    return Dispatch(
        [Address.parse(f"host:{port}") for port in range(1, count + 1)], max_in_flight=max_in_flight
    )


class DispatchMachine(RuleBasedStateMachine):
    """Requests come, go, cancel and are refused; endpoints go down and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 2
        self.dispatch = dispatch_of(3, self.limit)
        self.held: list[Endpoint] = []
        self.queue: deque[Ticket] = deque()
        self.now = 0.0

    def collect(self) -> None:
        """Slots granted to waiting tickets: from the front of the queue, deaf ones passed over."""
        while self.queue and (self.queue[0].endpoint is not None or self.queue[0].deaf):
            ticket = self.queue[0]
            if ticket.deaf and not any(later.endpoint is not None for later in self.queue):
                break
            self.queue.popleft()
            if ticket.endpoint is not None:
                self.held.append(ticket.endpoint)
        assert all(ticket.endpoint is None for ticket in self.queue), "someone was overtaken"

    @rule(avoid=st.none() | st.integers(0, 2), deaf=st.booleans())
    def request(self, avoid: int | None, deaf: bool) -> None:
        unwanted = None if avoid is None else self.dispatch.endpoints[avoid]
        endpoint = self.dispatch.take(unwanted)
        if endpoint is not None:
            assert endpoint.up
            others = [e for e in self.dispatch.endpoints if e is not endpoint and e.up]
            if endpoint is unwanted:
                assert all(other.in_flight >= self.limit for other in others)
            self.held.append(endpoint)
        else:
            ticket = Ticket(unwanted, deaf=deaf)
            self.dispatch.wait(ticket)
            self.queue.append(ticket)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.dispatch.give_back(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))
        self.collect()

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = self.queue[data.draw(st.integers(0, len(self.queue) - 1))]
        self.dispatch.withdraw(ticket)
        self.dispatch.withdraw(ticket)  # again is nothing
        self.queue.remove(ticket)

    @rule(index=st.integers(0, 2))
    def go_down(self, index: int) -> None:
        self.now += 1
        self.dispatch.refused(self.dispatch.endpoints[index], ConnectFailed("x"), self.now)

    @rule(index=st.integers(0, 2))
    def come_back(self, index: int) -> None:
        self.dispatch.accepted(self.dispatch.endpoints[index])
        self.collect()

    @rule()
    def give_up(self) -> None:
        self.dispatch.refuse_all(FleetDown("x"))
        assert all(isinstance(ticket.error, FleetDown) for ticket in self.queue if not ticket.deaf)
        self.queue.clear()

    @invariant()
    def counts_are_exact(self) -> None:
        for endpoint in self.dispatch.endpoints:
            assert endpoint.in_flight == self.held.count(endpoint) <= self.limit

    @invariant()
    def no_slot_is_free_while_someone_waits(self) -> None:
        if any(not ticket.deaf for ticket in self.queue):
            assert not any(e.up and e.in_flight < self.limit for e in self.dispatch.endpoints)

    @invariant()
    def an_outage_is_known(self) -> None:
        downs = [endpoint.down_since for endpoint in self.dispatch.endpoints]
        expected = None if None in downs else max(down for down in downs if down is not None)
        assert self.dispatch.down_since == expected


TestDispatchMachine = DispatchMachine.TestCase
TestDispatchMachine.settings = settings(max_examples=60, stateful_step_count=40)


def test_giving_back_too_much_is_noticed() -> None:
    dispatch = dispatch_of(1)
    endpoint = dispatch.take()
    assert endpoint is not None
    dispatch.give_back(endpoint)
    with pytest.raises(AssertionError, match="more slots given back than taken"):
        dispatch.give_back(endpoint)


def test_load_is_spread_evenly() -> None:
    dispatch = dispatch_of(7)
    for _ in range(700):
        assert dispatch.take() is not None
    assert {endpoint.in_flight for endpoint in dispatch.endpoints} == {100}


def test_a_hundred_thousand_waiting_cost_linear_time() -> None:
    dispatch = dispatch_of(1, 1)
    endpoint = dispatch.take()
    assert endpoint is not None
    tickets = [Ticket() for _ in range(100_000)]
    started = time.process_time()
    for ticket in tickets:
        dispatch.wait(ticket)
    for ticket in tickets[::2]:
        dispatch.withdraw(ticket)
    for ticket in tickets[1::2]:
        dispatch.give_back(endpoint)
        assert ticket.endpoint is endpoint
    assert time.process_time() - started < 3.0
    assert dispatch.waiting == 0 and endpoint.in_flight == 1


def test_probes_come_at_growing_intervals_and_start_anew() -> None:
    endpoint = dispatch_of(1).endpoints[0]
    endpoint.refuse(ConnectFailed("first"), 10.0)
    endpoint.refuse(ConnectFailed("second"), 11.0)
    assert (endpoint.down_since, endpoint.next_probe, str(endpoint.error)) == (
        10.0,
        10.0 + FIRST_PROBE,
        "first",
    )
    waits = []
    for now in range(20, 30):
        endpoint.fail_probe(ConnectFailed("still"), float(now))
        waits.append(endpoint.next_probe - now)
    assert waits[:3] == [2 * FIRST_PROBE, 4 * FIRST_PROBE, 8 * FIRST_PROBE]
    assert waits[-1] == MAX_PROBE
    endpoint.accept()
    endpoint.refuse(ConnectFailed("new"), 50.0)
    assert (endpoint.down_since, endpoint.next_probe) == (50.0, 50.0 + FIRST_PROBE)
