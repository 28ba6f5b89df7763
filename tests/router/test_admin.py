"""The router's own routes, its files, and its life as a process."""

from __future__ import annotations

import asyncio
import dataclasses
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

from penstock.control.control import Control
from penstock.errors import ConfigError
from penstock.router import RouterArgs
from penstock.router import server as server_module
from penstock.router.admin import Admin
from penstock.router.server import RouterServer
from penstock.router.upstream import EngineTransport
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
            for path in ("/get_loads", "/v1/loads"):
                loads = orjson.loads((await peer.get(path))[2])["workers"]
                assert loads[1] == {"worker": two.url, "load": 0, "max_in_flight": None}
            assert (await peer.get("/health_generate"))[0] == 200
            assert (await peer.ask(path=f"/remove_worker?url={two.url}"))[0] == 202
            await until(lambda: len(endpoints(server)) == 1)
            assert (await peer.ask(path="/remove_worker?url=nowhere:1"))[0] == 404
            assert (await peer.ask(path="/add_worker"))[0] == 400

    one, two = engine(), engine()
    scenario(main, one)


def change(data: bytes, path: str = "/workers", method: str = "PATCH") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


def test_settings_change_while_it_runs_all_at_once_or_not_at_all() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        async def patch(path: str = "/workers", **settings: Any) -> tuple[int, Any]:
            peer.send(change(orjson.dumps(settings), path))
            status, _, said = await peer.response()
            return status, orjson.loads(said)

        for wrong, word in (
            ({"policy": "fastest", "queue_size": 1}, "policy cannot be 'fastest'"),
            ({"queue_size": 1, "worker_max_in_flight": 0}, "must be at least 1"),
            ({"queue_size": "many"}, "queue_size cannot be 'many'"),
            ({"queue_sise": 1}, "is 'queue_size' meant"),
            ({"port": 1}, "port cannot be changed while the router runs"),
            ({}, "names no setting"),
        ):
            status, said = await patch(**wrong)
            assert status == 400 and word in said["error"]["message"]
        peer.send(change(b"[1]"))
        assert (await peer.response())[0] == 400
        assert server.router.args == before

        first = [await Peer.to(server) for _ in range(3)]
        for one_ in first:
            one_.post()
        await one.arrived(1)
        await until(lambda: server.router.fleet.dispatch.waiting == 2)
        status, said = await patch("/config", worker_max_in_flight=2, queue_size=7)
        assert (status, said["worker_max_in_flight"], said["queue_size"]) == (200, 2, 7)
        await one.arrived(2)  # one that waited has a slot by the new limit
        status, said = await patch(max_concurrent_requests=3, worker_max_in_flight=None)
        assert status == 200 and endpoints(server)[0].shown_limit is None
        await one.arrived(3)
        for one_ in first:
            assert (await one_.response())[0] == 200
            one_.close()
        await patch(policy="session", request_timeout_secs=0.5, retry_max_retries=0)
        assert server.router.fleet.retry.attempts == 1
        relay = endpoints(server)[0].transport.relay  # type: ignore[attr-defined]
        assert relay.timeouts.idle == relay.timeouts.first_byte == 0.5
        assert (await peer.ask(fields=b"x-session-id: a\r\n"))[0] == 200
        status, said = await patch(request_timeout_secs=None, policy="prefix_aware")
        assert said["policy"] == "prefix_aware" and said["request_timeout_secs"] is None
        assert (await peer.ask(b'{"prompt":"abc"}'))[0] == 200
        index = server.router.fleet.dispatch.index
        assert index is not None and len(index) == 1
        await patch(policy="round_robin")
        assert server.router.fleet.dispatch.index is None
        assert (await peer.ask(b'{"prompt":"abc"}'))[0] == 200
        shown = orjson.loads((await peer.get("/config"))[2])
        assert shown == orjson.loads((await peer.get("/workers"))[2])["config"]
        assert shown["max_concurrent_requests"] == 3 and "api_key" not in shown

        async with two:  # a worker that joins has the settings of now
            await patch(worker_max_in_flight=5, request_timeout_secs=9.0)
            await peer.ask(orjson.dumps({"url": two.url}), "/workers")
            joined = endpoints(server)[1]
            assert joined.limit == 5
            transport = joined.transport
            assert isinstance(transport, EngineTransport) and transport.relay.timeouts.idle == 9.0
            await server.router.leave(two.url, None)

    one, two = engine(default=answer(delay=0.2)), engine()
    before = RouterArgs(port=0, prometheus_port=None, worker_urls=("x:1",))

    async def main(server: RouterServer, peer: Peer) -> None:
        nonlocal before
        before = server.router.args
        await body(server, peer)

    scenario(main, one, worker_max_in_flight=1)


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


def test_the_worker_file_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "FILE_TICK", 0.02)
    path = tmp_path / "workers"
    one, two = engine(), engine()

    def names(server: RouterServer) -> list[str]:
        return [endpoint.name for endpoint in endpoints(server)]

    async def main(server: RouterServer, peer: Peer) -> None:
        path.write_text(f"# those there are\n{one.url}\n\n")
        await until(lambda: names(server) == [one.url])
        kept = endpoints(server)[0]
        os.utime(path)
        await asyncio.sleep(0.06)
        assert endpoints(server) == [kept]  # touched, it says what it said
        fresh = tmp_path / "new"
        fresh.write_text(f"{two.url}\n{one.url}\n")
        fresh.replace(path)
        await until(lambda: sorted(names(server)) == sorted([one.url, two.url]))
        assert kept in endpoints(server)
        fresh.write_text(f"aaa.example:1\nftp://no.example\n{one.url}\n")
        fresh.replace(path)
        await until(lambda: "line 2" in caplog.text)
        assert sorted(names(server)) == sorted([one.url, two.url])  # a file with a bad line changes nothing
        path.write_text(f"{two.url}\n")
        await until(lambda: names(server) == [two.url])
        path.unlink()
        await until(lambda: "cannot be read" in caplog.text)
        assert (await peer.get("/liveness"))[0] == 200
        path.write_text(f"{two.url}\n{one.url}  # back\n")
        await until(lambda: len(endpoints(server)) == 2)
        assert (await peer.ask())[0] == 200
        path.write_text("")
        await until(lambda: not endpoints(server))
        assert (await peer.get("/readiness"))[0] == 503

    path.write_text("")
    scenario(main, one, two, worker_urls=(), worker_file=path)


def test_a_worker_file_that_is_being_written_is_not_taken_half(tmp_path: Path) -> None:
    class Workers:
        def __init__(self) -> None:
            self.urls: set[str] = set()
            self.add = self.urls.add

        def leave(self, url: str, timeout: None) -> str:
            return url

        def spawn(self, left: str) -> None:
            self.urls.remove(left)

    workers: Any = Workers()
    path = tmp_path / "workers"
    path.write_text("a:1\nb:1\n")
    watch = server_module.WorkerFile(path, workers)
    watch.look()
    assert workers.urls == {"a:1", "b:1"}  # the first time as it is
    for content, urls in (("", {"a:1", "b:1"}), ("a:1\n", {"a:1", "b:1"}), ("a:1\n", {"a:1"})):
        path.write_text(content)
        watch.look()
        assert workers.urls == urls


def test_the_admin_routes_can_have_an_address_of_their_own() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        assert (await peer.get("/workers"))[0] == 404
        assert (await peer.ask(path="/flush_cache"))[0] == 404
        assert (await peer.get("/health"))[0] == 200
        assert (await peer.ask(b"x" * (2 << 20), "/update_weights"))[0] in (404, 413)
        assert not one.calls

    one = engine()
    scenario(body, one, admin_port=0)


def test_of_several_processes_only_that_of_the_admin_address_steers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        args = dataclasses.replace(server.router.args, processes=2)
        monkeypatch.setattr(server.router, "args", args)
        async with Control(server.router.fleet) as control:
            admin = Admin(server.router, control, lambda: 0)
            monkeypatch.setattr(server.listener, "handler", admin.handle)
            status, _, said = await peer.ask(path="/pause")
            assert status == 501 and b"--admin-port" in said
            assert (await peer.ask(path="/reset_prefix_cache"))[0] == 200
            paths = [call.path for call in one.calls]
            assert "/reset_prefix_cache" in paths and not any("pause" in path for path in paths)

    one = engine(default=raw(http(200, b"{}")))
    scenario(body, one)


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
