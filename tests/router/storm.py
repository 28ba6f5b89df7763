"""What a storm needs: engines and a router as processes, and a client of thousands of streams."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, cast

import orjson

GONE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER that makes a close an RST."""


class Engine:
    """A `counting_engine.py`, killed and started again at the same port."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._child: subprocess.Popen[str] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        script = str(Path(__file__).with_name("counting_engine.py"))
        command = [sys.executable, script, str(self.port), str(self._interval)]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._child.stdout is not None
        self.port = int(self._child.stdout.readline())

    def kill(self) -> None:
        """By SIGKILL."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()

    async def counts(self) -> dict[str, int]:
        return cast(dict[str, int], await get(self.port, "/stats"))


class RouterProcess:
    """A `penstock route` before the engines."""

    def __init__(self, engines: Iterable[Engine], *flags: str) -> None:
        urls = [engine.url for engine in engines]
        command = [sys.executable, "-m", "penstock", "route", "--port", "0", "--prometheus-port", "None"]
        self._command = [*command, *flags, "--worker-urls", *urls]
        self.port = 0

    def __enter__(self) -> RouterProcess:
        self._child = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._child.stdout is not None
        match = re.search(r"ready on http://127\.0\.0\.1:(\d+)", self._child.stdout.readline())
        assert match is not None
        self.port = int(match[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.communicate()

    @property
    def peak_memory(self) -> int:
        """Resident bytes at most so far, of each of its processes."""
        proc = Path("/proc")
        children = (proc / f"{self._child.pid}/task/{self._child.pid}/children").read_text().split()
        pages = [(proc / pid / "status").read_text() for pid in (str(self._child.pid), *children)]
        return sum(int(page.partition("VmHWM:")[2].split()[0]) << 10 for page in pages)

    async def workers(self) -> dict[str, Any]:
        return cast(dict[str, Any], await get(self.port, "/workers"))

    async def metrics(self) -> dict[str, float]:
        """Values summed over their labels."""
        found: Counter[str] = Counter()
        for line in (await fetch(self.port, "/metrics")).decode().splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name.partition("{")[0]] += float(value)  # type: ignore[assignment]
        return cast(dict[str, float], found)


async def fetch(port: int, path: str) -> bytes:
    """The body of an answer to GET."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET %s HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n" % path.encode())
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            return await reader.readexactly(size)
    finally:
        writer.transport.abort()


async def get(port: int, path: str) -> Any:
    return orjson.loads(await fetch(port, path))


class Asker(asyncio.Protocol):
    """One connection, one request, and what came of it."""

    def __init__(self, number: int, tokens: int, *, stream: bool, fields: bytes = b"") -> None:
        self.number = number
        self.tokens = tokens
        self.stream = stream
        self.data: list[bytes] = []
        self.closed = False
        self.vanished = False
        self._transport: asyncio.Transport | None = None
        body = {
            "model": "m",
            "user": str(number),
            "messages": [{"role": "user", "content": "count"}],
            "max_tokens": tokens,
            "stream": stream,
        }
        data = orjson.dumps(body)
        line = b"POST /v1/chat/completions HTTP/1.1\r\nhost: router\r\nconnection: close\r\n"
        self._request = b"%s%scontent-length: %d\r\n\r\n%s" % (line, fields, len(data), data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.data.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.closed = True

    def vanish(self, *, reset: bool) -> None:
        """Goes away, by RST or by FIN."""
        if self._transport is not None:
            self.vanished = True
            if reset:
                peer = self._transport.get_extra_info("socket")
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, GONE)
            self._transport.abort()

    @property
    def begun(self) -> bool:
        return len(self.data) > 0

    # -- what came of it ------------------------------------------------------------------------------

    @property
    def outcome(self) -> str:
        """`whole`, `vanished`, `broken` (and the client can see it), `refused`; anything else is a fault."""
        head, _, rest = b"".join(self.data).partition(b"\r\n\r\n")
        if self.vanished:
            return "vanished"
        if not head.startswith(b"HTTP/1.1 "):
            return "lost"
        status = int(head.split(b" ", 2)[1])
        if status != 200:
            return "refused" if status >= 429 and b'"message"' in rest else f"status {status}"
        return self._streamed(rest) if self.stream else self._answered(rest)

    def _answered(self, body: bytes) -> str:
        try:
            text = orjson.loads(body)["choices"][0]["message"]["content"]
        except orjson.JSONDecodeError:
            return "short"
        return "whole" if text.split() == self._expected(self.tokens) else "mixed up"

    def _streamed(self, body: bytes) -> str:
        events, ended = dechunked(body)
        lines = [line.removeprefix(b"data: ") for line in events.split(b"\n") if line.startswith(b"data: ")]
        done = bool(lines) and lines[-1] == b"[DONE]"
        broken = b"event: error" in events
        tokens: list[str] = []
        for line in lines[: -1 if done or broken else None]:
            for choice in orjson.loads(line)["choices"]:
                tokens += (choice["delta"].get("content") or "").split()
        if tokens != self._expected(len(tokens)):
            return "mixed up"
        if done and ended and len(tokens) == self.tokens:
            return "whole"
        return "broken" if broken and not done and not ended else "silently short"

    def _expected(self, count: int) -> list[str]:
        return [f"{self.number}:{index}" for index in range(count)]


def dechunked(data: bytes) -> tuple[bytes, bool]:
    """The bytes of a chunked body, and whether its last chunk was there."""
    pieces: list[bytes] = []
    at = 0
    while (line := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:line], 16)
        if not size:
            return b"".join(pieces), True
        pieces.append(data[line + 2 : line + 2 + size])
        at = line + 2 + size + 2
    return b"".join(pieces), False


class Crowd:
    """Askers at a router."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.all: list[Asker] = []

    async def ask(self, count: int, tokens: int, *, stream: bool, fields: bytes = b"") -> list[Asker]:
        """So many connect and ask, in waves of 200."""
        new = [Asker(len(self.all) + index, tokens, stream=stream, fields=fields) for index in range(count)]
        self.all += new
        loop = asyncio.get_running_loop()
        for start in range(0, count, 200):
            await asyncio.gather(*(self._connect(loop, asker) for asker in new[start : start + 200]))
        return new

    async def _connect(self, loop: asyncio.AbstractEventLoop, asker: Asker) -> None:
        await loop.create_connection(lambda: asker, "127.0.0.1", self._port)

    @property
    def live(self) -> list[Asker]:
        return [asker for asker in self.all if not asker.closed]

    async def ended(self, bound: float) -> None:
        """Waits until every connection is closed."""
        await within(bound, lambda: not self.live, lambda: f"{len(self.live)} are still open")

    def outcomes(self) -> Counter[str]:
        return Counter(asker.outcome for asker in self.all)


async def within(bound: float, condition: Callable[[], bool], shown: Callable[[], str]) -> None:
    """Waits until the condition holds, at most `bound` seconds."""
    loop = asyncio.get_running_loop()
    end = loop.time() + bound
    while not condition():
        assert loop.time() < end, f"{shown()} after {bound} s"
        await asyncio.sleep(0.02)


async def held(engines: Iterable[Engine]) -> int:
    """Requests in flight at the engines, as they say."""
    return sum([(await engine.counts())["open"] for engine in engines])


async def settled(router: RouterProcess, engines: Iterable[Engine], clients: Crowd, bound: float) -> None:
    """Within `bound` seconds the router, its workers and the engines hold what clients wait for, exactly."""
    loop = asyncio.get_running_loop()
    end = loop.time() + bound
    while True:
        shown = await router.workers()
        by_worker = sum(worker["in_flight"] for worker in shown["workers"])
        counts = shown["in_flight"], by_worker, await held(engines), len(clients.live)
        if len(set(counts)) == 1 and shown["waiting"] == 0:
            return
        assert loop.time() < end, f"router, workers, engines, clients: {counts}, waiting {shown['waiting']}"
        await asyncio.sleep(0.02)
