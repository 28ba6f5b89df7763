"""Requests are functions of their numbers; files become the prompts that they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.loadtest.dataset import read_dataset, read_trace
from penstock.loadtest.lengths import Lengths
from penstock.loadtest.workload import Item, Workload, scaled, synthetic


def texts(workload: Workload, count: int) -> list[str]:
    return [workload.messages(number)[-1]["content"] for number in range(count)]


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 30), st.integers(1, 3), st.integers(0, 9))
def test_synthetic_prompts_differ_by_group_and_share_their_prefix(
    group: int, distinct: int, prefix: int, prefixes: int, seed: int
) -> None:
    def make() -> Workload:
        lengths = Lengths.parse("uniform:40:60")
        items = synthetic(
            lengths, Lengths.parse("16"), seed=seed, distinct=distinct, prefix=prefix, prefixes=prefixes
        )
        return Workload(items, group=group)

    asked = texts(make(), 4 * distinct * group)
    assert asked == texts(make(), 4 * distinct * group)
    assert len(set(asked)) == 4 * distinct
    assert all(len(set(asked[start : start + group])) == 1 for start in range(0, len(asked), group))
    assert all(40 <= len(text.split()) <= 60 for text in asked)
    beginnings = {tuple(text.split()[:prefix]) for text in asked}
    assert len(beginnings) <= prefixes


def test_parameters_are_those_of_the_prompt() -> None:
    workload = Workload(
        [Item(({"role": "user", "content": "a"},), 7), Item(({"role": "user", "content": "b"},))]
    )
    assert workload.params(0).as_dict() == {"max_tokens": 7}
    assert workload.params(1).as_dict() == {}
    assert texts(workload, 3) == ["a", "b", "a"]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


SHAREGPT = [
    {"conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "hi"},
                       {"from": "gpt", "value": "well hello there"}, {"from": "human", "value": "bye"}]},
    {"conversations": [{"from": "gpt", "value": "no question"}]},
    {"conversations": []},
]  # fmt: skip


@pytest.mark.parametrize("array", [True, False])
def test_sharegpt_is_asked_up_to_its_first_reply(tmp_path: Path, array: bool) -> None:
    path = tmp_path / "share.json"
    if array:
        path.write_text(json.dumps(SHAREGPT, indent=1))
    else:
        written(path, SHAREGPT)
    asked = ({"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"})
    assert read_dataset(path) == [Item(asked, 3)]


def test_jsonl_of_prompts_and_of_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "two"}]
    rows = [{"prompt": "one", "max_tokens": 9}, {"messages": messages}, {"prompt": "three"}]
    path = written(tmp_path / "rows.jsonl", rows)
    one = ({"role": "user", "content": "one"},)
    assert read_dataset(path, limit=2) == [Item(one, 9), Item(tuple(messages), None)]


def test_a_trace_keeps_its_times_lengths_and_shared_blocks(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 3000, "input_length": 1100, "output_length": 52, "hash_ids": [1, 2, 3]},
        {"timestamp": 1000, "input_length": 600, "output_length": 5, "hash_ids": [1, 9]},
        {"timestamp": 1500, "prompt": "own words", "max_tokens": 4},
    ]
    items, times = read_trace(written(tmp_path / "trace.jsonl", rows), seed=1)
    assert times == (0.0, 0.5, 2.0)
    asked = [item.messages[0]["content"].split() for item in items]
    assert [len(text) for text in asked] == [600, 2, 1100]
    assert asked[0][:512] == asked[2][:512] and asked[0][512:] != asked[2][512:600]
    assert [item.max_tokens for item in items] == [5, 4, 52]
    assert scaled(times, 2.0) == (0.0, 0.25, 1.0)


@pytest.mark.parametrize(
    "row",
    [{"timestamp": -1, "input_length": 1, "output_length": 1},
     {"timestamp": 0, "input_length": 0, "output_length": 1},
     {"input_length": 1, "output_length": 1}, {"timestamp": 0, "input_length": 3}],
)  # fmt: skip
def test_a_wrong_trace_is_refused_with_its_line(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="line 1"):
        read_trace(written(tmp_path / "trace.jsonl", [row]), seed=1)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    for text in (
        "",
        "[1]",
        '{"conversations": [3]}',
        '{"other": 1}',
        "[{",
        '{"prompt": "a", "max_tokens": "b"}',
    ):
        path = tmp_path / "rows"
        path.write_text(text)
        with pytest.raises(ConfigError):
            read_dataset(path)
    with pytest.raises(ConfigError):
        Workload([])
    with pytest.raises(ConfigError):
        synthetic(Lengths.parse("1"), Lengths.parse("1"), seed=1, prefixes=0)
