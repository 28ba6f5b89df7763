"""The router's own routes, its files, and its life as a process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.errors import ConfigError
from penstock.router import RouterArgs
from penstock.router import server as server_module
from penstock.router.server import RouterServer
from tests.router.front import Peer, endpoints, engine, scenario
from tests.scripted import answer, http, raw, refuse, stall, until


def test_workers_join_change_drain_and_leave() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        status, _, said = await peer.ask(orjson.dumps({"url": two.url}), "/workers")
        assert status == 202 and orjson.loads(said)["success"] is True
        overview = orjson.loads((await peer.get("/workers"))[2])
        assert [worker["url"] for worker in overview["workers"]] == [one.url, two.url]
        assert overview["config"]["policy"] == "round_robin" and overview["total"] == 2
        change = b"PATCH /workers/%s HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%s"
        for limit, shown in ((b"3", 3), (b"null", None)):
            data = b'{"max_in_flight":%s}' % limit
            peer.send(change % (two.url.encode(), len(data), data))
            status, _, said = await peer.response()
            assert (status, orjson.loads(said)["max_in_flight"]) == (200, shown)
        data = b'{"max_in_flight":0}'
        peer.send(change % (two.url.encode(), len(data), data))
        assert (await peer.response())[0] == 400
        quoted = two.url.replace(":", "%3A").replace("/", "%2F")
        assert orjson.loads((await peer.get(f"/workers/{quoted}"))[2])["url"] == two.url
        assert [(await peer.ask())[0] for _ in range(4)] == [200] * 4
        assert len(two.calls) == 2
        assert (await peer.get(f"/workers/{two.url}", method="DELETE"))[0] == 202
        await until(lambda: len(endpoints(server)) == 1)
        assert (await peer.get(f"/workers/{two.url}"))[0] == 404
        assert (await peer.ask(b'{"url":5}', "/workers"))[0] == 400
        assert (await peer.ask(b'{"url":"ftp://x"}', "/workers"))[0] == 400
        assert (await peer.get("/workers", method="DELETE"))[0] == 405

    one, two = engine(), engine()

    async def main(server: RouterServer, peer: Peer) -> None:
        async with two:
            await body(server, peer)

    scenario(main, one, policy="round_robin")


def test_the_fields_other_admin_routes() -> None:
    async def main(server: RouterServer, peer: Peer) -> None:
        async with two:
            assert (await peer.ask(path=f"/add_worker?url={two.url}"))[0] == 202
            listed = orjson.loads((await peer.get("/list_workers"))[2])
            assert listed == {"urls": [one.url, two.url]}
            loads = orjson.loads((await peer.get("/get_loads"))[2])["workers"]
            assert loads[1] == {"worker": two.url, "load": 0, "max_in_flight": None}
            assert (await peer.ask(path="/flush_cache"))[0] == 200
            assert one.side_calls[-1].path == "/flush_cache"
            assert two.side_calls[-1].path == "/reset_prefix_cache"
            assert (await peer.ask(path=f"/remove_worker?url={two.url}"))[0] == 202
            await until(lambda: len(endpoints(server)) == 1)
            assert (await peer.ask(path="/remove_worker?url=nowhere:1"))[0] == 404
            assert (await peer.ask(path="/add_worker"))[0] == 400

    one, two = engine(), engine()
    one.side["/flush_cache"] = two.side["/reset_prefix_cache"] = raw(http(200, b"{}"))
    two.side["/flush_cache"] = refuse(404)
    scenario(main, one)


def test_control_routes_reach_every_worker_and_steps_for_one_engine_none() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        status, _, said = await peer.ask(path="/pause?mode=abort")
        answer = orjson.loads(said)
        assert status == 502 and answer["failed"] == [two.url] and answer["results"][one.url]["ok"]
        for engine_ in (one, two):
            assert [call.path.partition("&")[0] for call in engine_.calls] == ["/pause?mode=abort"]
        assert (await peer.ask(path="/sleep?level=x"))[0] == 400
        assert (await peer.get("/pause"))[0] == 405
        assert (await peer.ask(path="/update_weights"))[0] == 501
        assert len(one.calls) == len(two.calls) == 1

    one, two = engine(default=raw(http(200, b"{}"))), engine(default=refuse(500))
    for engine_ in (one, two):
        engine_.side["/version"] = raw(http(200, b'{"version":"1"}'))
    scenario(body, one, two)


def test_it_speaks_tls(tmp_path: Path) -> None:
    certificate = tmp_path / "both.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext subjectAltName=IP:127.0.0.1"
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [*make.split(), "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True, timeout=30
    )
    certificate.write_bytes(key.read_bytes() + cert.read_bytes())

    async def body(server: RouterServer, peer: Peer) -> None:
        context = ssl.create_default_context(cafile=str(cert))
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
        other = Peer(reader, writer)
        assert (await other.ask(b"x" * 2_000_000))[0] == 200
        assert len(one.calls[0].body) == 2_000_000
        other.close()

    one = engine()
    scenario(body, one, tls_cert_path=str(certificate))
    with pytest.raises(ConfigError, match="cannot be used"):
        scenario(body, one, tls_cert_path=str(tmp_path / "none"))


def test_metrics_can_be_parsed_and_add_up() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        for _ in range(3):
            await peer.ask(b"x" * 10)
        text = (await peer.get("/metrics"))[2].decode()
        families = {family.name: family for family in text_string_to_metric_families(text)}
        name = "penstock_router_"
        assert families[name + "requests"].samples[0].value == 3
        assert families[name + "requests_in_flight"].samples[0].value == 1  # this one
        codes = {s.labels["code"]: s.value for s in families[name + "worker_responses"].samples}
        assert codes == {"2xx": 2, "3xx": 0, "4xx": 1, "5xx": 0}
        assert families[name + "worker_bytes_sent"].samples[0].value == 30
        states = {s.labels["state"]: s.value for s in families[name + "worker_state"].samples}
        assert states == {"up": 1, "down": 0, "open": 0, "half_open": 0}
        counts = [s.value for s in families[name + "worker_seconds"].samples if s.name.endswith("_count")]
        assert counts == [3]

    scenario(body, engine(answer(), refuse(400), answer()))


def test_the_access_log_has_a_line_a_request(tmp_path: Path) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        await peer.ask(b"abc", fields=b"x-request-id: r1\r\n")
        leaver = await Peer.to(server)
        leaver.post(fields=b'x-request-id: "evil\\\r\n')
        await one.arrived(2)
        leaver.close()
        await until(lambda: server.router.statistics.cancelled)

    path = tmp_path / "access.jsonl"
    one = engine(answer(), stall())
    scenario(body, one, access_log=str(path))
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    assert [(line["id"], line["status"], line["worker"]) for line in lines] == [
        ("r1", 200, one.url),
        ('"evil\\', 499, one.url),
    ]
    assert lines[0]["bytes_in"] == 3 and lines[0]["attempts"] == 1 and lines[0]["bytes_out"] > 50


def test_the_worker_file_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        assert [end.name for end in endpoints(server)] == [one.url]
        path.write_text(f"{two.url}\n")
        await until(lambda: [end.name for end in endpoints(server)] == [two.url])
        path.write_bytes(b"not a url \xff\n")
        await asyncio.sleep(0.1)
        path.write_text(f"{two.url}\n{one.url}  # back\n")
        await until(lambda: len(endpoints(server)) == 2)

    monkeypatch.setattr(server_module, "FILE_TICK", 0.02)
    path = tmp_path / "workers"
    one, two = engine(), engine()

    async def main(server: RouterServer, peer: Peer) -> None:
        path.write_text(f"# those there are\n{one.url}\n\n")
        await until(lambda: [end.name for end in endpoints(server)] == [one.url])
        await body(server, peer)

    path.write_text("")
    scenario(main, one, two, worker_urls=(), worker_file=path)


def test_the_admin_routes_can_have_an_address_of_their_own() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        assert (await peer.get("/workers"))[0] == 404
        assert (await peer.ask(path="/flush_cache"))[0] == 404
        assert (await peer.get("/health"))[0] == 200

    scenario(body, engine(), admin_port=0)


def test_health_checks_take_out_a_worker_that_is_not_well() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        await until(lambda: not endpoints(server)[0].up)
        for _ in range(3):
            await peer.ask()
        assert len(two.calls) == 3
        one.side["/health"] = raw(http(200, b""))
        await until(lambda: endpoints(server)[0].up)

    one, two = engine(), engine()
    one.side["/health"] = refuse(500)
    scenario(body, one, two, health_check_interval_secs=0.05, health_failure_threshold=2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"worker_urls": ("a:1",), "queue_size": -1},
        {"worker_urls": ("a:1",), "api_key": "ä"},
        {"worker_urls": ("ftp://a",)},
        {"worker_urls": ("a:1",), "tls_key_path": "x"},
        {"worker_urls": ("a:1",), "max_concurrent_requests": 0},
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RouterArgs(**settings).check()


@contextmanager
def process(*flags: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "penstock", "route", "--port", "0", "--prometheus-port", "None", *flags]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert child.stdout is not None
    try:
        match = re.search(r"ready on http://127\.0\.0\.1:(\d+)", child.stdout.readline())
        assert match is not None
        yield child, int(match[1])
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("hurry", [False, True])
def test_a_process_drains_on_sigterm(hurry: bool) -> None:
    async def main(server: RouterServer, peer: Peer) -> None:
        loop = asyncio.get_running_loop()
        with process("--worker-urls", one.url) as (child, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            other = Peer(reader, writer)
            other.post()
            await one.arrived(1)
            child.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", port)
            assert child.poll() is None
            if hurry:
                child.send_signal(signal.SIGTERM)
                assert await other.rest() == b""
            else:
                status, headers, _ = await other.response()
                assert (status, headers["connection"]) == (200, "close")
            assert await asyncio.wait_for(loop.run_in_executor(None, child.wait), 5) == 0
            other.close()

    one = engine(default=answer(delay=20.0 if hurry else 0.6))
    scenario(main, one)
