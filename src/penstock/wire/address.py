"""Where an endpoint is: a base URL, or a bare host:port, taken apart once.

`Address.parse` accepts what people write: `http://h:8000`, `http://h:8000/v1`, `h:8000`, `https://[::1]/v1`,
`https://gateway/team-a`. The OpenAI routes live under `api`, the engine's own (`/health`, `/metrics`) under
`root`. A path without a version segment gets `/v1`; one with a version segment is taken as it is, as the
openai package does with its `base_url`.

A UNIX socket is written `unix:///run/vllm.sock` or `unix:/run/vllm.sock`, the path taken as it is, or
`http+unix://%2Frun%2Fvllm.sock/v1`, the path percent-encoded and followed by a path of the server's.
"""

from __future__ import annotations

import os
import re
from typing import Final
from urllib.parse import quote, unquote_to_bytes

import msgspec

from penstock.errors import ConfigError

DEFAULT_PORTS: Final = {"http": 80, "https": 443}
MAX_SOCKET_PATH: Final = 107
"""Bytes of a UNIX socket's path: what the kernel's sockaddr_un holds, less the final zero."""

_URL = re.compile(
    r"(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://)?(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<rest>.*)"
)
_AUTHORITY = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[^\]]+)?)\]|(?P<name>[^:\[\]@]+))(?::(?P<port>[0-9]+))?"
)
_UNIX = re.compile(r"unix:(?://(?=/)|(?!//))(?P<path>/.*)", re.IGNORECASE | re.DOTALL)
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._~/@+:,=-]*")
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
    socket_path: str | None = None
    """UNIX socket connections are made to; host and port are then those of the Host header, `localhost`."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ConfigError, naming the text and what is wrong with it."""
        text = text.strip()
        if (plain := _UNIX.fullmatch(text)) is not None:
            return cls("http", "localhost", 80, socket_path=_socket_path(text, plain["path"]))
        match = _URL.fullmatch(text)
        if match is None or not match["authority"]:
            raise ConfigError(f"{text!r} is not a base URL; write it as http://host:port or host:port")
        scheme = (match["scheme"] or "http").lower()
        if scheme == "unix":
            raise ConfigError(f"{text!r}: write a UNIX socket as unix:///path, with three slashes")
        if scheme not in DEFAULT_PORTS and scheme != "http+unix":
            raise ConfigError(f"{text!r}: the scheme must be http, https, unix or http+unix, not {scheme!r}")
        if match["rest"]:
            raise ConfigError(f"{text!r}: a base URL has no query and no fragment")
        prefixes = _prefixes(text, match["path"].rstrip("/"))
        if scheme == "http+unix":
            path = _socket_path(text, os.fsdecode(unquote_to_bytes(match["authority"])))
            return cls("http", "localhost", 80, *prefixes, path)
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
        return cls(scheme, host, port, *prefixes)

    @property
    def authority(self) -> str:
        """Host and port as a URL writes them; the port is left out where it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        if self.socket_path is not None:
            if not self.root and _PLAIN_PATH.fullmatch(self.socket_path):
                return f"unix://{self.socket_path}"
            return f"http+unix://{quote(os.fsencode(self.socket_path), safe='')}{self.root}"
        return f"{self.scheme}://{self.authority}{self.root}"


def _host(text: str, host: str) -> str:
    try:
        host = host if ":" in host else host.encode("idna").decode("ascii")
    except UnicodeError:
        raise ConfigError(f"{text!r}: {host!r} is not a host name") from None
    if not host.isprintable() or " " in host:
        raise ConfigError(f"{text!r}: {host!r} is not a host name")
    return host.lower()


def _prefixes(text: str, path: str) -> tuple[str, str]:
    """`root` and `api` of a URL's path."""
    if not path.isascii() or not path.isprintable() or " " in path:
        raise ConfigError(f"{text!r}: the path holds characters that do not belong in a URL")
    version = _VERSION.search(path)
    return (path, path + "/v1") if version is None else (path[: version.start()], path)


def _socket_path(text: str, path: str) -> str:
    try:
        size = len(os.fsencode(path))
    except UnicodeError:
        raise ConfigError(f"{text!r}: {path!r} cannot be the path of a file") from None
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise ConfigError(f"{text!r}: {path!r} is not the absolute path of a UNIX socket")
    if size > MAX_SOCKET_PATH:
        raise ConfigError(
            f"{text!r}: the path of a UNIX socket has at most {MAX_SOCKET_PATH} bytes, this one {size}"
        )
    return path
