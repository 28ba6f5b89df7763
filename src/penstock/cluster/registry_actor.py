"""The registry as an actor: what `penstock.cluster.registry` decides, for whoever asks over Ray.

Its process may be restarted at any time: it then has a new epoch, and hears of all living engines again
within a beat. Every question is answered within the time it gives.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

from penstock.cluster.follow import actor_name
from penstock.cluster.nodes import NODE_LABEL
from penstock.cluster.registry import Entry, Registry, Snapshot
from penstock.cluster.session import NAMESPACE
from penstock.errors import ConfigError


class RegistryActor:
    """Becomes a Ray actor in `start_registry`."""

    def __init__(self) -> None:
        self._registry = Registry(secrets.token_hex(8), time.monotonic())
        self._changed = asyncio.Event()
        self._revision = 0

    async def announce(self, entry: Entry) -> bool:
        """An engine is there. Whether it is wanted."""
        wanted = self._registry.announce(entry, time.monotonic())
        self._tell()
        return wanted

    async def leave(self, replica: str) -> None:
        self._registry.leave(replica, time.monotonic())
        self._tell()

    async def watch(self, epoch: str, revision: int, timeout: float) -> Snapshot:
        """The entries, as soon as they differ from this revision; after `timeout` seconds as they are."""
        registry = self._registry
        deadline = time.monotonic() + timeout
        while True:
            now = time.monotonic()
            registry.expire(now)
            self._tell()
            if (registry.epoch, registry.revision) != (epoch, revision) or now >= deadline:
                return registry.snapshot()
            changed = self._changed
            try:
                async with asyncio.timeout(min(deadline - now, registry.next_look(now) + 0.01)):
                    await changed.wait()
            except TimeoutError:
                pass

    def _tell(self) -> None:
        if self._registry.revision != self._revision:
            self._revision = self._registry.revision
            self._changed.set()
            self._changed = asyncio.Event()


QUESTIONS = 10_000
"""Questions that may be open at a time: one of each client and router."""


def start_registry(name: str) -> Any:
    """The actor, on this node. Raises ConfigError when the name is taken."""
    import ray

    options: dict[str, Any] = {
        "name": actor_name(name),
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_concurrency": QUESTIONS,
        "label_selector": here(),
    }
    try:
        return ray.remote(RegistryActor).options(**options).remote()
    except ValueError:
        raise ConfigError(
            f"There are engines registered as {name!r} on this Ray cluster already: choose another name."
        ) from None


def here() -> dict[str, str]:
    """Ray's way to say: on this node. With it dies whoever asks for it, and all that belongs to them."""
    import ray

    return {NODE_LABEL: ray.get_runtime_context().get_node_id()}
