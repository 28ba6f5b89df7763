"""A connection of the scripted engine: it can be reset, and says when its client reads again."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Final, Protocol

from penstock.wire.server import Connection, HttpServer, Request

_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER of zero seconds: closing sends RST."""


class Owner(Protocol):
    """Who answers the requests of the connections."""

    line: Line | None
    """The connection of the request that is being handed over."""

    lines: dict[Line, None]
    """Those that are open."""


class Line(Connection):
    """One accepted connection."""

    __slots__ = ("_owner", "on_writable")

    def __init__(self, server: HttpServer, owner: Owner) -> None:
        super().__init__(server)
        self._owner = owner
        owner.lines[self] = None
        self.on_writable: Callable[[], None] | None = None
        """Called when the client reads again after it had stopped."""

    def reset(self) -> None:
        """Ends the connection by RST."""
        if self._transport is not None:
            peer = self._transport.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()

    def _hand_over(self, request: Request) -> None:
        self._owner.line = self
        self.on_writable = None
        super()._hand_over(request)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.on_writable is not None:
            self.on_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.lines.pop(self, None)
        super().connection_lost(exc)
