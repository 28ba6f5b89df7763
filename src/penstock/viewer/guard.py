"""Who may ask the viewer.

A page elsewhere must not read a local file through the reader's own browser: the Host header has to name an
address or this machine, never a name that somebody's DNS may point here. Where the viewer listens for other
machines, every path begins with a secret besides.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from typing import Final

from penstock.wire.exchange import Request

TOKEN_BYTES: Final = 18


class Guard:
    """Of a viewer that listens on `host`."""

    def __init__(self, host: str) -> None:
        self.token = None if is_loopback(host) else secrets.token_urlsafe(TOKEN_BYTES)
        """What every path begins with; None: nothing."""
        self._names = {"localhost", host.lower()}
        if self.token is not None:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    @property
    def prefix(self) -> str:
        return "/" if self.token is None else f"/{self.token}/"

    def path(self, request: Request) -> str | None:
        """The path behind the secret, without a leading slash; None where the request is not for us."""
        if not self._is_ours(request.headers.get("host", "")):
            return None
        first, slash, rest = request.path.removeprefix("/").partition("/")
        if self.token is None:
            return first + slash + rest
        return rest if slash and hmac.compare_digest(first.encode(), self.token.encode()) else None

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        if name.lower() in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
