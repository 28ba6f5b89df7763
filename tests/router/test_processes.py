"""Several processes on one port: limits that hold for all together, whatever dies and whoever answers."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.errors import ConfigError
from penstock.router.args import RouterArgs
from penstock.router.server import serving
from penstock.servers.ports import LISTEN
from penstock.servers.supervisor import children
from tests.router.front import Peer, engine
from tests.scripted import Call, answer, chat_body, http, raw, refuse, run, until

READY = re.compile(r"ready on http://127\.0\.0\.1:(\d+)")
ESTABLISHED = 1


class Several:
    """A router of several processes."""

    def __init__(self, parent: subprocess.Popen[str], port: int) -> None:
        self.parent = parent
        self.told = False
        """To end."""
        self.port = port

    @property
    def pids(self) -> list[int]:
        return children().get(self.parent.pid, [])

    def terminate(self) -> None:
        self.told = True
        self.parent.terminate()

    async def peer(self) -> Peer:
        return Peer(*await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20))

    @property
    def listening(self) -> int:
        """Processes that accept connections."""
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        return sum(
            int(fields[1][9:], 16) == self.port and fields[3] == LISTEN for fields in map(str.split, lines)
        )

    async def peers(self, each: int = 1) -> dict[int, list[Peer]]:
        """So many connections to each process, by its pid."""
        found: dict[int, list[Peer]] = {pid: [] for pid in self.pids}
        for _ in range(200):
            if all(len(peers) >= each for peers in found.values()):
                return found
            peer = await self.peer()
            assert (await peer.get("/liveness"))[0] == 200  # it has been accepted
            found[self.server_of(peer)].append(peer)
        raise AssertionError(f"connections are not spread: {found}")

    def server_of(self, peer: Peer) -> int:
        """The process at the other end."""
        here = peer.writer.get_extra_info("sockname")[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if (int(fields[1][9:], 16), int(fields[2][9:], 16)) == (self.port, here):
                wanted = f"socket:[{fields[9]}]"
                for pid in self.pids:
                    fds = Path(f"/proc/{pid}/fd").iterdir()
                    if any(os.path.lexists(fd) and str(fd.readlink()) == wanted for fd in fds):
                        return pid
        raise AssertionError("nobody is at the other end")

    async def ended(self) -> int:
        return await asyncio.wait_for(asyncio.to_thread(self.parent.wait), 10)


@asynccontextmanager
async def several(*flags: str, processes: int = 2, status: int = 0) -> AsyncIterator[Several]:
    """Ended by SIGTERM; nothing of it is left."""
    command = [sys.executable, "-m", "penstock", "route", "--port", "0", "--processes", str(processes)]
    if "--prometheus-port" not in flags:
        flags = ("--prometheus-port", "None", *flags)
    parent = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    assert parent.stdout is not None
    pids: list[int] = []
    try:
        line = await asyncio.wait_for(asyncio.to_thread(parent.stdout.readline), 20)
        match = READY.search(line)
        assert match is not None, line
        started = Several(parent, int(match[1]))
        pids = started.pids
        assert len(pids) == processes
        yield started
        pids = [*pids, *started.pids]
        if not started.told:
            parent.terminate()
        assert await started.ended() == status
    finally:
        parent.kill()
        await asyncio.to_thread(parent.communicate)
        await until(lambda: not any(map(alive, pids)))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Gauge:
    """Requests in flight at an engine. Those whose client is gone are not."""

    def __init__(self, total: Gauge | None = None, *, seconds: Callable[[], float]) -> None:
        self.most = 0
        self.calls: set[Call] = set()
        self._total = total
        self._seconds = seconds

    def enter(self, call: Call) -> None:
        self.calls.add(call)
        self.most = max(self.most, sum(map(connected, self.calls)))

    async def __call__(self, call: Call) -> None:
        both = [self] if self._total is None else [self, self._total]
        for gauge in both:
            gauge.enter(call)
        await asyncio.sleep(self._seconds())
        for gauge in both:
            gauge.calls.discard(call)
        await call.write(http(200, chat_body()))


def connected(call: Call) -> bool:
    peer: socket.socket = call.writer.get_extra_info("socket")
    return peer.fileno() >= 0 and peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED


def scenario(body: Callable[[], Any]) -> None:
    run(body(), bound=60)


async def ask(peer: Peer, count: int) -> list[int]:
    return [(await peer.ask())[0] for _ in range(count)]


async def workers(peer: Peer) -> dict[str, dict[str, Any]]:
    shown = orjson.loads((await peer.get("/workers"))[2])
    return {worker["url"]: worker for worker in shown["workers"]}


async def shows(peer: Peer, wanted: Callable[[dict[str, dict[str, Any]]], bool]) -> None:
    """Waits until the workers are as wanted, at most five seconds."""
    for _ in range(100):
        if wanted(await workers(peer)):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(await workers(peer))


def close(peers: dict[int, list[Peer]]) -> None:
    for some in peers.values():
        for peer in some:
            peer.close()


def test_limits_hold_for_the_sum_of_all_processes_also_when_one_is_killed() -> None:
    async def main() -> None:
        chance = random.Random(7)
        total = Gauge(seconds=float)
        gauges = [Gauge(total, seconds=lambda: chance.random() * 0.02) for _ in range(2)]
        async with AsyncExitStack() as stack:
            one, two = [await stack.enter_async_context(engine(default=gauge)) for gauge in gauges]
            flags = ("--worker-max-in-flight", "3", "--max-concurrent-requests", "5")
            router = await stack.enter_async_context(
                several(*flags, "--worker-urls", one.url, two.url, processes=3)
            )
            peers = await router.peers(each=6)
            asked = await asyncio.gather(*(ask(peer, 12) for some in peers.values() for peer in some))
            assert {status for statuses in asked for status in statuses} == {200}
            assert total.most == 5 and max(gauge.most for gauge in gauges) == 3  # and all of it was used

            victim = router.pids[0]
            asking = [asyncio.create_task(ask(peer, 12)) for some in peers.values() for peer in some]
            await asyncio.sleep(0.05)
            os.kill(victim, signal.SIGKILL)
            done = await asyncio.gather(*asking, return_exceptions=True)
            lost = sum(isinstance(outcome, BaseException) for outcome in done)
            assert lost == len(peers[victim])  # the others have not noticed
            assert total.most == 5 and max(gauge.most for gauge in gauges) == 3
            await until(lambda: len(router.pids) == router.listening == 3)
            close(peers)
            again = await router.peers(each=1)
            started = next(some[0] for pid, some in again.items() if pid not in peers)
            assert [worker["in_flight"] for worker in (await workers(started)).values()] == [0, 0]
            # What the dead one had is there to be used: by one of the others alone, all of it.
            alone = [await router.peer() for _ in range(12)]
            total.most = 0
            await asyncio.gather(*(ask(peer, 4) for peer in alone))
            assert total.most == 5
            close(again | {0: alone})

    scenario(main)


def test_a_slot_given_back_in_one_process_is_taken_at_once_in_another() -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            one = await stack.enter_async_context(engine(default=answer(delay=0.01)))
            router = await stack.enter_async_context(
                several("--worker-max-in-flight", "1", "--worker-urls", one.url)
            )
            peers = await router.peers(each=2)
            loop = asyncio.get_running_loop()
            began = loop.time()
            ends = {}

            async def asks(pid: int, peer: Peer) -> None:
                await ask(peer, 20)
                ends[pid] = loop.time() - began

            await asyncio.gather(*(asks(pid, peer) for pid, some in peers.items() for peer in some[:2]))
            first, last = sorted(ends.values())
            assert first > 0.6 * last, "one process had all turns"
            assert last < 80 * 0.01 * 3, "slots were idle"
            close(peers)

    scenario(main)


def test_what_is_changed_through_one_process_is_changed_in_all() -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def held(call: Call) -> None:
            await gate.wait()
            await call.write(http(200, chat_body()))

        async with AsyncExitStack() as stack:
            one, two = [await stack.enter_async_context(engine(default=held)) for _ in range(2)]
            router = await stack.enter_async_context(several("--worker-urls", one.url))
            peers = await router.peers(each=3)
            (here, a, b), (there, c, d) = (some[:3] for some in peers.values())
            assert (await here.ask(b'{"url":"%s"}' % two.url.encode(), path="/workers"))[0] == 202
            assert list(await workers(there)) == [one.url, two.url]
            for peer in (a, b, c, d):  # least_in_flight goes by the sums
                peer.post()
                await until(lambda: len(one.calls) + len(two.calls) > 0)
                await asyncio.sleep(0.05)
            assert len(one.calls) == len(two.calls) == 2
            assert [w["in_flight"] for w in (await workers(there)).values()] == [2, 2]
            loads = orjson.loads((await here.get("/get_loads"))[2])["workers"]
            assert [worker["load"] for worker in loads] == [2, 2]

            change = b'{"max_in_flight": 1}'
            here.send(
                b"PATCH /workers/%s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s"
                % (one.url.encode(), len(change), change)
            )
            assert (await here.response())[0] == 200
            assert (await workers(there))[one.url]["max_in_flight"] == 1
            assert (await there.get(f"/workers/{two.url}", method="DELETE"))[0] == 202
            assert list(await workers(here)) == [one.url]
            await asyncio.sleep(0.3)  # it has not left while it is in flight in any process
            gate.set()
            assert [(await peer.response())[0] for peer in (a, b, c, d)] == [200] * 4
            assert [(await peer.ask())[0] for peer in (a, c)] == [200, 200]
            assert len(two.calls) == 2
            text = (await there.get("/metrics"))[2].decode()
            families = {family.name: family for family in text_string_to_metric_families(text)}
            assert families["penstock_router_requests"].samples[0].value == 6

            os.kill(router.pids[0], signal.SIGKILL)  # counters do not fall, and it finds things as they are
            await until(lambda: not set(router.pids) <= set(peers) and router.listening == 2)
            again = await router.peers()
            started = next(some[0] for pid, some in again.items() if pid not in peers)
            text = (await started.get("/metrics"))[2].decode()
            families = {family.name: family for family in text_string_to_metric_families(text)}
            assert families["penstock_router_requests"].samples[0].value == 6
            shown = await workers(started)
            assert list(shown) == [one.url] and shown[one.url]["max_in_flight"] == 1
            close(peers)
            close(again)

    scenario(main)


def test_settings_and_what_one_process_sees_of_the_workers_are_those_of_all(tmp_path: Path) -> None:
    async def main() -> None:
        total = Gauge(seconds=lambda: 0.005)
        async with AsyncExitStack() as stack:
            one, two = [await stack.enter_async_context(engine(default=total)) for _ in range(2)]
            listed = tmp_path / "workers"
            listed.write_text(one.url)
            flags = ("--health-check-interval-secs", "0.2", "--health-failure-threshold", "2")
            router = await stack.enter_async_context(several("--worker-file", str(listed), *flags))
            peers = await router.peers(each=4)
            listed.write_text(f"{one.url}\n{two.url}\n")
            here, there = (some[0] for some in peers.values())
            await shows(there, lambda shown: list(shown) == [one.url, two.url])
            change = b'{"max_concurrent_requests": 1}'
            head = b"PATCH /config HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(change)
            here.send(head + change)
            assert (await here.response())[0] == 200
            shown = orjson.loads((await there.get("/workers"))[2])
            assert shown["config"]["max_concurrent_requests"] == 1
            await asyncio.gather(*(ask(peer, 5) for some in peers.values() for peer in some))
            assert total.most == 1

            one.side["/health"] = refuse(500)
            await shows(here, lambda shown: not shown[one.url]["is_healthy"])
            assert not (await workers(there))[one.url]["is_healthy"]  # told, not found out
            one.side["/health"] = raw(http(200, b""))
            for peer in (here, there):
                await shows(peer, lambda shown: shown[one.url]["is_healthy"])
            close(peers)

    scenario(main)


def test_the_other_addresses_are_served_once_and_the_parents_death_ends_all(tmp_path: Path) -> None:
    async def main() -> None:
        log = tmp_path / "access.jsonl"
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        async with engine(default=answer()) as one:
            flags = ("--access-log", str(log), "--prometheus-port", str(port), "--worker-urls", one.url)
            async with several(*flags, status=-signal.SIGKILL) as router:
                peers = await router.peers(each=4)
                fields = b"x-request-id: " + b"x" * 2000 + b"\r\n"
                for _ in range(5):
                    await asyncio.gather(*(p.ask(fields=fields) for some in peers.values() for p in some))
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                metrics = Peer(reader, writer)
                assert (
                    b"requests_total %d" % (5 * sum(map(len, peers.values())))
                    in (await metrics.get("/metrics"))[2]
                )
                metrics.close()
                await asyncio.sleep(0.7)  # the log is written twice a second
                close(peers)
                router.parent.kill()
                await until(lambda: not any(map(alive, peers)))
            lines = [orjson.loads(line) for line in log.read_bytes().splitlines()]
            assert len(lines) == 5 * sum(map(len, peers.values()))

    scenario(main)


@pytest.mark.parametrize("hurry", [False, True])
def test_all_processes_drain(hurry: bool) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            one = await stack.enter_async_context(engine(default=answer(delay=20.0 if hurry else 0.5)))
            router = await stack.enter_async_context(several("--worker-urls", one.url))
            peers = await router.peers()
            for (peer,) in (some[:1] for some in peers.values()):
                peer.post()
            await one.arrived(2)
            router.terminate()
            await asyncio.sleep(0.2)
            with pytest.raises(OSError):
                await router.peer()
            if hurry:
                router.terminate()
            for (peer,) in (some[:1] for some in peers.values()):
                if hurry:
                    assert await peer.rest() == b""
                else:
                    assert (await peer.response())[0] == 200
            close(peers)

    scenario(main)


def test_a_port_that_is_taken_and_settings_that_cannot_work_are_told(tmp_path: Path) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            for flags, words in (
                (("--port", str(port)), f"Port {port}"),
                (("--port", "0", "--tls-cert-path", str(tmp_path / "none")), "cannot be used"),
                (("--port", "0", "--processes", "0"), "--processes"),
            ):
                command = [sys.executable, "-m", "penstock", "route", "--worker-urls", "a:1"]
                ended = await asyncio.to_thread(
                    subprocess.run,
                    [*command, "--processes", "2", "--prometheus-port", "None", *flags],
                    capture_output=True,
                    text=True,
                    timeout=20,
                )
                assert ended.returncode == 2 and words in ended.stderr, ended.stderr
                assert "Traceback" not in ended.stderr

        with pytest.raises(ConfigError, match="launch_router"):
            async with serving(RouterArgs(worker_urls=("a:1",), processes=2)):
                pass

    scenario(main)
