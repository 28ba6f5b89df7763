"""Retry decisions by type, backoff, and the state machine of one request."""

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
    FleetDown,
    MalformedResponse,
    Overloaded,
    PenstockError,
    PhaseTimeout,
    RequestRejected,
    ServerFailed,
)
from penstock.fleet.retry import Attempts, Decision, Retry, classify

AGAIN = Decision(retry=True)
REFUSED = Decision(retry=True, refused=True)
GIVE_UP = Decision(retry=False)

DECISIONS: list[tuple[BaseException, Decision]] = [
    (ConnectFailed("x"), REFUSED),
    (PhaseTimeout("x", "connect"), REFUSED),
    (PhaseTimeout("x", "first_byte"), AGAIN),
    (PhaseTimeout("x", "idle"), AGAIN),
    (ConnectionLost("x"), AGAIN),
    (MalformedResponse("x"), AGAIN),
    (Overloaded(429, "x"), AGAIN),
    (Overloaded(503, "x", retry_after=7.0), Decision(retry=True, wait=7.0)),
    (ServerFailed(500, "x"), AGAIN),
    (RequestRejected(400, "x"), GIVE_UP),
    (FleetDown("x"), GIVE_UP),
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
    "settings", [{"attempts": 0}, {"base": -1.0}, {"cap": -0.1}, {"outage": -1.0}, {"base": float("nan")}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Retry(**settings)  # type: ignore[arg-type]


failures = st.sampled_from([error for error, _ in DECISIONS if isinstance(error, PenstockError)])
waits = st.floats(0, 20)


@given(st.lists(st.tuples(failures, waits), max_size=40), st.integers(1, 6), st.floats(1, 60) | st.none())
def test_a_request_is_sent_at_most_so_often_and_refused_at_most_so_long(
    history: list[tuple[PenstockError, float]], limit: int, outage: float | None
) -> None:
    attempts = Attempts(Retry(attempts=limit, outage=outage), random.Random(1).random)
    now, sent, refused_since = 100.0, 0, None
    for error, passed in history:
        assert attempts.number == sent + 1
        wait = attempts.fail(error, now)
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


def test_refusals_are_bounded_from_the_first_of_a_row() -> None:
    attempts = Attempts(Retry(attempts=2, outage=10.0), lambda: 0.0)
    assert [attempts.fail(ConnectFailed("x"), now) for now in (0.0, 5.0, 9.9)] == [0.0, 0.0, 0.0]
    assert attempts.fail(ConnectionLost("x"), 9.9) == 0.0  # a connection was made: the row has ended
    assert [attempts.fail(ConnectFailed("x"), now) for now in (12.0, 21.9, 22.0)] == [0.0, 0.0, None]
    assert attempts.number == 2


def test_retry_after_beyond_patience_is_final() -> None:
    attempts = Attempts(Retry(outage=60.0), lambda: 0.0)
    assert attempts.fail(Overloaded(429, "x", retry_after=59.0), 0.0) == 59.0
    assert attempts.fail(Overloaded(429, "x", retry_after=61.0), 0.0) is None
    patient = Attempts(Retry(outage=None), lambda: 0.0)
    assert patient.fail(Overloaded(429, "x", retry_after=86_400.0), 0.0) == 86_400.0
