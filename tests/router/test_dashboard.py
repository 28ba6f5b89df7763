"""The dashboard: its page in a real browser, and the numbers it is given."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import socket
from pathlib import Path
from typing import Any

import orjson
import pytest

from penstock.router import dashboard
from penstock.router.server import RouterServer
from penstock.router.snapshot import Snapshot, WorkerSnapshot
from penstock.router.statistics import RouterStatistics, WorkerStatistics
from penstock.wire.exchange import Exchange
from penstock.wire.server import HttpServer
from tests.browser import CHROMIUM, MISSING, Browser, Page
from tests.router.front import Peer, endpoints, engine, scenario
from tests.scripted import answer, refuse, run, stall, until

ONE = "document.querySelector"
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)


def test_the_page_is_open_and_its_numbers_are_not() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        status, headers, page = await peer.get("/dashboard")
        assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
        for element in ("script", "style"):
            (content,) = re.findall(rf"<{element}>(.*?)</{element}>".encode(), page, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
            assert policy[f"{element}-src"] == f"'sha256-{digest}'"
        elsewhere = set(re.findall(rb"https?://[\w.]+", page)) - {b"http://www.w3.org"}
        assert not elsewhere, "the page names no other address"
        assert (await peer.get("/dashboard/data"))[0] == 401
        assert (await peer.get("/dashboard/data", b"authorization: Bearer client\r\n"))[0] == 401
        assert (await peer.get("/dashboard/data", b"authorization: Bearer admin\r\n"))[0] == 200
        assert (await peer.get("/dashboard", method="HEAD"))[0] == 200
        assert (await peer.get("/dashboard", method="DELETE"))[0] == 405

    scenario(body, engine(), api_key="client", admin_api_key="admin")


def test_with_an_admin_port_it_is_there_alone(unused_port: int) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        for path in ("/dashboard", "/dashboard/data"):
            assert (await peer.get(path, b"authorization: Bearer admin\r\n"))[0] == 404
        other = Peer(*await asyncio.open_connection("127.0.0.1", unused_port))
        assert (await other.get("/dashboard"))[0] == 200
        assert (await other.get("/dashboard/data"))[0] == 401
        assert (await other.get("/dashboard/data", b"authorization: Bearer admin\r\n"))[0] == 200
        other.close()

    scenario(body, engine(), admin_api_key="admin", admin_port=unused_port)


def test_the_numbers_are_those_of_the_router() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        for _ in range(3):
            await peer.ask(b"x" * 10)
        assert (await peer.ask(b""))[0] == 404
        given = orjson.loads((await peer.get("/dashboard/data"))[2])
        assert given["requests"] == 4 and given["slots"] == 0 and given["retries"] == 1
        assert len(given["bounds"]) + 1 == len(given["latency"]) == len(given["queued"])
        assert sum(given["latency"]) == sum(given["first_byte"]) == 5
        (worker,) = given["workers"]
        assert (worker["errors"], worker["rejected"], worker["retries"], worker["sent"]) == (1, 1, 1, 40)
        assert worker["limit"] == 5 and worker["begun"] == worker["ended"] == 5

    scenario(body, engine(answer(), refuse(500), answer(), answer(), refuse(404)), worker_max_in_flight=5)


@in_a_browser
def test_what_is_shown_is_what_the_router_did(tmp_path: Path) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        async with Browser(tmp_path) as browser:
            page = await browser.open(f"{server.url}/dashboard")
            await page.until("points.length >= 3 && !$('board').hidden")
            await page.value(f"{ONE}('[data-span=\"60\"]').click()")
            await _relayed(server, peer, page)
            await _in_flight(server, page)
            await _down(server, page)
            assert page.problems == []
            assert {url.partition("/dashboard")[0] for url in page.requested if url[:4] == "http"} == {
                server.url
            }
            await _unreachable(page)

    async def _relayed(server: RouterServer, peer: Peer, page: Page) -> None:
        for _ in range(8):
            await peer.ask(b"x" * 1000)
        await page.value("look()")
        counted = [end.transport.counts for end in endpoints(server)]  # type: ignore[attr-defined]
        errors = sum(one.responses[5] for one in counted)
        assert errors == server.router.fleet.retries == 2
        assert await _text(page, "#tile-requests .more") == "8 since it began"
        assert await _text(page, "#tile-errors .more") == "2 errors · 2 retries"
        received = sum(one.bytes_received for one in counted)
        assert await _text(page, "#tile-bytes .more") == f"{received / 1000:.2f} kB since it began"
        assert (await _text(page, "#facts")).startswith("2 of 2 workers up · round_robin")
        for url, column, shown in (
            (one.url, "errors", "0"),
            (two.url, "errors", "2"),
            (two.url, "retries", "2"),
        ):
            assert await _cell(page, url, column) == shown
        first = await _text(page, "#tile-first .value")  # the histogram's bucket around 100 ms
        assert 62 <= float(first.removesuffix(" msp50")) <= 250, first
        for chart in ("requests", "load", "first", "end", "workers", "errors", "bytes"):
            drawn = await page.value(f"{ONE}('#chart-{chart} path.series').getAttribute('d')")
            assert len(re.findall("[ML]", drawn)) >= (1 if chart in ("first", "end") else 2), (chart, drawn)
            assert "NaN" not in drawn

        box = await page.value(f"{ONE}('#chart-load svg').getBoundingClientRect().toJSON()")
        await page.call(
            "Input.dispatchMouseEvent", type="mouseMoved", x=box["x"] + box["width"] - 60, y=box["y"] + 50
        )
        await page.until("document.querySelectorAll('.chart .cursor').length === charts.length")

    async def _in_flight(server: RouterServer, page: Page) -> None:
        other = await Peer.to(server)
        one.script.extend([stall()] * 2)
        two.script.extend([stall()] * 2)
        other.post()
        await until(lambda: server.router.fleet.dispatch.in_flight == 1)
        await _soon(page, "document.querySelector('#tile-flight .value').textContent === '1of 8'")
        loads = sorted([await _cell(page, end.url, "load") for end in (one, two)])
        assert loads == ["0 / 4", "1 / 4"]
        other.close()
        await until(lambda: server.router.fleet.dispatch.in_flight == 0)
        await _soon(page, "document.querySelector('#tile-flight .value').textContent === '0of 8'")

    async def _down(server: RouterServer, page: Page) -> None:
        await two.kill()
        await until(lambda: not endpoints(server)[1].up)
        await _soon(page, f"{ONE}('[data-worker=\"{two.url}\"]').className === 'down'")
        assert (await _cell(page, two.url, "name")).startswith(two.url.removeprefix("http://") + "down: ")
        assert (await _text(page, "#facts")).startswith("1 of 2 workers up")
        assert await page.value("document.querySelector('#rows tr').dataset.worker") == two.url
        await _soon(page, f"{ONE}('[data-worker=\"{two.url}\"] .strip .down') !== null")
        assert await page.value(f"{ONE}('[data-worker=\"{one.url}\"] .strip .down')") is None

    async def _unreachable(page: Page) -> None:
        for offline in (True, False):
            await page.call(
                "Network.emulateNetworkConditions",
                offline=offline, latency=0, downloadThroughput=-1, uploadThroughput=-1,
            )  # fmt: skip
            await _soon(page, f"document.body.classList.contains('stale') === {str(offline).lower()}")
            live = await _text(page, "#live")
            assert live.startswith("no answer since") is offline

    slow = answer(delay=0.1)
    one = engine(default=slow)
    two = engine(refuse(500), slow, refuse(500), default=slow)
    scenario(
        body,
        one,
        two,
        policy="round_robin",
        worker_max_in_flight=4,
        health_check_interval_secs=0.05,
        health_failure_threshold=1,
    )


@in_a_browser
def test_the_page_asks_for_the_key_and_keeps_it_in_the_tab(tmp_path: Path) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        async with Browser(tmp_path) as browser:
            page = await browser.open(f"{server.url}/dashboard")
            await page.until("!$('ask').hidden")
            assert await page.value("$('board').hidden")
            enter = "$('key').value = '{}'; document.querySelector('#ask button').click()"
            await page.value(enter.format("wrong"))
            await page.until("$('refused').value === 'This key is not accepted.'")
            assert await page.value("sessionStorage.length") == 0
            await page.value(enter.format("secret"))
            await page.until("!$('board').hidden && $('ask').hidden")
            assert await page.value("JSON.stringify(sessionStorage)") == '{"penstock-key":"secret"}'
            assert await page.value("localStorage.length + document.cookie.length") == 0
            await page.reload()
            await page.until("points.length > 1 && $('ask').hidden")
            assert all("401" in problem for problem in page.problems), page.problems

    scenario(body, engine(), admin_api_key="secret")


@in_a_browser
def test_a_hundred_workers_are_sorted_filtered_and_the_busiest_charted(tmp_path: Path) -> None:
    counts = RouterStatistics()
    workers = [
        WorkerSnapshot(f"http://gpu-{n}.rack.example:8000", "up", None, n, 100, WorkerStatistics())
        for n in range(1, 101)
    ]
    workers[41].state, workers[41].error = "open", "<b>500</b>"
    shown = Snapshot("least_in_flight", 1.0, 0, 5050, None, 7, 0, counts, workers)

    def handle(exchange: Exchange) -> None:
        if exchange.request.path == dashboard.PAGE:
            dashboard.show_page(exchange)
        else:
            dashboard.show_data(exchange, shown)

    async def order(page: Page) -> list[int]:
        rows: Any = await page.value("[...$('rows').children].map(tr => tr.dataset.worker)")
        return [int(name.split("-")[1].split(".")[0]) for name in rows]

    async def main() -> None:
        async with HttpServer(handle, "127.0.0.1", 0) as server, Browser(tmp_path) as browser:
            page = await browser.open(f"http://127.0.0.1:{server.port}/dashboard", size=(390, 844), dark=True)
            await page.until("points.length >= 2")
            assert await order(page) == [42, *(n for n in range(1, 101) if n != 42)]
            assert await page.value("document.documentElement.scrollWidth") == 390, "nothing sticks out"
            why = "document.querySelector('#rows tr .why')"
            assert await page.value(f"{why}.textContent") == "breaker open: <b>500</b>"
            names = "[...document.querySelectorAll('#chart-workers .legend em')].map(em => em.textContent)"
            assert await page.value(names) == [f"gpu-{n}:8000" for n in range(96, 101)]
            await page.value("document.querySelector('[data-key=load] button').click()")
            assert await order(page) == list(range(100, 0, -1))
            await page.value("document.querySelector('[data-key=name] button').click()")
            assert await order(page) == list(range(1, 101))
            await page.value("$('filter').value = 'GPU-9'; $('filter').dispatchEvent(new Event('input'))")
            assert await order(page) == [9, *range(90, 100)]
            assert page.problems == []

    run(main())


async def _soon(page: Page, condition: str) -> None:
    """The page has asked again, until this is so."""
    await page.until(f"look().then(() => {condition})")


async def _text(page: Page, selector: str) -> str:
    return str(await page.value(f"{ONE}({selector!r}).textContent"))


async def _cell(page: Page, worker: str, column: str) -> str:
    """What the table says of a worker."""
    at = f"{ONE}('#columns [data-key={column}]').cellIndex"
    return str(await page.value(f"{ONE}('[data-worker=\"{worker}\"]').cells[{at}].textContent"))


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
