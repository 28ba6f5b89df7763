"""The dispatch queue as a state machine: counts, order, limits, endpoints that come and go."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.errors import ConnectFailed, FleetDown, PenstockError, ServerFailed
from penstock.fleet.dispatch import Dispatch
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.health import Breaker, State
from penstock.fleet.policy import POLICIES
from tests.fleet.nowhere import endpoint

BREAKER = Breaker(failure_threshold=2, timeout=1.0)
ERROR = ServerFailed(500, "x")


class Ticket:
    """Records what it is offered, and checks the endpoint at that moment."""

    def __init__(
        self,
        *,
        priority: int = 0,
        session: int | None = None,
        avoid: Endpoint | None = None,
        deaf: bool = False,
    ) -> None:
        self.priority = priority
        self.session = session
        self.avoid = avoid
        self.trial = 0
        self.deaf = deaf
        self.offered = False
        self.endpoint: Endpoint | None = None
        self.error: PenstockError | None = None

    def offer(self, endpoint: Endpoint) -> bool:
        assert self.endpoint is None and self.error is None and not self.offered
        assert endpoint.in_flight <= endpoint.limit and not endpoint.draining
        assert endpoint.up or (endpoint.health.state is State.HALF_OPEN and self.trial)
        self.offered = True
        if self.deaf:
            return False
        self.endpoint = endpoint
        return True

    def refuse(self, error: PenstockError) -> None:
        assert self.endpoint is None and self.error is None
        self.error = error


class DispatchMachine(RuleBasedStateMachine):
    """Requests come, go, cancel and are refused; endpoints join, leave, fail, and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.names = 0
        self.now = 0.0
        self.dispatch = Dispatch(policy=POLICIES["least_in_flight"], random=random.Random(1).random)
        self.held: list[Ticket] = []
        self.queue: list[Ticket] = []
        self.join(2)
        self.join(2)

    def pick(self, data: st.DataObject) -> Endpoint:
        return data.draw(st.sampled_from(list(self.dispatch.endpoints)))

    def admitting(self) -> list[Endpoint]:
        return [one for one in self.dispatch.endpoints if one.admits]

    def collect(self) -> None:
        """Slots granted to waiting tickets: in the order of (priority, arrival), deaf ones passed over."""
        order = sorted(self.queue, key=lambda ticket: ticket.priority)  # stable
        offered = [ticket.offered for ticket in order]
        assert offered == sorted(offered, reverse=True), "someone was overtaken"
        self.held += [ticket for ticket in order if ticket.endpoint is not None]
        self.queue = [ticket for ticket in self.queue if not ticket.offered]

    # -- endpoints --------------------------------------------------------------------------------

    @precondition(lambda self: len(self.dispatch.endpoints) < 5)
    @rule(limit=st.none() | st.integers(1, 3))
    def join(self, limit: int | None) -> None:
        self.names += 1
        self.dispatch.add(endpoint(self.names, limit=limit, breaker=BREAKER))
        self.collect()

    @precondition(lambda self: self.dispatch.endpoints)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.dispatch.remove(self.pick(data))

    @precondition(lambda self: self.dispatch.endpoints)
    @rule(data=st.data(), limit=st.integers(1, 4))
    def change_limit(self, data: st.DataObject, limit: int) -> None:
        chosen = self.pick(data)
        chosen.limit = limit
        self.dispatch.refresh(chosen)
        self.collect()

    @precondition(lambda self: self.dispatch.endpoints)
    @rule(data=st.data())
    def go_down(self, data: st.DataObject) -> None:
        chosen = self.pick(data)
        chosen.health.refuse(ConnectFailed("x"), self.now)
        self.dispatch.refresh(chosen)

    @precondition(lambda self: self.dispatch.endpoints)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        chosen = self.pick(data)
        chosen.health.accept()
        self.dispatch.refresh(chosen)
        self.collect()

    @precondition(lambda self: self.dispatch.endpoints)
    @rule(data=st.data())
    def fail_until_the_breaker_opens(self, data: st.DataObject) -> None:
        chosen = self.pick(data)
        for _ in range(BREAKER.failure_threshold):
            chosen.health.failed(ERROR, self.now, trial=0, may_open=True)
        self.dispatch.refresh(chosen)

    @rule(seconds=st.floats(0.5, 3.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for one in self.dispatch.endpoints:
            if one.health.half_open(self.now):
                self.dispatch.refresh(one)
        self.collect()

    # -- requests ---------------------------------------------------------------------------------

    @rule(
        data=st.data(),
        deaf=st.booleans(),
        priority=st.integers(0, 2),
        session=st.none() | st.integers(0, 3),
    )
    def request(self, data: st.DataObject, deaf: bool, priority: int, session: int | None) -> None:
        known = [None, *self.dispatch.endpoints]
        avoid = data.draw(st.sampled_from(known))
        ticket = Ticket(priority=priority, session=session, avoid=avoid, deaf=deaf)
        admitting = self.admitting()
        chosen = self.dispatch.take(ticket)
        assert (chosen is not None) == bool(admitting)
        if chosen is None:
            self.dispatch.wait(ticket)
            self.queue.append(ticket)
            return
        assert chosen in admitting
        assert chosen is not avoid or admitting == [avoid]
        ticket.endpoint = chosen
        self.held.append(ticket)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), failed=st.booleans())
    def finish(self, data: st.DataObject, failed: bool) -> None:
        ticket = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        chosen = ticket.endpoint
        assert chosen is not None
        if failed:
            chosen.health.failed(ERROR, self.now, trial=ticket.trial, may_open=True)
        else:
            chosen.health.succeeded(ticket.trial)
        self.dispatch.refresh(chosen)
        self.collect()
        waited = bool(self.queue)
        self.dispatch.give_back(chosen)
        assert chosen.saturated or not waited
        self.collect()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def cancel_in_flight(self, data: st.DataObject) -> None:
        ticket = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        assert ticket.endpoint is not None
        ticket.endpoint.health.dropped(ticket.trial)
        self.dispatch.give_back(ticket.endpoint)
        self.collect()

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.queue))
        self.dispatch.withdraw(ticket)
        self.dispatch.withdraw(ticket)  # again is nothing
        self.queue.remove(ticket)

    @rule()
    def give_up(self) -> None:
        self.dispatch.refuse_all(FleetDown("x"))
        assert all(isinstance(ticket.error, FleetDown) for ticket in self.queue)
        self.queue.clear()

    # -- what holds always ------------------------------------------------------------------------

    @invariant()
    def counts_are_exact(self) -> None:
        assert self.dispatch.in_flight == len(self.held)
        assert self.dispatch.waiting == len(self.queue)
        for one in self.dispatch.endpoints:
            assert one.in_flight == sum(ticket.endpoint is one for ticket in self.held)

    @invariant()
    def no_slot_is_free_while_someone_waits(self) -> None:
        assert not (self.queue and self.admitting())

    @invariant()
    def at_most_one_is_on_trial(self) -> None:
        for one in self.dispatch.endpoints:
            if one.health.state is State.HALF_OPEN:
                trial = one.health.on_trial
                there = [t for t in self.held if t.endpoint is one and t.trial and t.trial == trial]
                assert len(there) == (1 if trial else 0)

    def teardown(self) -> None:
        for ticket in self.held:
            assert ticket.endpoint is not None
            self.dispatch.give_back(ticket.endpoint)
        while late := [ticket for ticket in self.queue if ticket.endpoint is not None]:
            self.queue = [ticket for ticket in self.queue if ticket.endpoint is None]
            for ticket in late:
                assert ticket.endpoint is not None
                self.dispatch.give_back(ticket.endpoint)
        assert self.dispatch.in_flight == 0


DispatchMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50)
TestDispatchMachine = DispatchMachine.TestCase


def dispatch_of(count: int, limit: int | None = None) -> Dispatch:
    return Dispatch(
        [endpoint(number, limit=limit) for number in range(count)], random=random.Random(1).random
    )


def test_giving_back_too_much_is_noticed() -> None:
    dispatch = dispatch_of(1)
    chosen = dispatch.take(Ticket())
    assert chosen is not None
    dispatch.give_back(chosen)
    with pytest.raises(AssertionError, match="more slots given back than taken"):
        dispatch.give_back(chosen)


def test_load_is_spread_evenly() -> None:
    dispatch = dispatch_of(7)
    for _ in range(700):
        assert dispatch.take(Ticket()) is not None
    assert {one.in_flight for one in dispatch.endpoints} == {100}


def test_a_lower_number_is_earlier_and_equals_keep_their_order() -> None:
    dispatch = dispatch_of(1, 1)
    first = dispatch.take(Ticket())
    assert first is not None
    tickets = [Ticket(priority=priority) for priority in (1, 0, 2, 0, 1, -5)]
    for ticket in tickets:
        dispatch.wait(ticket)
    order = []
    for _ in tickets:
        dispatch.give_back(first)
        (served,) = [index for index, one in enumerate(tickets) if one.offered and index not in order]
        order.append(served)
    assert order == [5, 1, 3, 0, 4, 2]


def half_open(limit: int | None = None) -> tuple[Dispatch, Endpoint]:
    """One endpoint, its breaker open."""
    dispatch = Dispatch([endpoint(1, limit=limit, breaker=BREAKER)], random=random.Random(1).random)
    (one,) = dispatch.endpoints
    for _ in range(BREAKER.failure_threshold):
        one.health.failed(ERROR, 0.0, trial=0, may_open=True)
    dispatch.refresh(one)
    return dispatch, one


def test_one_of_those_that_wait_is_put_on_trial_and_one_that_has_gone_is_passed_over() -> None:
    dispatch, one = half_open()
    tickets = [Ticket(deaf=True), Ticket(), Ticket()]
    for ticket in tickets:
        assert dispatch.take(ticket) is None
        dispatch.wait(ticket)
    assert one.health.half_open(10.0)
    dispatch.refresh(one)
    gone, tried, later = tickets
    assert gone.offered and tried.trial
    assert [ticket.endpoint for ticket in tickets] == [None, one, None]
    assert one.in_flight == 1
    one.health.succeeded(tried.trial)
    dispatch.give_back(one)
    assert (later.endpoint, later.trial) == (one, 0)


def test_while_half_open_the_second_has_to_wait() -> None:
    dispatch, one = half_open()
    assert one.health.half_open(10.0)
    dispatch.refresh(one)
    taken = [dispatch.take(Ticket()) for _ in range(2)]
    assert taken == [one, None]


def test_saturated_is_what_had_to_wait_at_the_limit() -> None:
    dispatch = dispatch_of(1, 1)
    (one,) = dispatch.endpoints
    for waits in (False, True):
        one.saturated = False
        assert dispatch.take(Ticket()) is one
        if waits:
            dispatch.wait(Ticket())
        dispatch.give_back(one)
        assert one.saturated is waits


def test_a_removed_endpoint_gets_nothing_and_its_slots_come_back() -> None:
    dispatch = dispatch_of(2, 1)
    gone = dispatch.take(Ticket())
    assert gone is not None
    dispatch.remove(gone)
    other = dispatch.take(Ticket())
    assert other is not None and other is not gone
    late = Ticket()
    dispatch.wait(late)
    dispatch.give_back(gone)
    assert late.endpoint is None and gone.in_flight == 0 and dispatch.in_flight == 1
    dispatch.give_back(other)
    assert late.endpoint is other


def cost_of(count: int) -> float:
    """Seconds of CPU for so many tickets that wait, half of them withdrawn, on one slot."""
    dispatch = dispatch_of(1, 1)
    one = dispatch.take(Ticket())
    assert one is not None
    tickets = [Ticket(priority=number % 3) for number in range(count)]
    started = time.process_time()
    for ticket in tickets:
        dispatch.wait(ticket)
    for ticket in tickets[::2]:
        dispatch.withdraw(ticket)
    for _ in tickets[1::2]:
        dispatch.give_back(one)
    seconds = time.process_time() - started
    assert dispatch.waiting == 0 and one.in_flight == 1
    return seconds


def test_a_hundred_thousand_waiting_cost_linear_time() -> None:
    few = min(cost_of(10_000) for _ in range(3))
    many = min(cost_of(100_000) for _ in range(3))
    assert many < 40 * few, f"{few:.3f} s for 10,000, {many:.3f} s for 100,000"
