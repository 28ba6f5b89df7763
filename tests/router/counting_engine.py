"""A streaming engine, a process of its own, whose tokens are numbered: a stream cut short or mixed up shows.

    python counting_engine.py PORT INTERVAL

It prints its port and serves on 127.0.0.1 until it is killed. Token `i` of user `u` is the text
` u:i`; one comes every INTERVAL seconds, `max_tokens` in all. Asked to continue a message it goes
on from there. Without `stream` the whole answer comes after INTERVAL. GET /stats: what it holds, and did.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any, cast

import orjson
import uvloop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Counts:
    """Of the whole process."""

    def __init__(self) -> None:
        self.requests = self.finished = self.abandoned = self.open = 0


class Connection(asyncio.Protocol):
    """One client; one request at a time."""

    def __init__(self, counts: Counts, interval: float) -> None:
        self._counts = counts
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._input = b""
        self._timer: asyncio.TimerHandle | None = None
        self._user = ""
        self._next = self._end = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
            self._counts.open -= 1
            self._counts.abandoned += 1

    def data_received(self, data: bytes) -> None:
        self._input += data
        head, blank, rest = self._input.partition(b"\r\n\r\n")
        if not blank:
            return
        lower = head.lower()
        size = (
            int(lower.partition(b"content-length:")[2].split(b"\r\n")[0]) if b"content-length" in lower else 0
        )
        if len(rest) < size:
            return
        self._input = rest[size:]
        self._serve(head.split(b" ", 2), rest[:size])

    def _serve(self, line: list[bytes], body: bytes) -> None:
        method, path = line[0], line[1]
        if path == b"/stats":
            self._answer(200, orjson.dumps(vars(self._counts)))
        elif method != b"POST" or path == b"/abort_requests":
            self._answer(200 if path == b"/health" else 404, b"{}")
        else:
            self._counts.requests += 1
            self._counts.open += 1
            self._begin(orjson.loads(body))

    def _begin(self, asked: dict[str, Any]) -> None:
        assert self._transport is not None
        last = asked["messages"][-1]
        self._user = asked["user"]
        self._next = len(last["content"].split()) if last["role"] == "assistant" else 0
        self._end = self._next + asked["max_tokens"]
        if asked.get("stream"):
            self._transport.write(HEAD)
            self._later(self._token)
        else:
            self._later(self._whole)

    def _later(self, step: Callable[[], None]) -> None:
        self._timer = self._loop.call_later(self._interval, step)

    def _token(self) -> None:
        assert self._transport is not None
        self._timer = None
        text = f" {self._user}:{self._next}"
        self._next += 1
        last = self._next == self._end
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": "length" if last else None}
        event = b"data: %s\n\n" % orjson.dumps({"id": "c", "model": "m", "choices": [choice]})
        if last:
            event += b"data: [DONE]\n\n"
        self._transport.write(b"%x\r\n%s\r\n%s" % (len(event), event, b"0\r\n\r\n" if last else b""))
        if last:
            self._done()
        else:
            self._later(self._token)

    def _whole(self) -> None:
        self._timer = None
        text = "".join(f" {self._user}:{number}" for number in range(self._next, self._end))
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        self._answer(200, orjson.dumps({"id": "c", "model": "m", "choices": [choice]}))
        self._done()

    def _done(self) -> None:
        self._counts.open -= 1
        self._counts.finished += 1

    def _answer(self, status: int, body: bytes) -> None:
        assert self._transport is not None
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)


async def main(port: int, interval: float) -> None:
    counts = Counts()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(counts, interval), "127.0.0.1", port, backlog=4096)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2])))
