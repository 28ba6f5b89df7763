"""Streams that break off anywhere and are continued: the whole is what it would have been.

The engine is `tests.streaming.Model`, reached by a transport without sockets; all else is the real thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import pytest
import uvloop
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from penstock.client import Client
from penstock.continuation import (
    CHAT,
    TEXT,
    Request,
    Seam,
    Splice,
    asked_tokens,
    by_text,
    by_token_ids,
    count_tokens,
    held_text,
    may_continue,
    stop_strings,
)
from penstock.errors import ConnectionLost
from penstock.fleet.retry import Retry
from penstock.fleet.transport import ByteStream
from penstock.sample import Delta, Sample, SamplingParams
from penstock.wire.address import Address
from penstock.wire.connection import Response
from penstock.wire.openai_stream import Partial
from penstock.wire.pool import PoolStatistics
from tests.streaming import CONTEXT, EOS, PROMPT, Model, essence, event

MESSAGES = [{"role": "user", "content": "hi"}]


def partial_of(
    text: str = "", reasoning: str = "", ids: Sequence[int] = (), prompt: Sequence[int] | None = None
) -> Partial:
    partial = Partial()
    partial.text, partial.reasoning, partial.chunks = [text], [reasoning], 1
    partial.token_ids = list(ids)
    partial.prompt_token_ids = None if prompt is None else tuple(prompt)
    partial.has_token_ids = bool(ids)
    return partial


# -- the fields -----------------------------------------------------------------------------------


def test_a_chat_is_continued_as_a_completion_of_its_tokens() -> None:
    fields = {
        "model": "m",
        "messages": MESSAGES,
        "temperature": 0.5,
        "stop": ["x"],
        "seed": 3,
        "min_tokens": 4,
        "max_completion_tokens": 9,
        "logprobs": True,
        "top_logprobs": 2,
        "chat_template_kwargs": {"enable_thinking": True},
        "reasoning_effort": "low",
        "stream": True,
        "return_token_ids": True,
    }
    rest = by_token_ids(Request(CHAT, fields), partial_of("ab", ids=[5, 6], prompt=[1, 2]), None)
    assert rest == Request(
        TEXT,
        {
            "model": "m",
            "prompt": [1, 2, 5, 6],
            "temperature": 0.5,
            "stop": ["x"],
            "seed": 5,
            "min_tokens": 2,
            "max_tokens": 7,
            "logprobs": 2,
            "stream": True,
            "return_token_ids": True,
        },
    )
    assert fields["max_completion_tokens"] == 9, "the request itself stays as it is"


def test_logprobs_of_a_chat_that_asks_for_no_alternatives() -> None:
    partial = partial_of("a", ids=[5], prompt=[1])
    rest = by_token_ids(
        Request(CHAT, {"messages": MESSAGES, "logprobs": True, "max_tokens": 3}), partial, None
    )
    assert rest is not None and rest.fields["logprobs"] == 0
    rest = by_token_ids(
        Request(CHAT, {"messages": MESSAGES, "logprobs": False, "max_tokens": 3}), partial, None
    )
    assert rest is not None and "logprobs" not in rest.fields
    rest = by_token_ids(Request(TEXT, {"prompt": "x", "logprobs": 0}), partial, None)
    assert rest is not None and rest.fields["logprobs"] == 0


def test_a_chat_without_a_bound_goes_on_to_the_end_of_the_context() -> None:
    partial = partial_of("a", ids=[5, 6], prompt=[1, 2, 3])
    assert by_token_ids(Request(CHAT, {"messages": MESSAGES}), partial, None) is None
    rest = by_token_ids(Request(CHAT, {"messages": MESSAGES}), partial, 100)
    assert rest is not None and rest.fields["max_tokens"] == 100 - 3 - 2


@pytest.mark.parametrize(
    ("route", "fields", "asked"),
    [
        (CHAT, {}, None),
        (CHAT, {"max_tokens": 3}, 3),
        (CHAT, {"max_tokens": 3, "max_completion_tokens": 5}, 5),
        (CHAT, {"max_tokens": 3, "max_completion_tokens": None}, 3),
        (TEXT, {}, 16),
        (TEXT, {"max_tokens": 3}, 3),
        (TEXT, {"max_completion_tokens": 5}, 16),
    ],
)
def test_what_is_asked_for(route: str, fields: dict[str, Any], asked: int | None) -> None:
    assert asked_tokens(Request(route, fields)) == asked


def test_without_token_ids_there_is_no_way_by_them() -> None:
    request = Request(TEXT, {"prompt": "x", "max_tokens": 9})
    assert by_token_ids(request, partial_of("a"), None) is None
    assert by_token_ids(request, partial_of("a", ids=[3]), None) is None
    some = partial_of("a", ids=[3], prompt=[1])
    some.has_token_ids = False
    assert by_token_ids(request, some, None) is None


def test_a_prompt_with_an_image_is_not_its_tokens() -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
    text = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    partial = partial_of("a", ids=[5], prompt=[1])
    assert by_token_ids(Request(CHAT, {"messages": [image], "max_tokens": 4}), partial, None) is None
    assert by_token_ids(Request(CHAT, {"messages": [text], "max_tokens": 4}), partial, None) is not None
    assert by_text(Request(CHAT, {"messages": [image], "max_tokens": 4}), partial) is not None


def test_a_chat_is_continued_from_its_text() -> None:
    fields = {"messages": MESSAGES, "max_completion_tokens": 9, "seed": 3}
    rest = by_text(Request(CHAT, fields), partial_of("ab"))
    assert rest == Request(
        CHAT,
        {
            "messages": [*MESSAGES, {"role": "assistant", "content": "ab"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
            "max_tokens": 8,
            "seed": 4,
        },
    )
    begun = [*MESSAGES, {"role": "assistant", "content": "x"}]
    fields = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    rest = by_text(Request(CHAT, fields), partial_of("ab"))
    assert rest is not None and "max_tokens" not in rest.fields
    assert rest.fields["messages"] == [*MESSAGES, {"role": "assistant", "content": "xab"}]
    assert begun[-1]["content"] == "x"


def test_a_completion_is_continued_from_its_text() -> None:
    rest = by_text(Request(TEXT, {"prompt": "x"}), partial_of("ab"))
    assert rest == Request(TEXT, {"prompt": "xab", "max_tokens": 15})
    assert by_text(Request(TEXT, {"prompt": [1, 2]}), partial_of("ab")) is None
    assert by_text(Request(TEXT, {"prompt": "x"}), partial_of("ab", reasoning="hm")) is None


@pytest.mark.parametrize(
    ("fields", "may"),
    [
        ({}, True),
        ({"tools": []}, True),
        ({"tools": [{}]}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"structured_outputs": {"json": {}}}, False),
        ({"regex": "a"}, False),
        ({"echo": True}, False),
        ({"echo": False}, True),
        # counted from the seam, the penalties would be others
        ({"presence_penalty": 0.5}, False),
        ({"frequency_penalty": 0.5}, False),
        ({"frequency_penalty": 0.0, "repetition_penalty": 1.1}, True),
        ({"truncate_prompt_tokens": 5}, False),
    ],
)
def test_what_may_be_continued(fields: dict[str, Any], may: bool) -> None:
    assert may_continue(Request(CHAT, {"messages": MESSAGES, **fields})) is may


def test_stop_strings() -> None:
    assert [
        stop_strings(fields) for fields in ({}, {"stop": None}, {"stop": "ab"}, {"stop": ["a", "b"]})
    ] == [
        (),
        (),
        ("ab",),
        ("a", "b"),
    ]


def test_counting() -> None:
    assert count_tokens(partial_of("ab", ids=[1, 2, 3])) == 3
    assert count_tokens(partial_of("ab")) == 1


@pytest.mark.parametrize(
    ("whole", "text", "reasoning", "held"),
    [
        ("abc", "ab", "", "c"),
        ("abc", "abc", "", ""),
        ("abc", " ab", "", "c"),
        (" abc", "ab", "", "c"),
        ("abc", "xb", "", None),
        ("whyno", "", "why", "no"),
        ("<think>\nwhyno", "", "\nwhy", "no"),
        ("<think>\nwhyno", "", "why", "no"),
        ("why</think>", "", "why", "</think>"),
        ("why</think>\n\n4\n4", "\n\n4", "why", "\n4"),
        ("<think>why</think>4\n4", "4", "why", "\n4"),
        ("<think>4</think>\n\n44", "4", "4", "4"),
        ("why", "4", "why", None),
    ],
)
def test_held_text(whole: str, text: str, reasoning: str, held: str | None) -> None:
    assert held_text(whole, text, reasoning) == held


# -- the seam -------------------------------------------------------------------------------------


def through(seam: Seam, pieces: Sequence[str]) -> tuple[str, str | None]:
    """The text that comes out, and the stop string."""
    out = ""
    for number, piece in enumerate(pieces):
        text, stop, decided = seam.feed(piece, last=number == len(pieces) - 1)
        out += text
        if stop is not None:
            return out, stop
        if decided:
            return out + "".join(pieces[number + 1 :]), None
    return out, None


@pytest.mark.parametrize(
    ("held", "stops", "pieces", "out"),
    [
        ("", ["ab"], ["b", "c"], ("bc", None)),
        ("a", ["ab"], ["b", "c"], ("", "ab")),
        ("a", ["ab"], ["", "c"], ("ac", None)),
        ("xa", ["abc"], ["b", "c"], ("x", "abc")),
        ("xa", ["abc"], ["b", ""], ("xab", None)),
        ("xa", ["abc", "b"], ["b", "c"], ("x", "abc")),  # the second engine finds "b" itself
        ("aa", ["aab"], ["ab"], ("a", "aab")),
        ("ab", ["b", "bc"], ["c"], ("a", "bc")),  # "b" had not counted, say for min_tokens
        ("é", [], ["x"], ("éx", None)),
    ],
)
def test_the_seam(held: str, stops: list[str], pieces: list[str], out: tuple[str, str | None]) -> None:
    assert through(Seam(held, stops, include_stop=False), pieces) == out


def test_a_stop_string_across_the_seam_is_included_where_that_is_asked_for() -> None:
    assert through(Seam("xa", ["ab"], include_stop=True), ["bc"]) == ("xab", "ab")


@given(st.text("<>/think", max_size=12), st.lists(st.integers(0, 40)), st.text("ab</", max_size=6))
def test_reasoning_ends_at_its_tag_however_it_is_cut(before: str, cuts: list[int], after: str) -> None:
    raw = f"{before}</think>{after}"
    places = sorted({0, len(raw), *(min(cut, len(raw)) for cut in cuts)})
    pieces = [raw[start:end] for start, end in zip(places, places[1:], strict=False)]
    splice = Splice(None, in_reasoning=True)
    told = [splice(piece, number == len(pieces) - 1, "") for number, piece in enumerate(pieces)]
    expected = raw.partition("</think>")
    assert "".join(reasoning for _, reasoning, _ in told) == expected[0]
    assert "".join(text for text, _, _ in told) == expected[2]


def test_reasoning_that_never_ends() -> None:
    splice = Splice(None, in_reasoning=True)
    assert splice("why</thi", False, "") == ("", "why", None)
    assert splice("s", True, "") == ("", "</this", None)


# -- whole streams --------------------------------------------------------------------------------


class ModelTransport:
    """A transport to the model; each stream takes the next cut: it dies after so many chunks."""

    def __init__(self, model: Model, cuts: list[int]) -> None:
        self.model = model
        self.cuts = cuts
        self.requests: list[dict[str, Any]] = []

    async def request(self, head: bytes, body: bytes = b"") -> Response:
        if b"/detokenize" in head:
            text = self.model.text(orjson.loads(body)["tokens"])
            return Response(200, {}, orjson.dumps({"prompt": text}))
        assert b"/models" in head
        return Response(200, {}, orjson.dumps({"data": [{"id": "m", "max_model_len": CONTEXT}]}))

    async def stream(self, head: bytes, body: bytes = b"") -> ByteStream:
        request = orjson.loads(body)
        self.requests.append(request)
        chunks = self.model.generate(request, b"/chat/" in head)
        return ModelStream(chunks, self.cuts.pop(0) if self.cuts else None)

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(0, 0, 0, 0)

    def drop_silent(self, seconds: float) -> int:
        return 0

    async def close(self) -> None:
        pass


class ModelStream:
    status = 200
    headers: dict[bytes, bytes] = {}

    def __init__(self, chunks: list[dict[str, Any]], cut: int | None) -> None:
        self.events = [event(chunk) for chunk in chunks[:cut]] + (
            [b"data: [DONE]\n\n"] if cut is None else []
        )
        self.cut = cut

    def header(self, name: bytes) -> bytes | None:
        return None

    async def read(self) -> bytes:
        if self.events:
            some, self.events = self.events[:3], self.events[3:]
            return b"".join(some)
        if self.cut is not None:
            raise ConnectionLost("gone", response_started=True)
        return b""

    def close(self) -> None:
        pass


async def read(
    model: Model, params: SamplingParams, cuts: Sequence[int], *, chat: bool, prompt: Any = None, **body: Any
) -> tuple[Sample, list[Delta], list[dict[str, Any]]]:
    transports = []

    def make(address: Address) -> ModelTransport:
        transports.append(ModelTransport(model, list(cuts)))
        return transports[-1]

    retry = Retry(attempts=50, base=0.0)
    async with Client("http://model", model="m", resume_streams=True, retry=retry, transport=make) as client:
        given = prompt or (MESSAGES if chat else "x|")
        async with client.stream(given, params, extra_body=body) as stream:
            deltas = [delta async for delta in stream]
        sample = stream.sample
        assert client.statistics().in_flight == {"http://model": 0}
        assert sample.attempts <= len(cuts) + 1
        return sample, deltas, transports[0].requests


PIECES = st.lists(
    st.sampled_from([b"a", b"b", b"ab", b"ba", b"aab", b" a", b"\n", b"c", "é".encode(), b"\xc3", b"\xa9"]),
    min_size=1,
    max_size=14,
)


def whole_characters(pieces: list[bytes]) -> tuple[bytes, ...]:
    """The pieces without what makes no character."""
    kept: list[bytes] = []
    for piece in pieces:
        before = b"".join(kept)
        open = before.endswith(b"\xc3")
        if open and piece != b"\xa9":
            kept.append(b"\xa9")
        elif not open and piece == b"\xa9":
            continue
        kept.append(piece)
    return tuple(kept + ([b"\xa9"] if b"".join(kept).endswith(b"\xc3") else []))


SETTINGS = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@SETTINGS
@given(
    pieces=PIECES.map(whole_characters),
    stops=st.lists(st.text("abcé\n", min_size=1, max_size=4), max_size=2, unique=True),
    include=st.booleans(),
    limit=st.none() | st.integers(1, 20),
    cuts=st.lists(st.integers(0, 15), min_size=1, max_size=4),
    chat=st.booleans(),
    logprobs=st.booleans(),
    hold=st.booleans(),
)
@example(
    pieces=(b"xa", b"b", b"c", b"c"),
    stops=["ab"],
    include=False,
    limit=9,
    cuts=[2],
    chat=True,
    logprobs=True,
    hold=False,
)
def test_by_token_ids_the_whole_is_what_it_would_have_been(
    pieces: tuple[bytes, ...],
    stops: list[str],
    include: bool,
    limit: int | None,
    cuts: list[int],
    chat: bool,
    logprobs: bool,
    hold: bool,
) -> None:
    model = Model(pieces, hold=hold)
    params = SamplingParams(stop=tuple(stops) or None, max_tokens=limit, logprobs=0 if logprobs else None)
    body = {"include_stop_str_in_output": True} if include else {}

    async def main() -> None:
        expected, _, _ = await read(model, params, (), chat=chat, **body)
        sample, deltas, requests = await read(model, params, cuts, chat=chat, **body)
        assert essence(sample) == essence(expected)
        assert "".join(delta.text for delta in deltas) == sample.text
        assert sum((delta.token_ids for delta in deltas), ()) == sample.token_ids
        assert sum((delta.logprobs for delta in deltas), ()) == (sample.logprobs or ())
        assert all(request["max_tokens"] > 0 for request in requests[1:] if "max_tokens" in request)

    uvloop.run(main())


@SETTINGS
@given(
    pieces=st.lists(st.sampled_from([b"a", b"b", b"c", b"de"]), min_size=1, max_size=14).map(tuple),
    limit=st.none() | st.integers(1, 20),
    cuts=st.lists(st.integers(0, 15), min_size=1, max_size=4),
    chat=st.booleans(),
)
def test_by_text_the_whole_is_what_it_would_have_been(
    pieces: tuple[bytes, ...], limit: int | None, cuts: list[int], chat: bool
) -> None:
    model = Model(pieces, ids=False, hold=False)
    params = SamplingParams(max_tokens=limit)

    async def main() -> None:
        expected, _, _ = await read(model, params, (), chat=chat)
        sample, deltas, _ = await read(model, params, cuts, chat=chat)
        told, wanted = list(essence(sample)), list(essence(expected))
        # without ids a token that has no text may not have been seen, nor a prompt whose usage never came
        counted, right = told.pop(), wanted.pop()
        assert told == wanted
        assert counted.prompt_tokens in (right.prompt_tokens, 0)
        assert right.completion_tokens - counted.completion_tokens in (0, 1)
        assert "".join(delta.text for delta in deltas) == sample.text

    uvloop.run(main())


@SETTINGS
@given(
    thought=st.lists(st.sampled_from(["w", "hy", "\n", "é", "<"]), min_size=1, max_size=5),
    tag=st.sampled_from([["</think>"], ["</", "think>"], ["<", "/thi", "nk>"], ["</think>\n\n"]]),
    answer=st.lists(st.sampled_from(["4", "\n\n", "2", "é"]), max_size=5),
    cuts=st.lists(st.integers(0, 15), min_size=1, max_size=4),
    stops=st.sampled_from([(), ("\n\n4",), ("22",)]),
)
@example(thought=["w"], tag=["</think>"], answer=["4", "\n\n", "4"], cuts=[5], stops=("\n\n4",))
@example(thought=["w"], tag=["</think>"], answer=["4", "2", "2", "2"], cuts=[5], stops=("22",))
def test_reasoning_lands_where_it_belongs(
    thought: list[str], tag: list[str], answer: list[str], cuts: list[int], stops: tuple[str, ...]
) -> None:
    pieces = tuple(piece.encode() for piece in [*thought, *tag, *answer])
    think = "".join(thought) + "</think>"
    model = Model(pieces, think=think)

    async def main() -> None:
        params = SamplingParams(max_tokens=30, stop=stops or None)
        expected, _, _ = await read(model, params, (), chat=True)
        sample, deltas, _ = await read(model, params, cuts, chat=True)
        assert essence(sample) == essence(expected)
        assert "".join(delta.reasoning for delta in deltas) == (sample.reasoning or "")

    uvloop.run(main())


def test_every_cut_of_a_long_stream() -> None:
    model = Model(tuple(f" w{number}".encode() for number in range(40)))

    async def main() -> None:
        params = SamplingParams(max_tokens=30, seed=5, min_tokens=10)
        expected, _, _ = await read(model, params, (), chat=True)
        for cut in range(1, 32):
            sample, _, requests = await read(model, params, [cut], chat=True)
            assert essence(sample) == essence(expected)
            if cut in (2, 15, 30):
                assert sample.attempts == 2
                assert requests[1]["prompt"] == [*PROMPT, *range(cut - 1)]
                assert requests[1]["max_tokens"] == 30 - (cut - 1)
                assert requests[1]["min_tokens"] == max(0, 10 - (cut - 1))
                assert requests[1]["seed"] == 5 + cut - 1

    uvloop.run(main())


def test_what_all_tokens_have_come_of_needs_no_other_engine() -> None:
    model = Model((b"a", b"b", b"c"))

    async def main() -> None:
        # the finish chunk has come, the usage has not
        sample, _, requests = await read(model, SamplingParams(max_tokens=2), [3], chat=True)
        assert (sample.text, sample.finish_reason, sample.attempts, len(requests)) == ("ab", "length", 1, 1)
        assert (sample.usage.prompt_tokens, sample.usage.completion_tokens) == (3, 2)
        sample, _, _ = await read(model, SamplingParams(), [5], chat=True)
        assert (sample.text, sample.finish_reason, sample.token_ids) == ("abc", "stop", (0, 1, 2, EOS))

    uvloop.run(main())
