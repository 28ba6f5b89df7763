"""An HTTP server that does to its client, over real sockets, whatever a test has scripted.

Each request takes the next step of the script, then the default step. `run` runs a scenario and asserts that
it leaves no task and no socket behind.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import orjson
import uvloop

T = TypeVar("T")

SCENARIO_BOUND: Final = 30.0
"""Seconds a scenario may take."""


def run(main: Coroutine[Any, Any, T], *, bound: float = SCENARIO_BOUND) -> T:
    """Runs the scenario on uvloop, `bound` seconds at most; asserts that no task and no socket is left."""

    async def bounded() -> T:
        async with asyncio.timeout(bound):
            result = await main
        for _ in range(3):
            await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left: {left}"
        return result

    before = _sockets()
    result = uvloop.run(bounded())
    assert _sockets() - before == set(), "sockets left"
    return result


async def until(condition: Callable[[], object]) -> None:
    """Waits until the condition holds, at most five seconds."""
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen within five seconds")


def _sockets() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


class Call:
    """One request that has arrived, and the means to misbehave."""

    def __init__(
        self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.writer = writer

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """Ends the connection by RST."""
        peer = self.writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport = self.writer.transport
        transport.abort()


Step = Callable[[Call], Awaitable[None]]


def chat_body(text: str = "hello", **fields: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return orjson.dumps({"id": "chatcmpl-1", "model": "m", "choices": [choice], "usage": usage, **fields})


def http(
    status: int, body: bytes, headers: dict[str, str] | None = None, *, length: int | None = None
) -> bytes:
    lines = {
        "content-type": "application/json",
        "content-length": str(len(body) if length is None else length),
    }
    lines.update(headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body


def raw(data: bytes, *, close: bool = False) -> Step:
    async def step(call: Call) -> None:
        await call.write(data)
        if close:
            call.close()

    return step


def answer(text: str = "hello", *, delay: float = 0.0, close: bool = False) -> Step:
    async def step(call: Call) -> None:
        if delay:
            await asyncio.sleep(delay)
        await call.write(http(200, chat_body(text), {"connection": "close"} if close else None))
        if close:
            call.close()

    return step


def echo() -> Step:
    """Answers with the content of the last message."""

    async def step(call: Call) -> None:
        text = call.json["messages"][-1]["content"] if call.body else "alive"
        await call.write(http(200, chat_body(text)))

    return step


def refuse(status: int, message: str = "no", *, retry_after: str | None = None) -> Step:
    body = orjson.dumps({"error": {"message": message, "type": "t", "param": "p", "code": status}})
    return raw(http(status, body, {"Retry-After": retry_after} if retry_after is not None else None))


def stall(data: bytes = b"") -> Step:
    """Sends `data`, then nothing until the client goes away."""

    async def step(call: Call) -> None:
        await call.write(data)
        await asyncio.Event().wait()

    return step


def half_body() -> Step:
    whole = http(200, chat_body())
    return raw(whole[: -len(chat_body()) // 2], close=True)


def reset(data: bytes = b"") -> Step:
    async def step(call: Call) -> None:
        if data:
            await call.write(data)
            await asyncio.sleep(0.02)
        call.reset()

    return step


def hang_up() -> Step:
    async def step(call: Call) -> None:
        call.close()

    return step


def chunked(text: str, seed: int) -> Step:
    """A chunked answer, its chunks and its bytes on the wire split at random places."""

    async def step(call: Call) -> None:
        dice = random.Random(seed)
        body = chat_body(text)
        pieces = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in split(body, dice))
        whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"
        for part in split(whole, dice):
            await call.write(part)
            await asyncio.sleep(0)

    return step


def split(data: bytes, dice: random.Random) -> list[bytes]:
    cuts = sorted(dice.sample(range(1, len(data)), min(7, len(data) - 1)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def aside() -> dict[str, Step]:
    """The answers of an engine that is well and has neither metrics nor control routes."""
    return {"/health": raw(http(200, b"")), "/metrics": refuse(404), "/abort_requests": refuse(404)}


class ScriptedEngine:
    """Listens on 127.0.0.1. `idle_close`: seconds after which a connection without a request is closed.

    `side`: paths that have answers of their own, beside the script; they are recorded in `side_calls`.
    """

    def __init__(
        self,
        script: Iterable[Step] = (),
        default: Step | None = None,
        *,
        idle_close: float | None = None,
        port: int = 0,
        side: dict[str, Step] | None = None,
    ) -> None:
        self.script = deque(script)
        self.default = default or answer()
        self.side = aside() if side is None else side
        self.side_calls: list[Call] = []
        self.idle_close = idle_close
        self.port = port
        self.calls: list[Call] = []
        self.accepted = 0
        self.open = 0
        self.most_in_flight = 0
        self._in_flight = 0
        self._arrival = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> ScriptedEngine:
        await self.listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, backlog=4096)
        self.port = self._server.sockets[0].getsockname()[1]

    async def kill(self) -> None:
        """Stops listening and drops every connection, as a killed process does."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        self._server = None

    async def arrived(self, count: int) -> None:
        """Waits until so many requests have arrived, since the start."""
        while len(self.calls) < count:
            self._arrival.clear()
            await self._arrival.wait()

    async def drained(self) -> None:
        """Waits until every client has gone."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)

        def end(_: object) -> None:  # a task that is cancelled before its first step runs no `finally`
            self._tasks.discard(task)
            writer.transport.abort()

        task.add_done_callback(end)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.open += 1
        try:
            while not writer.is_closing():
                async with asyncio.timeout(self.idle_close):
                    call = await _read(reader, writer)
                if call.path in self.side:
                    self.side_calls.append(call)
                    await self.side[call.path](call)
                    continue
                self.calls.append(call)
                self._arrival.set()
                step = self.script.popleft() if self.script else self.default
                await self._perform(step, call, reader)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1

    async def _perform(self, step: Step, call: Call, reader: asyncio.StreamReader) -> None:
        """Performs the step, or stops when the client goes away."""
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        work = asyncio.ensure_future(step(call))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                raise ConnectionResetError
        finally:
            self._in_flight -= 1
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Call:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = head[0].split(" ")
    headers = {}
    for line in head[1:]:
        if line:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Call(method, path, headers, body, writer)
