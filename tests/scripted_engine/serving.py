"""A scripted engine in the test's own loop, and ways to talk to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson

from penstock import Client
from penstock.fleet.retry import Retry
from penstock.scripted.app import ScriptedApp
from penstock.scripted.config import ScriptedArgs
from penstock.scripted.server import ScriptedServer

QUESTION = [{"role": "user", "content": "Count."}]
QUICK = Retry(attempts=30, base=0.01, cap=0.05, budget=10.0)


class Engine:
    """A scripted engine that listens."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.batch = server.app.batch

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def counts(self) -> dict[str, Any]:
        return self.batch.account.counts()

    def states(self) -> dict[str, str]:
        """The state of each request by its id."""
        return {entry["id"]: entry["state"] for entry in self.batch.account.requests()}

    def assert_empty(self) -> None:
        """Nothing runs, nothing is held."""
        schedule = self.batch.schedule
        assert not schedule.running and not schedule.waiting and not self.batch.answers
        assert schedule.kv_usage == 0.0 and self.counts()["in_flight"] == 0

    async def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        return await self.ask("POST", path, {} if body is None else body)

    async def get(self, path: str) -> Any:
        status, answer = await self.ask("GET", path, None)
        assert status == 200
        return answer

    async def ask(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON (or bytes) of one exchange on a connection of its own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        try:
            writer.write(message(method, path, body))
            whole = await asyncio.wait_for(reader.read(), 10)
        finally:
            writer.close()
        head, _, content = whole.partition(b"\r\n\r\n")
        kind = b"application/json" in head.lower()
        return int(head.split()[1]), orjson.loads(content) if content and kind else content


def message(method: str, path: str, body: Any, *, close: bool = True, id: str | None = None) -> bytes:
    """The bytes of a request."""
    data = b"" if body is None else orjson.dumps(body)
    named = "" if id is None else f"x-request-id: {id}\r\n"
    ending = "connection: close\r\n" if close else ""
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{named}{ending}"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


@asynccontextmanager
async def engine(**settings: Any) -> AsyncIterator[Engine]:
    """An engine with these flags, by default a fast one; nothing is left in its batch afterwards."""
    config = ScriptedArgs(**{"itl": "1ms", **settings}).config()
    async with ScriptedServer(ScriptedApp(config)) as server:
        running = Engine(server)
        yield running
        await asyncio.sleep(0.02)  # it has to notice that its connections are closed
        running.assert_empty()


@asynccontextmanager
async def client_of(*engines: Engine, **settings: Any) -> AsyncIterator[Client]:
    async with Client([each.url for each in engines], **{"retry": QUICK, **settings}) as client:
        yield client
        assert set(client.statistics().in_flight.values()) == {0}
