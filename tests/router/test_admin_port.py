"""Which address answers what: clients, administrators and Prometheus can each have one of their own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.router.router import ADMIN_PATHS
from penstock.router.server import RouterServer
from tests.router.front import Peer, endpoints, engine, scenario
from tests.scripted import until

ADMIN = b"Authorization: Bearer admin\r\n"
CLIENT = b"Authorization: Bearer client\r\n"
PATHS = sorted(path.decode() for path in ADMIN_PATHS) + ["/workers/http%3A%2F%2Fx"]
KEYS = {"api_key": "client", "admin_api_key": "admin"}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


async def at(port: int) -> Peer:
    return Peer(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 20))


Body = Callable[[RouterServer, Peer, Peer], Awaitable[None]]


def with_admin_port(body: Body, *engines: object, **settings: object) -> None:
    """Runs `body(server, peer, admin)`; `admin` is connected to the admin address."""
    port = free_port()

    async def main(server: RouterServer, peer: Peer) -> None:
        admin = await at(port)
        try:
            await body(server, peer, admin)
        finally:
            admin.close()

    scenario(main, *engines, admin_port=port, **settings)  # type: ignore[arg-type]


def test_the_public_address_has_no_admin_route_and_relays_none() -> None:
    async def body(server: RouterServer, peer: Peer, admin: Peer) -> None:
        for path in PATHS:
            for method in ("GET", "POST", "DELETE"):
                for key, status in ((ADMIN, 404), (CLIENT, 401), (b"", 401)):
                    assert (await peer.get(path, key, method))[0] == status, path
        await until(lambda: one.side_calls)
        asked = {call.path for call in one.side_calls}
        assert one.calls == [] and asked <= {"/health", "/v1/models", "/metrics"}
        assert len(endpoints(server)) == 1

    one = engine()
    with_admin_port(body, one, **KEYS)


def test_without_keys_the_public_address_has_none_either() -> None:
    async def body(server: RouterServer, peer: Peer, admin: Peer) -> None:
        for path in PATHS:
            assert (await peer.ask(path=path))[0] == 404, path
            assert (await peer.get(path))[0] == 404, path
        assert one.calls == []
        assert (await admin.get("/workers"))[0] == 200

    one = engine()
    with_admin_port(body, one)


@pytest.mark.parametrize("keys", [KEYS, {"api_key": "admin"}, {"admin_api_key": "admin"}])
def test_the_admin_address_needs_the_admin_key(keys: dict[str, str]) -> None:
    async def body(server: RouterServer, peer: Peer, admin: Peer) -> None:
        for path in PATHS:
            for key in (b"", CLIENT, b"Authorization: admin\r\n", b"Authorization: bearer admin\r\n"):
                assert (await admin.get(path, key))[0] == 401, path
        shown = orjson.loads((await admin.get("/workers", ADMIN))[2])
        assert shown["total"] == 1
        assert (await admin.ask(orjson.dumps({"url": two.url}), "/workers", ADMIN))[0] == 202
        assert len(endpoints(server)) == 2
        assert (await admin.get(f"/workers/{two.url}", ADMIN, "DELETE"))[0] == 202
        await until(lambda: len(endpoints(server)) == 1)

    one, two = engine(), engine()

    async def main(server: RouterServer, peer: Peer, admin: Peer) -> None:
        async with two:
            await body(server, peer, admin)

    with_admin_port(main, one, **keys)


def test_the_admin_address_relays_nothing() -> None:
    async def body(server: RouterServer, peer: Peer, admin: Peer) -> None:
        for path in ("/v1/chat/completions", "/generate", "/", "/v1/anything"):
            status, _, said = await admin.ask(path=path, fields=ADMIN)
            assert status == 404 and "message" in orjson.loads(said)["error"], path
        assert one.calls == []
        assert (await peer.ask(fields=CLIENT))[0] == 200

    one = engine()
    with_admin_port(body, one, **KEYS)


def test_health_and_metrics_are_answered_at_both() -> None:
    async def body(server: RouterServer, peer: Peer, admin: Peer) -> None:
        for path in ("/health", "/liveness", "/readiness", "/metrics"):
            assert (await peer.get(path))[0] == 200
            assert (await admin.get(path, ADMIN))[0] == 200

    with_admin_port(body, engine(), **KEYS)


def test_a_bad_request_to_the_admin_address_is_refused() -> None:
    async def body(server: RouterServer, peer: Peer, admin: Peer) -> None:
        admin.send(
            b"POST /workers HTTP/1.1\r\nhost: a\r\n%scontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n"
            % ADMIN
        )
        assert (await admin.response())[0] == 400
        assert await admin.rest() == b""
        assert (await peer.ask(fields=CLIENT))[0] == 200

    with_admin_port(body, engine(), **KEYS)


def test_prometheus_has_an_address_of_its_own_without_a_key() -> None:
    port = free_port()

    async def body(server: RouterServer, peer: Peer) -> None:
        scraper = await at(port)
        assert (await peer.ask(fields=CLIENT))[0] == 200
        status, headers, page = await scraper.get("/metrics")
        assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
        samples = {
            sample.name: sample.value
            for family in text_string_to_metric_families(page.decode())
            for sample in family.samples
            if not sample.labels
        }
        assert samples["penstock_router_requests_total"] == 1
        for path in ("/", "/workers", "/v1/models", "/metrics/x", "/health"):
            assert (await scraper.get(path))[0] == 404
        assert (await scraper.ask(path="/v1/chat/completions"))[0] == 404
        assert len(one.calls) == 1
        scraper.close()

    one = engine()
    scenario(body, one, prometheus_port=port, **KEYS)
