"""The connections to one origin: reused, made, closed; every step O(1).

It guarantees:
- a request is sent once. The one exception: a reused connection that dies before any byte of a response (the
  server closed it while idle) is replaced by a fresh one, once;
- idle connections are reused last in, first out, and closed before the server closes them;
- a cancelled request, and a stream given up, closes its connection, so that the engine stops generating;
- after `close` no socket is left, and every stream that is not complete ends with ConnectionLost.

One timer per pool looks after all deadlines. A pool belongs to the loop it was made in.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import Final

import msgspec

from penstock.errors import ConnectionLost
from penstock.wire.address import Address
from penstock.wire.connection import MAX_RESPONSE, Connection, Response, Timeouts
from penstock.wire.connector import Connector
from penstock.wire.dial import Dialer
from penstock.wire.stream import Stream

KEEP_ALIVE: Final = 4.0
"""Seconds an idle connection is kept: less than uvicorn's 5, so that the client closes first."""
MAX_TICK: Final = 0.5
"""Seconds between two looks at the deadlines."""
CLOSE_ROUNDS: Final = 1000
"""Loop iterations `close` gives its connections to report their end; each needs one or two."""


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
    """Connections to `address`, made as needed. `request` and `stream` may be called by any number of tasks.

    source_addresses: local IP addresses connections are made from, in turn; none: the system's choice. Each
    adds its own local ports to what this machine can have open to one address. Without meaning for a UNIX
    socket, as is `ssl_context` unless the address is https.
    Raises ConfigError when a source is not an IP address.
    """

    def __init__(
        self,
        address: Address,
        *,
        timeouts: Timeouts | None = None,
        ssl_context: ssl.SSLContext | None = None,
        max_response: int = MAX_RESPONSE,
        keep_alive: float = KEEP_ALIVE,
        source_addresses: Sequence[str] = (),
        connection_type: type[Connection] = Connection,
    ) -> None:
        self.address = address
        self.timeouts = timeouts or Timeouts()
        self.max_response = max_response
        self.keep_alive = keep_alive
        self._loop = asyncio.get_running_loop()
        dialer = Dialer(address, self, self._loop, ssl_context, source_addresses, connection_type)
        self._connector = Connector(address, dialer, self.timeouts.connect, self._spare)
        self._clock = self._loop.time
        self._open: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}
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
        connection = self._reuse() or await self._connector.connection()
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
        connection = await self._connector.connection(fresh=True)
        waiter = connection.send(head, body)
        try:
            return await waiter
        except BaseException:
            connection.discard(waiter)
            raise

    async def stream(self, head: bytes, body: bytes = b"") -> Stream:
        """Sends a request and waits for the head of the response; its body is read from the stream.

        The stream is to be read to its end or closed. Raises as `request`.
        """
        connection = self._reuse() or await self._connector.connection()
        stream = connection.stream(head, body)
        try:
            await stream.begun()
            return stream
        except ConnectionLost as error:
            if not error.reused or error.response_started or self._closed:
                raise
        except BaseException:
            stream.close()
            raise
        self._resent += 1
        connection = await self._connector.connection(fresh=True)
        stream = connection.stream(head, body)
        try:
            await stream.begun()
            return stream
        except BaseException:
            stream.close()
            raise

    def drop_silent(self, seconds: float) -> int:
        """Ends, with ConnectionLost, the requests on which nothing has moved for so long; their number."""
        bound = self._clock() - seconds
        silent = [one for one in self._open if one not in self._idle and one.since <= bound]
        for connection in silent:
            connection.abort()
        return len(silent)

    async def close(self) -> None:
        """Closes every connection. Requests in flight and open streams end with ConnectionLost."""
        self._closed = True
        self._connector.close()
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
        elif not self._connector.offer(connection):
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

    def _spare(self, connection: Connection) -> None:
        """Nobody waits any longer for a connection just made."""
        connection.since = self._clock()
        self._idle[connection] = None

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
