"""The report is well-formed, needs nothing from elsewhere, and its axes have round numbers that fit."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.loadtest.bench import Result
from penstock.loadtest.page import page
from penstock.loadtest.plots import TICKS, Axis, log_ticks, short, ticks
from tests.loadtest.test_values import point

LAYERS = ("engine", "router", "client")


def charts(result: Result) -> list[ElementTree.Element]:
    text = page(result)
    assert "//" not in re.sub(r"<!doctype html>", "", text), "nothing is loaded from elsewhere"
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def titles(result: Result) -> list[str]:
    return [chart.attrib["aria-label"] for chart in charts(result)]


def test_a_sweep_has_every_plot() -> None:
    points = [
        point(layer, load, delay=0.01 * n) for load in (10, 100, 1000) for n, layer in enumerate(LAYERS)
    ]
    shown = titles(Result(points=points))
    assert "e2el over load: p50, dashed p99" in shown and "tokens/s over load" in shown
    assert {"p50_ttft by layer", "p50_e2el by layer", "CPU per request by part"} <= set(shown)
    for load in (10, 100, 1000):
        assert f"e2el at {load} in flight: share within" in shown
        assert f"p99 e2el at {load} in flight" in shown


def test_a_single_point_has_no_sweep() -> None:
    shown = titles(Result(points=[point()]))
    assert not [title for title in shown if "over load" in title]
    assert "e2el at 10 in flight: share within" in shown
    assert charts(Result()) == []


def test_stacks_are_as_wide_as_what_is_stacked() -> None:
    points = [point(layer, delay=0.1 * n) for n, layer in enumerate(LAYERS)]
    chart = next(c for c in charts(Result(points=points)) if c.attrib["aria-label"] == "p50_e2el by layer")
    engine, router, client = [float(bar.attrib["width"]) for bar in chart.iter("rect")]
    assert router == pytest.approx(client, rel=0.02)
    assert engine / router == pytest.approx(2.5, rel=0.02)  # 250 ms, and 100 ms more each


def test_text_from_outside_is_escaped_and_distrust_is_shown() -> None:
    result = Result(settings={"model": "<script>"}, points=[point(invalid=["<late>"], errors={"<b>": 1})])
    text = page(result)
    assert "<script>" not in text and "<late>" not in text and "<b>:" not in text
    assert 'class="invalid"' in text and "INVALID" in text


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_ticks_are_few_and_within(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert len(found) <= TICKS + 1
    assert all(low - 1e-3 * width <= tick <= low + 1.001 * width for tick in found)


@given(st.floats(1e-3, 1e6), st.floats(1.1, 1e6))
def test_ticks_of_a_logarithmic_axis_lie_on_it(low: float, ratio: float) -> None:
    axis = Axis(low, low * ratio, 0.0, 100.0, log=True)
    found = axis.ticks()
    assert 1 <= len(found) <= 14 and found == sorted(found)
    assert all(-0.01 <= axis.place(tick) <= 100.01 for tick in found)
    assert axis.place(math.sqrt(low * low * ratio)) == pytest.approx(50, abs=0.01)


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (0.25, "0.25"), (1234, "1,234"), (12_345, "12.3k"), (3_000_000, "3M")]
)
def test_numbers_of_an_axis(value: float, shown: str) -> None:
    assert short(value) == shown
    assert log_ticks(1, 1000)[0] == 1
