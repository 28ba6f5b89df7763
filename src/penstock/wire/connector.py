"""Who waits for a connection to an origin, and the connections being made for them.

It guarantees:
- first come, first served: a connection that is released or just made goes to who has waited longest. Under
  load most who wait are served by what others release, long before a connection of their own is made;
- no more connections are being made than requests wait, and at most CONNECTING at a time;
- a failure is the failure of all for whom no connection is being made any more: waiting out each attempt in
  line would add up;
- a connection whose receiver has gone meanwhile goes to the next; after `close` nothing is being made.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import Callable
from typing import Final

from penstock.errors import ConfigError, ConnectFailed, PhaseTimeout, TransportError
from penstock.wire.address import Address
from penstock.wire.connection import Connection
from penstock.wire.dial import Dialer, reason_of

CONNECTING: Final = 128
"""Connections being made at a time: thousands at once would overflow the server's listen queue."""

_Line = deque[asyncio.Future[Connection]]
"""Those that wait, first come first; who was cancelled is dropped when its turn comes."""


class Connector:
    """Gives connections to `address` to those who wait. spare: takes one that nobody waits for any more.

    timeout: seconds for one connection to be made, None: no bound.
    """

    def __init__(
        self, address: Address, dialer: Dialer, timeout: float | None, spare: Callable[[Connection], None]
    ) -> None:
        self._address = address
        self._dialer = dialer
        self._timeout = timeout
        self._spare = spare
        self._loop = asyncio.get_running_loop()
        self._any: _Line = deque()
        self._fresh: _Line = deque()
        """Those that a connection used before is no good for."""
        self._waiting = 0
        self._dials: set[asyncio.Task[None]] = set()
        self._closed = False

    async def connection(self, *, fresh: bool = False) -> Connection:
        """A connection; one just made if it has to be `fresh`.

        Raises ConnectFailed, PhaseTimeout, and ConfigError once closed.
        """
        while True:
            connection = await self._wait(self._fresh if fresh else self._any)
            if connection.alive:
                return connection
            if not connection.served:
                raise ConnectFailed(f"cannot connect to {self._address}: {os.strerror(errno.ECONNRESET)}")

    def offer(self, connection: Connection) -> bool:
        """Gives a released connection to who has waited longest; False: nobody waits for it."""
        return bool(self._any) and self._give(self._any, connection)

    def close(self) -> None:
        """Ends what is being made; those that wait get ConfigError."""
        self._closed = True
        for dial in self._dials:
            dial.cancel()
        self._dials.clear()
        self._fail(self._is_closed(), spared=0)

    # -- inside -----------------------------------------------------------------------------------

    async def _wait(self, line: _Line) -> Connection:
        if self._closed:
            raise self._is_closed()
        waiter: asyncio.Future[Connection] = self._loop.create_future()
        line.append(waiter)
        self._waiting += 1
        self._dial()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self._waiting -= 1
                if len(self._dials) > self._waiting:
                    self._dials.pop().cancel()
            elif waiter.exception() is None:
                self._pass_on(waiter.result())
            raise

    def _give(self, line: _Line, connection: Connection) -> bool:
        while line:
            waiter = line.popleft()
            if not waiter.done():
                self._waiting -= 1
                waiter.set_result(connection)
                return True
        return False

    def _pass_on(self, connection: Connection) -> None:
        """A connection that has nobody yet."""
        if self._closed:
            connection.abort()
        elif connection.alive and not self.offer(connection):
            self._spare(connection)

    def _dial(self) -> None:
        while len(self._dials) < min(self._waiting, CONNECTING):
            self._dials.add(self._loop.create_task(self._connect()))

    async def _connect(self) -> None:
        dial = asyncio.current_task()
        assert dial is not None
        try:
            async with asyncio.timeout(self._timeout):
                connection = await self._dialer.connect()
        except Exception as error:
            self._dials.discard(dial)
            self._dialer.forget()
            failure = self._failure(error) if isinstance(error, OSError) else error
            self._fail(failure, spared=len(self._dials))
        else:
            self._dials.discard(dial)
            if self._closed or not self._give(self._fresh, connection):
                self._pass_on(connection)
        if not self._closed:
            self._dial()

    def _fail(self, failure: Exception, *, spared: int) -> None:
        """Fails all who wait but the first `spared`."""
        for line in (self._fresh, self._any):
            waiting = [waiter for waiter in line if not waiter.done()]
            line.clear()
            line.extend(waiting[:spared])
            for waiter in waiting[spared:]:
                self._waiting -= 1
                waiter.set_exception(_again(failure))
            spared = max(0, spared - len(waiting))

    def _failure(self, error: OSError) -> TransportError:
        if isinstance(error, TimeoutError) and error.errno is None:
            return PhaseTimeout(f"no connection to {self._address} within {self._timeout} s", "connect")
        return ConnectFailed(f"cannot connect to {self._address}: {reason_of(error)}")

    def _is_closed(self) -> ConfigError:
        return ConfigError(f"the connections to {self._address} have been closed")


def _again(failure: Exception) -> Exception:
    """The same failure for another request: an exception that is raised twice grows its traceback."""
    if isinstance(failure, PhaseTimeout):
        return PhaseTimeout(str(failure), failure.phase)
    if isinstance(failure, ConnectFailed | ConfigError):
        return type(failure)(str(failure))
    return failure
