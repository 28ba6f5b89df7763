"""A server that runs already, behind the same interface as those that are started here.

Entering the block proves that it answers, takes the key and serves the model; nothing is started or stopped.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from penstock.errors import ConfigError, ResponseError, TransportError
from penstock.servers.server import Server
from penstock.wire.openai import model_names, response_error
from penstock.wire.tls import TLS

UNAUTHORIZED = (401, 403)


class EndpointServer(Server):
    """`async with EndpointServer("https://host/v1", api_key=…) as server`.

    base_url: with `/v1` or without. name: the model; None when the server offers only one. tls: for https.
    Raises ConfigError on entering when the server does not answer, refuses the key or lacks the model.
    """

    def __init__(
        self,
        base_url: str,
        *,
        name: str | None = None,
        api_key: str | None = None,
        tls: TLS | None = None,
    ) -> None:
        super().__init__(name or "", api_key, tls)
        self._url = base_url
        self._wanted = name

    async def __aenter__(self) -> Self:
        if self._pool is not None:
            raise ConfigError("The server is already in use: make one for each block.")
        self._begin(self._url)
        try:
            self.name = self._chosen(await self._models())
        except BaseException:
            await self._close_pool()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close_pool()

    async def _models(self) -> list[str]:
        try:
            response = await self._ask("/v1/models")
            if response.status == 200:
                return model_names(response.body)
            raise response_error(response)
        except TransportError as error:
            raise ConfigError(
                f"No server answers at {self._url} ({error}): start it, or name another."
            ) from None
        except ResponseError as error:
            if error.status in UNAUTHORIZED:
                key = "a key is needed" if self.api_key is None else "the key is refused"
                raise ConfigError(f"{self._url}: {key} ({error}); give another api_key.") from None
            if error.status == 404 and self._wanted is not None:
                return [self._wanted]  # it does not list its models; the name is taken on trust
            raise ConfigError(f"{self._url} does not say what it serves ({error}): check the URL.") from None

    def _chosen(self, offered: list[str]) -> str:
        if self._wanted is not None and self._wanted in offered:
            return self._wanted
        if self._wanted is None and len(offered) == 1:
            return offered[0]
        offer = ", ".join(offered) or "no model at all"
        wanted = "name one of them" if self._wanted is None else f"not {self._wanted!r}"
        raise ConfigError(f"{self._url} serves {offer}: {wanted}.")
