"""Limits of the machine, checked before they are met."""

from __future__ import annotations

import resource

from penstock.errors import ConfigError

SPARE_FILES = 128
"""Files a process needs besides its connections."""


def check_open_files(connections: int) -> None:
    """Raises ConfigError, with the command that mends it, where `connections` need more files than allowed.

    The soft limit is no obstacle: `penstock.wire.loop.run` raises it.
    """
    needed = connections + SPARE_FILES
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{connections} requests in flight need {needed} open files and this shell allows {hard}: "
            f"lower --max-concurrent to {max(hard - SPARE_FILES, 1)} or raise the limit "
            f"(as root: ulimit -Hn {needed})."
        )
