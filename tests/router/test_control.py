"""The RL control plane through the router: what reaches every worker, what is undone, and who may answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest

from penstock.control import holding
from penstock.fleet.retry import Retry
from penstock.router import broadcast
from penstock.router.fan_out import ALL_OR_NOTHING_HEADER
from penstock.router.server import RouterServer
from tests.control_engines import ControlledEngine, SGLangEngine
from tests.router.front import Peer, endpoints, handled, scenario
from tests.scripted import Call, http, raw, refuse, until

STEPS = ("/init_weight_transfer_engine", "/start_weight_update", "/update_weights")
COMPLETION = b'{"prompt":"x"}'


class Updatable(ControlledEngine):
    """With the steps of an update as vLLM has them: parts come in as `pending`, `finish` commits them."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: list[int] = []
        self.bodies: dict[str, Any] = {}
        self.size = 1

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        self.bodies[path] = body
        match path:
            case "/start_weight_update":
                self.pending = []
            case "/update_weights":
                self.pending.append(len(self.pending))
            case "/finish_weight_update":
                self.weights = f"new {len(self.pending)}"
            case "/abort_weight_update":
                self.pending = []
            case "/get_world_size":
                return {"world_size": self.size}
            case "/init_weight_transfer_engine" | "/start_profile":
                pass
            case _:
                return super().answer(method, path, query, body)
        return {"message": "done"}


Body = Callable[[RouterServer, Peer, Updatable, Updatable], Awaitable[None]]


def two(body: Body, one: Any = None, other: Any = None, **settings: Any) -> None:
    pair = (one or Updatable(), other or Updatable())
    scenario(lambda server, peer: body(server, peer, *pair), *pair, **settings)


async def post(peer: Peer, path: str, fields: Any = None, head: bytes = b"") -> tuple[int, Any]:
    data = b"" if fields is None else orjson.dumps(fields)
    status, _, said = await peer.ask(data, path, b"content-type: application/json\r\n" + head)
    return status, orjson.loads(said)


async def text(peer: Peer) -> str:
    status, _, said = await peer.ask(COMPLETION)
    assert status == 200
    content: str = orjson.loads(said)["choices"][0]["message"]["content"]
    return content


def test_a_call_reaches_all_and_the_answer_can_be_read_as_one_engines() -> None:
    async def body(server: RouterServer, peer: Peer, one: Updatable, other: Updatable) -> None:
        status, said = await post(peer, "/pause?mode=keep")
        assert (status, said["status"], said["success"], said["failed"]) == (200, "paused", True, [])
        assert said["results"][other.url]["value"] == {"status": "paused"}
        assert said["results"][one.url]["status"] == 200 and said["results"][one.url]["seconds"] > 0
        assert one.paths[-1] == other.paths[-1] == "/pause?mode=keep&clear_cache=true"
        said = orjson.loads((await peer.get("/is_paused"))[2])
        assert said["is_paused"] is True
        other.paused = False
        said = orjson.loads((await peer.get("/is_paused"))[2])
        assert said["is_paused"] is False and said["results"][one.url]["value"] == {"is_paused": True}
        assert (await post(peer, "/resume"))[0] == 200
        assert not one.paused and not other.paused
        one.size, other.size = 2, 4
        said = orjson.loads((await peer.get("/get_world_size"))[2])
        assert said["world_size"] == 6 and said["results"][other.url]["value"] == {"world_size": 4}
        other.faults["/pause"] = refuse(500)
        status, said = await post(peer, "/pause")
        assert (status, said["failed"], one.paused) == (502, [other.url], True)
        assert said["results"][other.url]["status"] == 500 and other.url in said["error"]["message"]
        assert (await post(peer, "/start_profile"))[0] == 200  # passes as it stands
        assert (await peer.get("/pause"))[0] == 405
        assert (await peer.ask(path="/is_paused"))[0] == 405
        assert (await post(peer, "/sleep?level=x"))[0] == 400
        await post(peer, "/resume")

    two(body)


@pytest.mark.parametrize("by_header", [False, True])
def test_all_or_nothing_undoes_what_one_refused(by_header: bool) -> None:
    async def body(server: RouterServer, peer: Peer, one: Updatable, other: Updatable) -> None:
        head = f"{ALL_OR_NOTHING_HEADER}: 1\r\n".encode() if by_header else b""
        query = "" if by_header else "&all_or_nothing=1"
        other.faults["/pause"] = refuse(400)
        status, said = await post(peer, f"/pause?mode=keep{query}", head=head)
        assert status == 502 and said["failed"] == [other.url] and said["results"][one.url]["ok"]
        assert [path.partition("?")[0] for path in one.paths[-2:]] == ["/pause", "/resume"]
        assert not one.paused and "all_or_nothing" not in "".join(one.paths)
        other.faults["/reset_prefix_cache"] = refuse(500)
        status, said = await post(peer, f"/reset_prefix_cache?{query}", head=head)
        assert status == 502 and "cannot be undone on the others" in said["error"]["message"]

    two(body)


def test_who_could_not_be_brought_back_is_out_of_service_until_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(server: RouterServer, peer: Peer, one: Updatable, other: Updatable) -> None:
        one.faults["/resume"] = refuse(500)
        other.faults["/pause"] = refuse(400)
        status, said = await post(peer, "/pause?mode=keep&all_or_nothing=1")
        assert status == 502 and "out of service until it is" in said["error"]["message"]
        assert [end.paused for end in (one, other)] == [True, False]
        assert [end.current for end in endpoints(server)] == [False, True]
        before = one.completions
        assert [await text(peer) for _ in range(4)] == ["start"] * 4 and one.completions == before
        del one.faults["/resume"]
        await until(lambda: endpoints(server)[0].current)
        assert [end.paused for end in (one, other)] == [False, False]
        assert {await text(peer) for _ in range(4)} == {"start"} and one.completions > before
        # What could not be resumed would hold what it is sent, whoever asked for what.
        del other.faults["/pause"]
        await post(peer, "/pause?mode=keep")
        other.faults["/resume"] = refuse(500)
        assert (await post(peer, "/resume"))[0] == 502
        assert [end.current for end in endpoints(server)] == [True, False]
        del other.faults["/resume"]
        await post(peer, "/pause?mode=keep")  # a later call takes the place of the tries
        await asyncio.sleep(0.15)
        assert one.paused and other.paused and all(end.current for end in endpoints(server))
        assert (await post(peer, "/resume"))[0] == 200
        assert all(end.current for end in endpoints(server))

    monkeypatch.setattr(holding, "BACKOFF", Retry(base=0.05, cap=0.05))
    two(body)


def test_the_steps_of_an_update_reach_all_and_move_the_fleet() -> None:
    async def body(server: RouterServer, peer: Peer, one: Updatable, other: Updatable) -> None:
        one.size, other.size = 2, 4
        info = {"init_info": {"rank_offset": 1, "world_size": 7}}
        assert (await post(peer, "/init_weight_transfer_engine", info))[0] == 200
        offsets = [
            end.bodies["/init_weight_transfer_engine"]["init_info"]["rank_offset"] for end in (one, other)
        ]
        assert offsets == [1, 3]
        assert (await post(peer, "/start_weight_update"))[0] == 200
        for _ in range(3):
            assert (await post(peer, "/update_weights", {"update_info": {}}))[0] == 200
        assert server.router.fleet.policy_version == 0 and await text(peer) == "start"
        status, said = await post(peer, "/finish_weight_update")
        assert status == 200 and said["message"] == "done"
        assert server.router.fleet.policy_version == 1 and one.label == other.label == "1"
        assert {await text(peer) for _ in range(4)} == {"new 3"}
        said = orjson.loads((await peer.get("/weight_info"))[2])
        assert said["weight_version"] == "1"
        assert (await post(peer, "/update_weight_version", {"new_version": "40"}))[0] == 200
        assert server.router.fleet.policy_version == 40 and one.label == "40"
        for wrong in ("3", "soon"):
            status, said = await post(peer, "/update_weight_version", {"new_version": wrong})
            assert status == 400 and one.label == "40"

    two(body)


@pytest.mark.parametrize("fault", [refuse(400), refuse(500)])
def test_who_missed_a_step_gets_no_other_and_no_request_until_it_has_caught_up(fault: Any) -> None:
    async def update(peer: Peer) -> list[int]:
        return [(await post(peer, path))[0] for path in (*STEPS, "/finish_weight_update")]

    async def body(server: RouterServer, peer: Peer, one: Updatable, other: Updatable) -> None:
        other.faults["/update_weights"] = fault
        assert await update(peer) == [200, 200, 502, 502]
        assert "/finish_weight_update" not in other.paths
        assert [end.policy_version for end in endpoints(server)][0] == 1
        assert [end.current for end in endpoints(server)] == [True, False]
        before = other.completions
        assert {await text(peer) for _ in range(4)} == {"new 1"} and other.completions == before
        other.faults.clear()
        assert await update(peer) == [200] * 4
        assert all(end.current for end in endpoints(server))
        other.faults["/finish_weight_update"] = refuse(400)
        status, said = await post(peer, "/finish_weight_update?all_or_nothing=1")
        assert status == 502 and "which cannot be undone" in said["error"]["message"]
        assert [end.current for end in endpoints(server)] == [True, False]

    two(body)


def test_all_or_nothing_gives_an_update_up_where_engines_can() -> None:
    async def body(server: RouterServer, peer: Peer, one: Updatable, other: Updatable) -> None:
        await post(peer, "/start_weight_update")
        other.faults["/update_weights"] = refuse(400)
        status, said = await post(peer, "/update_weights?all_or_nothing=1")
        assert status == 502 and "every engine keeps the weights it had" in said["error"]["message"]
        assert one.paths[-1] == "/abort_weight_update" and not one.pending
        assert server.router.fleet.policy_version == 0 and all(end.current for end in endpoints(server))

    two(body)


class Placing(SGLangEngine):
    """SGLang, which takes weights in place, with a version or without one."""

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        match path:
            case "/update_weights_from_distributed":
                self.weights, self.label = "placed", body.get("weight_version", self.label)
            case "/init_weights_update_group" | "/destroy_weights_update_group":
                self.rank = body.get("rank_offset")
            case "/server_info":
                return {"tp_size": 2}
            case "/update_weight_version":
                self.label = body["new_version"]
            case _:
                return super().answer(method, path, query, body)
        return {"success": True, "message": "done"}


def test_sglangs_names_are_spoken_to_sglang() -> None:
    async def body(server: RouterServer, peer: Peer, one: Any, other: Any) -> None:
        assert (await post(peer, "/pause_generation", {"mode": "in_place"}))[0] == 200
        assert one.paused and other.paused
        assert (await post(peer, "/continue_generation", {}))[0] == 200
        assert not one.paused
        assert (await post(peer, "/flush_cache"))[0] == 200
        assert (await post(peer, "/abort_request", {"abort_all": True}))[0] == 200
        assert one.paths[-1] == "/abort_request"
        assert (await post(peer, "/release_memory_occupation", {"tags": ["kv_cache"]}))[0] == 200
        assert one.asleep == 1
        assert (await post(peer, "/resume_memory_occupation", {"tags": ["kv_cache"]}))[0] == 200
        assert one.asleep is None and not one.paused
        assert (await post(peer, "/release_memory_occupation", {"tags": ["weights"]}))[0] == 400
        assert (await post(peer, "/pause_generation", {"mode": "fast"}))[0] == 400
        said = orjson.loads((await peer.get("/model_info"))[2])
        assert said["model_path"] == "m" and set(said["results"]) == {one.url, other.url}
        group = {"master_address": "h", "rank_offset": 1, "world_size": 5}
        assert (await post(peer, "/init_weights_update_group", group))[0] == 200
        assert (one.rank, other.rank) == (1, 3)
        for version in (5, 5, 6):
            fields = {"names": ["a"], "weight_version": str(version)}
            assert (await post(peer, "/update_weights_from_distributed", fields))[0] == 200
            assert server.router.fleet.policy_version == version
        other.faults["/update_weights_from_distributed"] = refuse(400)
        assert (await post(peer, "/update_weights_from_distributed", {"weight_version": "7"}))[0] == 502
        other.faults.clear()
        assert (await post(peer, "/update_weights_from_distributed", {"weight_version": "7"}))[0] == 200
        assert [end.current for end in endpoints(server)] == [True, False]  # it missed a part of version 7
        assert (await post(peer, "/update_weights_from_distributed", {"weight_version": "8"}))[0] == 200
        assert all(end.current for end in endpoints(server))

    two(body, Placing(), Placing())


# -- large bodies ---------------------------------------------------------------------------------

PART = bytes(range(256)) * 4096
"""A MiB."""


def upload(peer: Peer, size: int) -> None:
    head = b"POST /update_weights HTTP/1.1\r\nhost: a\r\ncontent-type: application/octet-stream\r\n"
    peer.send(b"%scontent-length: %d\r\n\r\n" % (head, size))


class Taking(ControlledEngine):
    """Notes the bodies of updates."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[int, str | None]] = []

        async def take(call: Call) -> None:
            self.taken.append((len(call.body), call.headers.get("content-type")))
            await call.write(http(200, b'{"message":"Weights updated"}'))

        self.faults["/update_weights"] = take


def test_a_large_body_goes_to_all_while_it_arrives() -> None:
    async def body(server: RouterServer, peer: Peer, one: Any, other: Any) -> None:
        upload(peer, 24 << 20)
        for _ in range(24):
            peer.send(PART)
            await peer.writer.drain()
        status, _, said = await peer.response()
        answer = orjson.loads(said)
        assert status == 200 and answer["message"] == "Weights updated", answer
        assert one.taken == other.taken == [(24 << 20, "application/octet-stream")]
        assert await text(peer) == "start"  # the connection goes on
        assert (await peer.ask(b"x" * (2 << 20), "/pause"))[0] == 413

    two(body, Taking(), Taking())


def test_a_worker_that_takes_nothing_stops_the_client_and_is_left_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what is held meanwhile is bounded."""
    monkeypatch.setattr(broadcast, "STALL", 0.3)
    monkeypatch.setattr(broadcast, "TICK", 0.05)

    async def body(server: RouterServer, peer: Peer, one: Any) -> None:
        async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET"):
                writer.write(http(404, b""))
                await writer.drain()
                return
            await asyncio.sleep(20)

        async with handled(deaf) as url:
            server.router.fleet.add(url)
            upload(peer, 64 << 20)
            sent = 0

            async def pump() -> None:
                nonlocal sent
                while sent < 64:
                    peer.send(PART)
                    await peer.writer.drain()
                    sent += 1

            pumping = asyncio.ensure_future(pump())
            await asyncio.sleep(0.25)
            assert sent < 32  # sockets' buffers and no more
            status, _, said = await peer.response()
            await pumping
            answer = orjson.loads(said)
            assert status == 502 and answer["failed"] == [url]
            assert "took nothing of the request" in answer["results"][url]["error"]
            assert one.taken == [(64 << 20, "application/octet-stream")]
            assert [end.current for end in endpoints(server)] == [True, False]
            await server.router.leave(url, None)

    one = Taking()
    scenario(lambda server, peer: body(server, peer, one), one)


def test_a_large_body_that_breaks_off_is_whole_nowhere() -> None:
    async def body(server: RouterServer, peer: Peer, one: Any, other: Any) -> None:
        leaver = await Peer.to(server)
        upload(leaver, 8 << 20)
        leaver.send(PART * 4)
        await asyncio.sleep(0.1)
        leaver.reset()
        relays = [end.transport.relay for end in endpoints(server)]  # type: ignore[attr-defined]
        await until(lambda: not any(relay.statistics().connections for relay in relays))
        assert one.taken == other.taken == [] and server.listener.in_flight == 0
        assert all(end.current for end in endpoints(server))
        other.faults["/update_weights"] = raw(http(500, b""), close=True)
        upload(peer, 4 << 20)
        peer.send(PART * 4)
        status, _, said = await peer.response()
        assert status == 502 and orjson.loads(said)["failed"] == [other.url]
        assert len(one.taken) == 1 and [end.current for end in endpoints(server)] == [True, False]

    two(body, Taking(), Taking())


def test_an_update_resumes_also_who_was_held(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(server: RouterServer, peer: Peer, one: Updatable, other: Updatable) -> None:
        await post(peer, "/pause?mode=keep")
        other.faults["/resume"] = refuse(400)
        one.faults["/pause"] = refuse(500)
        status, said = await post(peer, "/resume?all_or_nothing=1")
        assert status == 502 and [end.current for end in endpoints(server)] == [False, True]
        one.faults.clear()
        other.faults.clear()
        status, _ = await post(peer, "/update_weights_from_disk", {"model_path": "v1"})
        assert status == 200
        await until(lambda: all(end.current for end in endpoints(server)))
        await asyncio.sleep(0.1)
        assert [end.paused for end in (one, other)] == [False, False]
        assert {await text(peer) for _ in range(4)} == {"v1"}

    monkeypatch.setattr(holding, "BACKOFF", Retry(base=0.02, cap=0.02))
    two(body)
