"""A router in front of scripted engines, a client that speaks bytes to it, and the frame of a scenario."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from penstock.fleet.endpoint import Endpoint
from penstock.router.args import RouterArgs
from penstock.router.server import RouterServer, serving
from tests.scripted import Call, ScriptedEngine, Step, http, run, until

HOST = b"host: router\r\n"


class Peer:
    """A client that writes and reads bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def to(cls, server: RouterServer) -> Peer:
        return cls(*await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 20))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def post(self, body: bytes = b"{}", path: str = "/v1/chat/completions", fields: bytes = b"") -> None:
        head = f"POST {path} HTTP/1.1\r\n".encode() + HOST + fields
        self.send(b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body))

    async def ask(
        self, body: bytes = b"{}", path: str = "/v1/chat/completions", fields: bytes = b""
    ) -> tuple[int, dict[str, str], bytes]:
        self.post(body, path, fields)
        return await self.response()

    async def get(
        self, path: str, fields: bytes = b"", method: str = "GET"
    ) -> tuple[int, dict[str, str], bytes]:
        self.send(f"{method} {path} HTTP/1.1\r\n".encode() + HOST + fields + b"\r\n")
        return await self.response(head=method == "HEAD")

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (
            (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)).decode("latin-1").split("\r\n")
        )
        return int(lines[0].split()[1]), dict(line.split(": ", 1) for line in lines[1:] if line)

    async def chunk(self) -> bytes:
        size = int(await asyncio.wait_for(self.reader.readline(), 10), 16)
        return (await asyncio.wait_for(self.reader.readexactly(size + 2), 10))[:-2]

    async def response(self, *, head: bool = False) -> tuple[int, dict[str, str], bytes]:
        status, headers = await self.head()
        body = b""
        if head or status in (100, 204, 304):
            pass
        elif headers.get("transfer-encoding") == "chunked":
            while piece := await self.chunk():
                body += piece
        elif "content-length" in headers:
            body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), 20)
        else:
            body = await asyncio.wait_for(self.reader.read(), 10)
        return status, headers, body

    async def rest(self) -> bytes:
        """What is still sent before the connection ends, by FIN or RST."""
        try:
            return await asyncio.wait_for(self.reader.read(), 5)
        except ConnectionError:
            return b""

    def close(self) -> None:
        self.writer.transport.abort()

    def reset(self) -> None:
        peer = self.writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@asynccontextmanager
async def handled(handler: Handler) -> AsyncIterator[str]:
    """A server whose connections are handled by `handler`; its URL. No task of it is left."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.get_running_loop().create_task(serve(reader, writer)))

    listening = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def instead(server: RouterServer, engine: ScriptedEngine, handler: Handler) -> AsyncIterator[str]:
    """In place of the scripted engine, one that `handler` is; its URL."""
    async with handled(handler) as url:
        server.router.fleet.add(url)
        await server.router.leave(engine.url, None)
        yield url


def engine(*script: Step, default: Step | None = None) -> ScriptedEngine:
    """One that says nothing of its models."""
    made = ScriptedEngine(script, default)
    made.side["/v1/models"] = raw_status(404)
    return made


def raw_status(status: int) -> Step:
    async def step(call: Call) -> None:
        await call.write(http(status, b""))

    return step


def serves(*models: str) -> Step:
    """The answer to /v1/models."""
    cards = ",".join(f'{{"id":"{model}","object":"model","extra":1}}' for model in models)

    async def step(call: Call) -> None:
        await call.write(http(200, f'{{"object":"list","data":[{cards}]}}'.encode()))

    return step


def sse(*events: bytes, gap: float = 0.0, then: Step | None = None) -> Step:
    """A chunked stream of events, complete unless something else comes after them."""

    async def step(call: Call) -> None:
        await call.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for event in events:
            await call.write(b"%x\r\n%s\r\n" % (len(event), event))
            await asyncio.sleep(gap)
        if then is None:
            await call.write(b"0\r\n\r\n")
        else:
            await then(call)

    return step


async def settled(server: RouterServer) -> None:
    """Nothing is in flight anywhere, and every count says so."""
    fleet = server.router.fleet

    def idle() -> bool:
        return (
            fleet.dispatch.in_flight == 0 and fleet.dispatch.waiting == 0 and server.listener.in_flight == 0
        )

    await until(idle)
    assert all(endpoint.in_flight == 0 for endpoint in fleet.endpoints)


def endpoints(server: RouterServer) -> list[Endpoint]:
    return server.router.fleet.endpoints


def scenario(
    body: Callable[..., Awaitable[None]],
    *engines: ScriptedEngine,
    **settings: Any,
) -> None:
    """Runs `body(server, peer)` with a router before the engines; afterwards all counts are zero."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            for one in engines:
                await stack.enter_async_context(one)
            settings.setdefault("prometheus_port", None)
            settings.setdefault("worker_urls", tuple(one.url for one in engines))
            args = RouterArgs(port=0, **settings)
            server = await stack.enter_async_context(serving(args))
            peer = await Peer.to(server)
            try:
                await body(server, peer)
                await settled(server)
            finally:
                peer.close()

    run(main())
