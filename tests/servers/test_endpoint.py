"""A server that runs already: proved on entering, left as it was."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import orjson
import pytest

from penstock.errors import ConfigError
from penstock.servers.endpoint import EndpointServer
from penstock.wire.server import Exchange, HttpServer
from penstock.wire.tls import TLS
from tests.scripted import run

KEY = "right-key"


def handle(exchange: Exchange) -> None:
    request = exchange.request
    if request.headers.get("authorization") != f"Bearer {KEY}":
        exchange.respond(401, b'{"error":{"message":"wrong key"}}')
    elif request.path.endswith("/v1/models"):
        exchange.respond(200, orjson.dumps({"object": "list", "data": [{"id": "one"}, {"id": "two"}]}))
    elif request.path.endswith("/metrics"):
        exchange.respond(200, b"up 1\n", "text/plain")
    else:
        exchange.respond(200, request.path.encode(), "text/plain")


@pytest.mark.parametrize("path", ["", "/v1", "/v1/", "/team/a", "/team/a/v1"])
def test_with_v1_and_without(path: str) -> None:
    async def scenario() -> None:
        async with HttpServer(handle) as http:
            url = f"http://127.0.0.1:{http.port}{path}"
            async with EndpointServer(url, name="two", api_key=KEY) as server:
                assert await server.is_ready()
                assert await server.metrics() == "up 1\n"
                root = path.removesuffix("/").removesuffix("/v1")
                assert (await server.make_request("GET", "/health")).body.decode() == f"{root}/health"
                assert (await server.make_request("POST", "/v1/x")).body.decode() == f"{root}/v1/x"
                assert server.log_tail == () and not server.died.done()
                async with server.client() as client:
                    assert await client.models() == ["one", "two"]

    run(scenario())


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("two", "wrong", "the key is refused"),
        ("two", None, "a key is needed"),
        ("three", KEY, "serves one, two: not 'three'"),
        (None, KEY, "serves one, two: name one of them"),
    ],
)
def test_refused_on_entering(name: str | None, key: str | None, said: str) -> None:
    async def scenario() -> None:
        async with HttpServer(handle) as http:
            with pytest.raises(ConfigError, match=said):
                async with EndpointServer(f"http://127.0.0.1:{http.port}", name=name, api_key=key):
                    pass

    run(scenario())


def test_nobody_there() -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigError, match="No server answers at http://127.0.0.1:1 "):
            async with EndpointServer("http://127.0.0.1:1"):
                pass

    run(scenario())


def test_https(tmp_path: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        + ["-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=localhost", "-days", "2"]
        + ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        cwd=tmp_path, check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    async def scenario() -> None:
        import asyncio

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
                assert f"Bearer {KEY}".encode() in head
                body = b'{"data":[{"id":"one"}]}'
                writer.write(
                    b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body
                )
            except (OSError, EOFError, ssl.SSLError):
                pass
            writer.close()

        http = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=ours)
        url = f"https://127.0.0.1:{http.sockets[0].getsockname()[1]}/v1"
        trust = TLS(ca=str(tmp_path / "cert.pem"))
        async with EndpointServer(url, api_key=KEY, tls=trust) as server:
            assert server.name == "one"
        with pytest.raises(ConfigError, match="TLS|certificate"):
            async with EndpointServer(url, api_key=KEY):
                pass
        http.close()
        await http.wait_closed()

    run(scenario())
