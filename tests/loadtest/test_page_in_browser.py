"""The report in a real browser: nothing is asked for from elsewhere, nothing sticks out, the numbers are
those of the JSON file."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from penstock.loadtest.account import Account
from penstock.loadtest.bench import Result
from penstock.loadtest.files import load, save
from penstock.loadtest.page import page
from penstock.loadtest.values import value_of
from tests.browser import CHROMIUM, MISSING, Browser, Page
from tests.loadtest.test_values import point
from tests.scripted import run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

LAYERS = ("engine", "router", "client")
LOADS = (100, 1000, 10_000)
TABLE = """[...document.querySelector('table').rows].map(row => [...row.cells].map(cell => cell.innerText))"""
CHARTS = """[...document.querySelectorAll('svg')].map(chart => {
    const box = chart.getBoundingClientRect();
    return {title: chart.getAttribute('aria-label'), width: box.width, height: box.height,
            right: box.right, drawn: chart.querySelectorAll('polyline, path, rect').length};
})"""


def result() -> Result:
    lost = Account(generated=103, lost=3, duplicated=0, orphaned=0)
    return Result(
        points=[
            point(
                layer,
                load,
                delay=0.01 * number + load / 20_000,
                request_throughput=load / 3 - number,
                held=[(n / 4, load - n) for n in range(12)],
                account=lost if layer == "router" else Account(100, 0, 0, 0),
            )
            for load in LOADS
            for number, layer in enumerate(LAYERS)
        ]
    )


def shown(tmp_path: Path, body: Callable[[Page, Result], Awaitable[None]], width: int, dark: bool) -> None:
    out, html = tmp_path / "result.json", tmp_path / "report.html"
    save(result(), out)
    html.write_text(page(load(out)))

    async def scenario() -> None:
        async with Browser(tmp_path / "profile") as browser:
            opened = await browser.open(html.as_uri(), size=(width, 900), dark=dark)
            await body(opened, load(out))
            assert opened.problems == []
            assert opened.requested == [html.as_uri()]

    run(scenario())


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_it_reads_as_the_json_file_says(width: int, dark: bool, tmp_path: Path) -> None:
    async def body(page: Page, result: Result) -> None:
        text = await page.value("document.body.innerText")
        assert "valid: the load generator kept up in all 9 points" in text
        assert "router: 3 generations lost" in text and text.count("3 lost") == 3
        heads, *rows = await page.value(TABLE)
        assert [row[:2] for row in rows] == [[one.layer, one.load] for one in result.points]
        for head, name in (
            ("requests/s", "request_throughput"), ("lost", "lost"), ("errors", "errors"),
            ("ttft p50", "p50_ttft"), ("e2el p50", "p50_e2el"), ("p99.9", "p99.9_e2el"),
        ):  # fmt: skip
            found = [float(row[heads.index(head)].replace(",", "")) for row in rows]
            assert found == pytest.approx([value_of(one, name) for one in result.points], rel=0.01), name
        charts = await page.value(CHARTS)
        titles = [chart["title"] for chart in charts]
        assert {"e2el over load: p50, dashed p99", "tokens/s over load", "p50_e2el by layer"} <= set(titles)
        for number in LOADS:
            for title in ("e2el at {}: share within", "p99 e2el at {}", "requests at the engines, at {}"):
                assert title.format(f"{number} in flight") in titles
        for chart in charts:
            assert chart["width"] > 200 and chart["height"] > 60 and chart["right"] <= width
            assert chart["drawn"] >= 3, chart["title"]
        assert await page.value("document.documentElement.scrollWidth") == width, "nothing sticks out"

    shown(tmp_path, body, width, dark)
