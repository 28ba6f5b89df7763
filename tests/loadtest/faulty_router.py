"""A small router with faults that are planted: it leaks slots, loses answers, gives them twice, asks twice.

It lives in the test's loop, relays to one engine and knows nothing but requests that generate.
"""

from __future__ import annotations

import asyncio
from typing import Self

from penstock.errors import PenstockError
from penstock.wire.address import Address
from penstock.wire.exchange import Exchange
from penstock.wire.pool import Pool
from penstock.wire.server import HttpServer

SECOND = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


class FaultyRouter:
    """`pool` requests at a time go to the engine. Of so many requests one meets the fault, 0: none does.

    leaks: its slot is never given back. loses: its answer is thrown away. doubles: a second answer follows.
    repeats: the engine is asked twice.
    """

    def __init__(
        self,
        url: str,
        *,
        pool: int = 1000,
        leaks: int = 0,
        loses: int = 0,
        doubles: int = 0,
        repeats: int = 0,
    ) -> None:
        self._address = Address.parse(url)
        self._slots = asyncio.Semaphore(pool)
        self._faults = {"leaks": leaks, "loses": loses, "doubles": doubles, "repeats": repeats}
        self._asked = 0
        self._work: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._pool = Pool(self._address)
        self._server = HttpServer(self._handle, "127.0.0.1", 0)
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._work:
            task.cancel()
        await self._server.close()
        await self._pool.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.port}"

    def _handle(self, exchange: Exchange) -> None:
        if exchange.request.method == "GET":
            return exchange.respond(200, b"{}")
        task = asyncio.create_task(self._relay(exchange))
        exchange.on_disconnect = lambda: self._give_up(task)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return None

    @staticmethod
    def _give_up(task: asyncio.Task[None]) -> None:
        task.cancel()

    async def _relay(self, exchange: Exchange) -> None:
        self._asked += 1
        struck = {name for name, every in self._faults.items() if every and self._asked % every == 0}
        await self._slots.acquire()
        try:
            await self._answer(exchange, struck)
        except PenstockError:
            exchange.break_off()
        finally:
            if "leaks" not in struck:
                self._slots.release()

    async def _answer(self, exchange: Exchange, struck: set[str]) -> None:
        request = exchange.request
        id = request.headers["x-request-id"]
        head = f"POST {request.path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += f"x-request-id: {id}\r\n"
        if "repeats" in struck:
            await self._pool.request(head.encode(), request.body)
        connection = exchange._connection
        async with await self._pool.stream(head.encode(), request.body) as stream:
            if "loses" not in struck:
                exchange.start(stream.status, "text/event-stream")
            while piece := await stream.read():
                if "loses" not in struck:
                    exchange.send(piece)
        if "loses" in struck:
            exchange.start(200, "text/event-stream")
            return exchange.break_off()
        exchange.end()
        if "doubles" in struck and connection is not None:
            connection.write(SECOND)
        return None
