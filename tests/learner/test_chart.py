"""Charts are well-formed, pure, and show what the metrics hold."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.learner.chart import HEIGHT, Panel, page, points_of, smoothed, svg, ticks

PANELS = [
    Panel(title="Reward & more", lines={"reward": "mean <of the step>"}, percent=True, smooth=True),
    Panel(title="Accuracy", lines={"hard": "hard", "easy": "easy"}, percent=True, level=("shipped", 0.4)),
    Panel(title="Waiting", lines={"waiting": "trainer"}, top=2.0),
]
NAMESPACE = "{http://www.w3.org/2000/svg}"


def shown(image: str) -> list[str]:
    """The figures of the points."""
    return [str(title.text) for title in ET.fromstring(image).iter(f"{NAMESPACE}title")]


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 1}],
        [{"step": 4, "reward": 0.5, "waiting": 0.0}],
        [{"step": 1, "reward": 0.0}, {"step": 2, "reward": None, "hard": 0.41}, {"step": 3, "reward": 1}],
    ],
)
def test_every_figure_is_a_point(metrics: list[Mapping[str, Any]]) -> None:
    image = svg(PANELS, metrics)
    given_ = [figure for line in metrics for name, figure in line.items() if name != "step"]
    assert len(shown(image)) == sum(figure is not None for figure in given_)
    assert image == svg(PANELS, metrics)
    for tag in ("circle", "text"):
        for element in ET.fromstring(image).iter(f"{NAMESPACE}{tag}"):
            assert 0 <= float(element.get("cy") or element.get("y") or 0) <= HEIGHT


def test_words_are_escaped_and_facts_are_told() -> None:
    text = page("A <run>", PANELS, [{"step": 1, "reward": 0.25}], {"seed & more": "<7>"})
    assert "A &lt;run&gt;" in text and "<run>" not in text
    assert "seed &amp; more" in text and "&lt;7&gt;" in text
    assert "step 1: 25 %" in text


def test_points_and_means() -> None:
    metrics: list[Mapping[str, Any]] = [
        {"step": 1, "x": 1},
        {"step": 2},
        {"step": 3, "x": None},
        {"step": 4, "x": 3},
    ]
    assert points_of(metrics, "x") == [(1, 1), (4, 3)]
    assert smoothed([(1, 1), (2, 3), (3, 8)], 2) == [(1, 1), (2, 2), (3, 5.5)]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 9))
def test_ticks_are_round_and_within(low: float, extent: float, most: int) -> None:
    found = ticks(low, low + extent, most)
    assert len(found) <= most
    slack = 1e-6 * extent + 2 * math.ulp(abs(low) + extent)
    assert all(low - slack <= tick <= low + extent + slack for tick in found)
    assert len(found) >= 1 or most <= 3
    assert ticks(0, 1, 5) == [0, 0.25, 0.5, 0.75, 1] or ticks(0, 1, 5) == [0, 0.5, 1]
