"""Weight updates of two embedded engines through the router, one of which is killed and comes back old."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson
import pytest
from safetensors.torch import load_file

from penstock.control import readmission
from penstock.control.control import Control
from penstock.control.staged import HttpChunks
from penstock.control.tensors import copied, safetensors_file
from penstock.fleet.fleet import Fleet
from penstock.fleet.retry import Retry
from penstock.models import ARITHMETIC
from penstock.router.server import RouterServer
from tests.router.front import Peer, endpoints, scenario
from tests.scripted import until
from tests.test_control_embedded import Process, perturbed, processes

JSON = b"content-type: application/json\r\n"
PROMPT = {"prompt": "What is 12 + 30?", "temperature": 0, "max_tokens": 16}


async def text(peer: Peer) -> str:
    status, _, said = await peer.ask(orjson.dumps(PROMPT), "/v1/completions", JSON)
    assert status == 200, said
    generated: str = orjson.loads(said)["choices"][0]["text"]
    return generated


async def texts(peer: Peer) -> set[str]:
    return {await text(peer) for _ in range(6)}


async def post(peer: Peer, path: str, **fields: object) -> dict[str, object]:
    status, _, said = await peer.ask(orjson.dumps(fields), path, JSON)
    assert status == 200, said
    answer: dict[str, object] = orjson.loads(said)
    return answer


async def a_restarted_engine_gets_nothing_until_it_has_caught_up(
    server: RouterServer, peer: Peer, two: Process, second: Path
) -> None:
    old = await texts(peer)
    assert len(old) == 1
    said = await post(peer, "/update_weights_from_disk", model_path=str(second))
    assert said["success"] and server.router.fleet.policy_version == 1
    new = await texts(peer)
    assert len(new) == 1 and new != old
    away = second.with_name("away")
    await asyncio.to_thread(second.rename, away)
    two.kill()
    assert await texts(peer) == new  # the first that meets the dead one is sent to the other
    loop = asyncio.get_running_loop()
    two.start()
    await loop.run_in_executor(None, two.ready)
    it = endpoints(server)[1]
    await until(lambda: it.health.state.name == "UP")
    for _ in range(3):
        assert await texts(peer) == new  # it is up, has the weights of its start, and nobody meets them
    assert not it.current and it.in_flight == 0
    await asyncio.to_thread(away.rename, second)
    await until(lambda: it.current)
    assert it.policy_version == 1
    assert await texts(peer) == new
    said = orjson.loads((await peer.get("/weight_info"))[2])
    assert said["weight_version"] == "1"


async def a_trainer_takes_the_router_for_one_engine(server: RouterServer, peer: Peer, third: Path) -> None:
    before = await text(peer)
    tensors = load_file(third / "model.safetensors")
    transport = HttpChunks(tensors, chunk=2 << 20)
    async with Fleet(server.url) as fleet, Control(fleet) as control:
        update = await control.update_weights(transport, version=2, all_or_nothing=True)
    assert update.version == server.router.fleet.policy_version == 2
    assert [end.policy_version for end in endpoints(server)] == [2, 2]
    after = await texts(peer)
    assert len(after) == 1 and after != {before}


async def bodies_may_be_chunked(server: RouterServer, peer: Peer) -> None:
    content = safetensors_file(copied(load_file(ARITHMETIC / "model.safetensors")))
    assert len(content) > 1 << 20
    await post(peer, "/init_weight_transfer_engine", init_info={"backend": "http"})
    await post(peer, "/start_weight_update")
    peer.send(b"POST /update_weights HTTP/1.1\r\nhost: a\r\ncontent-type: application/octet-stream\r\n")
    peer.send(b"transfer-encoding: chunked\r\n\r\n")
    for at in range(0, len(content), 300_000):
        piece = content[at : at + 300_000]
        peer.send(b"%x\r\n%s\r\n" % (len(piece), piece))
        await peer.writer.drain()
    peer.send(b"0\r\n\r\n")
    status, _, said = await peer.response()
    assert status == 200, said
    finished = await post(peer, "/finish_weight_update")
    assert finished["weight_version"] == "3" and server.router.fleet.policy_version == 3
    await asyncio.sleep(0.05)
    assert all(end.current for end in endpoints(server))


@pytest.mark.slow
def test_weights_of_two_engines_through_the_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readmission, "BACKOFF", Retry(base=0.1, cap=0.2))
    second, third = perturbed(tmp_path / "second", 2), perturbed(tmp_path / "third", 3)
    with processes(ARITHMETIC, ARITHMETIC) as (one, two):

        async def body(server: RouterServer, peer: Peer) -> None:
            old = await text(peer)
            await a_restarted_engine_gets_nothing_until_it_has_caught_up(server, peer, two, second)
            await a_trainer_takes_the_router_for_one_engine(server, peer, third)
            await bodies_may_be_chunked(server, peer)
            assert await texts(peer) == {old}

        scenario(body, worker_urls=(one.url, two.url), policy="round_robin", health_check_interval_secs=0.2)
