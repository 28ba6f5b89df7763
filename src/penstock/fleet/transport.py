"""What carries requests to an endpoint: a `Pool` of connections, or in a simulation anything of this
shape."""

from __future__ import annotations

from typing import Protocol

from penstock.wire.address import Address
from penstock.wire.connection import Response
from penstock.wire.pool import Pool, PoolStatistics


class ByteStream(Protocol):
    """A response whose body is read as it comes."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> dict[bytes, bytes]:
        """Names as the server wrote them."""
        ...

    def header(self, name: bytes) -> bytes | None: ...

    async def read(self) -> bytes:
        """The next bytes of the body; b"" once it is complete. Raises TransportError."""
        ...

    def close(self) -> None:
        """Wants no more of it."""
        ...


class Transport(Protocol):
    """Carries requests to one endpoint. Raises TransportError when no usable response comes back."""

    async def request(self, head: bytes, body: bytes = b"") -> Response: ...

    async def stream(self, head: bytes, body: bytes = b"") -> ByteStream: ...

    def drop_silent(self, seconds: float) -> int:
        """Ends, with ConnectionLost, the requests on which nothing has moved for so long; their number."""
        ...

    def statistics(self) -> PoolStatistics: ...

    async def close(self) -> None: ...


class TransportFactory(Protocol):
    def __call__(self, address: Address) -> Transport: ...


__all__ = ["ByteStream", "Pool", "Transport", "TransportFactory"]
