"""Admission over real sockets: limits that are found, caps that hold, and who waits for whom."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from penstock.models import ARITHMETIC
from penstock.router.args import RouterArgs
from penstock.router.peek import blocks_of, peek
from penstock.router.server import RouterServer, serving
from penstock.servers.embedded import EmbeddedServer
from tests.router.front import Peer, engine, scenario, settled
from tests.scripted import Call, Step, answer, chat_body, http, run, stall, until

JSON = b"Content-Type: application/json\r\n"


class Knee:
    """An engine that runs so many requests at a time; the others wait inside, as vLLM's do."""

    def __init__(self, slots: int, seconds: float) -> None:
        self.slots = slots
        self._seconds = seconds
        self._free = asyncio.Semaphore(slots)
        self.running = self.waiting = self.tokens = 0

    async def generate(self, call: Call) -> None:
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            for _ in range(10):
                await asyncio.sleep(self._seconds / 10)
                self.tokens += 4
        finally:
            self.running -= 1
            self._free.release()
        await call.write(http(200, chat_body(usage={"prompt_tokens": 9, "completion_tokens": 40})))

    async def metrics(self, call: Call) -> None:
        page = (
            f"vllm:num_requests_running {self.running}\nvllm:num_requests_waiting {self.waiting}\n"
            f"vllm:generation_tokens_total {self.tokens}\nvllm:kv_cache_usage_perc 0.5\n"
        )
        await call.write(http(200, page.encode()))


async def limits(peer: Peer) -> dict[str, int]:
    """As the router shows them, at /workers and in its metrics alike."""
    shown = {
        one["url"]: one["max_in_flight"] for one in orjson.loads((await peer.get("/workers"))[2])["workers"]
    }
    page = (await peer.get("/metrics"))[2].decode()
    for url, limit in shown.items():
        assert f'penstock_router_worker_limit{{worker="{url}"}} {limit}' in page
    return shown


@asynccontextmanager
async def crowd(server: RouterServer, count: int, body: bytes) -> AsyncIterator[list[int]]:
    """So many clients that ask again and again; statuses they got."""
    statuses: list[int] = []
    over = asyncio.Event()

    async def ask_on() -> None:
        peer = await Peer.to(server)
        try:
            while not over.is_set():
                statuses.append((await peer.ask(body, fields=JSON))[0])
        finally:
            peer.close()

    tasks = [asyncio.create_task(ask_on()) for _ in range(count)]
    try:
        yield statuses
    finally:
        over.set()
        await asyncio.gather(*tasks)


async def mean_limits(peer: Peer, settle: float, seconds: float) -> dict[str, float]:
    await asyncio.sleep(settle)
    seen = []
    for _ in range(round(seconds / 0.1)):
        seen.append(await limits(peer))
        await asyncio.sleep(0.1)
    return {url: sum(one[url] for one in seen) / len(seen) for url in seen[0]}


@pytest.mark.slow
def test_each_workers_knee_is_found() -> None:
    large, small = Knee(64, 0.4), Knee(16, 0.4)

    async def body(server: RouterServer, peer: Peer) -> None:
        async with crowd(server, 160, b"{}") as statuses:
            found = await mean_limits(peer, 8.0, 2.0)
        assert 64 * 0.9 <= found[one.url] <= 64 * 1.25, found
        assert 16 * 0.9 <= found[two.url] <= 16 * 1.5, found
        assert set(statuses) == {200}
        change = b"PATCH /workers/%s HTTP/1.1\r\nhost: a\r\ncontent-length: 19\r\n\r\n" % one.url.encode()
        peer.send(change + b'{"max_in_flight":5}')
        assert (await peer.response())[0] == 400

    one, two = engine(default=large.generate), engine(default=small.generate)
    one.side["/metrics"], two.side["/metrics"] = large.metrics, small.metrics
    scenario(body, one, two, adaptive=True, worker_max_in_flight=512)


def arguments(url: str) -> RouterArgs:
    return RouterArgs(
        port=0, prometheus_port=None, worker_urls=(url,), adaptive=True, worker_max_in_flight=512
    )


@pytest.mark.slow
def test_that_of_the_embedded_engine_is_found() -> None:
    slots = 64
    asked = {
        "messages": [{"role": "user", "content": "What is 12 + 34?"}],
        "max_tokens": 48,
        "ignore_eos": True,
    }

    async def body(server: RouterServer, peer: Peer) -> None:
        async with crowd(server, 200, orjson.dumps(asked)) as statuses:
            (found,) = (await mean_limits(peer, 11.0, 3.0)).values()
        assert set(statuses) == {200}
        assert slots * 0.9 <= found <= slots * 1.25, found

    async def main() -> None:
        async with (
            EmbeddedServer(ARITHMETIC, [f"--max-num-seqs={slots}"]) as engine,
            serving(arguments(engine.base_url)) as server,
        ):
            peer = await Peer.to(server)
            await body(server, peer)
            await settled(server)
            peer.close()

    run(main(), bound=60.0)


@pytest.mark.parametrize("setting", [{"max_concurrent_requests": 24}, {"worker_max_in_flight": 12}])
def test_no_more_than_the_cap_is_ever_in_flight(setting: dict[str, int]) -> None:
    there = most = 0

    async def counted(call: Call) -> None:
        nonlocal there, most
        there += 1
        most = max(most, there)
        await asyncio.sleep(0.004)
        there -= 1
        if call.body == b"503":
            await call.write(http(503, b"", {"retry-after": "0"}))
        else:
            await call.write(http(200, b"{}"))

    async def client(server: RouterServer, number: int) -> list[int]:
        peer = await Peer.to(server)
        statuses = [(await peer.ask(b"503" if number % 7 == 0 else b"{}"))[0] for _ in range(2)]
        peer.close()
        return statuses

    async def body(server: RouterServer, peer: Peer) -> None:
        got = await asyncio.gather(*(client(server, number) for number in range(200)))
        assert {status for statuses in got for status in statuses} == {200, 503}
        assert most == 24 and server.router.fleet.dispatch.in_flight <= 24

    engines = engine(default=counted), engine(default=counted)
    scenario(body, *engines, retry_max_retries=2, cb_failure_threshold=10_000, **setting)


def echoing(order: list[int]) -> Step:
    """Answers after a moment; keeps the numbers in the order of their arrival."""

    async def step(call: Call) -> None:
        order.append(call.json["number"])
        await asyncio.sleep(0.002)
        await call.write(http(200, call.body))

    return step


@pytest.mark.parametrize("policy", ["least_in_flight", "session"])
def test_the_queue_is_served_by_priority_and_then_in_order_of_arrival(policy: str) -> None:
    priorities: list[Any] = [0, 5, -3, None, 5, -3, 0, 2**40, -(2**40), "x", 1.5, -3]
    order: list[int] = []

    async def body(server: RouterServer, peer: Peer) -> None:
        peer.post(b'{"number":-1}')
        await one.arrived(1)
        peers = [await Peer.to(server) for _ in priorities]
        dispatch = server.router.fleet.dispatch
        for number, (other, priority) in enumerate(zip(peers, priorities, strict=True)):
            given = {} if priority is None else {"priority": priority}
            other.post(orjson.dumps({"number": number, **given}), fields=b"X-Session-ID: s\r\n")
            await until(lambda number=number: dispatch.waiting == number + 1)  # type: ignore[misc]
        gate.set()
        assert [(await other.response())[0] for other in peers] == [200] * len(peers)
        as_numbers = [one if type(one) is int else 0 for one in priorities]
        assert order == sorted(range(len(priorities)), key=lambda number: as_numbers[number])
        for other in peers:
            other.close()

    async def first(call: Call) -> None:
        await gate.wait()
        await call.write(http(200, b"{}"))

    gate = asyncio.Event()
    one = engine(first, default=echoing(order))
    scenario(body, one, max_concurrent_requests=1, policy=policy)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_full_queue_and_a_deadline_are_429_with_retry_after(streaming: bool) -> None:
    fields = b"X-Penstock-Resume: 1\r\n" if streaming else b""
    asked = orjson.dumps({"stream": streaming, "messages": [{"role": "user", "content": "x"}]})

    async def body(server: RouterServer, peer: Peer) -> None:
        peer.post()
        await one.arrived(1)
        waiting = [await Peer.to(server) for _ in range(3)]
        waiting[0].post(asked, fields=fields + b"X-Request-Timeout: 0.2\r\n")
        waiting[1].post(asked, fields=fields + b"X-Request-Timeout: nonsense\r\n")
        await until(lambda: server.router.fleet.dispatch.waiting == 2)
        status, headers, said = await waiting[2].ask(asked, fields=fields)
        assert (status, headers["retry-after"]) == (429, "1")
        assert "wait already" in orjson.loads(said)["error"]["message"]
        began = time.monotonic()
        status, headers, said = await waiting[0].response()
        assert (status, headers["retry-after"]) == (429, "1")
        assert "no slot became free in 0.2 s" in orjson.loads(said)["error"]["message"]
        assert time.monotonic() - began < 0.4
        assert server.router.fleet.dispatch.waiting == 1 and len(one.calls) == 1
        counted = server.router.statistics
        assert (counted.queue_full, counted.queue_timeouts) == (1, 1)
        for other in (peer, *waiting):
            other.close()

    one = engine(stall())
    scenario(body, one, max_concurrent_requests=1, queue_size=2)


def test_a_deadline_does_not_end_what_is_in_flight() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        assert (await peer.ask(fields=b"X-Request-Timeout: 0.05\r\n"))[0] == 200
        for value in (b"0", b"-1", b"nan", b"inf", b"1e999", b""):
            assert (await peer.ask(fields=b"X-Request-Timeout: %s\r\n" % value))[0] == 200

    scenario(body, engine(default=answer(delay=0.1)))


@pytest.mark.parametrize(
    "odd", [b'"priority":null', b'"priority":"high"', b'"session_id":7', b'"session_id":null']
)
def test_a_field_of_an_odd_type_does_not_hide_the_others(odd: bytes) -> None:
    seen = peek(b'{%s,"model":"m","prompt":[1,2,3]}' % odd, complete=True)
    assert seen.model == "m" and seen.priority == 0 and len(blocks_of(seen)) == 1
    assert seen.session_id == ("7" if b"7" in odd else None)
