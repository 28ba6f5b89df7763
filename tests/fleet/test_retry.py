"""Retry decisions by type, backoff, the budget, and the state machine of one request."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import errors
from penstock.errors import (
    ConfigError,
    ConnectFailed,
    ConnectionLost,
    DeadlineExceeded,
    EngineError,
    FleetDown,
    MalformedResponse,
    Overloaded,
    PenstockError,
    PhaseTimeout,
    RequestRejected,
    ServerFailed,
)
from penstock.fleet.retry import Budget, Decision, Retries, Retry, classify

FAILED = Decision(retry=True, charged=True, blamed=True, suspect=True)
REFUSED = Decision(retry=True, refused=True)
GIVE_UP = Decision(retry=False)

DECISIONS: list[tuple[BaseException, Decision]] = [
    (ConnectFailed("x"), REFUSED),
    (PhaseTimeout("x", "connect"), REFUSED),
    (PhaseTimeout("x", "first_byte"), FAILED),
    (PhaseTimeout("x", "idle"), FAILED),
    (ConnectionLost("x"), FAILED),
    (MalformedResponse("x"), FAILED),
    (ServerFailed(500, "x"), FAILED),
    (Overloaded(408, "x"), Decision(retry=True, overloaded=True)),
    (Overloaded(429, "x"), Decision(retry=True, overloaded=True)),
    (
        Overloaded(503, "x", retry_after=7.0),
        Decision(retry=True, overloaded=True, suspect=True, wait=7.0),
    ),
    (RequestRejected(400, "429 connection reset"), GIVE_UP),
    (FleetDown("x"), GIVE_UP),
    (DeadlineExceeded("x"), GIVE_UP),
    (EngineError("x"), GIVE_UP),
    (ConfigError("x"), GIVE_UP),
    (ValueError("x"), GIVE_UP),
]


@pytest.mark.parametrize(("error", "decision"), DECISIONS, ids=lambda it: type(it).__name__)
def test_the_type_decides(error: BaseException, decision: Decision) -> None:
    assert classify(error) == decision


def test_every_transport_and_response_error_has_been_thought_of() -> None:
    decided = {type(error) for error, _ in DECISIONS}
    leaves = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type)
        and issubclass(kind, errors.TransportError | errors.ResponseError)
        and kind not in (errors.TransportError, errors.ResponseError)
    }
    assert leaves <= decided


@given(st.integers(1, 10_000), st.floats(0, 10), st.floats(0, 100), st.integers())
def test_backoff_is_bounded_and_spread_over_the_whole_span(
    failures: int, base: float, cap: float, seed: int
) -> None:
    retry = Retry(base=base, cap=cap)
    dice = random.Random(seed)
    span = min(cap, base * 2.0 ** min(failures - 1, 64))
    assert all(0 <= retry.backoff(failures, dice.random) <= span for _ in range(20))
    assert retry.backoff(failures, lambda: 0.0) == 0.0
    assert retry.backoff(failures, lambda: 1.0) == span


@pytest.mark.parametrize(
    "settings",
    [
        {"attempts": 0},
        {"base": -1.0},
        {"cap": -0.1},
        {"outage": -1.0},
        {"budget": -0.1},
        {"base": float("nan")},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Retry(**settings)  # type: ignore[arg-type]


# -- the budget -------------------------------------------------------------------------------------

steps = st.one_of(
    st.tuples(st.just("wait"), st.floats(0, 30)),
    st.tuples(st.just("spend"), st.integers(1, 150).map(float)),
    st.tuples(st.just("earn"), st.integers(1, 300).map(float)),
)


@given(st.lists(steps, max_size=60), st.sampled_from([0.0, 0.1, 1.0, 7.0]), st.sampled_from([1, 500]))
def test_retries_are_never_made_faster_than_the_budget_says(
    history: list[tuple[str, float]], ratio: float, in_flight: int
) -> None:
    """In any span of time no more fall due than the burst, its share for each second, and what was earned."""
    budget, now, earned = Budget(ratio), 1000.0, 0
    burst = max(Budget.BURST, in_flight)
    due: list[tuple[float, int]] = []
    for what, amount in history:
        if what == "wait":
            now += amount
        elif what == "earn":
            for _ in range(int(amount)):
                budget.earn()
                earned += 1
        else:
            for _ in range(int(amount)):
                before = budget.due(now, in_flight)
                assert budget.due(now, in_flight) == before  # asking takes nothing
                wait = budget.spend(now, in_flight)
                assert wait == before >= 0
                due.append((now + wait, earned))
        assert budget.owed >= 0
    due.sort()
    for first in range(0, len(due), 7):
        start = due[first][0]
        for last in range(first, len(due), 11):
            allowed = burst + Budget.SHARE * burst * (due[last][0] - start) + ratio * earned + 1
            assert last - first + 1 <= allowed + 1e-6


def test_within_the_budget_nobody_waits_and_over_it_each_has_its_turn() -> None:
    budget = Budget(0.1)
    burst = int(Budget.BURST)
    assert [budget.spend(5.0, 1) for _ in range(burst)] == [0.0] * burst
    waits = [budget.spend(5.0, 1) for _ in range(30)]
    assert waits == pytest.approx([(n + 1) / (Budget.SHARE * Budget.BURST) for n in range(30)])
    assert budget.spend(8.0, 1) == pytest.approx(0.1)  # those promised are due by now


def test_all_that_was_in_flight_may_be_lost_once_without_delay() -> None:
    budget = Budget(0.1)
    assert [budget.spend(0.0, 3000 - n) for n in range(3000)] == [0.0] * 3000
    assert budget.spend(0.0, 1) == pytest.approx(1 / 300)
    assert budget.spend(11.0, 3000) == 0.0  # and again some ten seconds later


def test_answers_and_time_earn_retries_and_no_more_than_the_burst() -> None:
    budget = Budget(0.1)
    for _ in range(50):
        budget.spend(0.0, 1)
    for _ in range(100):
        budget.earn()
    assert budget.owed == pytest.approx(40.0)
    assert budget.due(1e6, 1) == 0.0 and budget.owed == 0.0
    budget.spend(1e6, 1)
    for _ in range(1000):
        budget.earn()
    assert budget.owed == 0.0


# -- one request ------------------------------------------------------------------------------------

failures = st.sampled_from([error for error, _ in DECISIONS if isinstance(error, PenstockError)])


@given(
    st.lists(st.tuples(failures, st.floats(0, 20)), max_size=40),
    st.integers(1, 6),
    st.floats(1, 60) | st.none(),
)
def test_a_request_is_sent_at_most_so_often_and_refused_at_most_so_long(
    history: list[tuple[PenstockError, float]], limit: int, outage: float | None
) -> None:
    retry, budget = Retry(attempts=limit, outage=outage), Budget(0.1)
    retries, dice = Retries(), random.Random(1)
    now, sent, refused_since = 100.0, 0, None
    for error, passed in history:
        assert retries.failures == sent
        wait = retries.fail(classify(error), retry, budget, now, dice.random)
        decision = classify(error)
        if decision.refused:
            refused_since = now if refused_since is None else refused_since
            final = outage is not None and now - refused_since >= outage
        elif decision.retry:
            refused_since, sent = None, sent + 1
            final = sent >= limit or (outage is not None and decision.wait > outage)
        else:
            final = True
        assert (wait is None) == final
        if wait is None:
            return
        if decision.refused:
            assert wait == 0.0
        else:
            assert decision.wait <= wait <= decision.wait + min(30.0, 0.5 * 2 ** (sent - 1))
        now += wait + passed
    assert sent < limit


def fail(retries: Retries, error: PenstockError, now: float, **options: float) -> float | None:
    deadline = options.pop("deadline", None)
    retry = Retry(**options)  # type: ignore[arg-type]
    return retries.fail(classify(error), retry, Budget(0.1), now, lambda: 0.0, deadline=deadline)


def test_refusals_are_bounded_from_the_first_of_a_row() -> None:
    retries, bounds = Retries(), {"attempts": 2, "outage": 10.0}
    refused, lost = ConnectFailed("x"), ConnectionLost("x")
    assert [fail(retries, refused, now, **bounds) for now in (0.0, 5.0, 9.9)] == [0.0, 0.0, 0.0]
    assert fail(retries, lost, 9.9, **bounds) == 0.0  # a connection was made: the row has ended
    assert [fail(retries, refused, now, **bounds) for now in (12.0, 21.9, 22.0)] == [0.0, 0.0, None]
    assert retries.failures == 1


def test_retry_after_beyond_patience_is_final() -> None:
    assert fail(Retries(), Overloaded(429, "x", retry_after=59.0), 0.0, outage=60.0) == 59.0
    assert fail(Retries(), Overloaded(429, "x", retry_after=61.0), 0.0, outage=60.0) is None
    patient = Retry(outage=None)
    decision = classify(Overloaded(429, "x", retry_after=86_400.0))
    assert Retries().fail(decision, patient, Budget(0.1), 0.0, lambda: 0.0) == 86_400.0


def test_only_what_may_have_been_generated_is_charged() -> None:
    for error, decision in DECISIONS:
        budget = Budget(0.1)
        Retries().fail(decision, Retry(), budget, 0.0, lambda: 0.0)
        assert budget.owed == (decision.charged and decision.retry), error


def test_what_is_over_the_budget_waits_for_it() -> None:
    budget, retry = Budget(0.1), Retry()
    for _ in range(int(budget.BURST) + 50):
        budget.spend(0.0, 1)
    wait = Retries().fail(classify(ConnectionLost("x")), retry, budget, 0.0, lambda: 0.0)
    assert wait == pytest.approx(51 / (budget.SHARE * budget.BURST))
    assert Retries().fail(classify(Overloaded(429, "x")), retry, budget, 0.0, lambda: 0.0) == 0.0


def test_what_would_come_after_the_deadline_is_given_up_and_takes_nothing() -> None:
    budget, retry = Budget(0.1), Retry()
    for _ in range(int(budget.BURST) + 50):
        budget.spend(0.0, 1)
    before = budget.owed
    decision = classify(ConnectionLost("x"))
    for _ in range(1000):
        assert Retries().fail(decision, retry, budget, 0.0, lambda: 0.0, deadline=5.0) is None
    assert budget.owed == before
    wait = Retries().fail(decision, retry, budget, 0.0, lambda: 0.0, deadline=5.2)
    assert wait == pytest.approx(5.1)
