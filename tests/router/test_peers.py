"""What clients of the field's other routers (vllm-router, sglang-router) rely on at the HTTP surface."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from penstock.router.server import RouterServer
from tests.router.front import Peer, endpoints, engine, scenario
from tests.scripted import refuse, until

LIMIT = 100_000


@pytest.mark.parametrize("chunked", [False, True])
def test_the_largest_payload_is_inclusive(chunked: bool) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        for size, expected in ((LIMIT, 200), (LIMIT + 1, 413)):
            data = bytes(size)
            if chunked:
                peer.send(b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
                peer.send(b"%x\r\n%s\r\n0\r\n\r\n" % (size, data))
            else:
                peer.post(data, "/x")
            assert (await peer.response())[0] == expected
        assert [len(call.body) for call in one.calls] == [LIMIT]

    one = engine()
    scenario(body, one, max_payload_size=LIMIT)


def test_an_empty_session_is_none_and_the_header_comes_first() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        async def met(fields: bytes, given: dict[str, str]) -> int:
            """How many workers 16 such requests, one after the other, meet."""
            before = [len(one.calls) for one in engines]
            for _ in range(16):
                assert (await peer.ask(orjson.dumps(given), fields=fields))[0] == 200
            return sum(len(one.calls) > count for one, count in zip(engines, before, strict=True))

        spread = await met(b"", {})
        assert spread == len(engines)
        assert await met(b"X-Session-ID:\r\n", {}) == spread
        assert await met(b"", {"session_id": ""}) == spread
        for name in ("a", "b", "c"):
            header = b"X-Session-ID: %s\r\n" % name.encode()
            assert await met(header, {}) == 1
            before = [len(one.calls) for one in engines]
            assert await met(header, {"session_id": "other"}) == 1
            await met(header, {})
            assert sum(len(one.calls) > count for one, count in zip(engines, before, strict=True)) == 1

    engines = [engine(), engine(), engine()]
    scenario(body, *engines, policy="session")


def test_a_router_can_begin_without_workers(tmp_path: Path) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        async with one:
            assert (await peer.get("/liveness"))[0] == 200
            assert (await peer.get("/readiness"))[0] == 503
            assert orjson.loads((await peer.get("/workers"))[2])["workers"] == []
            assert (await peer.ask(orjson.dumps({"url": one.url}), "/workers"))[0] == 202
            assert (await peer.ask())[0] == 200
            await until(lambda: endpoints(server)[0].up)
            assert (await peer.get("/readiness"))[0] == 200
            assert (await peer.get(f"/workers/{one.url}", method="DELETE"))[0] == 202
            await until(lambda: not endpoints(server))
            assert (await peer.get("/readiness"))[0] == 503
            assert (await peer.ask(fields=b"X-Request-Timeout: 0.05\r\n"))[0] == 503

    file = tmp_path / "workers"
    file.write_text("")
    one = engine()
    scenario(body, worker_file=file)


@pytest.mark.parametrize(("retries", "calls"), [(0, 1), (2, 3)])
def test_a_failure_is_the_engines_own_once_no_retry_is_left(retries: int, calls: int) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        status, _, said = await peer.ask()
        assert status == 500 and orjson.loads(said)["error"]["message"] == "out of memory"
        assert len(one.calls) == calls

    one = engine(default=refuse(500, "out of memory"))
    scenario(body, one, retry_max_retries=retries)
