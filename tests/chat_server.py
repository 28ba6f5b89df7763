"""A chat completions server in a thread, whose answers a test decides.

Unlike an engine it can be told to refuse, to fail and to wait; it counts what it was asked. The answer to a
message is the message itself, doubled, so that a test can tell whose answer it holds.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import orjson
import uvloop

from penstock.wire.exchange import Exchange
from penstock.wire.server import HttpServer

MODEL = "echo"

Behaviour = Callable[[str, int], tuple[int, str] | None]
"""(last user message, how often it was asked before) → an error's (status, message), or None: answer it."""


def answer_to(message: str) -> str:
    return f"<think>hm</think>{message} {message}"


class ChatServer:
    """`with ChatServer() as server:` serves on 127.0.0.1:`server.port` until the block ends."""

    def __init__(
        self, behaviour: Behaviour = lambda message, asked: None, *, latency: float = 0.0, slow: str = ""
    ) -> None:
        self.behaviour = behaviour
        self.latency = latency
        """Seconds before a request is answered."""
        self.slow = slow
        """A message whose answer takes 50 times as long."""
        self.asked: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.in_flight = 0
        self.peak = 0
        self.abandoned = 0
        """Requests whose client went away."""
        self.port = 0
        self._ready = threading.Event()
        self._stop: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=lambda: uvloop.run(self._serve()), name="chat server")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._thread.join(10)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()

        def stop() -> None:
            loop.call_soon_threadsafe(stopped.set)

        self._stop = stop
        server = HttpServer(self._handle, port=self.port)
        await server.start()
        self.port = server.port
        self._ready.set()
        await stopped.wait()
        await server.close(0.0)

    def _handle(self, exchange: Exchange) -> None:
        if exchange.request.path == "/v1/models":
            exchange.respond(
                200, orjson.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
            )
            return
        if exchange.request.method == "GET":
            exchange.respond(404, b"")
            return
        request = orjson.loads(exchange.request.body)
        message = request["messages"][-1]["content"]
        self.requests.append(request)
        self.asked[message] += 1
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        exchange.on_disconnect = self._abandon
        if self.latency:
            wait = 50 * self.latency if message == self.slow else self.latency
            asyncio.get_running_loop().call_later(wait, self._answer, exchange, message)
        else:
            self._answer(exchange, message)

    def _abandon(self) -> None:
        self.in_flight -= 1
        self.abandoned += 1

    def _answer(self, exchange: Exchange, message: str) -> None:
        if exchange.disconnected:
            return
        self.in_flight -= 1
        refused = self.behaviour(message, self.asked[message] - 1)
        if refused is not None:
            status, text = refused
            exchange.respond(
                status, orjson.dumps({"error": {"message": text, "type": "test", "code": status}})
            )
            return
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer_to(message)},
            "finish_reason": "stop",
        }
        usage = {"prompt_tokens": len(message), "completion_tokens": 2, "total_tokens": len(message) + 2}
        exchange.respond(
            200, orjson.dumps({"id": "chatcmpl-1", "model": MODEL, "choices": [choice], "usage": usage})
        )
