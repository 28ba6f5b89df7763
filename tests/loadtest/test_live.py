"""What is shown while a load test runs."""

from __future__ import annotations

import io

from rich.console import Console

from penstock.loadtest.live import Display, watch, whole
from penstock.loadtest.plan import Beat, Extent, Load
from tests.loadtest.test_values import point

LOAD = Load(concurrency=8)


def test_on_a_terminal_the_point_under_way_and_its_rates() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with watch(console, 4, Extent(count=100)) as display:
        display.beat("router", LOAD, [Beat(10, 2, 0, 20, 8), None], now=1.0)
        display.beat("router", LOAD, [Beat(10, 3, 0, 30, 8), Beat(0, 0, 0, 0, 0)], now=1.01)  # too soon
        display.beat("router", LOAD, [Beat(40, 20, 1, 200, 8), Beat(40, 12, 0, 120, 4)], now=3.0)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1/4 router at 8 in flight" in text
    assert "15.0" in text and "150" in text, "requests/s and tokens/s between the two beats"


def test_without_a_terminal_a_line_for_each_point() -> None:
    console = Console(file=io.StringIO(), width=40)
    with watch(console, 2, Extent(count=100)) as display:
        display.beat("engine", LOAD, [Beat(10, 2, 0, 20, 8)], now=1.0)
        display.point(point())
        display.point(point("router", invalid=["late"], errors={"Overloaded 429": 2}))
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "1/2 engine at 10 in flight: 50.0 requests/s",
        "2/2 router at 10 in flight: 50.0 requests/s, 2 errors, INVALID",
    ]


def test_how_much_is_done() -> None:
    console = Console(file=io.StringIO())
    timed = Display(console, 1, Extent(duration=8, warmup=2))
    assert [timed.share(LOAD, whole([]), seconds) for seconds in (0, 5, 10, 20)] == [0, 0.5, 1, 1]
    counted = Display(console, 1, Extent(count=10))
    assert counted.share(LOAD, Beat(9, 4, 1, 0, 4), 3.0) == 0.5
