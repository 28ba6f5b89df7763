"""One server for many tests: it lives on a loop in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from penstock.servers.launched import LaunchedServer
from penstock.wire.connection import Response
from tests.engines.engines import START_LIMIT, Engine

T = TypeVar("T")

LIMIT = 90.0
"""Seconds one request may take."""


class Live:
    """A server that runs; its coroutines are called from the test's thread."""

    def __init__(self, engine: Engine, server: LaunchedServer) -> None:
        self.engine = engine
        self.server = server
        self.seconds = 0.0
        """The start took."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="live server")

    def __enter__(self) -> Self:
        self._thread.start()
        started = time.monotonic()
        try:
            self.call(self.server.__aenter__(), START_LIMIT)
        except BaseException:
            self._end()
            raise
        self.seconds = time.monotonic() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.call(self.server.__aexit__(None, None, None), START_LIMIT)
        finally:
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, coroutine: Coroutine[Any, Any, T], limit: float = LIMIT) -> T:
        return self.begin(coroutine).result(limit)

    # -- requests ---------------------------------------------------------------------------------

    def ask(self, method: str, path: str, body: Any = None) -> Response:
        return self.call(self.server.make_request(method, path, body))

    def completion(self, **body: Any) -> Coroutine[Any, Any, Response]:
        body = {"model": self.server.name, "temperature": 0, **body}
        return self.server.make_request("POST", "/v1/completions", body)

    def complete(self, **body: Any) -> Any:
        """The JSON answer of a completion that has to succeed."""
        response = self.call(self.completion(**body))
        assert response.status == 200, response.body
        return json.loads(response.body)

    def control(self, what: str, **values: str) -> Response | None:
        """Uses a control route; None when the engine has no such route."""
        if what in self.engine.missing or what not in self.engine.routes:
            return None
        method, path, body = self.engine.routes[what]
        filled = (
            None
            if body is None
            else json.loads(json.dumps(body).replace("{folder}", values.get("folder", "")))
        )
        response = self.ask(method, path, filled)
        return None if response.status in (404, 405) else response

    def metric(self, name: str) -> float:
        """The sum of a metric's samples; 0 while there are none."""
        lines = self.call(self.server.metrics()).splitlines()
        return sum(
            float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " "))
        )

    def wait_until(self, holds: Callable[[], bool], what: str, limit: float = 20.0) -> None:
        deadline = time.monotonic() + limit
        while not holds():
            assert time.monotonic() < deadline, f"not within {limit} s: {what}"
            time.sleep(0.05)


def core_pid(engine: Engine, server: LaunchedServer) -> int:
    """The child that computes the tokens."""
    assert server._process is not None
    for pid in server._process.tree:
        if engine.core in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"):
            return pid
    raise AssertionError(f"no process with {engine.core} in its name")
