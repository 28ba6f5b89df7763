"""What a job says of itself while it runs: counts, rates, the time left, the panel and the line."""

from __future__ import annotations

import random
from heapq import heappop, heappush
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from penstock.batch.display import duration, line, panel
from penstock.batch.eta import longest_of, quantile, time_left
from penstock.batch.progress import LATENCY_BOUNDS, Progress, Rates
from penstock.batch.trace import Metadata, Trace
from penstock.errors import RolloutFailed, ServerFailed
from penstock.fleet.fleet import FleetStatistics


def progress_of(samples: int | None = 100, done: int = 0) -> Progress:
    return Progress(
        rows=samples, rows_done=done, rows_failed=0, samples=samples, samples_done=done, samples_failed=0
    )


def trace(latency: float = 1.0, tokens: int = 10) -> Trace:
    metadata = Metadata(
        prompt_tokens=3, completion_tokens=tokens, total_tokens=tokens + 3, latency=latency, attempts=2
    )
    return Trace(text="x", metadata=metadata)


def fleet(in_flight: dict[str, int], limit: int | None = 8) -> FleetStatistics:
    return FleetStatistics(
        in_flight=in_flight,
        limits=dict.fromkeys(in_flight, limit),
        states=dict.fromkeys(in_flight, "up"),
        waiting=5,
        connections=1,
        retries=2,
        resent=0,
    )


def test_what_an_earlier_run_did_is_counted_but_in_no_rate() -> None:
    progress = progress_of(100, done=90)
    rates = Rates(progress, 0.0)
    for _ in range(5):
        progress.add_trace(trace())
    rates.mark(1.0)
    assert (progress.samples_done, progress.samples_owed) == (95, 5)
    assert (rates.samples(), rates.tokens(), rates.prompt_tokens()) == (5.0, 50.0, 15.0)
    assert rates.latency(0.5) == 1.0
    assert progress.retries == 5
    rates.mark(40.0)
    rates.mark(50.0)
    assert rates.samples() == 0.0


def test_latencies_are_counted_in_the_histogram_once() -> None:
    progress = progress_of()
    for latency in (0.05, 0.1, 3.0, 1e9):
        progress.add_trace(trace(latency))
    assert sum(progress.latency_counts) == 4
    assert progress.latency_counts[0] == 2  # bounds are inclusive, as Prometheus' are
    assert progress.latency_counts[-1] == 1
    assert progress.latency_counts[LATENCY_BOUNDS.index(5.0)] == 1


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_lies_among_its_values(values: list[float], share: float) -> None:
    ordered = sorted(values)
    assert ordered[0] <= quantile(share, ordered) <= ordered[-1] * (1 + 1e-12)


@given(
    st.integers(0, 1000),
    st.integers(0, 1000),
    st.floats(0, 1e4),
    st.lists(st.floats(0.001, 1e4)),
    st.floats(0, 1e4),
)
def test_the_time_left_is_never_negative(
    owed: int, in_flight: int, rate: float, latencies: list[float], age: float
) -> None:
    left = time_left(owed, in_flight, rate, sorted(latencies), age)
    assert left is None or left >= 0
    assert (left == 0.0) or owed


def test_nothing_is_said_where_nothing_is_known() -> None:
    assert time_left(None, 3, 1.0, [1.0], 0.0) is None
    assert time_left(10, 3, 0.0, [], 0.0) is None
    assert time_left(3, 3, 1.0, [1.0], 2.0) is None  # all in flight are older than any that has finished
    assert longest_of(0, [1.0]) == 0.0


def finished_at(latencies: list[float], slots: int) -> list[tuple[float, float]]:
    """(when, latency) of each sample, of a job that fills `slots` in order."""
    busy: list[float] = []
    ended = []
    for latency in latencies:
        now = heappop(busy) if len(busy) == slots else 0.0
        heappush(busy, now + latency)
        ended.append((now + latency, latency))
    return sorted(ended)


@pytest.mark.parametrize("sigma", [0.3, 0.8])
def test_the_tail_of_a_heavy_tailed_job_is_in_its_time(sigma: float) -> None:
    """Owed over rate alone would promise the end far too early, as soon as the last samples are sent."""
    ours, naive = [], []
    for seed in range(20):
        dice = random.Random(seed)
        slots, count = 200, 3000
        ended = finished_at([dice.lognormvariate(0.0, sigma) for _ in range(count)], slots)
        end = ended[-1][0]
        done = count // 2
        now = ended[done - 1][0]
        window = [at for at, _ in ended[:done] if at > now - 1.0]
        latencies = sorted(latency for _, latency in ended[:done])
        left = time_left(count - done, slots, len(window), latencies, 0.0)
        assert left is not None
        ours.append(abs(left - (end - now)))
        naive.append(abs((count - done) / len(window) - (end - now)))
    assert sum(ours) < 0.75 * sum(naive)


def test_panel_and_line_say_all_of_it() -> None:
    progress = progress_of(1000)
    rates = Rates(progress, 0.0)
    stats = fleet({"http://a": 7, "http://b": 8})
    progress.fleet = lambda: stats
    for _ in range(10):
        progress.add_trace(trace(latency=2.0))
    progress.add_failure(ServerFailed(500, "no"), new_row=True)
    progress.add_failure(RolloutFailed("x", "ValueError"), new_row=False)
    progress.notice = "no engine [has] answered"
    rates.mark(2.0)
    console = Console(width=120, record=True, file=StringIO())
    console.print(panel(progress, rates))
    for text in (console.export_text(), line(progress, rates)):
        for said in ("10/1,000", "15/16", "2.00 s", "5.0", "50", "1 ServerFailed", "1 ValueError", "[has]"):
            assert said in text, (said, text)
    assert "http://b" in Console(width=120).render_str("http://b").plain


def test_an_input_without_a_known_end_has_no_total_and_no_eta() -> None:
    progress = progress_of(None)
    progress.add_trace(trace())
    rates = Rates(progress, 0.0)
    rates.mark(1.0)
    said = line(progress, rates)
    assert "samples 1," in said
    assert "ETA –" in said


def test_a_duration_has_hours_minutes_and_seconds() -> None:
    assert [duration(seconds) for seconds in (None, 0, 59.6, 3661, 360000)] == [
        "–", "0:00:00", "0:01:00", "1:01:01", "100:00:00",
    ]  # fmt: skip
