"""A client for server tests that writes and reads bytes, and the frame of a scenario."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import orjson

from penstock.wire.server import Exchange, HttpServer
from tests.scripted import run

Handler = Callable[[Exchange], None]


def mirror(exchange: Exchange) -> None:
    request = exchange.request
    seen = {"method": request.method, "path": request.path, "query": request.query, "size": len(request.body)}
    exchange.respond(200, orjson.dumps(seen))


class Peer:
    """A client that writes and reads bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def to(cls, server: HttpServer) -> Peer:
        return cls(*await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 20))

    async def response(self, *, head: bool = False) -> tuple[int, dict[str, str], bytes]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        if head or int(lines[0].split()[1]) in (100, 204):
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await self.reader.readline(), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            assert await self.reader.readline() == b"\r\n"
        elif "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        else:
            body = await self.reader.read()
        return int(lines[0].split()[1]), headers, body

    async def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        self.writer.write(data)
        return await self.response()

    async def closed(self) -> bytes:
        """What the server still sends before it closes."""
        return await asyncio.wait_for(self.reader.read(), 5)

    def close(self) -> None:
        self.writer.transport.abort()


def scenario(handler: Handler, body: Callable[[HttpServer, Peer], Any], **settings: Any) -> None:
    """Runs `body` with a server and a connected peer; asserts that the server is left with nothing."""

    async def main() -> None:
        server = HttpServer(handler, **settings)
        async with server:
            peer = await Peer.to(server)
            try:
                await body(server, peer)
            finally:
                peer.close()
        assert (server.connections, server.in_flight) == (0, 0)

    run(main())
