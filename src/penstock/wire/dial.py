"""How a connection to an address is made: name, source address, TCP or UNIX socket, TLS.

It guarantees:
- of several addresses of a name the first that answers is used, and none that hangs is waited for;
- whatever ends an attempt, cancellation included, no socket and no task is left of it;
- every failure is an OSError that `reason_of` can put in words.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import ssl
import sys
from collections import deque
from collections.abc import Sequence
from typing import Final

from penstock.errors import ConfigError
from penstock.wire import tls
from penstock.wire.address import Address
from penstock.wire.connection import Connection, Owner

RESOLVE_TTL: Final = 30.0
"""Seconds a resolved name is used."""
HEAD_START: Final = 0.25
"""Seconds an address of a name is ahead of the next one. Source: RFC 8305, section 5."""
BACKLOG_PAUSE: Final = 0.01
"""Seconds until a UNIX socket whose listen queue was full is tried again."""
IP_BIND_ADDRESS_NO_PORT: Final = 24
"""Linux: bind(2) chooses no port, so that connect(2) may share one between destinations."""

_KEEPALIVE_PROBES: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", 4), 60),
    (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPINTVL", 5), 15),
    (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPCNT", 6), 4),
)
_NO_PORT_LEFT: Final = frozenset({errno.EADDRNOTAVAIL, errno.EADDRINUSE})
_EXHAUSTED: Final = {
    errno.EMFILE: "this process has too many open files; raise `ulimit -n` or lower the concurrency",
    errno.ENFILE: "this machine has too many open files",
    errno.EADDRNOTAVAIL: "this machine has no free local port left for that address",
}

Target = tuple[socket.AddressFamily, str]
"""Family and numeric address."""


class Dialer:
    """Makes the connections of one owner to one address.

    Raises ConfigError when a source address is not an IP address.
    """

    def __init__(
        self,
        address: Address,
        owner: Owner,
        loop: asyncio.AbstractEventLoop,
        ssl_context: ssl.SSLContext | None = None,
        source_addresses: Sequence[str] = (),
        connection_type: type[Connection] = Connection,
    ) -> None:
        self._address = address
        self._connection_type = connection_type
        self._owner = owner
        self._loop = loop
        self._ssl = (ssl_context or ssl.create_default_context()) if address.scheme == "https" else None
        self._sources = _by_family(source_addresses)
        self._turn = 0
        self._resolving = asyncio.Lock()
        self._resolved: list[Target] = []
        self._resolved_at = 0.0

    async def connect(self) -> Connection:
        """A connection just made. Raises OSError. Not bounded: the caller bounds it."""
        if self._address.socket_path is not None:
            return await self._connect_unix(self._address.socket_path)
        targets = await self._resolve()
        if self._sources:
            targets = [target for target in targets if target[0] in self._sources]
            if not targets:
                raise OSError("it has no address of the same family (IPv4 or IPv6) as a source address")
        if len(targets) == 1:
            return await self._connect_to(*targets[0])
        return await self._race(targets)

    def forget(self) -> None:
        """The name is to be resolved anew."""
        self._resolved_at = 0.0

    def _new(self) -> Connection:
        return self._connection_type(self._owner, self._loop, str(self._address))

    def _forsake(self, connection: Connection) -> None:
        """uvloop, cancelled, closes a connection that it has announced without telling of its end."""
        self._owner.lost(connection)

    async def _race(self, targets: Sequence[Target]) -> Connection:
        """Each address starts HEAD_START after the one before, or once all before have failed; one wins."""
        waiting = deque(targets)
        tasks: set[asyncio.Task[Connection]] = set()
        running: set[asyncio.Task[Connection]] = set()
        winner: Connection | None = None
        failure: BaseException = OSError(f"the name {self._address.host!r} has no address")
        try:
            while winner is None and (waiting or running):
                if waiting:
                    running.add(self._loop.create_task(self._connect_to(*waiting.popleft())))
                    tasks |= running
                patience = HEAD_START if waiting else None
                done, running = await asyncio.wait(
                    running, timeout=patience, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    failure = task.exception() or failure
                    winner = task.result() if task.exception() is None else winner
        finally:
            for task in tasks:
                task.cancel()
            if running:
                await asyncio.wait(running)
            for task in tasks:
                if not task.cancelled() and task.exception() is None and task.result() is not winner:
                    task.result().abort()
        if winner is None:
            raise failure
        return winner

    async def _connect_to(self, family: socket.AddressFamily, host: str) -> Connection:
        bound = await self._connect_from_any(family, host) if self._sources else None
        name = self._address.host if self._ssl is not None else None
        connection = self._new()
        try:
            if bound is None:
                transport, _ = await self._loop.create_connection(
                    lambda: connection,
                    host,
                    self._address.port,
                    family=family,
                    ssl=self._ssl,
                    server_hostname=name,
                )
            else:
                transport, _ = await self._loop.create_connection(
                    lambda: connection, sock=bound, ssl=self._ssl, server_hostname=name
                )
        except BaseException:
            self._forsake(connection)
            if bound is not None:
                bound.close()
            raise
        peer = transport.get_extra_info("socket")
        for level, option, value in _KEEPALIVE_PROBES:
            peer.setsockopt(level, option, value)
        return _alive(connection)

    async def _connect_from_any(self, family: socket.AddressFamily, host: str) -> socket.socket:
        """A socket connected from the next source address that has a port left."""
        sources = self._sources[family]
        failure: OSError | None = None
        for _ in sources:
            source = sources[self._turn % len(sources)]
            self._turn += 1
            try:
                return await self._connect_from(source, family, host)
            except OSError as error:
                if error.errno not in _NO_PORT_LEFT:
                    raise
                failure = error
        assert failure is not None
        raise failure

    async def _connect_from(self, source: str, family: socket.AddressFamily, host: str) -> socket.socket:
        bound = _bound(family, source)
        try:
            await self._loop.sock_connect(bound, (host, self._address.port))
        except BaseException as error:
            bound.close()
            if isinstance(error, OSError) and error.errno == errno.EINVAL:
                raise OSError(f"it cannot be reached from the source address {source}") from error
            raise
        return bound

    async def _connect_unix(self, path: str) -> Connection:
        connection = self._new()
        try:
            while True:
                try:
                    await self._loop.create_unix_connection(lambda: connection, path)
                    return _alive(connection)
                except BlockingIOError:  # the listen queue is full; TCP would wait by itself
                    await asyncio.sleep(BACKLOG_PAUSE)
        except BaseException:
            self._forsake(connection)
            raise

    async def _resolve(self) -> list[Target]:
        async with self._resolving:
            if not self._resolved_at or self._loop.time() - self._resolved_at > RESOLVE_TTL:
                found = await self._loop.getaddrinfo(
                    self._address.host, self._address.port, type=socket.SOCK_STREAM
                )
                self._resolved = [(family, str(where[0])) for family, _, _, _, where in found]
                self._resolved_at = self._loop.time()
            return self._resolved


def reason_of(error: OSError) -> str:
    """Why no connection could be made, in words."""
    if isinstance(error, ssl.SSLError):
        return tls.reason_of(error)
    if isinstance(error, socket.gaierror):
        return f"the name cannot be resolved ({error.strerror})"
    if error.errno is None:
        return str(error) or "the server closed the connection during the TLS handshake"
    return _EXHAUSTED.get(error.errno) or os.strerror(error.errno)


def _by_family(sources: Sequence[str]) -> dict[socket.AddressFamily, list[str]]:
    found: dict[socket.AddressFamily, list[str]] = {}
    for source in sources:
        try:
            version = ipaddress.ip_address(source).version
        except ValueError:
            raise ConfigError(f"the source address {source!r} is not an IP address") from None
        found.setdefault(socket.AF_INET if version == 4 else socket.AF_INET6, []).append(source)
    return found


def _bound(family: socket.AddressFamily, source: str) -> socket.socket:
    """A socket that will connect from `source`."""
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        if sys.platform == "linux":
            made.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        made.bind((source, 0))
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise OSError(f"the source address {source} is not an address of this machine") from error
        raise
    return made


def _alive(connection: Connection) -> Connection:
    if not connection.alive:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    return connection
