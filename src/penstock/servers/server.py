"""A server that answers requests: what can be asked of it, whoever started it.

Inside `async with` the server is healthy; what is asked of a server that has died ends at once with the error
that says why. Every question that generates nothing is bounded in time.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Final, Self

import orjson

from penstock import __version__
from penstock.client import Client
from penstock.errors import ConfigError, PenstockError, PhaseTimeout, TransportError
from penstock.servers.diagnosis import EngineDied
from penstock.wire.address import Address
from penstock.wire.connection import Response
from penstock.wire.openai import response_error
from penstock.wire.pool import Pool
from penstock.wire.tls import TLS

ASK_LIMIT: Final = 10.0
"""Seconds a question that generates nothing (health, metrics) may take."""


class Server(ABC):
    """One server, as an async context manager.

    `base_url` and `name`, what requests call the model, are valid inside the block.
    """

    def __init__(self, name: str, api_key: str | None, tls: TLS | None = None) -> None:
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise ConfigError("The API key holds characters that cannot be sent in a header.")
        self.name = name
        self.base_url = ""
        self.api_key = api_key
        self.tls = tls
        self._pool: Pool | None = None
        self._died: asyncio.Future[EngineDied] | None = None

    @abstractmethod
    async def __aenter__(self) -> Self: ...

    @abstractmethod
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __repr__(self) -> str:
        state = "closed" if self._pool is None else "dead" if self._dead else "ready"
        return f"<{type(self).__name__} {self.name} {self.base_url} {state}>"

    @property
    def died(self) -> asyncio.Future[EngineDied]:
        """Done, with the error, when the server has died. Shield it, or use asyncio.wait."""
        if self._died is None:
            raise ConfigError("The server has not been started: use it inside `async with`.")
        return self._died

    @property
    def log_tail(self) -> tuple[str, ...]:
        """The last lines of the server's log, its secrets masked; none for a server we did not start."""
        return ()

    def client(self, **settings: Any) -> Client:
        """A client of this server; `settings` are those of `penstock.Client`."""
        own = {"model": self.name, "api_key": self.api_key, "tls": self.tls}
        return Client(self.base_url, **{**own, **settings})

    async def make_request(self, method: str, path: str, json: Any = None) -> Response:
        """Sends one request and returns the answer, of whatever status. Not bounded in time.

        path: `/v1/…` for the OpenAI API, anything else for the engine's own routes.
        Raises EngineDied when the server has died or dies, TransportError when there is no answer.
        """
        try:
            return await self._request(method, path, json)
        except (TransportError, ConfigError):
            if (death := await self._death()) is not None:
                raise death from None
            raise

    async def is_ready(self) -> bool:
        """Whether the server lives and says that it is well."""
        try:
            return not self._dead and await self._health() < 400
        except PenstockError:
            return False

    async def metrics(self) -> str:
        """The server's metrics in Prometheus' text form. Raises ResponseError where there are none."""
        response = await self._ask("/metrics")
        if response.status != 200:
            raise response_error(response)
        return response.body.decode(errors="replace")

    # -- for the kinds of servers -----------------------------------------------------------------

    @property
    def _dead(self) -> bool:
        return self._died is not None and self._died.done()

    async def _death(self) -> EngineDied | None:
        """What a request that has failed may have failed of."""
        return self.died.result() if self._dead else None

    def _begin(self, base_url: str) -> None:
        """The server is, or will be, at this URL."""
        self.base_url = base_url
        self._died = asyncio.get_running_loop().create_future()
        self._pool = Pool(
            Address.parse(base_url), ssl_context=None if self.tls is None else self.tls.context()
        )

    async def _close_pool(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()

    async def _health(self) -> int:
        """The status of /health."""
        return (await self._ask("/health")).status

    async def _ask(self, path: str, limit: float = ASK_LIMIT) -> Response:
        try:
            async with asyncio.timeout(limit):
                return await self._request("GET", path)
        except TimeoutError as error:
            if isinstance(error, PhaseTimeout):
                raise
            raise PhaseTimeout(
                f"{self.base_url} did not answer {path} within {limit:g} s", "first_byte"
            ) from None

    async def _request(self, method: str, path: str, json: Any = None) -> Response:
        pool = self._open_pool()
        if self._dead:
            raise self.died.result()
        body = b"" if json is None else orjson.dumps(json)
        return await pool.request(self._head(pool.address, method, path), body)

    def _open_pool(self) -> Pool:
        if self._pool is None:
            raise ConfigError(
                "The server has not been started, or has been stopped: use it inside `async with`."
            )
        return self._pool

    def _head(self, address: Address, method: str, path: str) -> bytes:
        where = address.api + path.removeprefix("/v1") if path.startswith("/v1/") else address.root + path
        if not where.startswith("/") or not where.isascii() or not where.isprintable() or " " in where:
            raise ConfigError(f"{path!r} cannot be a path: it starts with / and is percent-encoded.")
        lines = [
            f"{method} {where} HTTP/1.1",
            f"host: {address.authority}",
            f"user-agent: penstock/{__version__}",
            "content-type: application/json",
        ]
        if self.api_key is not None:
            lines.append(f"authorization: Bearer {self.api_key}")
        return ("\r\n".join(lines) + "\r\n").encode("ascii")
