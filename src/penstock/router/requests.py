"""Requests out of a client's bytes: what is malformed, ambiguous or too large is refused here.

It guarantees:
- one framing: a request with more than one length, a length and chunks, an unknown coding or none or two
  hosts is a `Refusal`, as is all that the parser does not take for HTTP/1.1;
- heads and their fields are bounded, bodies by the server's `max_body`;
- a head's fields hold what passes, and nothing that belongs to this connection alone;
- the parser is passed by only for a whole request whose head it has taken before: see `KnownHeads`.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_to_bytes

import msgspec

from penstock.router.heads import (
    AUTHORIZATION,
    CONNECTION,
    CONTENT_ENCODING,
    CONTENT_LENGTH,
    CONTENT_TYPE,
    DROP,
    END,
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
    Cut,
    cut,
    learn,
    without_named,
)
from penstock.router.relay import Relay
from penstock.wire.accepted import MAX_HEAD, AcceptedConnection, Refusal
from penstock.wire.server import HttpServer

if TYPE_CHECKING:
    from penstock.router.router import Router

_PASSING: Final = frozenset({PASS, CONTENT_TYPE})
_HTTP_URL: Final = re.compile(rb"(?i:https?)://[^/?]+(.*)", re.DOTALL)
MAX_FIELDS: Final = 256
"""Header fields of one request."""
MAX_REQUEST_ID: Final = 256
"""Bytes of an X-Request-Id that is taken over; a longer one is replaced."""


class RequestHead(msgspec.Struct, eq=False):
    """What a head says, but for the values of content-length and x-request-id.

    Filled in by the parser, then only read: requests with the same head share it.
    """

    method: bytes = b""
    target: bytes = b""
    """As it is sent on."""
    path: bytes = b""
    """Percent-decoded, without the query."""
    fields: list[bytes] = []
    """Header fields that pass: name, separator, value and line end in turn."""
    passing: bytes = b""
    """The same in one piece, with the router's own."""
    host: bytes | None = None
    authorization: bytes | None = None
    session: bytes | None = None
    resume: bytes | None = None
    timeout: bytes | None = None
    connection_fields: list[bytes] = []
    """Values of `Connection` other than keep-alive and close."""
    chunked: bool = False
    encoded: bool = False
    """The body is compressed."""
    expect: bool = False
    http10: bool = False
    keep_alive: bool = True
    denied: bool = False
    """It has no valid key. A router's keys stay as they are while it runs."""

    def sending(self, fields: list[bytes], own: bytes) -> RequestHead:
        """The same with other fields; own: the router's."""
        return msgspec.structs.replace(self, fields=fields, passing=b"".join([*fields, own]))

    @property
    def common(self) -> bool:
        """A request with this head may be one like others: nothing in it is but for this one."""
        return self.keep_alive and not (self.chunked or self.expect or self.denied or self.connection_fields)


class RequestReader(AcceptedConnection):
    """The callbacks of one connection's parser, and the way past it."""

    __slots__ = ("_body_of", "_cut", "_head", "_head_size", "_id", "_length", "_queue", "router")

    def __init__(self, server: HttpServer, router: Router) -> None:
        super().__init__(server)
        self.router = router
        self._head = RequestHead()
        """The one received last."""
        self._head_size = 0
        self._length: int | None = None
        self._id: bytes | None = None
        self._cut: Cut | None = None
        """Set while just these bytes are parsed, from the beginning of a request."""
        self._body_of: Relay | None = None
        """The request whose body is being received."""
        self._queue: deque[Relay] = deque()
        """Complete requests whose turn has not come."""

    @abstractmethod
    def _new_relay(self, head: RequestHead, length: int | None, id: bytes | None) -> Relay:
        """A head has been received."""

    def _read(self, data: bytes) -> Relay | None:
        """What comes first in `data`, if it is a whole request and nothing else; else it is parsed."""
        if not self._receiving:
            found = self.router.heads.find(data)
            if found is not None:
                head, end, length, id = found
                size = length or 0
                if len(data) == end + size and size <= self._server.max_body:
                    request = self._new_relay(head, length, id)
                    if size:
                        request.body.append(data[end:])
                        request.size = size
                    request.complete = True
                    self._fresh = False
                    return request
            end = data.find(END) + len(END)
            if end >= len(END):
                self._cut = cut(data[:end])
                self._parse(data[:end])
                self._cut = None
                data = data[end:]
        if data and not self._last_seen:
            self._parse(data)
        return None

    # -- the parser's side ------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = RequestHead()
        self._head_size = 0
        self._length = self._id = None

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_done:
            return  # a trailer
        self._head_size += len(name) + len(value) + 4
        kind = KIND.get(name, -1)
        if kind < 0:
            kind = learn(name)
        if kind in _PASSING:
            self._head.fields += (name, b": ", value, b"\r\n")
        elif kind == CONTENT_LENGTH:
            self._length = int(value)
        else:
            self._special(self._head, kind, name, value)

    def _special(self, head: RequestHead, kind: int, name: bytes, value: bytes) -> None:
        if kind == HOST:
            if head.host is not None:
                raise Refusal(400, "the request has more than one Host header")
            head.host = value
        elif kind == RETRY_AFTER:
            head.fields += (name, b": ", value, b"\r\n")
        elif kind == AUTHORIZATION:
            head.authorization = value
            if self.router.forwards_authorization:
                head.fields += (name, b": ", value, b"\r\n")
        elif kind == CONNECTION:
            if value.lower() not in (b"keep-alive", b"close"):
                head.connection_fields.append(value)
        elif kind == TRANSFER_ENCODING:
            if value.lower() != b"chunked":
                raise Refusal(400, "the only transfer coding understood is chunked")
            head.chunked = True
        elif kind == REQUEST_ID:
            self._id = value if 0 < len(value) <= MAX_REQUEST_ID and value.isascii() else None
        elif kind == SESSION:
            head.session = value
            head.fields += (name, b": ", value, b"\r\n")
        elif kind == CONTENT_ENCODING:
            head.encoded = True
            head.fields += (name, b": ", value, b"\r\n")
        elif kind == EXPECT:
            head.expect = True
        elif kind == RESUME:
            head.resume = value
        elif kind == REQUEST_TIMEOUT:
            head.timeout = value
            head.fields += (name, b": ", value, b"\r\n")
        else:
            assert kind == DROP

    def on_headers_complete(self) -> None:
        self._head_done = self._begun = True
        self._head_raw = 0
        self._since = self._server.clock()
        head, parser, length = self._head, self._parser, self._length
        if self._head_size + len(self._url) > MAX_HEAD:
            raise Refusal(431, f"the request head is larger than {MAX_HEAD} bytes")
        if len(head.fields) > 4 * MAX_FIELDS:
            raise Refusal(431, f"the request has more than {MAX_FIELDS} header fields")
        head.method = parser.get_method()
        head.keep_alive = parser.should_keep_alive()
        version = parser.get_http_version()
        if version != "1.1":
            if version != "1.0":
                raise Refusal(400, "the HTTP version is not 1.0 or 1.1")
            if head.chunked:
                raise Refusal(400, "an HTTP/1.0 request cannot be chunked")
            head.http10, head.keep_alive = True, False
        elif head.host is None:
            raise Refusal(400, "the request has no Host header")
        if head.connection_fields:
            head.fields = without_named(head.fields, head.connection_fields)
        head.passing = b"".join([*head.fields, self.router.own_fields])
        self._set_target(head)
        request = self._new_relay(head, length, self._id)
        head.denied = not self.router.admits(request)
        if length is not None and length > self._server.max_body:
            self._too_large()
        if head.expect and (length or head.chunked):
            if head.denied:
                raise Refusal(401, "a valid API key is needed")
            if self._pending is None and not self._queue:
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._body_of = request
        if self._cut is not None and head.common and not parser.should_upgrade():
            self.router.heads.remember(self._cut, length, self._id, head)

    def _set_target(self, head: RequestHead) -> None:
        url = self._url
        if b"#" in url:
            raise Refusal(400, "the request target has a fragment")
        if not url.startswith(b"/") and url != b"*":
            found = _HTTP_URL.fullmatch(url)
            if found is None:
                raise Refusal(400, "the request target is neither a path nor an http URL")
            url = found[1] if found[1].startswith(b"/") else b"/" + found[1]
        head.target = url
        path = url.partition(b"?")[0] if b"?" in url else url
        head.path = unquote_to_bytes(path) if b"%" in path else path  # as engines read it

    def on_body(self, data: bytes) -> None:
        request = self._body_of
        assert request is not None
        self._begun = True
        self._head_raw = 0
        self._since = self._server.clock()
        request.size += len(data)
        if request.size > self._server.max_body:
            self._too_large()
        if request.head.denied:
            return
        if request is self._pending:
            request.feed(data)
        else:
            request.body.append(data)

    def on_message_complete(self) -> None:
        request, self._body_of = self._body_of, None
        self._receiving = False
        if request is None or self._last_seen or self._parser.should_upgrade():
            return
        request.complete = True
        self._last_seen = not request.head.keep_alive
        if request is self._pending:
            request.finish()
        elif not self._queue or self._queue[-1] is not request:
            self._queue.append(request)

    def _too_large(self) -> None:
        raise Refusal(413, f"the request body is larger than {self._server.max_body} bytes")
