"""Who may ask: API keys, as vLLM checks them.

Only paths that begin with one of GUARDED are guarded, and no OPTIONS request is.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from hashlib import sha256
from typing import Final

from penstock.wire.server import Request

GUARDED: Final = ("/v1", "/v2", "/inference", "/cohere")
"""Beginnings of the paths that need a key; control, health and metrics do not."""

UNAUTHORIZED: Final = b'{"error":"Unauthorized"}'
"""The body of a 401."""


class ApiKeys:
    """Keys of which any one opens every guarded path."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def admit(self, request: Request) -> bool:
        """Whether a request needs no key or brings one; how long it takes tells nothing about the keys."""
        if request.method == "OPTIONS" or not request.path.startswith(GUARDED):
            return True
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        # Header bytes are read as Latin-1; a key that is not ASCII was sent as UTF-8.
        digest = sha256(key.encode("latin-1")).digest()
        found = False
        for known in self._digests:
            found |= secrets.compare_digest(digest, known)
        return found
