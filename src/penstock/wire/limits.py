"""Limits of the machine, checked before they are met; a shortage is a ConfigError that names its cure."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Final

from penstock.errors import ConfigError

SPARE_FILES: Final = 128
"""Files a process needs besides its connections."""
WIDEST_PORT_RANGE: Final = (1024, 65535)
"""The local ports an unprivileged process may be given, first and last."""
PORT_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Where Linux tells the local ports it gives to connections, first and last."""


def check_open_files(connections: int, *, raised: bool = False) -> None:
    """Raises ConfigError, with the command that mends it, where `connections` need more files than allowed.

    raised: the soft limit is no obstacle, for `penstock.wire.loop.run` will have raised it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        compare_open_files(connections, hard)
    needed = connections + SPARE_FILES
    if not raised and soft != resource.RLIM_INFINITY and soft < needed:
        raise ConfigError(
            f"{connections} requests in flight need {needed} open files and this process allows itself "
            f"{soft}: raise the limit (ulimit -n {needed}, or penstock.wire.loop.raise_open_files() in the "
            "process)."
        )


def compare_open_files(connections: int, allowed: int) -> None:
    """Raises ConfigError where `connections` need more open files than are allowed."""
    needed = connections + SPARE_FILES
    if allowed < needed:
        raise ConfigError(
            f"{connections} requests in flight need {needed} open files and this shell allows {allowed}: "
            f"lower the concurrency to {max(allowed - SPARE_FILES, 1)} or raise the limit "
            f"(as root: ulimit -Hn {needed})."
        )


def check_local_ports(connections: int, sources: int = 1) -> None:
    """Raises ConfigError where connections to one address and port need more local ports than there are.

    sources: number of local addresses the connections are made from; each has all local ports to itself. A
    machine that does not tell its range of local ports is not checked.
    """
    try:
        first, last = map(int, PORT_RANGE.read_text().split())
    except (OSError, ValueError):
        return
    compare_local_ports(connections, sources, last - first + 1)


def compare_local_ports(connections: int, sources: int, ports: int) -> None:
    """Raises ConfigError where `sources` addresses with `ports` local ports each are too few."""
    if connections <= sources * ports:
        return
    first, last = WIDEST_PORT_RANGE
    enough = connections <= sources * (last - first + 1)
    command = f"as root: sysctl -w net.ipv4.ip_local_port_range='{first} {last}'"
    widening = (
        f"widen the range ({command})"
        if enough
        else f"widen the range ({command}), which is not enough alone,"
    )
    raise ConfigError(
        f"{connections} connections to one address need as many local ports and this machine has {ports} for "
        f"each of {sources} source address{'es' if sources > 1 else ''}: {widening} or connect from "
        f"{-(-connections // ports)} source addresses (on loopback 127.0.0.2, 127.0.0.3, …)."
    )
