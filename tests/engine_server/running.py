"""An engine server in this process, on a loop in a thread of its own, reached over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import uvloop

from penstock.engine.app import EngineApp
from penstock.engine.config import EngineConfig
from penstock.engine.engine import LLMEngine
from penstock.wire.server import HttpServer
from tests.engine_server.cases import CONTEXT, MODEL

TIMEOUT = 30.0
"""Seconds anything here may take."""


def engine_of(folder: Path, kind: type[LLMEngine] = LLMEngine, **settings: Any) -> LLMEngine:
    """A small engine on one thread, with the context the cases are written for."""
    options: dict[str, Any] = {"max_model_len": CONTEXT, "threads": 1, "device": "cpu", "dtype": "float32"}
    return kind(EngineConfig(model=str(folder), **options | settings))


class Running:
    """A server that runs, and a client's view of it."""

    def __init__(self, app: EngineApp, port: int) -> None:
        self.app = app
        self.host = "127.0.0.1"
        self.port = port

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of one request; a body that is no bytes is sent as JSON."""
        payload = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        with closing(HTTPConnection(self.host, self.port, timeout=TIMEOUT)) as connection:
            connection.request(method, path, payload, {"content-type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return response.status, response.read()

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
        """The JSON answer of a request that has to succeed."""
        status, content = self.send("POST", path, body, headers)
        assert status == 200, content
        return json.loads(content)

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics by their name and labels."""
        status, content = self.send("GET", "/metrics")
        assert status == 200
        lines = [line for line in content.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def metric(self, name: str, *labels: str) -> float:
        """One vLLM metric of this engine; the labels have to be in its name, too."""
        (value,) = (
            value
            for sample, value in self.metrics().items()
            if sample.startswith(f"vllm:{name}{{") and all(label in sample for label in labels)
        )
        return value

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        """Looks again and again until something holds; fails after TIMEOUT."""
        deadline = time.monotonic() + TIMEOUT
        while not holds():
            assert time.monotonic() < deadline, f"not within {TIMEOUT} s: {what}"
            time.sleep(0.005)

    def raw(self, path: str, body: Any) -> socket.socket:
        """A socket with a POST on its way, for clients that do not behave."""
        payload = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection = socket.create_connection((self.host, self.port), timeout=TIMEOUT)
        connection.sendall(f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload)
        return connection


@contextmanager
def running(llm: LLMEngine, **options: Any) -> Iterator[Running]:
    """Serves an engine as `tiny` until the block is left."""
    started: list[Running] = []
    ready, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        app = EngineApp(llm, served_model_names=(MODEL,), **options)
        async with HttpServer(app.handle) as server:
            app.engine.start()
            loops.append(asyncio.get_running_loop())
            started.append(Running(app, server.port))
            ready.set()
            await stop.wait()
        await app.engine.close()

    thread = threading.Thread(target=lambda: uvloop.run(serve()))
    thread.start()
    assert ready.wait(TIMEOUT), "the server did not start"
    try:
        yield started[0]
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "the server did not stop"
