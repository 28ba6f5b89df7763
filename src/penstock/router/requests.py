"""Requests out of a client's bytes: what is malformed, ambiguous or too large is refused here.

It guarantees:
- one framing: a request with more than one length, a length and chunks, an unknown coding or none or two
  hosts is a `Refusal`, as is all that the parser does not take for HTTP/1.1;
- heads and their fields are bounded, bodies by the server's `max_body`;
- a relay's fields hold what passes, and nothing that belongs to this connection alone.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import httptools

from penstock.router.heads import (
    AUTHORIZATION,
    CONNECTION,
    CONTENT_ENCODING,
    CONTENT_LENGTH,
    CONTENT_TYPE,
    DROP,
    EXPECT,
    HOST,
    KIND,
    PASS,
    REQUEST_ID,
    REQUEST_TIMEOUT,
    RESUME,
    RETRY_AFTER,
    SESSION,
    TRANSFER_ENCODING,
    learn,
    without_named,
)
from penstock.router.relay import Relay
from penstock.wire.exchange import Exchange
from penstock.wire.server import MAX_HEAD, HttpServer

if TYPE_CHECKING:
    from penstock.router.router import Router

_PASSING: Final = frozenset({PASS, CONTENT_TYPE})
MAX_FIELDS: Final = 256
"""Header fields of one request."""
MAX_REQUEST_ID: Final = 256
"""Bytes of an X-Request-Id that is taken over; a longer one is replaced."""


class Refusal(Exception):
    """A request that is answered with an error and a close."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RequestReader(asyncio.Protocol, ABC):
    """The callbacks of one connection's parser."""

    __slots__ = (
        "_current",
        "_exchange",
        "_head_done",
        "_head_size",
        "_last_seen",
        "_parser",
        "_queue",
        "_receiving",
        "_server",
        "_since",
        "_url",
        "router",
        "write",
    )

    def __init__(self, server: HttpServer, router: Router) -> None:
        self._server = server
        self.router = router
        self._parser = httptools.HttpRequestParser(self)
        self._receiving: Relay | None = None
        """The request that is being received."""
        self._current: Relay | None = None
        """The one that is being answered; it may be received still."""
        self._exchange: Exchange | None = None
        """The same, where the router answers itself."""
        self._queue: deque[Relay] = deque()
        """Complete requests whose turn has not come."""
        self._url = b""
        self._head_size = 0
        self._head_done = False
        self._last_seen = False
        """No further request is read."""
        self._since = server.clock()
        """When the present state began."""
        self.write: Callable[[bytes], None] = nowhere

    @abstractmethod
    def _new_relay(self) -> Relay:
        """A request begins."""

    def on_message_begin(self) -> None:
        self._receiving = self._new_relay()
        self._url = b""
        self._head_size = 0
        self._head_done = False
        self._since = self._server.clock()

    def on_url(self, url: bytes) -> None:
        self._url = self._url + url if self._url else url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_done:
            return  # a trailer
        self._head_size += len(name) + len(value) + 4
        kind = KIND.get(name, -1)
        if kind < 0:
            kind = learn(name)
        request = self._receiving
        assert request is not None
        if kind in _PASSING:
            request.fields += (name, b": ", value, b"\r\n")
        elif kind == CONTENT_LENGTH:
            request.length = int(value)
        else:
            self._special(request, kind, name, value)

    def _special(self, request: Relay, kind: int, name: bytes, value: bytes) -> None:
        if kind == HOST:
            if request.host is not None:
                raise Refusal(400, "the request has more than one Host header")
            request.host = value
        elif kind == RETRY_AFTER:
            request.fields += (name, b": ", value, b"\r\n")
        elif kind == AUTHORIZATION:
            request.authorization = value
            if self.router.forwards_authorization:
                request.fields += (name, b": ", value, b"\r\n")
        elif kind == CONNECTION:
            if value.lower() not in (b"keep-alive", b"close"):
                request.connection_fields = [*(request.connection_fields or ()), value]
        elif kind == TRANSFER_ENCODING:
            if value.lower() != b"chunked":
                raise Refusal(400, "the only transfer coding understood is chunked")
            request.chunked = True
        elif kind == REQUEST_ID:
            request.request_id = value if 0 < len(value) <= MAX_REQUEST_ID and value.isascii() else None
        elif kind == SESSION:
            request.session = value
            request.fields += (name, b": ", value, b"\r\n")
        elif kind == CONTENT_ENCODING:
            request.encoded = True
            request.fields += (name, b": ", value, b"\r\n")
        elif kind == EXPECT:
            request.expect = True
        elif kind == RESUME:
            request.resume = value
        elif kind == REQUEST_TIMEOUT:
            request.timeout = value
            request.fields += (name, b": ", value, b"\r\n")
        else:
            assert kind == DROP

    def on_headers_complete(self) -> None:
        self._head_done = True
        request, parser = self._receiving, self._parser
        assert request is not None
        if self._head_size + len(self._url) > MAX_HEAD:
            raise Refusal(431, f"the request head is larger than {MAX_HEAD} bytes")
        if len(request.fields) > 4 * MAX_FIELDS:
            raise Refusal(431, f"the request has more than {MAX_FIELDS} header fields")
        request.method = parser.get_method()
        request.keep_alive = parser.should_keep_alive()
        version = parser.get_http_version()
        if version != "1.1":
            if version != "1.0":
                raise Refusal(400, "the HTTP version is not 1.0 or 1.1")
            if request.chunked:
                raise Refusal(400, "an HTTP/1.0 request cannot be chunked")
            request.http10, request.keep_alive = True, False
        elif request.host is None:
            raise Refusal(400, "the request has no Host header")
        if request.connection_fields is not None:
            request.fields = without_named(request.fields, request.connection_fields)
        self._set_target(request)
        request.denied = not self.router.admits(request)
        if request.length is not None and request.length > self._server.max_body:
            self._too_large()
        if request.expect and (request.length or request.chunked):
            if request.denied:
                raise Refusal(401, "a valid API key is needed")
            if self._current is None and self._exchange is None and not self._queue:
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _set_target(self, request: Relay) -> None:
        url = self._url
        if not url.startswith(b"/") and url != b"*":
            scheme, separator, rest = url.partition(b"://")
            if not separator or scheme.lower() not in (b"http", b"https"):
                raise Refusal(400, "the request target is neither a path nor an http URL")
            url = b"/" + rest.partition(b"/")[2]
        request.target = url
        request.path = url.partition(b"?")[0] if b"?" in url else url

    def on_body(self, data: bytes) -> None:
        request = self._receiving
        assert request is not None
        request.size += len(data)
        if request.size > self._server.max_body:
            self._too_large()
        if request.denied:
            return
        if request is self._current:
            self._since = self._server.clock()
            request.feed(data)
        else:
            request.body.append(data)

    def on_message_complete(self) -> None:
        request = self._receiving
        if request is None or self._last_seen or self._parser.should_upgrade():
            return
        request.complete = True
        self._receiving = None
        self._last_seen = not request.keep_alive
        if request is self._current:
            request.finish()
        elif not self._queue or self._queue[-1] is not request:
            self._queue.append(request)

    def _too_large(self) -> None:
        raise Refusal(413, f"the request body is larger than {self._server.max_body} bytes")


def nowhere(data: bytes) -> None:
    """The client has gone."""
