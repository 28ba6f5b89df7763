"""Ports without races: reserved from the choice until the server listens, and known to be the server's.

A reserved port is bound, not listened on, with SO_REUSEADDR. The kernel then gives it to nobody who asks for
any free port, while a server that names it, with SO_REUSEADDR as servers do, can bind it and listen. So a
reservation needs no hand-over: it is released when the server has come up or has failed.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from penstock.errors import ConfigError

LISTEN: Final = "0A"
"""State of a listening socket in /proc/net/tcp."""


class ReservedPort:
    """A port of `host` held until `release`; 0 takes any free one.

    Raises ConfigError when somebody listens on it already, or the host is not an address of this machine.
    """

    def __init__(self, host: str, port: int = 0) -> None:
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except OSError as error:
            raise ConfigError(f"The host {host!r} cannot be resolved: {error.strerror}.") from None
        self._socket = socket.socket(family, kind, protocol)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(where)
        except OSError as error:
            self._socket.close()
            raise ConfigError(_refusal(host, port, error)) from None
        self.port: int = self._socket.getsockname()[1]

    def release(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _refusal(host: str, port: int, error: OSError) -> str:
    reason = (error.strerror or str(error)).lower()
    holders = [_name(pid) for pid in _holders(_running(), port)] if port else []
    by = f" by {', '.join(holders)}" if holders else ""
    return f"Port {port} of {host} cannot be used{by}: {reason}; choose another, or 0 for any free one."


def listens(pids: Iterable[int], port: int) -> bool:
    """Whether one of these processes listens on a TCP port. False where there is no /proc."""
    return next(_holders(pids, port), None) is not None


def _holders(pids: Iterable[int], port: int) -> Iterator[int]:
    """Those of the processes that listen on a port; `pids` is not looked at when nobody does."""
    wanted = {f"socket:[{inode}]" for inode in _listening(port)}
    if wanted:
        yield from (pid for pid in pids if wanted & _sockets(pid))


def can_tell() -> bool:
    """Whether this system says who listens on a port."""
    return Path("/proc/net/tcp").exists()


def _listening(port: int) -> set[str]:
    """Inodes of the sockets that listen on a port of this machine, whatever the address."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(fields[9])
    return found


def _sockets(pid: int) -> set[str]:
    found = set()
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            try:
                found.add(str(path.readlink()))
            except OSError:
                continue
    except OSError:
        pass
    return found


def _running() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _name(pid: int) -> str:
    try:
        return f"{Path(f'/proc/{pid}/comm').read_text().strip()} (process {pid})"
    except OSError:
        return f"process {pid}"
