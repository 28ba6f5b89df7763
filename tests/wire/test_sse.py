"""Server-sent events under arbitrary chunking."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import MalformedResponse
from penstock.wire.sse import EventParser


def parse(*chunks: bytes) -> list[bytes]:
    parser = EventParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b'data: {"a": 1}\n\ndata: [DONE]\n\n', [b'{"a": 1}', b"[DONE]"]),
        (b"data:x\r\n\r\ndata:  y\r\r", [b"x", b" y"]),
        (b": comment\n\nevent: e\nid: 7\nretry: 1\ndata: x\n\n", [b"x"]),
        (b"data: a\ndata: b\ndata\n\n", [b"a\nb\n"]),
        (b"data:\n\n", [b""]),
        (b"\xef\xbb\xbfdata: x\n\n", [b"x"]),
        (b"data: cut off\n", []),
        (b"datax: no\ndata : no\n\n", []),
        ("data: ü\u2028ü\n\n".encode(), ["ü\u2028ü".encode()]),
        (b"data: a\x0bb\x0cc\x1cd\n\n", [b"a\x0bb\x0cc\x1cd"]),
    ],
)
def test_the_standard(stream: bytes, events: list[bytes]) -> None:
    assert parse(stream) == events


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_place_to_split_a_stream_in_two(end: bytes) -> None:
    stream = end.join([b"data: a", b"data: b", b"", b": x", b"data:c", b"id: 1", b"", b""])
    for cut in range(len(stream) + 1):
        assert parse(stream[:cut], stream[cut:]) == [b"a\nb", b"c"]


payloads = st.lists(
    st.text(st.characters(exclude_characters="\r\n", codec="utf-8")).map(str.encode), max_size=6
)


@given(payloads, st.sampled_from([b"\n", b"\r\n", b"\r"]), st.data())
def test_the_split_does_not_matter(events: list[bytes], end: bytes, data: st.DataObject) -> None:
    stream = b"".join(b"data: " + event + end + b": x" + end + end for event in events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert parse(*chunks) == events


pieces = st.sampled_from([b"data: ", b"data", b":", b"x", b"\r", b"\n", b"\r\n", b"\xef\xbb\xbf", b"id: 1"])


@given(st.lists(pieces, max_size=30).map(b"".join) | st.binary(max_size=100), st.data())
def test_any_bytes_split_anyhow_give_the_same_events(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert parse(*chunks) == parse(stream)


def test_an_event_too_large_is_refused() -> None:
    parser = EventParser(max_event=1000)
    assert parser.feed(b"data: " + b"x" * 900 + b"\n\n") == [b"x" * 900]
    assert parser.feed(b"data: " + b"x" * 900) == []
    with pytest.raises(MalformedResponse, match="larger than 1000"):
        parser.feed(b"x" * 200)


def test_many_data_lines_of_one_event_count_together() -> None:
    parser = EventParser(max_event=1000)
    with pytest.raises(MalformedResponse):
        for _ in range(1000):
            parser.feed(b"data: x\n")


def test_a_long_line_in_small_pieces_costs_linear_time() -> None:
    parser = EventParser()
    started = time.process_time()
    parser.feed(b"data: ")
    for _ in range(100_000):
        parser.feed(b"x" * 40)
    assert parser.feed(b"\n\n") == [b"x" * 4_000_000]
    assert time.process_time() - started < 2.0
