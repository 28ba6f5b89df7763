"""What the router does when engines fail, refuse or die, and when clients leave: over real sockets."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from penstock.fleet.health import State
from penstock.router import server as server_module
from penstock.router.server import RouterServer
from tests.router.front import Peer, endpoints, engine, instead, scenario, settled, sse
from tests.scripted import Call, Step, answer, hang_up, http, raw, refuse, reset, stall, until

EVENT = b'data: {"id":1}\n\n'


def test_a_worker_that_refuses_connections_costs_the_client_nothing() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        await two.kill()
        for _ in range(6):
            assert (await peer.ask())[0] == 200
        assert len(one.calls) == 6
        states = {end.name: end.health.state for end in endpoints(server)}
        assert states[two.url] is State.DOWN and states[one.url] is State.UP

    one, two = engine(), engine()
    scenario(body, one, two)


@pytest.mark.parametrize("status", [429, 503, 500, 502])
def test_an_answer_that_is_none_is_asked_for_elsewhere(status: int) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        assert [(await peer.ask(b'{"n":1}'))[0] for _ in range(2)] == [200, 200]
        assert (len(one.calls), len(two.calls)) in ((1, 2), (2, 1), (1, 3))
        ids = [call.headers["x-request-id"] for call in two.calls]
        assert one.calls[0].headers["x-request-id"] + "-2" in ids
        assert {call.body for call in one.calls + two.calls} == {b'{"n":1}'}

    one, two = engine(refuse(status)), engine()
    scenario(body, one, two, policy="round_robin")


def test_the_last_refusal_is_the_engines_own_answer() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        status, headers, got = await peer.ask()
        assert (status, headers["Retry-After"]) == (429, "7")
        assert orjson.loads(got)["error"]["param"] == "p"
        assert len(one.calls) == 2

    one = engine(default=refuse(429, "busy", retry_after="7"))
    scenario(body, one, retry_max_retries=1)


def test_a_4xx_is_relayed_at_once_and_opens_no_breaker() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        for _ in range(30):
            assert (await peer.ask())[0] == 400
        assert len(one.calls) == 30 and endpoints(server)[0].health.state is State.UP

    one = engine(default=refuse(400))
    scenario(body, one, cb_failure_threshold=3)


def test_a_breaker_opens_closes_and_is_seen_at_workers() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        for _ in range(8):
            assert (await peer.ask())[0] == 200
        await until(lambda: "open" in {end.health.state.name.lower() for end in endpoints(server)})
        shown = {one["url"]: one["state"] for one in orjson.loads((await peer.get("/workers"))[2])["workers"]}
        assert shown == {bad.url: "open", good.url: "up"}
        bad.default = answer()
        await until(lambda: endpoints(server)[0].health.state is State.HALF_OPEN)
        for _ in range(4):
            assert (await peer.ask())[0] == 200
        assert endpoints(server)[0].health.state is State.UP

    bad, good = engine(default=refuse(500)), engine()
    scenario(body, bad, good, cb_failure_threshold=2, cb_timeout_duration_secs=0.2, policy="round_robin")


@pytest.mark.parametrize(
    "fault", [hang_up(), reset(), raw(b"nonsense\r\n\r\n"), raw(b"HTTP/1.1 20", close=True)]
)
def test_what_dies_before_the_client_has_a_byte_is_tried_again(fault: Step) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        assert (await peer.ask())[0] == 200
        assert len(one.calls) == 2 and server.router.fleet.retries == 1

    one = engine(fault)
    scenario(body, one)


def test_a_stale_kept_connection_is_replaced_for_free() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        assert (await peer.ask())[0] == 200
        one.script.append(hang_up())
        assert (await peer.ask())[0] == 200
        assert len(one.calls) == 3 and server.router.fleet.retries == 0

    one = engine()
    scenario(body, one, retry_max_retries=0)


def test_a_stream_whose_engine_dies_ends_with_an_error_event_and_no_end() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.post()
        await peer.head()
        assert await peer.chunk() == EVENT
        last = await peer.chunk()
        assert last.startswith(b"event: error\ndata: ") and last.endswith(b"\n\n")
        error = orjson.loads(last.split(b"data: ")[1])["error"]
        assert error["type"] == "engine_lost"
        assert await peer.rest() == b""  # no last chunk
        assert server.router.statistics.broken == 1

    scenario(body, engine(sse(EVENT, gap=0.02, then=reset())), engine(sse(EVENT, gap=0.02, then=reset())))


def test_half_an_event_is_not_glued_to_the_error_event() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.post()
        await peer.head()
        assert await peer.chunk() == b'data: {"id'
        assert (await peer.chunk()).startswith(b"\n\nevent: error\n")
        assert await peer.rest() == b""

    scenario(body, engine(sse(b'data: {"id', gap=0.02, then=hang_up())))


def test_a_body_of_known_length_that_breaks_off_is_not_completed() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.post()
        _, headers = await peer.head()
        assert len(await peer.rest()) < int(headers["content-length"])

    whole = http(200, b"x" * 1000)
    scenario(body, engine(raw(whole[:-10], close=True)))


def test_no_chunk_after_a_malformed_one_reaches_the_client() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.post()
        await peer.head()
        assert await peer.chunk() == b"abc" and b"0\r\n\r\n" not in await peer.rest()

    scenario(body, engine(sse(b"abc", gap=0.02, then=raw(b"zz\r\n0\r\n\r\n"))))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("goodbye", ["close", "reset", "half"])
def test_a_client_that_goes_away_frees_its_slot_and_its_engine(streaming: bool, goodbye: str) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        loop = asyncio.get_running_loop()
        leaver = await Peer.to(server)
        leaver.post()
        if streaming:
            await leaver.head()
        await one.arrived(1)
        assert endpoints(server)[0].in_flight == 1
        began = loop.time()
        if goodbye == "half":
            leaver.writer.write_eof()
        elif goodbye == "reset":
            leaver.reset()
        else:
            leaver.close()
        await settled(server)
        await until(lambda: one._in_flight == 0)
        assert loop.time() - began < 1.0
        assert server.router.statistics.cancelled == 1
        assert endpoints(server)[0].health.outcomes == 0
        leaver.close()

    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    one = engine(stall(head if streaming else b""))
    scenario(body, one)


def test_a_client_that_leaves_while_it_is_held_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(20)

    async def body(server: RouterServer, peer: Peer) -> None:
        async with instead(server, one, deaf):
            leaver = await Peer.to(server)
            leaver.send(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (64 << 20))
            for _ in range(16):
                leaver.send(bytes(1 << 20))
            await asyncio.sleep(0.2)
            assert server.router.fleet.dispatch.in_flight == 1
            leaver.reset()
            await settled(server)

    monkeypatch.setattr(server_module, "SLOW_HEAD", 0.4)  # the sweeper looks four times in it
    one = engine()
    scenario(body, one)


def test_a_client_that_leaves_the_queue_leaves_no_trace() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        busy, waiting = await Peer.to(server), await Peer.to(server)
        busy.post()
        await one.arrived(1)
        waiting.post()
        await until(lambda: server.router.fleet.dispatch.waiting == 1)
        waiting.close()
        await until(lambda: server.router.fleet.dispatch.waiting == 0)
        busy.close()
        await settled(server)
        assert (await peer.ask())[0] == 200
        assert len(one.calls) == 2

    one = engine(stall())
    scenario(body, one, max_concurrent_requests=1)


def test_an_engine_that_is_silent_too_long_is_left() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        status, _, said = await peer.ask()
        assert status == 504 and b"no response within" in said

    scenario(body, engine(stall()), request_timeout_secs=0.2, retry_max_retries=0)


def test_while_no_worker_is_up_requests_wait_and_then_are_told() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        await one.kill()
        peer.post()
        await asyncio.sleep(0.1)
        await one.listen()
        assert (await peer.response())[0] == 200
        assert (await peer.get("/readiness"))[0] == 200
        await one.kill()
        status, headers, _ = await peer.ask()
        assert status == 503 and "retry-after" in headers
        assert (await peer.get("/health"))[0] == 503 and (await peer.get("/liveness"))[0] == 200

    one = engine()
    scenario(body, one, queue_timeout_secs=0.8)


def test_the_cap_holds_the_queue_is_bounded_and_the_order_is_that_of_arrival() -> None:
    there: list[bytes] = []
    most: list[int] = []
    order: list[bytes] = []

    async def slow(call: Call) -> None:
        there.append(call.body)
        order.append(call.body)
        most.append(len(there))
        await asyncio.sleep(0.05)
        there.remove(call.body)
        await call.write(http(200, call.body))

    async def body(server: RouterServer, peer: Peer) -> None:
        peers = [await Peer.to(server) for _ in range(12)]
        for number, one in enumerate(peers):
            one.post(b'{"priority":%d}' % (-9 if number == 9 else 0))
            await asyncio.sleep(0.001)
        dispatch = server.router.fleet.dispatch
        assert dispatch.in_flight == 3 and dispatch.waiting == 8
        status, headers, _ = await peers[11].response()
        assert (status, headers["retry-after"]) == (429, "1")
        assert [(await one.response())[0] for one in peers[:11]] == [200] * 11
        assert max(most) == 3 and len(order) == 11
        # Three slots become free at about the same time, and who needs a new connection arrives later.
        assert b'{"priority":-9}' in order[3:6]
        for one in peers:
            one.close()

    engines = engine(default=slow), engine(default=slow)
    scenario(body, *engines, max_concurrent_requests=3, queue_size=8)


def test_waiting_too_long_is_429_and_the_request_is_not_sent() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        busy = await Peer.to(server)
        busy.post()
        await one.arrived(1)
        status, headers, _ = await peer.ask()
        assert status == 429 and "retry-after" in headers
        status, _, _ = await peer.ask(fields=b"X-Request-Timeout: 0.05\r\n")
        assert status == 429 and len(one.calls) == 1
        busy.close()

    one = engine(stall())
    scenario(body, one, worker_max_in_flight=1, queue_timeout_secs=0.2)


def test_a_drained_worker_ends_what_it_has() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peer.post()
        await until(lambda: one.calls or two.calls)
        busy = one if one.calls else two
        admin = await Peer.to(server)
        status, _, _ = await admin.get(f"/workers/{busy.url}", method="DELETE")
        assert status == 202
        await until(lambda: len(endpoints(server)) == 1)
        assert (await peer.response())[0] == 200
        admin.close()

    one, two = engine(answer(delay=0.2)), engine(answer(delay=0.2))
    scenario(body, one, two)
