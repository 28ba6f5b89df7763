"""The connections to one origin: reused, made, closed; every step O(1).

It guarantees:
- a request is sent once. The one exception: a reused connection that dies before any byte of a response (the
  server closed it while idle) is replaced by a fresh one, once;
- idle connections are reused last in, first out, and closed before the server closes them;
- a cancelled request closes its connection, so that the engine stops generating;
- after `close` no socket is left.

One timer per pool looks after all deadlines. A pool belongs to the loop it was made in.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from typing import Final

import msgspec

from penstock.errors import ConfigError, ConnectFailed, ConnectionLost, PhaseTimeout, TransportError
from penstock.wire.address import Address
from penstock.wire.connection import MAX_RESPONSE, Connection, Response, Timeouts

KEEP_ALIVE: Final = 4.0
"""Seconds an idle connection is kept: less than uvicorn's 5, so that the client closes first."""
RESOLVE_TTL: Final = 30.0
"""Seconds a resolved name is used."""
CONNECTING: Final = 128
"""Connections being made at a time: thousands at once would overflow the server's listen queue."""
MAX_TICK: Final = 0.5
"""Seconds between two looks at the deadlines."""
CLOSE_ROUNDS: Final = 1000
"""Loop iterations `close` gives its connections to report their end; each needs one or two."""

_KEEPALIVE_PROBES: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", 4), 60),
    (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPINTVL", 5), 15),
    (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPCNT", 6), 4),
)
_EXHAUSTED: Final = {
    errno.EMFILE: "this process has too many open files; raise `ulimit -n` or lower the concurrency",
    errno.ENFILE: "this machine has too many open files",
    errno.EADDRNOTAVAIL: "this machine has no free local port left for that address",
}


class PoolStatistics(msgspec.Struct, frozen=True):
    """Counts of one pool at one moment."""

    connections: int
    """Open connections, idle ones included."""
    idle: int
    opened: int
    """Connections made since the start."""
    resent: int
    """Requests resent because a reused connection had died."""


class Pool:
    """Connections to `address`, made as needed. `request` may be called by any number of tasks."""

    def __init__(
        self,
        address: Address,
        *,
        timeouts: Timeouts | None = None,
        ssl_context: ssl.SSLContext | None = None,
        max_response: int = MAX_RESPONSE,
        keep_alive: float = KEEP_ALIVE,
    ) -> None:
        self.address = address
        self.timeouts = timeouts or Timeouts()
        self.max_response = max_response
        self.keep_alive = keep_alive
        self._ssl = (ssl_context or ssl.create_default_context()) if address.scheme == "https" else None
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._open: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}
        self._turns = asyncio.Semaphore(CONNECTING)
        self._resolving = asyncio.Lock()
        self._resolved: list[tuple[socket.AddressFamily, str]] = []
        self._resolved_at = 0.0
        self._failures = 0
        self._failure: TransportError | None = None
        self._opened = 0
        self._resent = 0
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        bounds = (self.timeouts.first_byte, self.timeouts.idle, keep_alive)
        self._tick = min(MAX_TICK, *(bound / 4 for bound in bounds if bound is not None))

    def __repr__(self) -> str:
        return f"<Pool {self.address} open={len(self._open)} idle={len(self._idle)}>"

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(len(self._open), len(self._idle), self._opened, self._resent)

    async def request(self, head: bytes, body: bytes = b"") -> Response:
        """Sends a request and waits for the whole response, of whatever status.

        `head` is the request line and the headers, without content-length and without the empty line.
        Raises ConnectFailed, ConnectionLost, PhaseTimeout or MalformedResponse.
        """
        connection = self._reuse() or await self._connect()
        waiter = connection.send(head, body)
        try:
            return await waiter
        except ConnectionLost as error:
            if not error.reused or error.response_started or self._closed:
                raise
        except BaseException:
            connection.discard(waiter)
            raise
        self._resent += 1
        connection = await self._connect()
        waiter = connection.send(head, body)
        try:
            return await waiter
        except BaseException:
            connection.discard(waiter)
            raise

    async def close(self) -> None:
        """Closes every connection. Requests in flight end with ConnectionLost."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for connection in list(self._open):
            connection.abort()
        for _ in range(CLOSE_ROUNDS):
            if not self._open:
                return
            await asyncio.sleep(0)

    # -- what connections tell --------------------------------------------------------------------

    def made(self, connection: Connection) -> None:
        self._open[connection] = None
        self._opened += 1
        if self._timer is None:
            self._timer = self._loop.call_later(self._tick, self._sweep)

    def released(self, connection: Connection) -> None:
        if self._closed:
            connection.abort()
        else:
            self._idle[connection] = None

    def lost(self, connection: Connection) -> None:
        self._open.pop(connection, None)
        self._idle.pop(connection, None)

    # -- inside -----------------------------------------------------------------------------------

    def _reuse(self) -> Connection | None:
        """The connection released last, if it is still good."""
        while self._idle:
            connection = self._idle.popitem()[0]
            if connection.alive:
                if self._clock() - connection.since < self.keep_alive:
                    return connection
                connection.abort()
        return None

    def _sweep(self) -> None:
        now, timeouts = self._clock(), self.timeouts
        if timeouts.first_byte is not None or timeouts.idle is not None:
            for connection in self._open:
                connection.sweep(now, timeouts)
        stale = []
        for connection in self._idle:  # in the order of their release
            if now - connection.since < self.keep_alive:
                break
            stale.append(connection)
        for connection in stale:
            del self._idle[connection]
            connection.abort()
        self._timer = self._loop.call_later(self._tick, self._sweep) if self._open else None

    async def _connect(self) -> Connection:
        failures = self._failures
        async with self._turns:
            self._check_open()
            if self._failure is not None and self._failures != failures:
                # One failed while this one waited for its turn: waiting out each in line would add up.
                raise _again(self._failure)
            try:
                async with asyncio.timeout(self.timeouts.connect):
                    connection = await self._connect_any()
            except OSError as error:
                self._failure = self._connect_failure(error)
                self._failures += 1
                self._resolved_at = 0.0
                raise _again(self._failure) from error
            if self._closed:
                connection.abort()
                self._check_open()
            return connection

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError(f"the connections to {self.address} have been closed")

    def _connect_failure(self, error: OSError) -> TransportError:
        if isinstance(error, TimeoutError) and error.errno is None:
            return PhaseTimeout(
                f"no connection to {self.address} within {self.timeouts.connect} s", "connect"
            )
        return ConnectFailed(f"cannot connect to {self.address}: {_reason(error)}")

    async def _connect_any(self) -> Connection:
        """Tries the addresses of the host in order, each for its share of the time that is left."""
        deadline = None if self.timeouts.connect is None else self._clock() + self.timeouts.connect
        addresses = await self._resolve()
        for position, (family, host) in enumerate(addresses):
            left = len(addresses) - position
            share = None if deadline is None else (deadline - self._clock()) / left
            try:
                async with asyncio.timeout(share if left > 1 else None):
                    return await self._connect_to(family, host)
            except OSError:  # TimeoutError is one
                if left == 1:
                    raise
        raise OSError(f"the name {self.address.host!r} has no address")

    async def _connect_to(self, family: socket.AddressFamily, host: str) -> Connection:
        transport, connection = await self._loop.create_connection(
            lambda: Connection(self, self._loop, str(self.address)),
            host,
            self.address.port,
            family=family,
            ssl=self._ssl,
            server_hostname=self.address.host if self._ssl is not None else None,
        )
        peer = transport.get_extra_info("socket")
        for level, option, value in _KEEPALIVE_PROBES:
            peer.setsockopt(level, option, value)
        if not connection.alive:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        return connection

    async def _resolve(self) -> list[tuple[socket.AddressFamily, str]]:
        async with self._resolving:
            if not self._resolved_at or self._clock() - self._resolved_at > RESOLVE_TTL:
                found = await self._loop.getaddrinfo(
                    self.address.host, self.address.port, type=socket.SOCK_STREAM
                )
                self._resolved = [(family, str(where[0])) for family, _, _, _, where in found]
                self._resolved_at = self._clock()
            return self._resolved


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {getattr(error, 'verify_message', '') or error.reason or error}"
    if isinstance(error, socket.gaierror):
        return f"the name cannot be resolved ({error.strerror})"
    if error.errno is None:
        return str(error)
    return _EXHAUSTED.get(error.errno) or os.strerror(error.errno)


def _again(failure: TransportError) -> TransportError:
    """The same failure for another request: an exception that is raised twice grows its traceback."""
    if isinstance(failure, PhaseTimeout):
        return PhaseTimeout(str(failure), failure.phase)
    return type(failure)(str(failure))
