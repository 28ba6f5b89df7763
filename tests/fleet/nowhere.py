"""A transport for tests that send nothing."""

from __future__ import annotations

from penstock.fleet.endpoint import Endpoint
from penstock.fleet.health import Breaker
from penstock.fleet.transport import ByteStream
from penstock.wire.address import Address
from penstock.wire.connection import Response
from penstock.wire.pool import PoolStatistics


class Nowhere:
    async def request(self, head: bytes, body: bytes = b"") -> Response:
        raise AssertionError("nothing is to be sent")

    async def stream(self, head: bytes, body: bytes = b"") -> ByteStream:
        raise AssertionError("nothing is to be sent")

    def drop_silent(self, seconds: float) -> int:
        return 0

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(0, 0, 0, 0)

    async def close(self) -> None:
        pass


def endpoint(number: int, *, limit: int | None = None, breaker: Breaker | None = None) -> Endpoint:
    return Endpoint(Address.parse(f"host{number}:80"), Nowhere(), limit=limit, breaker=breaker)
