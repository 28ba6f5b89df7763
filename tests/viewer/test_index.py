"""The index and the views on it, against the file they are of."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.viewer.index import Index, Table
from penstock.viewer.views import Query, View


def line(**columns: Any) -> bytes:
    return orjson.dumps(columns) + b"\n"


Sampled = tuple[str, str, int, float | None, float | None]
"""Text, finish reason, tokens, seconds, reward."""


def sample(
    text: str, finish: str, tokens: int, latency: float | None, reward: float | None
) -> dict[str, Any]:
    return {
        "generations": [text],
        "finish_reasons": [finish],
        "api_metadata": [{"prompt_tokens": 5, "completion_tokens": tokens, "latency": latency}],
        "rewards": [reward],
    }


def test_of_several_samples_the_largest_counts_and_rewards_are_averaged(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    metadata = [
        {"prompt_tokens": 5, "completion_tokens": 20, "latency": 2.0},
        {"prompt_tokens": 5, "completion_tokens": 30, "latency": 1.0},
    ]
    row: dict[str, Any] = {"generations": ["abc", "de"], "finish_reasons": ["stop", "length"]}
    row |= {"api_metadata": metadata, "rewards": [1, 0]}
    path.write_bytes(line(**row) + b"\n  \nnot json\n" + line(problem="only a prompt") + b'{"torn": ')
    index = Index(path)
    index.advance()
    table = index.table
    assert table.rows == 3 and index.is_current and index.lines.torn == 9
    assert (table.tokens[0], table.prompt_tokens[0], table.length[0]) == (30, 5, 3)
    assert (table.latency[0], table.reward[0]) == (2.0, 0.5)
    assert [table.finishes_of(n) for n in range(3)] == [["stop", "length"], ["not a row"], []]
    assert index.read(table, 0) + b"\n" == line(**row) and index.read(table, 1) == b"not json"
    with pytest.raises(IndexError):
        index.read(table, 3)
    charts = index.charts
    assert (charts["samples"], charts["completion_tokens"], charts["prompt_tokens"]) == (2, 50, 10)
    assert dict(charts["finish"]) == {"stop": 1, "length": 1, "not a row": 1}
    assert sum(charts["completion"]) == 2 and charts["rewards"] == [(0.0, 1), (1.0, 1)]
    assert charts["speed"] == [10.0, 30.0]


def test_it_grows_with_the_file_and_begins_anew_with_another(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    index = Index(path)
    index.advance()
    assert index.table.rows == 0 and index.is_current
    for count in range(1, 4):
        with path.open("ab") as file:
            file.write(line(n=count))
        index.advance()
        assert index.table.rows == count
    old = index.table
    path.write_bytes(line(n=9))
    index.advance()
    index.advance()
    assert index.table is not old and index.table.rows == 1 and index.read(index.table, 0) == b'{"n":9}'


def test_a_row_costs_thirty_bytes(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(line(**sample("x" * 50, "stop", 1, 1.0, None)) * 5000)
    index = Index(path)
    index.advance()
    table = index.table
    names = ("offsets", "tokens", "prompt_tokens", "length", "latency", "reward", "finish")
    columns = [getattr(table, name) for name in names]
    assert sum(column.itemsize for column in columns) == Table.BYTES_A_ROW == 30
    assert all(len(column) == 5000 for column in columns)
    assert sum(column.buffer_info()[1] * column.itemsize for column in columns) == 30 * 5000


def test_more_finish_reasons_than_there_are_bits(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"".join(line(generations=["x"], finish_reasons=[f"reason {n}"]) for n in range(40)))
    index = Index(path)
    index.advance()
    assert len(index.table.finishes) == 16 and index.table.finishes_of(39) == ["other"]
    view = View(index, Query(finish="other"), None)
    assert view.update() == 25


ROW = st.tuples(
    st.sampled_from(["a", "bb", "ccc"]),
    st.sampled_from(["stop", "length"]),
    st.integers(0, 5),
    st.none() | st.sampled_from([0.5, 1.0, 2.0]),
    st.none() | st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
)
BOUND = st.none() | st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(ROW, max_size=20),
    st.integers(0, 20),
    st.sampled_from(["", "stop", "length", "nothing"]),
    BOUND,
    BOUND,
    BOUND,
    st.sampled_from(["position", "length", "tokens", "time", "reward"]),
    st.booleans(),
)
def test_a_view_is_what_filtering_and_sorting_all_rows_gives(
    rows: list[Sampled],
    first: int,
    finish: str,
    least: float | None,
    most: float | None,
    reward: float | None,
    sort: Any,
    down: bool,
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "out.jsonl"
        lines = [line(**sample(*row)) for row in rows]
        path.write_bytes(b"".join(lines[:first]))
        index = Index(path)
        index.advance()
        query = Query(
            finish=finish, tokens_min=least, tokens_max=most, reward_min=reward, sort=sort, down=down
        )
        view = View(index, query, None)
        view.update()
        with path.open("ab") as file:
            file.write(b"".join(lines[first:]))
        index.advance()
        view._sort_cost = 0.0  # as if sorting took no time: it is not put off
        total = view.update()
    kept = [
        n
        for n, (_, why, tokens, _, score) in enumerate(rows)
        if (not finish or why == finish)
        and (least is None or tokens >= least)
        and (most is None or tokens <= most)
        and (reward is None or (score is not None and score >= reward))
    ]
    column = {"position": 0, "length": 0, "tokens": 2, "time": 3, "reward": 4}[sort]

    def value(n: int) -> Any:
        return len(rows[n][0]) if sort == "length" else rows[n][column]

    if sort == "position":
        expected = kept[::-1] if down else kept
    else:
        known = [n for n in kept if value(n) is not None]
        expected = sorted(known, key=value, reverse=down) + [n for n in kept if n not in known]
    assert total == len(kept) and view.rows(0, 100) == expected
    assert all(view.place(n) == at for at, n in enumerate(expected))
    assert all(isnan(index.table.reward[n]) == (rows[n][4] is None) for n in range(len(rows)))
