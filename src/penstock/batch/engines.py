"""What is asked of engines before a job begins: what they serve, what they are, whether they take requests.

It guarantees that a server that is not up, a wrong model's name, a missing key and a parameter that engines
refuse are one sentence before anything is generated, and not a failure for every row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from penstock.batch.context import overflow_of
from penstock.client import Client
from penstock.errors import ConfigError, RequestRejected, ResponseError, TransportError
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.fleet import Fleet
from penstock.fleet.monitor import ask
from penstock.sample import SamplingParams
from penstock.wire.tls import TLS

NO_MODEL_LIST: Final = 404
"""Status of a server that does not list its models; the name given is then taken on trust."""

OF_THE_JOB: Final = frozenset({401, 403, 404})
"""Statuses that concern every request of a job: no key, no permission, no such model."""

VERSION_TIMEOUT: Final = 5.0
"""Seconds an engine has to say its version."""

VERSION_ROUTES: Final = ("/version", "/get_server_info")
"""vLLM's and the embedded engine's; SGLang's."""


async def served_model(
    urls: Sequence[str], wanted: str | None, api_key: str | None, tls: TLS | None = None
) -> str:
    """The name requests will call the model, after asking each server what it serves.

    Raises ConfigError when a server does not answer, refuses, or does not serve `wanted`; without it the
    servers must all serve the same single model.
    """
    served = {url: await _models_of(url, wanted, api_key, tls) for url in urls}
    common = set.intersection(*map(set, served.values()))
    if wanted is None and len(common) == 1:
        return common.pop()
    if wanted in common:
        return wanted
    url, names = next((url, names) for url, names in served.items() if wanted not in names)
    offer = ", ".join(names) or "no model at all"
    if wanted is None:
        raise ConfigError(f"Which model? {url} serves {offer}: name one that all servers have with --model.")
    raise ConfigError(f"{url} does not serve the model {wanted!r}: give --model one of {offer}.")


async def only_model(client: Client) -> str:
    """The model of an open client that names none: the only one its engines serve. Raises ConfigError."""
    names = await client.models()
    if len(names) != 1:
        raise ConfigError(f"Which model? The engines serve {', '.join(names) or 'none'}: name one.")
    return names[0]


async def preflight(client: Client, model: str | None, params: SamplingParams, *, chat: bool) -> None:
    """One token, asked for as the job's requests will be.

    chat: the job sends chats with just these parameters, so that whatever is refused is refused for every
    row; of a rollout function only the key and the model can be judged. Raises ConfigError.
    """
    wanted = msgspec.structs.replace(params, max_tokens=1, min_tokens=None)
    try:
        await client.chat([{"role": "user", "content": "Hi"}], wanted, model=model)
    except RequestRejected as error:
        if error.status in OF_THE_JOB or (chat and overflow_of(error) is None):
            raise ConfigError(f"The engines refuse the job's requests before it has begun: {error}") from None


async def versions(fleet: Fleet) -> dict[str, str]:
    """What each endpoint says of its version, by the endpoint's name; those that say nothing are left out."""
    endpoints = fleet.endpoints
    found = await asyncio.gather(*(_version(fleet, endpoint) for endpoint in endpoints))
    return {endpoint.name: version for endpoint, version in zip(endpoints, found, strict=True) if version}


class _Version(msgspec.Struct):
    version: str = ""


_decode: Final = msgspec.json.Decoder(_Version).decode


async def _version(fleet: Fleet, endpoint: Endpoint) -> str:
    for route in VERSION_ROUTES:
        try:
            response = await ask(fleet, endpoint, endpoint.address.root + route, timeout=VERSION_TIMEOUT)
            if response.status == 200:
                return _decode(response.body).version
        except (TransportError, msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return ""


async def _models_of(url: str, wanted: str | None, api_key: str | None, tls: TLS | None) -> list[str]:
    options: dict[str, Any] = {} if tls is None else {"tls": tls}
    async with Client(url, api_key=api_key, **options) as client:
        try:
            return await client.models()
        except TransportError as error:
            raise ConfigError(f"No engine answers at {url} ({error}): start it, or name another.") from None
        except ResponseError as error:
            if error.status == NO_MODEL_LIST and wanted is not None:
                return [wanted]
            raise ConfigError(
                f"{url} does not say what it serves ({error}): check URL, key and --model."
            ) from None
