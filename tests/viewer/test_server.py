"""The viewer over real sockets: who may ask, what is given, and that it ends what it began."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from penstock.errors import ConfigError
from penstock.viewer.guard import Guard
from penstock.viewer.server import Viewer
from penstock.wire.exchange import Request
from tests.scripted import run, until

ROWS = 300


def row(n: int, **columns: Any) -> bytes:
    text = f"<think>because {n}</think>\nThe answer is {n}."
    usage = {"prompt_tokens": 10, "completion_tokens": n, "total_tokens": n + 10, "latency": n / 10}
    given = {
        "id": f"r{n}",
        "prompt": f"Question {n}",
        "generations": [text],
        "finish_reasons": ["length" if n % 10 == 0 else "stop"],
        "api_metadata": [usage],
        "rewards": [n % 2],
    }
    return orjson.dumps(given | columns) + b"\n"


class Asker:
    """Asks a viewer, with a Host header or a method of choice."""

    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self.port = int(viewer.url.split(":")[2].split("/")[0])

    async def raw(
        self, path: str, *, host: str | None = None, method: str = "GET"
    ) -> tuple[int, dict[str, str], bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        given = f"127.0.0.1:{self.port}" if host is None else host
        writer.write(f"{method} {path} HTTP/1.1\r\nhost: {given}\r\nconnection: close\r\n\r\n".encode())
        async with asyncio.timeout(20):
            data = await reader.read(-1)
        writer.close()
        head, _, body = data.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return int(status.split()[1]), headers, body

    async def __call__(self, path: str) -> Any:
        status, _, body = await self.raw(path)
        return orjson.loads(body) if status == 200 else status

    async def indexed(self, rows: int = ROWS) -> None:
        index = self.viewer.sources["rows"]
        await until(lambda: index.table.rows == rows and index.is_current)


def scenario(out: Path, body: Callable[[Asker], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with Viewer(out, **options) as viewer:
            await body(Asker(viewer))

    run(main())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"".join(map(row, range(ROWS))))
    return path


def test_the_page_is_allowed_only_what_it_holds(out: Path) -> None:
    async def body(ask: Asker) -> None:
        status, headers, page = await ask.raw("/")
        assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
        _, given, _ = await ask.raw("/")
        policy = dict(part.split(" ", 1) for part in given["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["require-trusted-types-for"] == "'script'"
        for element in ("script", "style"):
            (content,) = re.findall(rf"<{element}>(.*?)</{element}>".encode(), page, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(content).digest()).decode().lower()
            assert policy[f"{element}-src"] == f"'sha256-{digest}'"
        assert set(re.findall(rb"https?://[\w.]+", page)) == {b"http://www.w3.org"}
        assert b"innerHTML" not in page and b"insertAdjacentHTML" not in page

    scenario(out, body)


def test_only_this_machines_own_names_are_answered(out: Path) -> None:
    async def body(ask: Asker) -> None:
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:80"):
            assert (await ask.raw("/api/state", host=host))[0] == 200, host
        for host in (
            "evil.example",
            "evil.example:80",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "",
        ):
            for path in ("/", "/api/state", "/api/raw?n=1"):
                assert (await ask.raw(path, host=host))[0] == 403, host
        assert (await ask.raw("/", method="POST"))[0] == 405
        assert (await ask.raw("/", method="HEAD"))[0] == 200
        for path in ("/api/other", "/../etc/passwd", "/out.jsonl", "/%2e%2e/x"):
            assert (await ask.raw(path))[0] == 404

    scenario(out, body)


def test_where_others_reach_it_the_url_has_a_secret(out: Path) -> None:
    async def body(ask: Asker) -> None:
        token = ask.viewer.guard.token
        assert token is not None and len(token) >= 24 and ask.viewer.url.endswith(f"/{token}/")
        for path in ("/", "/api/state", f"/{token}", f"/{token[:-1]}/", f"/x{token}/api/state", "/%C3%A9/"):
            assert (await ask.raw(path))[0] == 403, path
        assert (await ask.raw(f"/{token}/"))[0] == 200
        assert (await ask(f"/{token}/api/state"))["file"] == "out.jsonl"
        assert (await ask.raw(f"/{token}/", host="evil.example"))[0] == 403

    scenario(out, body, host="0.0.0.0")
    assert Guard("127.0.0.1").token is Guard("::1").token is Guard("localhost").token is None
    assert Guard("0.0.0.0").token != Guard("0.0.0.0").token
    assert Guard("gpu-1.lab").path(Request("GET", "/x/", "", {"host": "gpu-1.lab:80"}, b"")) is None


def test_rows_are_filtered_sorted_and_shown_whole(out: Path) -> None:
    async def body(ask: Asker) -> None:
        await ask.indexed()
        answer = await ask("/api/rows?first=10&count=5")
        assert answer["total"] == ROWS and [item["n"] for item in answer["items"]] == [10, 11, 12, 13, 14]
        assert answer["items"][0]["id"] == "r10" and answer["items"][0]["text"] == "Question 10"
        answer = await ask("/api/rows?finish=length&sort=tokens&down=true&count=3&place_of=270")
        assert answer["total"] == 30 and [item["n"] for item in answer["items"]] == [290, 280, 270]
        assert answer["place"] == 2
        answer = await ask("/api/rows?tokens_min=100&tokens_max=109&reward_min=1")
        assert answer["total"] == 5
        assert (await ask("/api/rows?count=100000"))["items"][-1]["n"] == 199, "never all at once"
        shown = await ask("/api/row?n=7")
        (sample,) = shown["samples"]
        assert (sample["reasoning"], sample["answer"]) == ("because 7", "The answer is 7.")
        assert (sample["tokens"], sample["time"], sample["reward"]) == (7, 0.7, 1.0)
        assert sample["speed"] == pytest.approx(10)
        _, headers, raw = await ask.raw("/api/raw?n=7")
        assert orjson.loads(raw) == orjson.loads(row(7))
        assert headers["content-type"] == "text/plain; charset=utf-8"
        for wrong in ("rows?sort=colour", "rows?colour=red", "rows?text=(&regex=true", "row?n=x", "row"):
            assert await ask(f"/api/{wrong}") == 400, wrong
        assert await ask("/api/row?n=300") == await ask("/api/row?n=-1") == 404

    scenario(out, body)


def test_failures_are_a_list_of_their_own(out: Path) -> None:
    failure = {"row": 3, "key": "r3", "index": 1, "error": "ServerFailed", "message": "500: <b>oops</b>"}
    failure |= {"status": 500, "fields": {"prompt": "Question 3"}}
    out.with_name("out.jsonl.failures").write_bytes(orjson.dumps(failure) + b"\n")

    async def body(ask: Asker) -> None:
        await until(lambda: ask.viewer.sources["failures"].table.rows == 1)
        answer = await ask("/api/rows?source=failures&finish=ServerFailed&count=9")
        assert answer["items"][0]["text"] == "Question 3" and answer["items"][0]["finish"] == ["ServerFailed"]
        shown = await ask("/api/row?n=0&source=failures")
        assert shown["failure"]["message"] == "500: <b>oops</b>" and shown["failure"]["status"] == 500
        assert (await ask("/api/state"))["failure_names"] == ["ServerFailed"]

    scenario(out, body)


async def found(ask: Asker, query: str, total: int) -> Any:
    async with asyncio.timeout(20):
        while True:
            answer = await ask(f"/api/rows?{query}")
            if answer["total"] == total and not answer["searching"]:
                return answer
            await asyncio.sleep(0.02)


def test_a_search_finds_what_there_is_and_what_comes(out: Path) -> None:
    async def body(ask: Asker) -> None:
        await ask.indexed()
        await found(ask, "text=BECAUSE+29", 11)
        await found(ask, "text=because+29&where=answer", 0)
        await found(ask, "text=^The+answer+is+2[0-4]\\.$&regex=true&where=answer&tokens_min=22", 3)
        await found(ask, "text=r299&where=id", 1)
        with out.open("ab") as file:
            file.write(row(2999, id="late"))
        answer = await found(ask, "text=BECAUSE+29&count=20&sort=position&down=true", 12)
        assert answer["items"][0]["id"] == "late"
        await found(ask, "text=BECAUSE+29", 12)

    scenario(out, body)


def test_a_pattern_that_never_ends_hinders_nobody_and_its_process_is_ended(out: Path) -> None:
    with out.open("ab") as file:
        file.write(row(300, prompt="a" * 60 + "!"))

    async def body(ask: Asker) -> None:
        await ask.indexed(ROWS + 1)
        answer = await ask("/api/rows?page=1&text=^(a|a)*$&regex=true&where=prompt")
        assert answer["searching"]
        (search,) = ask.viewer._searches
        await until(lambda: search.scanned > 0)
        before = asyncio.get_running_loop().time()
        assert (await ask("/api/state"))["rows"] == ROWS + 1
        assert asyncio.get_running_loop().time() - before < 5
        await ask("/api/rows?page=2&text=^(a|a)*$&regex=true&where=prompt")
        await ask("/api/rows?page=1&tokens_min=1")
        assert ask.viewer._searches, "another page looks at it still"
        await ask("/api/rows?page=2")
        await until(lambda: not ask.viewer._searches)
        assert search.is_over

    scenario(out, body)


def size(out: Path) -> int:
    return out.stat().st_size


def replace(out: Path) -> None:
    out.write_bytes(row(5))


def test_what_grows_and_what_is_torn_is_told(out: Path) -> None:
    async def body(ask: Asker) -> None:
        await ask.indexed()
        with out.open("ab") as file:
            file.write(row(300) + b'{"torn": "')
        await ask.indexed(ROWS + 1)
        state = await ask("/api/state")
        assert state["rows"] == ROWS + 1 and state["torn"] == 10 and state["size"] == size(out)
        first = await ask("/api/rows?count=1")
        replace(out)
        await ask.indexed(1)
        again = await ask("/api/rows?count=1")
        assert again["total"] == 1 and again["items"][0]["id"] == "r5" and again["epoch"] != first["epoch"]

    scenario(out, body)


def test_what_cannot_be_opened_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.gz").touch()
    for name, why in (("", "is a folder"), ("no", "There is no file"), ("out.jsonl.gz", "compressed")):
        with pytest.raises(ConfigError, match=why):
            Viewer(tmp_path / name)
