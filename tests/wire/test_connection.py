"""Responses under arbitrary chunking, and what a connection may be reused after."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError, ConnectFailed, ConnectionLost, MalformedResponse, PhaseTimeout
from penstock.wire.connection import Connection, Response, Timeouts

HEAD = b"POST / HTTP/1.1\r\nhost: h\r\n"


class Wire(asyncio.Transport):
    """A transport whose other end is the test."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closed = False
        self.unsent = 0
        self.reading = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += bytes(data)

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return self.unsent


class Bench:
    """A connection on a `Wire`, and its owner."""

    def __init__(self, loop: asyncio.AbstractEventLoop, max_response: int = 1 << 20) -> None:
        self.max_response = max_response
        self.releases = 0
        self.losses = 0
        self.wire = Wire()
        self.connection = Connection(self, loop, "engine")
        self.connection.connection_made(self.wire)

    def made(self, connection: Connection) -> None:
        assert connection is self.connection

    def released(self, connection: Connection) -> None:
        self.releases += 1

    def lost(self, connection: Connection) -> None:
        self.losses += 1

    def feed(self, data: bytes, cuts: list[int] | None = None) -> None:
        """Delivers the bytes as a loop would: nothing more once the connection has been closed."""
        bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts or [])})
        for start, end in zip(bounds, bounds[1:], strict=False):
            if not self.wire.closed:
                self.connection.data_received(data[start:end])

    def lose(self, error: Exception | None = None) -> None:
        self.connection.connection_lost(error)


@contextmanager
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    try:
        yield made
    finally:
        made.close()


def outcome(waiter: asyncio.Future[Response]) -> Response:
    assert waiter.done()
    return waiter.result()


bodies = st.binary(max_size=300)
cuts = st.lists(st.integers(0, 2000), max_size=20)


@st.composite
def framed(draw: st.DrawFn, body: bytes) -> tuple[bytes, bool]:
    """A response with this body, and whether only the end of the connection ends it."""
    head = b"HTTP/1.1 200 OK\r\nX-Some: thing\r\n"
    kind = draw(st.sampled_from(["length", "chunked", "close"]))
    interim = draw(
        st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 E\r\nlink: x\r\n\r\n"])
    )
    if kind == "length":
        return interim + head + b"Content-Length: %d\r\n\r\n" % len(body) + body, False
    if kind == "close":
        return interim + head + b"\r\n" + body, True
    sizes = draw(st.lists(st.integers(1, 100), max_size=8))
    parts, rest = [], body
    for size in sizes:
        parts.append(rest[:size])
        rest = rest[size:]
    parts = [part for part in [*parts, rest] if part]
    chunks = b"".join(b"%X;ext=1\r\n%s\r\n" % (len(part), part) for part in parts)
    trailer = draw(st.sampled_from([b"", b"x-trailer: 1\r\n"]))
    return (
        interim + head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + trailer + b"\r\n",
        False,
    )


@given(st.data(), bodies, cuts)
def test_a_response_is_the_same_however_it_is_split(
    data: st.DataObject, body: bytes, cuts: list[int]
) -> None:
    stream, until_close = data.draw(framed(body))
    with loop() as made:
        bench = Bench(made)
        waiter = bench.connection.send(HEAD, b"{}")
        bench.feed(stream, cuts)
        if until_close:
            assert not waiter.done()
            bench.lose()
        response = outcome(waiter)
        assert (response.status, response.body) == (200, body)
        assert response.header(b"x-some") == b"thing"
        assert bench.releases == (0 if until_close else 1)


@given(st.data(), bodies, cuts, st.integers(0, 2000))
def test_a_response_cut_anywhere_is_lost_never_short(
    data: st.DataObject, body: bytes, cuts: list[int], at: int
) -> None:
    stream, until_close = data.draw(framed(body).filter(lambda it: not it[1]))
    with loop() as made:
        bench = Bench(made)
        waiter = bench.connection.send(HEAD, b"{}")
        part = stream[: at % len(stream)]
        bench.feed(part, cuts)
        bench.lose()
        with pytest.raises(ConnectionLost) as caught:
            outcome(waiter)
        assert caught.value.response_started == bool(part) and not caught.value.reused
        assert (bench.releases, bench.losses) == (0, 1)


@given(st.binary(min_size=1, max_size=200), cuts)
def test_any_bytes_end_in_one_outcome(stream: bytes, cuts: list[int]) -> None:
    with loop() as made:
        bench = Bench(made)
        waiter = bench.connection.send(HEAD, b"{}")
        bench.feed(stream, cuts)
        if not waiter.done():
            bench.lose()
        assert isinstance(waiter.exception(), MalformedResponse | ConnectionLost) or waiter.result()


@given(st.lists(bodies, min_size=1, max_size=5), st.data(), cuts)
def test_one_connection_serves_many_requests(many: list[bytes], data: st.DataObject, cuts: list[int]) -> None:
    with loop() as made:
        bench = Bench(made)
        for number, body in enumerate(many):
            waiter = bench.connection.send(HEAD, b"%d" % number)
            bench.feed(data.draw(framed(body).filter(lambda it: not it[1]))[0], cuts)
            assert outcome(waiter).body == body
        assert bench.releases == bench.connection.served == len(many)
        assert bench.wire.sent.count(b"content-length: 1\r\n\r\n") == len(many)


@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTT",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok}}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno",
    ],
)
def test_a_connection_out_of_step_is_not_reused(stream: bytes) -> None:
    with loop() as made:
        bench = Bench(made)
        waiter = bench.connection.send(HEAD, b"")
        bench.feed(stream)
        assert outcome(waiter).body == b"ok"
        assert bench.releases == 0 and bench.wire.closed


def test_an_answer_before_the_request_was_written_closes() -> None:
    with loop() as made:
        bench = Bench(made)
        bench.wire.unsent = 5
        waiter = bench.connection.send(HEAD, b"x" * 100_000)
        bench.feed(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        assert outcome(waiter).status == 413
        assert bench.releases == 0 and bench.wire.closed


@pytest.mark.parametrize("status", [204, 304])
def test_statuses_without_a_body(status: int) -> None:
    with loop() as made:
        bench = Bench(made)
        waiter = bench.connection.send(HEAD, b"")
        bench.feed(b"HTTP/1.1 %d X\r\nETag: 1\r\n\r\n" % status)
        assert (outcome(waiter).status, outcome(waiter).body, bench.releases) == (status, b"", 1)


def test_head_has_no_body_and_ends_the_connection() -> None:
    with loop() as made:
        bench = Bench(made)
        waiter = bench.connection.send(b"HEAD / HTTP/1.1\r\n", b"")
        bench.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n")
        assert outcome(waiter).header(b"content-length") == b"900"
        assert bench.wire.closed


def test_a_reset_is_never_the_end_of_a_body() -> None:
    with loop() as made:
        bench = Bench(made)
        waiter = bench.connection.send(HEAD, b"")
        bench.feed(b"HTTP/1.1 200 OK\r\n\r\nhalf of it")
        bench.lose(ConnectionResetError(104, "Connection reset by peer"))
        with pytest.raises(ConnectionLost, match="in the middle of a response .*reset"):
            outcome(waiter)


@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"x" * 2000,
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000,
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_bounds_and_other_protocols(stream: bytes) -> None:
    with loop() as made:
        bench = Bench(made, max_response=1000 if b"5000" in stream else 1 << 20)
        waiter = bench.connection.send(HEAD, b"")
        bench.feed(stream, list(range(0, len(stream), 10_000)))
        with pytest.raises(MalformedResponse):
            outcome(waiter)
        assert bench.wire.closed and bench.releases == 0


def test_bytes_nobody_asked_for_close_an_idle_connection() -> None:
    with loop() as made:
        bench = Bench(made)
        bench.feed(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        assert bench.wire.closed


def test_a_connection_we_close_ends_no_body() -> None:
    with loop() as made:
        bench = Bench(made)
        waiter = bench.connection.send(HEAD, b"")
        bench.feed(b"HTTP/1.1 200 OK\r\n\r\nhalf of what only the end of the connection ends")
        bench.connection.abort()
        bench.lose()
        with pytest.raises(ConnectionLost, match="was closed while a request was in flight") as caught:
            outcome(waiter)
        assert caught.value.response_started and bench.wire.closed


@pytest.mark.parametrize(("served", "expected"), [(0, ConnectFailed), (1, ConnectionLost)])
def test_tls_refused_after_the_handshake_is_no_connection(served: int, expected: type[Exception]) -> None:
    with loop() as made:
        bench = Bench(made)
        bench.connection.served = served
        waiter = bench.connection.send(HEAD, b"")
        alert = ssl.SSLError(1, "tlsv13 alert certificate required")
        alert.reason = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
        bench.lose(alert)
        with pytest.raises(expected, match="certificate"):
            outcome(waiter)


def test_discard_closes_only_while_the_response_is_owed() -> None:
    with loop() as made:
        bench = Bench(made)
        waiter = bench.connection.send(HEAD, b"")
        waiter.cancel()
        bench.feed(b"HTTP/1.1 204 X\r\n\r\n")
        bench.connection.discard(waiter)  # the connection may serve someone else by now
        assert not bench.wire.closed
        bench.connection.discard(bench.connection.send(HEAD, b""))
        assert bench.wire.closed


def test_phases_time_out() -> None:
    with loop() as made:
        bench = Bench(made)
        timeouts = Timeouts(first_byte=2.0, idle=1.0)
        waiter = bench.connection.send(HEAD, b"")
        bench.connection.sweep(bench.connection.since + 1.9, timeouts)
        assert not waiter.done()
        bench.connection.sweep(bench.connection.since + 2.1, timeouts)
        with pytest.raises(PhaseTimeout, match=r"engine sent no response within 2 s") as first:
            outcome(waiter)
        bench = Bench(made)
        waiter = bench.connection.send(HEAD, b"")
        bench.feed(b"HTTP/1.1 200 OK\r\n")
        bench.connection.sweep(bench.connection.since + 1.1, timeouts)
        with pytest.raises(PhaseTimeout, match="stopped in the middle") as second:
            outcome(waiter)
        assert (first.value.phase, second.value.phase) == ("first_byte", "idle")


@pytest.mark.parametrize("name", ["connect", "first_byte", "idle"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_a_timeout_is_positive_or_none(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        Timeouts(**{name: value})
