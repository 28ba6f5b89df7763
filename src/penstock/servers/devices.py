"""GPUs dealt out to the servers of a fleet. Pure: what the machine has is handed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from penstock.errors import ConfigError

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"


def visible(count: int, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs a process may use on a machine with `count`: by index, or as CUDA_VISIBLE_DEVICES says."""
    named = environment.get(VISIBLE)
    if named is None:
        return tuple(map(str, range(count)))
    # CUDA itself ignores what follows the first -1.
    found: list[str] = []
    for name in (part.strip() for part in named.split(",")):
        if not name or name == "-1":
            break
        found.append(name)
    return tuple(found)


def deal(devices: Sequence[int | str], servers: int, each: int) -> list[tuple[str, ...]]:
    """`each` neighbouring devices for every server, none twice: neighbours are the best connected.

    Raises ConfigError when there are too few, or one is named twice.
    """
    names = [str(device) for device in devices]
    if len(set(names)) < len(names):
        raise ConfigError(f"A device is named twice: {', '.join(names)}.")
    if len(names) < servers * each:
        raise ConfigError(
            f"{servers} server{'s' if servers > 1 else ''} of {each} GPU{'s' if each > 1 else ''} "
            f"need{'' if servers > 1 else 's'} {servers * each}, and there are {len(names)}: use fewer "
            "replicas, or a smaller tp, dp or pp."
        )
    return [tuple(names[place * each : (place + 1) * each]) for place in range(servers)]
