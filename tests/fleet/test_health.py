"""Health and breaker against a plain model, and the times they keep."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.errors import ConfigError, ConnectFailed, ServerFailed
from penstock.fleet.health import FIRST_PROBE, MAX_PROBE, Breaker, Health, State

ERROR = ServerFailed(500, "x")
BREAKER = Breaker(failure_threshold=3, success_threshold=2, timeout=1.0, max_timeout=4.0)


class HealthMachine(RuleBasedStateMachine):
    """Requests are sent while it admits them, and end in any order, long after the state has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.health = Health(BREAKER)
        self.now = 0.0
        self.sent: list[tuple[int, int]] = []
        """(trial, turn in which it was sent): a turn ends with each change of state."""
        self.turn = 0
        self.state = State.UP
        self.window: list[bool] = []
        self.timeout = BREAKER.timeout
        self.until = 0.0
        self.successes = 0

    def go(self, state: State) -> None:
        self.state = state
        self.turn += 1
        if state is State.OPEN:
            self.until = self.now + self.timeout
        if state is State.UP:
            self.window, self.timeout = [], BREAKER.timeout
        if state is State.HALF_OPEN:
            self.successes = 0

    @property
    def under_trial(self) -> list[tuple[int, int]]:
        return [it for it in self.sent if it[0] and it[1] == self.turn]

    @precondition(lambda self: self.health.admits)
    @rule()
    def send(self) -> None:
        on_trial = self.health.state is State.HALF_OPEN
        self.sent.append((self.health.begin_trial() if on_trial else 0, self.turn))

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), outcome=st.sampled_from(["answered", "failed", "dropped"]), may_open=st.booleans())
    def end(self, data: st.DataObject, outcome: str, may_open: bool) -> None:
        request = self.sent.pop(data.draw(st.integers(0, len(self.sent) - 1)))
        trial, turn = request
        decides = trial > 0 and turn == self.turn and self.state is State.HALF_OPEN
        if outcome == "dropped":
            self.health.dropped(trial)
            return
        self.window = [*self.window, outcome == "failed"][-2 * BREAKER.failure_threshold :]
        if outcome == "failed":
            self.health.failed(ERROR, self.now, trial=trial, may_open=may_open)
            if decides:
                self.timeout = min(2 * self.timeout, BREAKER.max_timeout)
                self.go(State.OPEN)
            elif self.state is State.UP and may_open and sum(self.window) >= BREAKER.failure_threshold:
                self.go(State.OPEN)
        else:
            self.health.succeeded(trial)
            if decides:
                self.successes += 1
                if self.successes == BREAKER.success_threshold:
                    self.go(State.UP)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        due = self.state is State.OPEN and self.now >= self.until
        assert self.health.half_open(self.now) == due
        if due:
            self.go(State.HALF_OPEN)

    @rule()
    def refuse(self) -> None:
        self.health.refuse(ConnectFailed("x"), self.now)
        if self.state is not State.DOWN:
            self.go(State.DOWN)

    @rule()
    def answer_a_probe(self) -> None:
        self.health.accept()
        if self.state is State.DOWN:
            self.go(State.UP)

    @invariant()
    def as_the_model(self) -> None:
        assert self.health.state is self.state
        assert (self.health.error is None) == (self.state is State.UP)
        if self.state is State.OPEN:
            assert self.health.until == self.until

    @invariant()
    def a_single_trial(self) -> None:
        if self.state is State.HALF_OPEN:
            assert len(self.under_trial) <= 1
            assert self.health.admits == (not self.under_trial)
        else:
            assert self.health.admits == (self.state is State.UP)


HealthMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50)
TestHealthMachine = HealthMachine.TestCase


@given(st.lists(st.sampled_from(["answered", "dropped"]), max_size=200))
def test_answers_and_cancels_never_open_it(outcomes: list[str]) -> None:
    health = Health(BREAKER)
    for outcome in outcomes:
        if outcome == "answered":
            health.succeeded(0)
        else:
            health.dropped(0)
    assert health.admits


@given(st.integers(1, 20), st.lists(st.booleans(), max_size=200))
def test_it_opens_on_so_many_failures_among_the_last_twice_as_many(
    threshold: int, outcomes: list[bool]
) -> None:
    health = Health(Breaker(failure_threshold=threshold))
    for index, failed in enumerate(outcomes):
        if failed:
            health.failed(ERROR, 0.0, trial=0, may_open=True)
        else:
            health.succeeded(0)
        recent = outcomes[max(0, index + 1 - 2 * threshold) : index + 1]
        assert (health.state is State.OPEN) == (failed and sum(recent) >= threshold)
        if health.state is State.OPEN:
            return


def opened(breaker: Breaker) -> Health:
    health = Health(breaker)
    for _ in range(breaker.failure_threshold):
        health.failed(ERROR, 0.0, trial=0, may_open=True)
    return health


def test_the_time_it_stays_open_doubles_up_to_its_bound_and_starts_anew() -> None:
    breaker = Breaker(timeout=1.0, max_timeout=5.0)
    health = opened(breaker)
    now, waits = 0.0, []
    for _ in range(4):
        waits.append(health.until - now)
        now = health.until
        assert not health.half_open(now - 0.001) and health.half_open(now)
        health.failed(ERROR, now, trial=health.begin_trial(), may_open=False)
    assert waits == [1.0, 2.0, 4.0, 5.0]
    assert health.half_open(health.until)
    health.succeeded(health.begin_trial())
    assert health.admits
    for _ in range(breaker.failure_threshold):
        health.failed(ERROR, 100.0, trial=0, may_open=True)
    assert health.until == 101.0


def test_an_outage_in_between_starts_the_times_anew_as_well() -> None:
    health = opened(Breaker(timeout=1.0))
    assert health.half_open(1.0)
    health.failed(ERROR, 1.0, trial=health.begin_trial(), may_open=True)
    health.refuse(ConnectFailed("x"), 2.0)
    health.accept()
    for _ in range(10):
        health.failed(ERROR, 10.0, trial=0, may_open=True)
    assert health.until == 11.0


def test_a_trial_from_before_an_outage_decides_nothing_about_the_next() -> None:
    health = opened(Breaker(timeout=1.0))
    assert health.half_open(1.0)
    old = health.begin_trial()
    health.refuse(ConnectFailed("x"), 2.0)
    health.accept()
    for _ in range(10):
        health.failed(ERROR, 3.0, trial=0, may_open=True)
    assert health.half_open(4.0)
    new = health.begin_trial()
    for end in (health.succeeded, health.dropped):
        end(old)
        assert health.state is State.HALF_OPEN and not health.admits
    health.succeeded(new)
    assert health.admits


def test_probes_come_at_growing_intervals_and_start_anew() -> None:
    health = Health(Breaker())
    health.refuse(ConnectFailed("first"), 10.0)
    health.refuse(ConnectFailed("second"), 11.0)
    assert (health.since, health.next_probe, str(health.error)) == (10.0, 10.0 + FIRST_PROBE, "first")
    waits = []
    for now in range(20, 30):
        health.fail_probe(ConnectFailed("still"), float(now))
        waits.append(health.next_probe - now)
    assert waits[:3] == [2 * FIRST_PROBE, 4 * FIRST_PROBE, 8 * FIRST_PROBE]
    assert waits[-1] == MAX_PROBE
    health.accept()
    health.refuse(ConnectFailed("new"), 50.0)
    assert (health.since, health.next_probe) == (50.0, 50.0 + FIRST_PROBE)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"failure_threshold": 0}, "failure_threshold"),
        ({"success_threshold": 0}, "success_threshold"),
        ({"timeout": 0.0}, "timeout"),
        ({"timeout": 9.0, "max_timeout": 8.0}, "max_timeout"),
        ({"timeout": float("nan")}, "timeout"),
    ],
)
def test_a_breaker_that_makes_no_sense_is_refused(given: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Breaker(**given)  # type: ignore[arg-type]
