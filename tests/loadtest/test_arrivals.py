"""Intended send times: the rate asked for, in order, shaped as asked; lengths within their bounds."""

from __future__ import annotations

import math
import statistics
from itertools import islice, takewhile
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.loadtest.arrivals import Shape, first_send, send_times
from penstock.loadtest.lengths import LONGEST, Lengths

RATES = st.floats(0.1, 10_000)
SHAPES = st.builds(
    Shape,
    ramp=st.floats(0, 100),
    work=st.one_of(st.just(math.inf), st.floats(0.5, 100)),
    pause=st.floats(0, 50),
)


@given(
    RATES,
    st.one_of(st.just(math.inf), st.floats(0.05, 50)),
    st.integers(1, 8),
    SHAPES,
    st.integers(0, 1 << 30),
)
def test_times_ascend_in_whole_groups_and_never_fall_into_a_pause(
    rate: float, burstiness: float, group: int, shape: Shape, seed: int
) -> None:
    times = list(islice(send_times(rate, Random(seed), burstiness=burstiness, group=group, shape=shape), 64))
    assert times == sorted(times)
    for start in range(0, len(times) - group + 1, group):
        assert len(set(times[start : start + group])) == 1
    if shape.pauses:
        for time in times:
            phase = time % (shape.work + shape.pause)
            assert phase <= shape.work * (1 + 1e-9) or math.isclose(
                phase, shape.work + shape.pause, rel_tol=1e-6
            )


@given(st.integers(1, 5000), st.integers(1, 4), st.sampled_from([0.5, 1.0, 4.0, math.inf]))
def test_the_rate_is_that_of_requests_whatever_the_group_and_the_burstiness(
    rate: int, group: int, burstiness: float
) -> None:
    count = 4000
    times = send_times(rate, Random(rate), burstiness=burstiness, group=group)
    last = list(islice(times, count))[-1]
    assert count / last == pytest.approx(rate, rel=0.25)


@pytest.mark.parametrize(("burstiness", "spread"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5), (math.inf, 0.0)])
def test_intervals_spread_as_the_gamma_distribution_says(burstiness: float, spread: float) -> None:
    times = list(islice(send_times(100, Random(1), burstiness=burstiness), 20_000))
    intervals = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    deviation = statistics.pstdev(intervals) / statistics.fmean(intervals)
    assert deviation == pytest.approx(spread, abs=0.05 * (1 + spread))


def test_a_ramp_rises_linearly_to_the_rate() -> None:
    shape = Shape(ramp=10)
    times = list(
        takewhile(lambda time: time < 20, send_times(100, Random(1), burstiness=math.inf, shape=shape))
    )
    counts = [sum(low <= time < low + 5 for time in times) for low in (0, 5, 10, 15)]
    assert counts == pytest.approx([125, 375, 500, 500], abs=2)


def test_a_rate_without_bound_sends_all_at_once() -> None:
    assert list(islice(send_times(math.inf, Random(1), group=3), 7)) == [0.0] * 7


@given(SHAPES, st.floats(0, 1000))
def test_what_is_ready_in_a_pause_waits_for_its_end_and_no_longer(shape: Shape, time: float) -> None:
    resumed = shape.resume(time)
    assert time <= resumed <= time + shape.pause * (1 + 1e-9) + 1e-9
    if resumed == time and shape.pauses:
        assert time % (shape.work + shape.pause) < shape.work


def test_workers_of_a_closed_loop_join_over_the_ramp() -> None:
    shape = Shape(ramp=8)
    assert [first_send(worker, 4, shape) for worker in range(4)] == [0, 2, 4, 6]


@pytest.mark.parametrize("options", [{"rate": 0}, {"rate": 1, "burstiness": 0}, {"rate": 1, "group": 0}])
def test_what_is_no_load_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        send_times(random=Random(1), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"ramp": -1}, {"work": 0}, {"pause": -1}])
def test_shapes_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Shape(**options)


@given(
    st.sampled_from(["7", "uniform:3:9", "normal:50:20", "lognormal:20:2", "lognormal:20:2:100"]),
    st.integers(0, 1 << 30),
)
def test_lengths_are_drawn_within_their_bounds(text: str, seed: int) -> None:
    lengths = Lengths.parse(text)
    drawn = [lengths.draw(Random(seed + number)) for number in range(20)]
    low, high = {"7": (7, 7), "uniform:3:9": (3, 9), "lognormal:20:2:100": (1, 100)}.get(text, (1, LONGEST))
    assert all(low <= length <= high for length in drawn)


def test_the_median_of_a_lognormal_is_the_one_given() -> None:
    lengths, random = Lengths.parse("lognormal:200:1.0"), Random(5)
    assert statistics.median(lengths.draw(random) for _ in range(5000)) == pytest.approx(200, rel=0.1)


@given(st.text(max_size=12))
def test_any_text_is_a_length_or_a_sentence(text: str) -> None:
    try:
        assert 1 <= Lengths.parse(text).draw(Random(1)) <= LONGEST
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize(
    "text", ["0", "-3", "1.5", "uniform:9:3", "normal:5", "zipf:1:2", "nan", "normal:1:nan"]
)
def test_wrong_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Lengths.parse(text)
