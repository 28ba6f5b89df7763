"""Whether an engine still generates, judged from what its metrics say."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.fleet.load import EngineLoad
from penstock.fleet.progress import LOST_AFTER, Progress, Verdict

STALL = 60.0
ALIVE, STALLED, LOST = Verdict.ALIVE, Verdict.STALLED, Verdict.LOST


def load(running: float = 1.0, waiting: float = 0.0, tokens: float | None = 0.0) -> EngineLoad:
    return EngineLoad(running=running, waiting=waiting, generation_tokens=tokens)


def verdicts(looks: list[tuple[float, int, EngineLoad]], stall: float | None = STALL) -> list[Verdict]:
    progress = Progress(stall)
    return [progress.observe(*look) for look in looks]


def test_work_without_a_token_is_stalled_and_told_once_per_span() -> None:
    found = verdicts([(float(now), 3, load()) for now in range(0, 131, 10)])
    assert [index * 10 for index, it in enumerate(found) if it is STALLED] == [60, 120]
    assert set(found) == {ALIVE, STALLED}


def test_requests_that_only_wait_in_the_engine_are_work() -> None:
    assert verdicts([(0.0, 1, load(0, 5)), (60.0, 1, load(0, 5))]) == [ALIVE, STALLED]


def test_tokens_flow_whoever_asked_for_them() -> None:
    looks = [(10.0 * n, 1, load(running=9, tokens=float(n))) for n in range(20)]
    assert set(verdicts(looks)) == {ALIVE}


def test_a_counter_that_starts_anew_is_movement() -> None:
    looks = [(0.0, 1, load(tokens=5000)), (50.0, 1, load(tokens=0)), (100.0, 1, load(tokens=0))]
    assert set(verdicts(looks)) == {ALIVE}


def test_without_requests_of_ours_nothing_is_concluded() -> None:
    assert set(verdicts([(10.0 * n, 0, load()) for n in range(20)])) == {ALIVE}
    assert set(verdicts([(10.0 * n, 0, load(0, 0)) for n in range(20)])) == {ALIVE}
    # The span begins with our first request, however long the engine has stood still before.
    looks = [(0.0, 0, load()), (100.0, 1, load()), (150.0, 1, load()), (160.0, 1, load())]
    assert verdicts(looks) == [ALIVE, ALIVE, ALIVE, STALLED]


def test_without_a_counter_or_a_bound_nothing_is_stalled() -> None:
    assert set(verdicts([(10.0 * n, 1, load(tokens=None)) for n in range(20)])) == {ALIVE}
    assert set(verdicts([(10.0 * n, 1, load()) for n in range(20)], stall=None)) == {ALIVE}


def test_an_idle_engine_has_lost_what_we_wait_for() -> None:
    found = verdicts([(float(now), 2, load(0, 0)) for now in range(0, 40, 5)])
    times = [index * 5.0 for index, it in enumerate(found) if it is LOST]
    assert times == [LOST_AFTER, 2 * LOST_AFTER]


def test_an_engine_that_is_idle_now_and_then_has_lost_nothing() -> None:
    looks = [(5.0 * n, 2, load(n % 3 == 0, 0)) for n in range(40)]
    assert LOST not in verdicts(looks)


@given(
    st.lists(
        st.tuples(st.floats(0.1, 20), st.integers(0, 2), st.booleans(), st.booleans(), st.booleans()),
        max_size=40,
    )
)
def test_a_verdict_has_its_span_behind_it(
    history: list[tuple[float, int, bool, bool, bool]],
) -> None:
    """STALLED: no look within the span saw a token, an idle engine or none of ours. LOST: each was idle."""
    progress, now, tokens = Progress(STALL), 0.0, 0.0
    looks: list[tuple[float, bool, bool]] = []
    for passed, in_flight, running, waiting, moved in history:
        now += passed
        tokens += moved
        busy = running or waiting
        verdict = progress.observe(now, in_flight, load(running, waiting, tokens))
        looks.append((now, bool(in_flight) and busy and not moved, bool(in_flight) and not busy))
        if verdict is STALLED:
            assert all(still for at, still, _ in looks if at > now - STALL)
        if verdict is LOST:
            assert all(idle for at, _, idle in looks if at >= now - LOST_AFTER)
