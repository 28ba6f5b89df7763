"""Slots lent to several processes: never too many, none idle while somebody wants it, exact when one dies."""

from __future__ import annotations

import os
from collections import deque
from itertools import count
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.fleet.endpoint import UNLIMITED
from penstock.fleet.limit import AdaptiveLimit
from penstock.fleet.policy import least_in_flight
from penstock.router.counts import COLUMNS, IN_FLIGHT, Counts
from penstock.router.dispatch import RouterAttempts
from penstock.router.ledger import Ledger, Lend, Word
from penstock.router.shared import SharedDispatch, SharedEndpoint, SharedLimit
from penstock.wire.address import Address

TRANSPORT: Any = None
"""No request is sent."""
MOMENTS = count()
WORKERS = 2
MOST = 3
"""Processes."""


class Request(RouterAttempts):
    """One that is in flight as soon as it is offered a slot."""

    def __init__(self, process: Process, serial: int) -> None:
        self.process = process
        self.serial = serial
        self.model = self.session = self.avoid = self.blocks = None
        self.priority = self.trial = 0
        self.at: Any = None
        self.since = 0

    def offer(self, endpoint: Any) -> bool:
        self.at = endpoint
        self.since = next(MOMENTS)
        self.process.flying.append(self)
        return True


class Process:
    """One process, and what is on the way between it and the parent."""

    def __init__(self, number: int, fd: int, limits: dict[int, int | None]) -> None:
        self.number = number
        self.counts = Counts(fd, MOST, number)
        self.asked = False
        self.flying: list[Request] = []
        self.up: deque[Any] = deque()
        self.down: deque[Word] = deque()
        self.dispatch = SharedDispatch(
            self.counts,
            clock=lambda: 0.0,
            ask=self._ask,
            agree=lambda *_: None,
            policy=least_in_flight,
            random=lambda: 0.0,
            cap=None,
            prefix_aware=False,
        )
        for worker, limit in limits.items():
            address = Address.parse(f"10.0.0.{worker}:1")
            endpoint = SharedEndpoint(self.counts, address, TRANSPORT, limit=limit)
            endpoint.worker = worker
            self.dispatch.workers[worker] = endpoint
            self.dispatch.add(endpoint)

    def _ask(self) -> None:
        self.asked = True

    def arrive(self, serial: int) -> None:
        request = Request(self, serial)
        endpoint = self.dispatch.take(request)
        if endpoint is None:
            self.dispatch.wait(request)
        else:
            request.offer(endpoint)

    def step(self) -> None:
        """The end of a step of its event loop."""
        if self.asked:
            self.asked = False
            self.up.extend(self.dispatch.claims())


class Machine(RuleBasedStateMachine):
    """Processes and their parent, with messages that take their time."""

    @initialize(
        limits=st.lists(st.none() | st.integers(1, 6), min_size=WORKERS, max_size=WORKERS),
        cap=st.none() | st.integers(1, 8),
        processes=st.integers(1, MOST),
    )
    def begin(self, limits: list[int | None], cap: int | None, processes: int) -> None:
        self.limits = dict(enumerate(limits, 1))
        self.lowered: set[int] = set()
        """Whose limit was lowered below what was lent."""
        self.fd = Counts.create(MOST)
        self.parent_counts = Counts(self.fd, MOST)
        self.ledger = Ledger(cap)
        for worker, limit in self.limits.items():
            self.ledger.add(worker, limit)
        self.processes: dict[int, Process] = {}
        self.serial = 0
        for number in range(processes):
            self.start(number)

    def start(self, number: int) -> None:
        self.processes[number] = Process(number, self.fd, self.limits)
        self.ledger.join(number)
        self.pass_on()

    def pass_on(self) -> None:
        for number, word in self.ledger.words:
            self.processes[number].down.append(word)
        self.ledger.words.clear()

    def some(self, number: int) -> Process:
        return self.processes[sorted(self.processes)[number % len(self.processes)]]

    @rule(number=st.integers(0, MOST))
    def arrive(self, number: int) -> None:
        self.serial += 1
        self.some(number).arrive(self.serial)

    @rule(number=st.integers(0, MOST), which=st.integers(0, 50))
    def end(self, number: int, which: int) -> None:
        process = self.some(number)
        if process.flying:
            request = process.flying.pop(which % len(process.flying))
            process.dispatch.give_back(request.at)

    @rule(number=st.integers(0, MOST))
    def step(self, number: int) -> None:
        self.some(number).step()

    @rule(number=st.integers(0, MOST))
    def parent_hears(self, number: int) -> None:
        process = self.some(number)
        if process.up:
            self.ledger.claim(process.number, process.up.popleft())
            self.pass_on()

    @rule(number=st.integers(0, MOST))
    def process_hears(self, number: int) -> None:
        process = self.some(number)
        if process.down:
            process.dispatch.hear(process.down.popleft())

    @rule(number=st.integers(0, MOST))
    def die(self, number: int) -> None:
        """Whatever it was doing; with what it had said, and not what it had not."""
        if len(self.processes) > 1:
            process = self.some(number)
            del self.processes[process.number]
            for claim in process.up:
                self.ledger.claim(process.number, claim)
            self.ledger.words = [said for said in self.ledger.words if said[0] != process.number]
            self.ledger.leave(process.number)
            self.parent_counts.clear(process.number)
            self.pass_on()

    @precondition(lambda self: len(self.processes) < MOST)
    @rule()
    def restart(self) -> None:
        self.start(next(number for number in range(MOST) if number not in self.processes))

    @rule(worker=st.integers(1, WORKERS), limit=st.none() | st.integers(1, 6))
    def change(self, worker: int, limit: int | None) -> None:
        self.limits[worker] = limit
        self.ledger.limit(worker, limit)
        if limit is not None and self.ledger.lent(worker) > limit:
            self.lowered.add(worker)
        self.pass_on()

    @rule(cap=st.none() | st.integers(1, 8))
    def rebound(self, cap: int | None) -> None:
        self.ledger.bound(cap)
        if cap is not None and self.ledger.lent() > cap:
            self.lowered.add(0)
        self.pass_on()

    @rule()
    def rest(self) -> None:
        """All is said and heard: then nothing is idle that somebody waits for, and nobody goes without."""
        for _ in range(200):
            self.quiesce()
            waiting = [process for process in self.processes.values() if process.dispatch.lanes]
            if waiting and not self.full():
                for process in self.processes.values():
                    process.dispatch.retell()
                self.quiesce()
                assert self.full() or not any(p.dispatch.lanes for p in waiting), "idle slots"
            flying = [process for process in self.processes.values() if process.flying]
            if not flying:
                assert not waiting, "nobody is in flight, and some wait"
                return
            for process in flying:
                process.dispatch.give_back(process.flying.pop(0).at)
        raise AssertionError("some wait for ever")

    def quiesce(self) -> None:
        for _ in range(3000):
            busy = False
            for process in self.processes.values():
                process.step()
                while process.up:
                    busy = True
                    self.ledger.claim(process.number, process.up.popleft())
                    self.pass_on()
                while process.down:
                    busy = True
                    process.dispatch.hear(process.down.popleft())
                busy = busy or process.asked
            if not busy:
                return
        raise AssertionError("they talk for ever")

    def waiting(self) -> list[Process]:
        return [process for process in self.processes.values() if process.dispatch.lanes]

    def flying(self, worker: int) -> int:
        return sum(process.dispatch.workers[worker].own for process in self.processes.values())

    def full(self) -> bool:
        total = sum(map(self.flying, self.limits))
        return (self.ledger.cap is not None and total >= self.ledger.cap) or all(
            limit is not None and self.flying(worker) >= limit for worker, limit in self.limits.items()
        )

    @invariant()
    def never_too_many(self) -> None:
        if not hasattr(self, "limits"):
            return
        for worker, limit in self.limits.items():
            lent = self.ledger.lent(worker)
            if limit is None or lent <= limit:
                self.lowered.discard(worker)
            assert worker in self.lowered or limit is None or lent <= limit
            for number, process in self.processes.items():
                endpoint = process.dispatch.workers[worker]
                assert endpoint.own <= endpoint.lent, "more in flight than lent"
                on_the_way = sum(
                    word.count for word in process.down if isinstance(word, Lend) and word.worker == worker
                )
                coming = sum(claim.returned for claim in process.up if claim.worker == worker)
                held = self.ledger.held(number, worker)
                assert held == endpoint.lent + on_the_way + coming, "the book and the process differ"
                assert held >= endpoint.own
        total = self.ledger.lent()
        assert total == sum(map(self.ledger.lent, self.limits))
        if self.ledger.cap is None or total <= self.ledger.cap:
            self.lowered.discard(0)
        assert 0 in self.lowered or self.ledger.cap is None or total <= self.ledger.cap
        for process in self.processes.values():
            process.dispatch.look()
            for worker, endpoint in process.dispatch.workers.items():
                assert endpoint.in_flight == self.flying(worker)
            assert process.dispatch.in_flight == sum(map(self.flying, self.limits))
            assert process.dispatch.waiting == sum(p.dispatch.waiting_here for p in self.processes.values())

    def teardown(self) -> None:
        if hasattr(self, "fd"):
            for process in self.processes.values():
                process.counts.close()
            self.parent_counts.close()
            os.close(self.fd)


TestShared = Machine.TestCase
TestShared.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    limits=st.lists(st.none() | st.integers(1, 5), min_size=WORKERS, max_size=WORKERS),
    cap=st.none() | st.integers(1, 6),
    waves=st.lists(st.lists(st.integers(0, 12), min_size=MOST, max_size=MOST), min_size=1, max_size=3),
    dies=st.booleans(),
)
@example(limits=[4, 4], cap=None, waves=[[12, 12, 0], [0, 0, 12]], dies=True)
@example(limits=[1, 1], cap=None, waves=[[12, 12, 12]], dies=False)
@example(limits=[1, 1], cap=1, waves=[[12, 12, 12]], dies=True)
@example(limits=[5, 5], cap=4, waves=[[4, 0, 0], [0, 12, 12]], dies=False)
def test_nothing_is_idle_and_everybody_has_a_turn(
    limits: list[int | None], cap: int | None, waves: list[list[int]], dies: bool
) -> None:
    world = Machine()
    world.begin(limits=limits, cap=cap, processes=MOST)
    try:
        for wave in waves:
            for number, count in enumerate(wave):
                for _ in range(count if number in world.processes else 0):
                    world.arrive(number)
            world.quiesce()
            assert world.full() or not world.waiting(), "idle slots"
        if dies:
            world.die(0)
            world.quiesce()
            assert world.full() or not world.waiting(), "what the dead one had is idle"
        ended: dict[int, int] = {}
        """Requests that have ended since each waiting process was last given a slot."""
        while world.waiting():
            before = {number: len(process.flying) for number, process in world.processes.items()}
            oldest = min(
                (request for process in world.processes.values() for request in process.flying),
                key=lambda request: request.since,
            )
            oldest.process.flying.remove(oldest)
            oldest.process.dispatch.give_back(oldest.at)
            before[oldest.process.number] -= 1
            world.quiesce()
            world.never_too_many()
            assert world.full() or not world.waiting(), "idle slots"
            for number, process in world.processes.items():
                served = len(process.flying) > before[number] or not process.dispatch.lanes
                ended[number] = 0 if served else ended.get(number, 0) + 1
            assert max(ended.values()) <= sum(before.values()) + 2 * MOST, "somebody has no turn"
    finally:
        world.teardown()


def test_the_table_sums_rows_and_forgets_the_dead() -> None:
    fd = Counts.create(3)
    tables = [Counts(fd, 3, own) for own in range(3)]
    for number, table in enumerate(tables):
        table.rows[IN_FLIGHT][5] = 10**number
        table.rows[IN_FLIGHT][COLUMNS - 1] = 1
    assert tables[0].elsewhere(IN_FLIGHT, 7) == [0, 0, 0, 0, 0, 110, 0]
    assert tables[0].elsewhere(IN_FLIGHT, COLUMNS)[-1] == 2
    tables[0].clear(2)
    assert tables[1].elsewhere(IN_FLIGHT, 6)[5] == 1
    assert tables[1].get(1, IN_FLIGHT, 5) == 10
    for table in tables:
        table.close()
    os.close(fd)


def test_one_process_moves_an_adaptive_limit_by_what_all_have_seen() -> None:
    fd = Counts.create(2)
    tables = [Counts(fd, 2, own) for own in range(2)]
    address = Address.parse("10.0.0.1:1")
    ends = [SharedEndpoint(table, address, TRANSPORT, adaptive=True) for table in tables]
    for end in ends:
        end.worker = 1
    leader, follower = (end.limiter for end in ends)
    assert isinstance(leader, SharedLimit) and isinstance(follower, SharedLimit)
    leader.leads = True
    leader.tick(0.0, 32, True, None)
    before = leader.current
    follower.overloaded(0.1)
    follower.tick(0.5, 32, True, None)
    assert follower.current == before  # it only says what it saw
    leader.tick(0.5, 32, True, None)
    assert leader.current == before * 3 // 4
    # Answers of both are throughput: with twice the answers of one it grows as a lone process would.
    alone = AdaptiveLimit(UNLIMITED)
    both = SharedLimit(ends[0], UNLIMITED)
    both.leads = True
    both.tick(10.0, 32, True, None)
    alone.tick(10.0, 32, True, None)
    for look in range(1, 40):
        for limiter in (both, follower):
            for _ in range(10):
                limiter.finished(50, 0.5)
        for _ in range(20):
            alone.finished(50, 0.5)
        now = 10.0 + look / 2
        both.tick(now, both.current, True, None)
        alone.tick(now, alone.current, True, None)
        assert both.current == alone.current
    assert both.current != 32
    tables[0].clear(1)  # the follower has died: nothing is negative
    both.tick(60.0, 32, True, None)
    for table, end in zip(tables, ends, strict=True):
        assert end.counts is table
        table.close()
    os.close(fd)
