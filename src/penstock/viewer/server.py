"""The viewer's server: one page, and what it asks for.

It guarantees:
- nothing is written anywhere, and only the file that was named, its failures and its journal are read;
- the page holds everything it needs and is allowed nothing else: its content security policy names its own
  script and style by their digests, and no other origin; all of a file is given as JSON or plain text;
- reading, sorting and indexing are done in threads, searching in processes: the page always answers;
- when it ends, no thread, task or process of it is left.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self
from urllib.parse import parse_qsl

import msgspec
import orjson

from penstock import __version__
from penstock.batch.status import prompt_format
from penstock.errors import ConfigError
from penstock.viewer import detail
from penstock.viewer.guard import Guard
from penstock.viewer.index import Index
from penstock.viewer.search import Search
from penstock.viewer.views import Query, View
from penstock.wire.exchange import Exchange, error_body
from penstock.wire.server import HttpServer

logger = logging.getLogger(__name__)

MOST_VIEWS: Final = 6
"""Queries kept; the one not asked for longest is dropped, and its search ended."""
MOST_PAGES: Final = 32
"""Pages whose last query is remembered."""
SEARCH_IDLE: Final = 20.0
"""Seconds after which a search nobody asks about is ended."""
MOST_ROWS: Final = 200
"""Rows of a list given at once."""

_PAGE: Final = Path(__file__).with_name("page.html")
"""The page, into which the script and the style beside it are put."""
_JSON: Final = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


class _Window(msgspec.Struct, forbid_unknown_fields=True):
    """Which rows of a view."""

    first: int = 0
    count: int = 0
    place_of: int | None = None
    """A row whose place in the view is asked for."""
    page: str = ""
    """The page that looks at this view now; its former one is looked at no longer."""


class _Which(msgspec.Struct, forbid_unknown_fields=True):
    """One row of a file."""

    n: int
    source: Literal["rows", "failures"] = "rows"


class Viewer:
    """Serves the page for the file `out`; an async context manager. Raises ConfigError when there is none."""

    def __init__(self, out: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        _check(out)
        self.out = out
        self.guard = Guard(host)
        failures = out.with_name(out.name + ".failures")
        self.sources = {"rows": Index(out), "failures": Index(failures)}
        self._form = prompt_format(out)
        self._server = HttpServer(self._handle, host, port)
        self._views: dict[Query, View] = {}
        self._looking: dict[str, Query] = {}
        """What each page looks at."""
        self._searches: dict[Search, asyncio.Task[None]] = {}
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=index.follow, args=(self._stop,), name=f"penstock viewer {name}")
            for name, index in self.sources.items()
        ]
        self._answers: set[asyncio.Task[None]] = set()
        self._rates = _Rates()

    @property
    def url(self) -> str:
        host = self._server.host
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1" if host == "0.0.0.0" else "::1"
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self._server.port}{self.guard.prefix}"

    async def __aenter__(self) -> Self:
        await self._server.start()
        for thread in self._threads:
            thread.start()
        self._sweeper = asyncio.create_task(self._sweep(), name="penstock viewer sweep")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        await self._server.close()
        tasks = [self._sweeper, *self._searches.values(), *self._answers]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    # -- requests ---------------------------------------------------------------------------------

    def _handle(self, exchange: Exchange) -> None:
        request = exchange.request
        path = self.guard.path(request)
        if path is None:
            exchange.respond(403, error_body(403, "this address is not the viewer's own"))
        elif request.method not in ("GET", "HEAD"):
            exchange.respond(405, error_body(405, "only GET is known here"), headers={"allow": "GET, HEAD"})
        elif path == "":
            body, headers = _page()
            exchange.respond(200, body, "text/html; charset=utf-8", headers)
        elif path in ("api/state", "api/rows", "api/row", "api/raw"):
            task = asyncio.create_task(self._answer(exchange, path.removeprefix("api/")))
            self._answers.add(task)
            task.add_done_callback(self._answers.discard)
        else:
            exchange.respond(404, error_body(404, f"there is no {request.path}"))

    async def _answer(self, exchange: Exchange, what: str) -> None:
        asked = dict(parse_qsl(exchange.request.query))
        kind = "application/json"
        try:
            if what == "state":
                body = orjson.dumps(self._state())
            elif what == "rows":
                body = orjson.dumps(await self._rows(asked))
            else:
                which = msgspec.convert(asked, _Which, strict=False)
                body = await asyncio.to_thread(self._row, which, what)
                kind = "application/json" if what == "row" else "text/plain; charset=utf-8"
        except (msgspec.ValidationError, ConfigError) as error:
            exchange.respond(400, error_body(400, str(error)), headers=_JSON)
        except IndexError:
            exchange.respond(404, error_body(404, "there is no such row (yet)"), headers=_JSON)
        except OSError as error:
            exchange.respond(500, error_body(500, f"cannot be read: {error.strerror}"), headers=_JSON)
        except Exception:
            logger.exception("failed on %s", exchange.request.path)
            exchange.respond(500, error_body(500, "internal error"), headers=_JSON)
        else:
            exchange.respond(200, body, kind, _JSON)

    def _state(self) -> dict[str, Any]:
        rows, failures = self.sources["rows"], self.sources["failures"]
        self._rates.mark(rows)
        return {
            "file": self.out.name,
            "path": str(self.out.absolute()),
            "version": __version__,
            "size": rows.lines.size,
            "indexed": rows.lines.end,
            "torn": rows.lines.torn if rows.is_current else 0,
            "current": rows.is_current and failures.is_current,
            "problem": rows.problem or failures.problem,
            "rows": rows.table.rows,
            "failures": failures.table.rows,
            "failure_names": failures.table.finishes,
            "finishes": rows.table.finishes,
            "growth": self._rates.rates(),
            "charts": rows.charts,
        }

    async def _rows(self, asked: dict[str, str]) -> dict[str, Any]:
        window = msgspec.convert(
            {name: asked.pop(name) for name in _Window.__struct_fields__ if name in asked},
            _Window,
            strict=False,
        )
        query = msgspec.convert(asked, Query, strict=False)
        view = self._view(query)
        if window.page:
            self._looks(window.page, query)
        total = await asyncio.to_thread(view.update)
        count = min(window.count, MOST_ROWS)
        items = await asyncio.to_thread(self._items, view, max(window.first, 0), count)
        place = None if window.place_of is None else await asyncio.to_thread(view.place, window.place_of)
        search = view.search
        size = self.sources[query.source].lines.size
        return {
            "total": total,
            "first": window.first,
            "items": items,
            "place": place,
            "epoch": id(view.table),
            "searched": None if search is None else min(search.scanned, size),
            "searching": search is not None and not search.is_over and search.scanned < size,
            "size": size,
        }

    def _view(self, query: Query) -> View:
        view = self._views.pop(query, None)
        if view is None or view.is_stale:
            if view is not None:
                self._end_search(view)
            view = View(self.sources[query.source], query, self._search_for(query))
        self._views[query] = view
        view.used = time.monotonic()
        while len(self._views) > MOST_VIEWS:
            self._end_search(self._views.pop(next(iter(self._views))))
        return view

    def _looks(self, page: str, query: Query) -> None:
        """A search that is under way ends when the last page looks away from it."""
        before = self._looking.pop(page, None)
        self._looking[page] = query
        if len(self._looking) > MOST_PAGES:
            del self._looking[next(iter(self._looking))]
        if before is None or before in self._looking.values() or (view := self._views.get(before)) is None:
            return
        if view.search is not None and view.search.scanned < self.sources[before.source].lines.size:
            self._end_search(self._views.pop(before))

    def _search_for(self, query: Query) -> Search | None:
        if (pattern := query.pattern) is None:
            return None
        pattern.matcher()
        search = Search(self.sources[query.source].path, self.out, pattern)
        task = asyncio.create_task(search.run(), name="penstock viewer search")
        self._searches[search] = task
        task.add_done_callback(lambda _: self._searches.pop(search, None))
        return search

    def _end_search(self, view: View) -> None:
        if view.search is not None and (task := self._searches.get(view.search)) is not None:
            task.cancel()

    def _items(self, view: View, first: int, count: int) -> list[dict[str, Any]]:
        index = self.sources[view.query.source]
        return [
            detail.item(view.table, row, index.read(view.table, row), self._form)
            for row in view.rows(first, count)
        ]

    def _row(self, which: _Which, what: str) -> bytes:
        index = self.sources[which.source]
        line = index.read(index.table, which.n)
        return detail.raw(line) if what == "raw" else orjson.dumps(detail.detail(which.n, line, self._form))

    async def _sweep(self) -> None:
        """Ends searches that nobody asks about."""
        while True:
            await asyncio.sleep(SEARCH_IDLE / 4)
            for query, view in list(self._views.items()):
                if view.search is not None and time.monotonic() - view.used > SEARCH_IDLE:
                    self._end_search(self._views.pop(query))


class _Rates:
    """How fast the file grows, over the last seconds, once it has been read."""

    WINDOW: Final = 10.0

    def __init__(self) -> None:
        self._marks: list[tuple[float, int, int]] = []

    def mark(self, index: Index) -> None:
        now = time.monotonic()
        if not index.is_current and not self._marks:
            return
        self._marks.append((now, index.table.rows, int(index.charts["completion_tokens"])))
        while self._marks[0][0] < now - self.WINDOW:
            self._marks.pop(0)

    def rates(self) -> dict[str, float] | None:
        """Rows and tokens a second; None while nothing is known."""
        if len(self._marks) < 2 or self._marks[-1][0] - self._marks[0][0] < 1:
            return None
        first, last = self._marks[0], self._marks[-1]
        seconds = last[0] - first[0]
        return {"rows": (last[1] - first[1]) / seconds, "tokens": (last[2] - first[2]) / seconds}


def _check(out: Path) -> None:
    if out.is_dir():
        raise ConfigError(f"{out} is a folder: name a .jsonl file in it.")
    if not out.exists():
        raise ConfigError(f"There is no file {out}.")
    if out.suffix in (".gz", ".zst"):
        raise ConfigError(f"{out} is compressed: rows are read from where they lie, so unpack it first.")


@cache
def _page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers."""
    script, style = _PAGE.with_suffix(".js").read_bytes(), _PAGE.with_suffix(".css").read_bytes()
    body = _PAGE.read_bytes()
    body = body.replace(b"<style></style>", b"<style>%b</style>" % style)
    body = body.replace(b"<script></script>", b"<script>%b</script>" % script)
    policy = [
        "default-src 'none'",
        f"script-src {_digest(script)}",
        f"style-src {_digest(style)}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
    return body, {
        "content-security-policy": "; ".join(policy),
        "cache-control": "no-cache",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


def _digest(content: bytes) -> str:
    """What names the page's one script or style in its policy."""
    return f"'sha256-{b64encode(sha256(content).digest()).decode('ascii')}'"
