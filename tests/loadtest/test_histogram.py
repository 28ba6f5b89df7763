"""Durations come out as they went in, to three digits, merged or not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.loadtest.histogram import Histogram
from penstock.loadtest.sending import two_digits

DURATIONS = st.lists(st.floats(2e-6, 3000.0), min_size=1, max_size=50)


@settings(max_examples=20)
@given(DURATIONS, DURATIONS)
def test_percentiles_of_what_was_merged(first: list[float], second: list[float]) -> None:
    one, two = Histogram(), Histogram()
    for duration in first:
        one.add(duration)
    two.extend(second)
    one.merge(two.encoded())
    values = sorted(first + second)
    assert one.count == len(values)
    assert one.percentile(100) == pytest.approx(values[-1], rel=2e-3, abs=2e-6)
    assert one.percentile(0.0001) == pytest.approx(values[0], rel=2e-3, abs=2e-6)
    assert one.mean() == pytest.approx(sum(values) / len(values), rel=2e-3, abs=2e-6)
    curve = one.curve()
    assert curve == sorted(curve)
    assert curve[-1][1] == 1.0


def test_what_is_empty_has_no_percentiles() -> None:
    empty = Histogram()
    assert (empty.count, empty.percentile(50), empty.mean(), empty.curve()) == (0, None, None, [])


def test_counting_by_buckets_loses_nothing_of_the_library() -> None:
    from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

    ours, theirs = Histogram(), HdrHistogram(1, 3_600_000_000, 3)
    value = 1
    while value < 3_000_000_000:
        ours.add(value / 1e6 + 1e-9)
        theirs.record_value(value)
        value = value * 21 // 20 + 1
    for percent in range(0, 101, 5):
        assert ours.percentile(percent) == theirs.get_value_at_percentile(percent) / 1e6


@given(st.floats(0, 4000))
def test_two_digits_are_within_a_twentieth(seconds: float) -> None:
    assert two_digits(seconds) == pytest.approx(seconds * 1e3, rel=0.1, abs=0.51)
