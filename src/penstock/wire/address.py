"""Where an endpoint is: a base URL, or a bare host:port, taken apart once.

`Address.parse` accepts what people write: `http://h:8000`, `http://h:8000/v1`, `h:8000`, `https://[::1]/v1`,
`https://gateway/team-a`. The OpenAI routes live under `api`, the engine's own (`/health`, `/metrics`) under
`root`. A path without a version segment gets `/v1`; one with a version segment is taken as it is, as the
openai package does with its `base_url`.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from penstock.errors import ConfigError

DEFAULT_PORTS: Final = {"http": 80, "https": 443}

_URL = re.compile(
    r"(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://)?(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<rest>.*)"
)
_AUTHORITY = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[^\]]+)?)\]|(?P<name>[^:\[\]@]+))(?::(?P<port>[0-9]+))?"
)
_VERSION = re.compile(r"/v[0-9]+[a-z0-9]*(?=/|$)")


class Address(msgspec.Struct, frozen=True):
    """One endpoint's address. Equal addresses are the same endpoint."""

    scheme: str
    """`http` or `https`."""
    host: str
    """Name or address, lower-case, IPv6 without brackets."""
    port: int
    root: str = ""
    """Path prefix of the engine's own routes, empty or `/…` without a trailing slash."""
    api: str = "/v1"
    """Path prefix of the OpenAI routes."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ConfigError, naming the text and what is wrong with it."""
        match = _URL.fullmatch(text.strip())
        if match is None or not match["authority"]:
            raise ConfigError(f"{text!r} is not a base URL; write it as http://host:port or host:port")
        scheme = (match["scheme"] or "http").lower()
        if scheme not in DEFAULT_PORTS:
            raise ConfigError(f"{text!r}: the scheme must be http or https, not {scheme!r}")
        if match["rest"]:
            raise ConfigError(f"{text!r}: a base URL has no query and no fragment")
        if "@" in match["authority"]:
            raise ConfigError(
                "a base URL holds no user name and password; give a key with the API key option"
            )
        authority = _AUTHORITY.fullmatch(match["authority"])
        if authority is None:
            raise ConfigError(
                f"{text!r}: the host and port cannot be read; an IPv6 address is written in brackets"
            )
        host = _host(text, authority["v6"] or authority["name"])
        port = int(authority["port"] or DEFAULT_PORTS[scheme])
        if not 0 < port < 65536:
            raise ConfigError(f"{text!r}: the port must be between 1 and 65535")
        path = match["path"].rstrip("/")
        if not path.isascii() or not path.isprintable() or " " in path:
            raise ConfigError(f"{text!r}: the path holds characters that do not belong in a URL")
        version = _VERSION.search(path)
        if version is None:
            return cls(scheme, host, port, path, path + "/v1")
        return cls(scheme, host, port, path[: version.start()], path)

    @property
    def authority(self) -> str:
        """Host and port as a URL writes them; the port is left out where it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.root}"


def _host(text: str, host: str) -> str:
    try:
        host = host if ":" in host else host.encode("idna").decode("ascii")
    except UnicodeError:
        raise ConfigError(f"{text!r}: {host!r} is not a host name") from None
    if not host.isprintable() or " " in host:
        raise ConfigError(f"{text!r}: {host!r} is not a host name")
    return host.lower()
