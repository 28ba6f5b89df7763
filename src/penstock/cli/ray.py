"""The flags of `penstock generate --ray`: light, for each run of the command loads them."""

from __future__ import annotations

from dataclasses import dataclass

SHARDS = 64
"""Shards where their number is not said: with 64 a lost worker costs little, and each is long enough."""


@dataclass(frozen=True)
class RayArgs:
    """Many machines."""

    ray: bool = False
    """Do the job on a Ray cluster, in shards. INPUT and OUT must be on a file system all machines see."""
    ray_address: str | None = None
    """HOST:PORT of its head. Default: RAY_ADDRESS, or the cluster this machine is part of."""
    shards: int = SHARDS
    """Parts of the input, each worked on by one worker at a time. A resume needs the same number."""
    workers: int | None = None
    """Workers, each with --max-concurrent samples at a time. Default: one for each machine."""
    ray_name: str | None = None
    """Use the engines that `penstock serve --ray` has registered under this name (its --ray-name)."""

    def changed(self) -> list[str]:
        """Flags that were given and say nothing without --ray."""
        given = {"--ray-address": self.ray_address, "--workers": self.workers, "--ray-name": self.ray_name}
        found = [name for name, value in given.items() if value is not None]
        return found + (["--shards"] if self.shards != SHARDS else [])
