"""The page in a real browser: what a person sees, clicks and types."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import orjson
import pytest

from penstock.viewer.server import Viewer
from tests.browser import CHROMIUM, MISSING, Browser, Page
from tests.scripted import run
from tests.viewer.test_server import row

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

LISTED = "[...slots.values()].map(e => e.item).filter(Boolean).map(i => i.n).sort((a, b) => a - b)"
SHOWN = "document.querySelector('#detail h2')?.textContent"
CHOSEN = "document.querySelector('.item[aria-selected=true]')?.item.n"
FIRST = "slots.get(0)?.item?.n"
FOREIGN = "document.querySelectorAll('main img, main script, main a, header img').length"
HOSTILE = (
    "<img src=x onerror='window.owned=1'><script>window.owned=1</script></script><svg onload=owned=1>"
    "\u202e\u0000\ud7ff{{7*7}}<a href=javascript:owned=1>x</a>"
)


def scenario(
    out: Path,
    body: Callable[[Page, Browser, Viewer], Awaitable[None]],
    *,
    size: tuple[int, int] = (1280, 800),
) -> None:
    async def main() -> None:
        async with Viewer(out) as viewer, Browser(out.parent / "profile") as browser:
            page = await browser.open(viewer.url, size=size)
            await page.until("state?.current && settled")
            await body(page, browser, viewer)
            assert page.problems == []
            assert await page.value("window.owned") is None
            own = (viewer.url, "data:")
            assert all(url.startswith(own) for url in page.requested), "it asks nobody else"

    run(main(), bound=90.0)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out.jsonl"
    rows = [row(n) for n in range(120)]
    texts, finishes = ["first", "<think>hm</think>second", "third"], ["stop", "length", "stop"]
    rows[3] = row(3, generations=texts, finish_reasons=finishes, rewards=[0, 1, 0.5])
    path.write_bytes(b"".join(rows))
    return path


async def press(page: Page, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
        await page.call("Input.dispatchKeyEvent", type=kind, key=key, **text)


async def click(page: Page, selector: str, label: str) -> None:
    """The first of the elements that begins with this label."""
    found = f"[...document.querySelectorAll('{selector}')].find(b => b.textContent.startsWith('{label}'))"
    await page.value(f"{found}.click()")


async def write(page: Page, element: str, value: str, event: str = "change") -> None:
    await page.value(f"$('{element}').value = '{value}'; $('{element}').dispatchEvent(new Event('{event}'))")


def test_rows_are_browsed_by_keys_and_found_by_a_link(out: Path) -> None:
    async def body(page: Page, browser: Browser, viewer: Viewer) -> None:
        await page.until("document.querySelectorAll('#board .chart').length === 5")
        await page.until(f"{LISTED}.length > 5")
        for n in range(4):
            await press(page, "j")
            await page.until(f"{SHOWN} === 'r{n}' && {CHOSEN} === {n}")
        assert await page.value("location.hash") == "#row=3"
        assert await page.value("document.querySelectorAll('.tab').length") == 3
        await press(page, "n")
        await page.until("location.hash === '#row=3&gen=1'")
        text = str(await page.value("$('sample').innerText"))
        assert "finish length" in text and "reward 1" in text and "hm" in text and "second" in text
        await press(page, "r")
        await page.until("document.querySelector('.think .body').hidden")
        await press(page, "k")
        await page.until(f"{SHOWN} === 'r2'")
        await press(page, "/")
        await page.until("document.activeElement === $('text')")
        await press(page, "Escape")
        await press(page, "Escape")
        await page.until("!$('board').hidden && location.hash === ''")
        other = await browser.open(f"{viewer.url}#row=3&gen=2")
        await other.until("$('sample')?.innerText.includes('third')")
        await other.value("location.hash = '#row=101'")
        await other.until(f"{SHOWN} === 'r101' && {CHOSEN} === 101")
        await click(other, "#detail button", "JSON")
        await other.until("$('raw').textContent.includes('\"Question 101\"')")
        assert other.problems == []

    scenario(out, body)


def test_the_list_is_searched_filtered_and_sorted(out: Path) -> None:
    async def body(page: Page, browser: Browser, viewer: Viewer) -> None:
        await write(page, "text", "because 11", "input")
        await page.until(f"total === 11 && {LISTED}.length === 11 && !searching")
        await write(page, "where", "answer")
        await page.until("settled && total === 0 && !searching")
        await page.until("document.querySelector('.empty').innerText === 'Nothing fits.'")
        await page.value("$('regex').click()")
        await write(page, "text", "is 1[0-2]\\\\.$", "input")
        await page.until(f"{LISTED}.join() === '10,11,12'")
        await write(page, "text", "(", "input")
        await page.until("$('wrong').textContent.includes('regular expression')")
        await page.value("$('clear').click()")
        await page.until("total === 120 && $('wrong').textContent === ''")
        await write(page, "finish", "length")
        await write(page, "tokens_min", "50")
        await page.until("total === 7")
        await write(page, "sort", "tokens")
        await page.until(f"{FIRST} === 110")
        await page.value("$('down').click()")
        await page.until(f"{FIRST} === 50")
        await page.value("$('clear').click()")
        await page.until("total === 120")
        await click(page, ".bars button", "length")
        await page.until("total === 13 && $('finish').value === 'length'")
        page.problems[:] = [problem for problem in page.problems if "400" not in problem]  # the pattern "("

    scenario(out, body)


def test_whatever_stands_in_a_file_is_shown_as_text(tmp_path: Path) -> None:
    out = tmp_path / "<img src=x onerror=owned=1>.jsonl"
    hostile = row(
        0,
        id=HOSTILE,
        prompt=[{"role": HOSTILE, "content": HOSTILE}],
        generations=[f"<think>{HOSTILE}</think>{HOSTILE}", HOSTILE],
        finish_reasons=[HOSTILE, HOSTILE],
        api_metadata=[{HOSTILE: HOSTILE, "completion_tokens": -5, "latency": "x"}, {}],
        rewards=[{"reward": 1e308}, 1e308],
        **{HOSTILE: {HOSTILE: HOSTILE}},
    )
    out.write_bytes(hostile + b"\x00\xff<script>owned=1</script>\n" + b'{"__proto__": {"owned": 1}}\n')
    failure = dict.fromkeys(("key", "error", "message", "status", "index"), HOSTILE)
    line = orjson.dumps(failure | {"row": 0, "fields": {"prompt": HOSTILE}}) + b"\n"
    out.with_name(out.name + ".failures").write_bytes(line)

    async def body(page: Page, browser: Browser, viewer: Viewer) -> None:
        await page.until(f"{LISTED}.length === 3")
        await page.value("$('fold').click()")
        assert await page.value("$('left').scrollWidth <= $('left').clientWidth"), "nothing sticks out"
        for n in (1, 2, 0):
            await page.value(f"pick({n}, 0)")
        await page.until("document.querySelector('.message .body')?.textContent.includes('<script>')")
        await click(page, "#detail button", "JSON")
        await page.until("$('raw').textContent.includes('<script>')")
        assert await page.value(FOREIGN) == 0
        await click(page, "#sources button", "Failed 1")
        await page.until(f"{LISTED}.length === 1 && document.querySelector('.charts .bars') !== null")
        await page.value("pick(0, 0)")
        await page.until("document.querySelector('.notice')?.textContent.includes('<script>')")
        assert await page.value(FOREIGN) == 0
        assert await page.value("$('right').scrollWidth <= $('right').clientWidth"), "nothing sticks out"

    scenario(out, body, size=(1100, 800))


def test_a_growing_file_is_followed(out: Path) -> None:
    def add(data: bytes) -> None:
        with out.open("ab") as file:
            file.write(data)

    async def body(page: Page, browser: Browser, viewer: Viewer) -> None:
        await page.until("total === 120")
        add(row(120) + row(121)[:30])
        await page.until("total === 121 && $('facts').textContent.includes('not whole yet')")
        await page.until("$('live').textContent.startsWith('growing')")
        add(row(121)[30:])
        await page.until("total === 122 && !$('facts').textContent.includes('not whole')")
        await page.value("bring(121)")
        await page.until("itemAt(121)?.id === 'r121'")

    scenario(out, body)


@pytest.mark.slow
def test_a_hundred_thousand_rows_scroll_on_a_phone(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    line = b'{"id":"r%d","prompt":"Question %d","generations":["x"]}\n'
    out.write_bytes(b"".join(line % (n, n) for n in range(100_000)))
    generator = random.Random(5)

    async def body(page: Page, browser: Browser, viewer: Viewer) -> None:
        await page.until("total === 100000 && squeezed()")
        assert await page.value("document.documentElement.scrollWidth") == 390, "nothing sticks out"
        for _ in range(4):
            place = generator.randrange(1000, 99_000)
            await page.value(f"list.scrollTop = {place} / 100000 * (TALL - list.clientHeight)")
            await page.until(f"Math.abs(Math.min(...{LISTED}) - {place}) < 50 && {LISTED}.length > 5")
            assert await page.value("pane.children.length") < 40, "only what is seen is in the page"
            # A turn of the wheel moves by what it says, not by what the whole list is squeezed by.
            before = float(await page.value("top_"))
            wheel = {"type": "mouseWheel", "x": 100, "y": 500, "deltaX": 0, "deltaY": 100}
            await page.call("Input.dispatchMouseEvent", **wheel)
            await page.until(f"Math.abs(top_ - {before} - 100) < 3")
        await page.value("list.scrollTop = 1e9")
        await page.until("slots.get(99999)?.item?.id === 'r99999'")
        bottom = "getBoundingClientRect().bottom"
        await page.until(f"Math.abs(slots.get(99999).{bottom} - list.{bottom}) < 2")
        await page.value("list.scrollTop = 0")
        await page.until("slots.get(1)?.item?.id === 'r1'")
        await page.value("slots.get(1).click()")
        await page.until(f"{SHOWN} === 'r1' && getComputedStyle($('left')).display === 'none'")
        await page.value("document.querySelector('#detail .back').click()")
        await page.until("getComputedStyle($('left')).display !== 'none' && location.hash === ''")

    scenario(out, body, size=(390, 844))
