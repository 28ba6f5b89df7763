"""What the parent and the processes of a router say to each other: lines of JSON, in order."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Final, cast

import msgspec

from penstock.router.ledger import Claim, Lend, Share

# -- from a process, and where others are concerned passed on to them ------------------------------------


class Ready(msgspec.Struct, tag=True, frozen=True):
    """It listens."""


class Failed(msgspec.Struct, tag=True, frozen=True):
    """It cannot start, and why."""

    message: str


class Join(msgspec.Struct, tag=True, frozen=True):
    """A worker joins. `worker`: the number the parent has given it, in requests 0."""

    url: str
    worker: int = 0
    limit: int | None = None


class Leave(msgspec.Struct, tag=True, frozen=True):
    """A worker drains and leaves; after `timeout` seconds it is cut off."""

    url: str
    timeout: float | None = None


class Left(msgspec.Struct, tag=True, frozen=True):
    """Nothing of this process is in flight on a worker that leaves, nor will be."""

    worker: int


class Limit(msgspec.Struct, tag=True, frozen=True):
    """Another limit of a worker; of TOTAL: of all together."""

    worker: int
    limit: int | None


class Forget(msgspec.Struct, tag=True, frozen=True):
    """The workers' prefix caches are empty."""


class Configure(msgspec.Struct, tag=True, frozen=True):
    """Settings that have been changed."""

    changes: dict[str, Any]


class Seen(msgspec.Struct, tag=True, frozen=True):
    """What the process that looks at the workers has seen of one: its models, or why it is down."""

    worker: int
    models: list[dict[str, Any]] | None = None
    error: str | None = None


class Barrier(msgspec.Struct, tag=True, frozen=True):
    """Answered when all have heard what was said before, with the statistics of each if asked for."""

    number: int
    statistics: bool = False


class Passed(msgspec.Struct, tag=True, frozen=True):
    """The answer to a Barrier. From the parent: of the other processes, dead ones included."""

    number: int
    statistics: list[dict[str, Any]] = []


# -- from the parent ----------------------------------------------------------------------------------------


class Lead(msgspec.Struct, tag=True, frozen=True):
    """Looks at the workers, and moves their adaptive limits, from now on."""


class Drain(msgspec.Struct, tag=True, frozen=True):
    """Ends when what is in flight has ended; said again: at once."""


Message = (
    Ready
    | Failed
    | Join
    | Leave
    | Left
    | Limit
    | Forget
    | Configure
    | Seen
    | Barrier
    | Passed
    | Lead
    | Drain
    | Claim
    | Lend
    | Share
)
_DECODER: Final = msgspec.json.Decoder(Message)
_ENCODER: Final = msgspec.json.Encoder()


class Link(asyncio.Protocol):
    """One end. `hear` gets each message, and None at the end, when the other side is gone."""

    def __init__(self, hear: Callable[[Message | None], None]) -> None:
        self._hear = hear
        self._transport: asyncio.Transport | None = None
        self._rest = b""

    @classmethod
    async def over(cls, end: socket.socket, hear: Callable[[Message | None], None]) -> Link:
        end.setblocking(False)
        _, link = await asyncio.get_running_loop().create_connection(lambda: cls(hear), sock=end)
        return link

    def say(self, message: Message) -> None:
        if self._transport is not None:
            self._transport.write(_ENCODER.encode(message) + b"\n")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._hear(None)

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._hear(_DECODER.decode(line))
