"""How connections are made: several addresses, UNIX sockets, source addresses."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from penstock.errors import ConfigError, ConnectFailed, PhaseTimeout
from penstock.wire import dial
from penstock.wire.address import Address
from penstock.wire.connection import Connection, Timeouts
from penstock.wire.dial import HEAD_START
from penstock.wire.pool import Pool
from tests.scripted import (
    Call,
    ScriptedEngine,
    answer,
    http,
    run,
    until,
)

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\n"


def pool_of(engine: ScriptedEngine, **settings: float) -> Pool:
    keep_alive = settings.pop("keep_alive", 4.0)
    return Pool(Address.parse(engine.url), timeouts=Timeouts(**settings), keep_alive=keep_alive)


def resolving_to(pool: Pool, *hosts: str) -> None:
    """Makes the pool believe that its host has these addresses."""
    families = [socket.AF_INET6 if ":" in host else socket.AF_INET for host in hosts]
    pool._connector._dialer._resolved = list(zip(families, hosts, strict=True))
    pool._connector._dialer._resolved_at = asyncio.get_running_loop().time()


@contextmanager
def silent(host: str, port: int) -> Iterator[None]:
    """An address whose listen queue is full: connections to it hang."""
    with socket.socket() as full:
        full.bind((host, port))
        full.listen(0)
        with socket.create_connection(full.getsockname()):
            yield


def test_another_address_of_the_name_is_tried() -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:  # listens on 127.0.0.1 only
            for hosts in (["::1", "127.0.0.1"], ["127.0.0.9", "127.0.0.8", "127.0.0.1"]):
                pool = pool_of(engine)
                resolving_to(pool, *hosts)
                started = time.monotonic()
                assert (await pool.request(HEAD, b"{}")).status == 200
                assert time.monotonic() - started < HEAD_START  # what refuses costs no waiting
                await pool.close()
            pool = pool_of(engine)
            resolving_to(pool, "127.0.0.9", "127.0.0.8")
            with pytest.raises(ConnectFailed, match="refused"):
                await pool.request(HEAD, b"{}")
            await pool.close()

    run(main())


def test_an_address_that_hangs_is_not_waited_for() -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:
            with silent("127.0.0.7", engine.port):
                pool = pool_of(engine)
                resolving_to(pool, "127.0.0.7", "127.0.0.1")
                started = time.monotonic()
                assert (await pool.request(HEAD, b"{}")).status == 200
                assert HEAD_START <= time.monotonic() - started < HEAD_START + 1.0
                await pool.close()
                pool = pool_of(engine, connect=0.4)
                resolving_to(pool, "127.0.0.7", "127.0.0.7")
                with pytest.raises(PhaseTimeout, match="no connection"):
                    await pool.request(HEAD, b"{}")
                task = asyncio.create_task(pool.request(HEAD, b"{}"))
                await asyncio.sleep(0.05)
                task.cancel()
                await asyncio.wait([task])
                await pool.close()

    run(main())


def test_only_one_of_two_connections_made_at_once_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "HEAD_START", 0.0)

    async def main() -> None:
        async with ScriptedEngine() as engine:
            pool = pool_of(engine)
            for _ in range(20):
                resolving_to(pool, "127.0.0.1", "127.0.0.1", "127.0.0.1")
                assert (await pool.request(HEAD, b"{}")).status == 200
                for connection in list(pool._idle):
                    connection.abort()
                await until(lambda: pool.statistics().connections == 0)
            await pool.close()

    run(main())


def test_of_two_winners_one_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "HEAD_START", 0.001)
    genuine = dial.Dialer._connect_to

    async def main() -> None:
        gate = asyncio.Event()

        async def together(self: dial.Dialer, family: socket.AddressFamily, host: str) -> Connection:
            connection = await genuine(self, family, host)
            await gate.wait()
            return connection

        monkeypatch.setattr(dial.Dialer, "_connect_to", together)
        async with ScriptedEngine() as engine:
            pool = pool_of(engine)
            resolving_to(pool, "127.0.0.1", "127.0.0.1")
            request = asyncio.create_task(pool.request(HEAD, b"{}"))
            await until(lambda: pool.statistics().connections == 2)
            gate.set()
            assert (await request).status == 200
            await until(lambda: pool.statistics().connections == 1)
            assert pool.statistics().idle == 1  # the winner is the one that is left
            await pool.close()

    run(main())


def test_a_unix_socket(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                hosts.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(http(200, b"local"))
        writer.transport.abort()

    hosts: list[bytes] = []

    async def main() -> None:
        address = Address.parse(f"unix://{tmp_path}/s")
        pool = Pool(address, source_addresses=["127.0.0.2"])
        with pytest.raises(ConnectFailed, match="cannot connect to unix:///.*No such file"):
            await pool.request(HEAD)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(address.socket_path))
        with pytest.raises(ConnectFailed, match="refused"):
            await pool.request(HEAD)
        listener.listen(1)  # more than two at once find its queue full
        requests = [asyncio.create_task(pool.request(HEAD)) for _ in range(50)]
        await asyncio.sleep(0.05)
        server = await asyncio.start_unix_server(serve, sock=listener)
        assert [(await request).body for request in requests] == [b"local"] * 50
        async with await pool.stream(HEAD) as stream:
            assert (await stream.read(), await stream.read(), stream.complete) == (b"local", b"", True)
        await pool.close()
        server.close()
        await server.wait_closed()

    run(main())
    assert len(hosts) == 51


def test_connections_are_made_from_the_source_addresses_in_turn() -> None:
    async def main() -> None:
        peers: list[str] = []

        async def remember(call: Call) -> None:
            peers.append(call.writer.get_extra_info("peername")[0])
            await call.write(http(200, b"{}", {"connection": "close"}))

        async with ScriptedEngine(default=remember) as engine:
            sources = ["127.0.0.2", "127.0.0.3"]
            pool = Pool(Address.parse(engine.url), source_addresses=sources)
            for _ in range(6):
                await pool.request(HEAD, b"{}")
            assert sorted(set(peers)) == sources and all(a != b for a, b in pairwise(peers))
            tasks = [asyncio.create_task(pool.request(HEAD, b"{}")) for _ in range(30)]
            for turns, task in enumerate(tasks):  # cancelled while connecting, no socket is left
                await asyncio.sleep(0)
                if turns % 2:
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await pool.close()
            await until(lambda: engine.open == 0)

    run(main())


def test_one_port_serves_connections_to_several_addresses() -> None:
    """The kernel chooses ports when it knows the destination, not at bind."""
    bound = dial._bound(socket.AF_INET, "127.0.0.2")
    with bound:
        assert bound.getsockname() == ("127.0.0.2", 0)


def test_a_source_without_a_free_port_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, tried = dial._bound, []

    def bound(family: socket.AddressFamily, source: str) -> socket.socket:
        tried.append(source)
        if source in used_up:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return genuine(family, source)

    monkeypatch.setattr(dial, "_bound", bound)
    used_up = {"127.0.0.3"}

    async def main() -> None:
        async with ScriptedEngine(default=answer(close=True)) as engine:
            pool = Pool(Address.parse(engine.url), source_addresses=["127.0.0.2", "127.0.0.3"])
            for _ in range(4):
                assert (await pool.request(HEAD, b"{}")).status == 200
            assert "127.0.0.3" in tried
            used_up.add("127.0.0.2")
            with pytest.raises(ConnectFailed, match="no free local port"):
                await pool.request(HEAD, b"{}")
            await pool.close()

    run(main())


def test_sources_that_cannot_be_used_are_named() -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:
            for source, complaint in [
                ("192.0.2.1", "source address 192.0.2.1 is not an address of this machine"),
                ("::1", "no address of the same family"),
            ]:
                pool = Pool(Address.parse(engine.url), source_addresses=[source])
                with pytest.raises(ConnectFailed, match=complaint):
                    await pool.request(HEAD)
                await pool.close()
            with pytest.raises(ConfigError, match="'lo' is not an IP address"):
                Pool(Address.parse(engine.url), source_addresses=["lo"])

    run(main())
