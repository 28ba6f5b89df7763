"""Workers that are reached by TLS or by a UNIX socket: requests, streams and large bodies, as over TCP."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from penstock.router.server import RouterServer
from tests.router.front import Peer, scenario, settled
from tests.scripted import until
from tests.wire.test_tls import files  # noqa: F401 -- a fixture

EVENTS = [b"data: %d\n\n" % number for number in range(20)]
LARGE = 8 << 20


async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Health as an engine's, no models; a stream, a hanging response, or what it was sent with its digest."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ")[1]
            size = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
            body = await reader.readexactly(size)
            if path == b"/stream":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
                writer.write(b"transfer-encoding: chunked\r\n\r\n")
                for event in EVENTS:
                    writer.write(b"%x\r\n%s\r\n" % (len(event), event))
                    await asyncio.sleep(0.002)
                writer.write(b"0\r\n\r\n")
            elif path == b"/hang":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n")
                GONE.append(await reader.read())
                return
            elif path == b"/v1/models":
                writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
            else:
                digest = hashlib.sha256(body).hexdigest().encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nx-digest: %s\r\ncontent-length: %d\r\n\r\n" % (digest, size)
                )
                writer.write(body)
                await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
        pass
    finally:
        writer.transport.abort()


GONE: list[bytes] = []
"""What came of clients that left a hanging response."""


@asynccontextmanager
async def behind_tls(folder: Path, certificate: str, *, demand: bool = False) -> AsyncIterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if demand:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(folder / "ca.pem")
    context.load_cert_chain(folder / f"{certificate}.pem", folder / f"{certificate}.key")
    server = await asyncio.start_server(engine, "127.0.0.1", 0, ssl=context, limit=1 << 20)
    async with server:
        yield f"https://localhost:{server.sockets[0].getsockname()[1]}"


@asynccontextmanager
async def on_a_socket(folder: Path) -> AsyncIterator[str]:
    path = folder / "engine.sock"
    server = await asyncio.start_unix_server(engine, path, limit=1 << 20)
    async with server:
        yield f"unix://{path}"


async def everything(server: RouterServer, peer: Peer) -> None:
    for number in range(5):
        status, headers, got = await peer.ask(b"%d" % number, "/x")
        assert (status, got) == (200, b"%d" % number)
    assert server.router.fleet.statistics().connections == 1, "the connection is kept"
    for _ in range(2):
        peer.post(path="/stream")
        assert (await peer.head())[0] == 200
        assert [await peer.chunk() for _ in EVENTS] == EVENTS and await peer.chunk() == b""
    body = bytes(range(256)) * (LARGE >> 8)
    status, headers, got = await peer.ask(body, "/x")
    assert (status, headers["x-digest"]) == (200, hashlib.sha256(body).hexdigest())
    assert got == body
    other = await Peer.to(server)
    other.post(path="/hang")
    assert (await other.head())[0] == 200
    other.close()
    await until(lambda: bool(GONE))  # the engine is told at once
    GONE.clear()
    await settled(server)
    assert (await peer.ask(b"last", "/x"))[2] == b"last"


@pytest.fixture
def nobody(tmp_path: Path) -> Path:
    """A list of workers with none in it: each test adds its own."""
    GONE.clear()
    path = tmp_path / "workers"
    path.write_text("")
    return path


def test_a_worker_behind_tls_with_an_authority_of_its_own(files: Path, nobody: Path) -> None:  # noqa: F811
    async def body(server: RouterServer, peer: Peer) -> None:
        async with behind_tls(files, "server") as url:
            server.router.fleet.add(url)
            await everything(server, peer)
            await server.router.leave(url, None)

    scenario(body, worker_urls=(), worker_file=nobody, worker_ca_path=str(files / "ca.pem"))


def test_a_worker_that_demands_a_certificate(files: Path, nobody: Path) -> None:  # noqa: F811
    async def body(server: RouterServer, peer: Peer) -> None:
        async with behind_tls(files, "server", demand=True) as url:
            server.router.fleet.add(url)
            assert (await peer.ask(b"1", "/x"))[::2] == (200, b"1")
            await server.router.leave(url, None)

    scenario(
        body, worker_urls=(), worker_file=nobody, worker_ca_path=str(files / "ca.pem"),
        worker_cert_path=str(files / "client.pem"), worker_key_path=str(files / "client.key"),
    )  # fmt: skip


def test_a_worker_of_another_authority_gets_no_request(files: Path, nobody: Path) -> None:  # noqa: F811
    async def body(server: RouterServer, peer: Peer) -> None:
        async with behind_tls(files, "server") as url:
            server.router.fleet.add(url)
            status, _, said = await peer.ask(b"secret", "/x")
            assert status == 503 and b"certificate" in said
            await server.router.leave(url, None)

    scenario(
        body, worker_urls=(), worker_file=nobody, worker_ca_path=str(files / "another.pem"),
        retry_max_retries=0, queue_timeout_secs=2.0,
    )  # fmt: skip


def test_a_worker_on_a_unix_socket(tmp_path: Path, nobody: Path) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        async with on_a_socket(tmp_path) as url:
            server.router.fleet.add(url)
            await everything(server, peer)
            await server.router.leave(url, None)

    scenario(body, worker_urls=(), worker_file=nobody)
