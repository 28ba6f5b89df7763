"""What is remembered of heads never changes what is made of a message: with it and without it, the same."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import PenstockError
from penstock.router import heads
from penstock.router.heads import KnownHeads
from penstock.router.inlet import Inlet
from penstock.router.relay import Relay
from penstock.router.upstream import EngineConnection, RelayPool
from penstock.wire.accepted import Refusal
from penstock.wire.address import Address
from penstock.wire.connection import Connection
from penstock.wire.server import HttpServer
from tests.scripted import run

VALUES = st.sampled_from(
    [b"0", b"1", b"3", b"03", b"12", b"+3", b"3 ", b" 3", b"3, 3", b"", b"9" * 16, b"x", b"a b", b"z" * 257]
)
NAMES = st.sampled_from(
    [b"content-length", b"Content-Length", b"CONTENT-LENGTH", b"x-request-id", b"X-Request-Id"]
)
FIELDS = st.one_of(
    st.tuples(
        NAMES,
        st.sampled_from([b": ", b":", b" : ", b":\t"]),
        VALUES,
        st.just(b"\r\n"),
    ),
    st.sampled_from(
        [
            (b"host", b": ", b"a", b"\r\n"),
            (b"x-session-id", b": ", b"s", b"\r\n"),
            (b"transfer-encoding", b": ", b"chunked", b"\r\n"),
            (b"connection", b": ", b"close", b"\r\n"),
            (b"connection", b": ", b"content-length, x-one", b"\r\n"),
            (b"x-one", b": ", b"content-length: 3", b"\r\n"),
            (b"x-two", b": ", b"1", b"\r\n "),
            (b"x-two", b": ", b"1\0", b"\r\n"),
            (b"x-two", b": ", b"1", b"\n"),
            (b"expect", b": ", b"100-continue", b"\r\n"),
            (b"upgrade", b": ", b"h2c", b"\r\n"),
        ]
    ),
).map(b"".join)
BODIES = st.sampled_from(
    [b"", b"a", b"abc", b"3\r\nabc\r\n0\r\n\r\n", b"abcdefghijkl", b"\r\n\r\n", b"GET / HT"]
)


def messages(*starts: bytes) -> st.SearchStrategy[list[bytes]]:
    """Messages, good and bad, of a few heads, so that the same ones come again."""
    fields = st.lists(FIELDS, max_size=3).map(b"".join)
    one = st.tuples(st.sampled_from(starts), fields, st.just(b"\r\n"), BODIES)
    return st.lists(one.map(b"".join), min_size=1, max_size=3).flatmap(
        lambda few: st.lists(st.sampled_from(few), min_size=2, max_size=6)
    )


class Forgetful(KnownHeads[Any]):
    def find(self, data: bytes) -> None:
        return None


class Transport:
    """Takes what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def is_reading(self) -> bool:
        return True

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None: ...

    resume_reading = pause_reading


class Recording(Inlet):
    """Takes up each request, and answers it at once."""

    def __init__(self, known: KnownHeads[Any]) -> None:
        router = SimpleNamespace(
            heads=known, own_fields=b"", forwards_authorization=True, access_log=None,
            admits=lambda request: True, statistics=SimpleNamespace(refused=0),
        )  # fmt: skip
        super().__init__(cast(HttpServer, Server()), cast(Any, router))
        self.seen: list[object] = []

    def _begin(self, request: Relay) -> None:
        head = request.head
        said = (head.method, head.target, head.path, head.passing, head.session, head.keep_alive, head.host)
        body = b"".join(request.body)
        self.seen.append((said, request.length, request.request_id, body, request.size, request.complete))

    def _send_refusal(self, refusal: Refusal) -> None:
        self._refusal = None
        self.seen.append((refusal.status, str(refusal)))


class Server:
    max_body = 100
    in_flight = 0

    def clock(self) -> float:
        return 0.0

    def opened(self, connection: object) -> None: ...


def requests(known: KnownHeads[Any], stream: list[bytes]) -> list[object]:
    inlet = Recording(known)
    inlet.connection_made(cast(asyncio.Transport, Transport()))
    for data in stream:
        inlet.data_received(data)
    return [*inlet.seen, inlet._receiving]


@settings(max_examples=100, deadline=None)
@given(
    messages(b"POST /x HTTP/1.1\r\nhost: a\r\n", b"GET /?y HTTP/1.1\r\nhost: a\r\n", b"GET / HTTP/1.0\r\n")
)
def test_requests_are_the_same_whether_their_heads_are_known_or_not(stream: list[bytes]) -> None:
    assert requests(KnownHeads(), stream) == requests(Forgetful(), stream)


@settings(max_examples=100, deadline=None)
@given(messages(b"POST /x HTTP/1.1\r\nhost: a\r\n"), VALUES, VALUES)
def test_another_value_in_a_known_head_is_the_value_the_parser_finds(
    stream: list[bytes], length: bytes, id: bytes
) -> None:
    known: KnownHeads[Any] = KnownHeads()
    for data in stream:
        requests(known, [data])
        head, _, body = data.partition(b"\r\n\r\n")
        lines = [
            line.partition(b":")[0] + b": " + (length if b"ength" in line.partition(b":")[0].lower() else id)
            if line.lower().startswith((b"content-length", b"x-request-id"))
            else line
            for line in head.split(b"\r\n")
        ]
        other = b"\r\n".join(lines) + b"\r\n\r\n" + body
        assert requests(known, [other]) == requests(Forgetful(), [other])


KNOWN = b"POST /x HTTP/1.1\r\nhost: a\r\nx-request-id: 1\r\ncontent-length: 3\r\nx-tail: t\r\n\r\nabc"


@pytest.mark.parametrize(
    "change",
    [
        *[(b"id: 1", b"id: " + id) for id in (b"", b"2", b"a b", b"\0", b"\x80", b"2\r", b"2\n", b"z" * 256)],
        *[(b"id: 1", b"id: " + b"z" * 257), (b"id: 1\r\n", b"id: 1\r\nx-request-id: 2\r\n")],
        *[(b"th: 3", b"th: " + size) for size in (b"", b"\0", b"+3", b"0x3", b"03", b"3 ", b"3_0")],
        (b"th: 3", b"th: " + b"0" * 15 + b"3"),
        *[(b"th: 3", b"th: 3\r\ncontent-length: 3"), (b"th: 3", b"th: 3\r\ntransfer-encoding: chunked")],
        *[(b"tail: t", b"tail: u"), (b"tail: t", b"tail:"), (b"t\r\n\r\n", b"t\r\nhost: b\r\n\r\n")],
        *[(b"t\r\n\r\nabc", b"t\r\n\r\nab"), (b"abc", b"abcd"), (b"\r\n\r\nabc", b"\r\n"), (b" 1", b"1")],
        *[(b"POST", b"POS"), (b"/x", b"/y"), (b"host: a\r\n", b""), (b"HTTP/1.1", b"HTTP/1.0")],
    ],
)
def test_a_head_that_is_nearly_known_is_parsed_for_what_it_is(change: tuple[bytes, bytes]) -> None:
    known: KnownHeads[Any] = KnownHeads()
    requests(known, [KNOWN])
    assert known.find(KNOWN) is not None
    other = KNOWN.replace(*change)
    assert other != KNOWN
    assert requests(known, [other]) == requests(Forgetful(), [other])
    assert requests(known, [KNOWN, other]) == requests(Forgetful(), [KNOWN, other])


def test_known_heads_are_used_and_are_bounded() -> None:
    known: KnownHeads[Any] = KnownHeads()
    head = b"POST /%d HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\nx-request-id: %d\r\n\r\n%s"
    for number in range(3):
        requests(known, [head % (0, number, number, b"x" * number)])
    assert len(known) == 1
    found = known.find(head % (0, 12, 345, b""))
    assert found is not None and found[1:] == (len(head % (0, 12, 345, b"")), 12, b"345")
    for number in range(heads.MAX_KNOWN + 10):
        requests(known, [head % (number, 0, 0, b"")])
    assert 0 < len(known) <= heads.MAX_KNOWN
    large = b"GET / HTTP/1.1\r\nhost: a\r\nx: %s\r\n\r\n" % (b"y" * heads.MAX_KNOWN_SIZE)
    requests(known, [large])
    assert known.find(large) is None


class Sink:
    """Records one response."""

    complete = True

    def __init__(self) -> None:
        self.said: list[object] = []
        self.body = b""

    def headed(self, connection: EngineConnection) -> None:
        self.said.append(
            (connection.status, connection.head.passing, connection.length, connection.head.events)
        )

    def arrived(self, parts: list[bytes], *, complete: bool) -> None:
        self.body += b"".join(parts)

    def ended(self) -> None:
        self.said.append(("ended", self.body))

    def failed(self, error: PenstockError) -> None:
        self.said.append((type(error).__name__, self.body, getattr(error, "response_started", None)))

    def stop_sending(self) -> None: ...

    def go_on_sending(self) -> None: ...


async def responses(
    stream: list[bytes], splits: list[int], *, remembers: bool, head: bool
) -> list[tuple[list[object], bool]]:
    """What comes of responses to one request each, over one connection while it is kept; whether it is."""
    pool = RelayPool(Address.parse("h:1"))
    if not remembers:
        pool.heads = Forgetful()
    seen: list[tuple[list[object], bool]] = []
    kept: Connection | None = None
    for data in stream:
        if kept is None:
            made = EngineConnection(pool, asyncio.get_running_loop(), "h")
            made.connection_made(cast(asyncio.Transport, Transport()))
        sink = Sink()
        made.submit(sink, b"", b"", bodyless=head)
        places = [0, *sorted(at % (len(data) + 1) for at in splits), len(data)]
        for start, end in zip(places, places[1:], strict=False):
            if start < end:
                made.data_received(data[start:end])
        kept = pool.reuse()
        if kept is None:
            made.connection_lost(None)
        seen.append((sink.said, kept is not None))
    await pool.close()
    return seen


@settings(max_examples=100, deadline=None)
@given(
    messages(
        b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 204 No\r\n", b"HTTP/1.1 503 X\r\nretry-after: 1\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 099 X\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n",
    ),
    st.lists(st.integers(0, 200), max_size=3),
    st.booleans(),
)  # fmt: skip
def test_responses_are_the_same_whether_their_heads_are_known_or_not(
    stream: list[bytes], splits: list[int], head: bool
) -> None:
    async def body() -> None:
        known = await responses(stream, splits, remembers=True, head=head)
        parsed = await responses(stream, splits, remembers=False, head=head)
        assert [said for said, _ in known] == [said for said, _ in parsed]
        for (_, kept), (_, kept_by_parser) in zip(known, parsed, strict=True):
            assert kept_by_parser or not kept  # the parser lets empty lines follow, which are not counted

    run(body())
