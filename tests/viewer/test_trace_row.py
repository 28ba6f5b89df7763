"""Rows of every known writer, and rows of nobody."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from penstock.prompt import PromptFormat, Template
from penstock.viewer.detail import detail
from penstock.viewer.trace_row import (
    Columns,
    Trace,
    columns_of,
    decode_columns,
    messages,
    row_id,
    searched,
    traces,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = [*Columns.__struct_fields__, "prompt", "messages", "fields", "message", "id", "uuid"]


def samples(row: dict[str, Any]) -> list[Trace]:
    columns = decode_columns(orjson.dumps(row))
    assert columns is not None
    return traces(columns)


def test_what_generate_writes() -> None:
    one, two = samples(
        {
            "q": "?",
            "generations": ["<think>hm</think>\n4", "5"],
            "finish_reasons": ["stop", "length"],
            "api_metadata": [
                {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10, "latency": 0.5},
                {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12},
            ],
            "reasonings": ["hm", "so"],
        }
    )
    assert one.split() == ("hm", "4") and two.split() == ("so", "5")
    assert (one.finish, one.prompt_tokens, one.completion_tokens, one.latency) == ("stop", 3, 7, 0.5)
    assert (two.finish, two.latency, two.reward) == ("length", None, None)
    assert (one.length, two.length) == (len("<think>hm</think>\n4"), len("5so"))


def test_what_open_r1_and_reinforcement_learning_write() -> None:
    (trace,) = samples({"problem": "?", "generations": ["a"], "finish_reasons": None, "api_metadata": None})
    assert trace[:7] == ("a", None, None, None, None, None, None)
    group = samples(
        {"prompt": "?", "completions": ["a", "b"], "rewards": [1, 0.5], "completion_tokens": [4, 5]}
    )
    assert [(t.text, t.reward, t.completion_tokens) for t in group] == [("a", 1.0, 4), ("b", 0.5, 5)]
    (trace,) = samples({"prompt": "?", "completion": [{"role": "assistant", "content": "a"}], "reward": True})
    assert (trace.text, trace.reward) == ("a", 1.0)
    (trace,) = samples({"response": "a", "rewards": {"format": 1, "reward": 0.25}, "finish_reason": "stop"})
    assert (trace.text, trace.reward, trace.finish) == ("a", 0.25, "stop")
    # Columns of other lengths than the samples: what there is not is not known.
    assert [t.finish for t in samples({"generations": ["a", "b"], "finish_reasons": ["stop"]})] == [
        "stop",
        None,
    ]


def test_the_prompt_is_the_one_that_was_sent_where_the_journal_says_how() -> None:
    row = {"uuid": 7, "q": "2 + 2", "prompt": "not this"}
    form = PromptFormat(prompt_column="q", template=Template("Solve {prompt}."), system_prompt="Be brief.")
    assert messages(row, form) == [("system", "Be brief."), ("user", "Solve 2 + 2.")]
    assert messages(row, PromptFormat(prompt_column="gone")) == [("user", "not this")]
    parts = [{"type": "text", "text": "hi"}, {"type": "image_url"}]
    assert messages({"messages": [{"role": "user", "content": parts}]}, None) == [("user", "hi\n[image_url]")]
    assert row_id(row, None) == "7" and row_id({"q": 1}, None) is None
    assert row_id({"q": "x", "id": 1}, PromptFormat(id_column="q")) == "x"


def test_a_search_looks_where_it_is_told() -> None:
    row = {"id": "r1", "prompt": "the question", "generations": ["<think>the way</think>the answer"]}
    looked = {"id": "r1", "prompt": "the question", "reasoning": "the way", "answer": "the answer"}
    for where, text in looked.items():
        assert list(searched(row, where, None)) == [text]
    assert set(searched(row, "all", None)) == {"r1", "the question", "the way", "the answer"}
    failure = {"key": "k", "error": "ServerFailed", "message": "broke", "fields": {"prompt": "the question"}}
    assert set(searched(failure, "all", None)) == {"k", "the question", "broke"}


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), JSON, max_size=8))
def test_no_row_breaks_the_reader(row: dict[str, Any]) -> None:
    line = orjson.dumps(row)
    columns = decode_columns(line)
    assert columns is not None
    assert traces(columns) == traces(columns_of(orjson.loads(line)))
    for where in ("all", "prompt", "answer", "reasoning", "id"):
        assert all(isinstance(text, str) for text in searched(orjson.loads(line), where, PromptFormat()))
    orjson.dumps(detail(0, line, PromptFormat()))


def test_what_is_no_object_is_no_row() -> None:
    for line in (b"[1]", b"1", b'"x"', b"{", b"\xff\xfe", b'{"a": "\xff"}', b"[" * 100_000):
        assert decode_columns(line) is None or line == b'{"a": "\xff"}'
        assert detail(0, line, None)["readable"] is False
