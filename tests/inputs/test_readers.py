"""Every kind of file gives the same rows, in the same order, and names what is wrong with it."""

from __future__ import annotations

import base64
import datetime
import decimal
import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from penstock.errors import ConfigError
from penstock.inputs.iterable import from_iterable
from penstock.inputs.opened import open_source
from penstock.inputs.parquet import ParquetInput
from penstock.inputs.source import Source
from penstock.prompt import PromptFormat

ROWS = [
    {"q": f'What is "{i}", or {i}\n+ {i}?', "answer": str(i), "note": "" if i % 3 else "ü"}
    for i in range(2500)
]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)


def csv_file(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    between = "\t" if ".tsv" in path.name else ","
    quoted = [between.join('"' + str(cell).replace('"', '""') + '"' for cell in line) for line in lines]
    data = ("\ufeff" + "\r\n".join(quoted) + "\r\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)


WRITERS = {
    "a.jsonl": jsonl,
    "a.jsonl.gz": jsonl,
    "a.ndjson.zst": jsonl,
    "a.csv": csv_file,
    "a.tsv": csv_file,
    "a.csv.gz": csv_file,
    "a.parquet": parquet,
}


def rows_of(source: Source) -> list[dict[str, Any]]:
    return [json.loads(line) for _, line in source.lines()]


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    assert rows_of(open_source([path])) == ROWS
    parts = [rows_of(open_source([path], skip=100, limit=1500, shard=(i, 7))) for i in range(7)]
    assert [row for row in ROWS if any(row in part for part in parts)] == ROWS[100:1600]
    assert parts[3] == ROWS[103:1600:7]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_a_shuffle_is_the_same_for_every_kind(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    source = open_source([path], shuffle=5)
    shuffled = rows_of(source)
    assert shuffled != ROWS
    assert sorted(shuffled, key=ROWS.index) == ROWS
    assert rows_of(source) == shuffled == rows_of(open_source([path], shuffle=5))
    assert shuffled == rows_of(open_source([tmp_path / name], shuffle=5, limit=2500))
    shards = [rows_of(open_source([path], shuffle=5, skip=3, limit=1000, shard=(i, 3))) for i in range(3)]
    assert shards == [shuffled[3 + i : 1003 : 3] for i in range(3)]
    # Each row is still named by its place in the file.
    jsonl(tmp_path / "plain.jsonl", ROWS)
    where = dict(open_source([tmp_path / "plain.jsonl"], shuffle=5).lines())
    first = next(iter(where)).rsplit(" ", 1)[1]
    assert ROWS[int(first) - 1] == shuffled[0]


def test_a_folder_is_read_in_order_and_only_where_it_is_of_one_kind(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i, start in enumerate(range(0, 2500, 500)):
        parquet(folder / f"part-{i:05}.parquet", ROWS[start : start + 500])
    (folder / "README.md").write_text("# a dataset")
    (folder / "_SUCCESS.csv").write_text("")
    assert rows_of(open_source([folder])) == ROWS
    assert rows_of(open_source([folder], skip=600, limit=2)) == ROWS[600:602]
    assert rows_of(open_source([str(folder / "part-*.parquet")])) == ROWS
    assert rows_of(open_source([str(tmp_path / "**/part-0000[01].parquet")])) == ROWS[:1000]
    assert rows_of(open_source(sorted(folder.glob("part-*")))) == ROWS
    shuffled = rows_of(open_source([folder], shuffle=1))
    assert shuffled != ROWS
    assert sorted(shuffled, key=ROWS.index) == ROWS
    assert rows_of(open_source([folder], shuffle=1, limit=10)) == shuffled[:10]
    jsonl(folder / "again.jsonl", ROWS)
    (folder / "again.jsonl.journal").touch()  # a job's own output is not its input
    assert rows_of(open_source([folder])) == ROWS
    with pytest.raises(ConfigError, match="No file matches"):
        open_source([str(folder / "*.jsonl")])
    (folder / "again.jsonl.journal").unlink()
    with pytest.raises(ConfigError, match=r"several kinds \(again.jsonl is JSONL, part-0"):
        open_source([folder])
    with pytest.raises(ConfigError, match=r"give a pattern, '.*parquet'"):
        open_source([tmp_path])


def test_a_shuffled_folder_of_plain_files_reads_them_where_they_are(tmp_path: Path) -> None:
    for i in range(150):  # more than are open at a time
        lines = [json.dumps({"n": i * 3 + k}) for k in range(3)]
        (tmp_path / f"{i:03}.jsonl").write_text("\n \n".join(lines))
    source = open_source([tmp_path], shuffle=2)
    found = list(source.lines())
    assert sorted(json.loads(line)["n"] for _, line in found) == list(range(450))
    for where, line in found[:20]:
        n = json.loads(line)["n"]
        assert where == f"{tmp_path}/{n // 3:03}.jsonl line {n % 3 * 2 + 1}"


def test_words_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for word in (tmp_path / "none", str(tmp_path / "none"), "none.parquet", "./none"):
        with pytest.raises(ConfigError, match="There is no input file"):
            open_source([word])
    with pytest.raises(ConfigError, match="No file matches"):
        open_source([str(tmp_path / "*.jsonl")])
    with pytest.raises(ConfigError, match="Say what to read"):
        open_source([])
    with pytest.raises(ConfigError, match="only once"):
        open_source(["-", "-"])
    with pytest.raises(ConfigError, match="must not be negative"):
        open_source(["-"], skip=-1)


def test_a_shard_of_too_few_rows_is_empty_and_no_error(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ROWS[:2])
    form = PromptFormat(prompt_column="q")
    for order in (None, 3):
        surveys = [
            open_source([tmp_path / "a.jsonl"], shuffle=order, shard=(i, 4)).survey(form) for i in range(4)
        ]
        assert [survey.rows for survey in surveys] == [1, 1, 0, 0]
    with pytest.raises(ConfigError, match="holds no rows"):
        open_source([tmp_path / "a.jsonl"], skip=2).survey(form)


def test_a_pipe_can_be_read_once_and_its_shuffle_again(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    data = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    for shuffle in (None, 1):
        writer = threading.Thread(target=path.write_bytes, args=(data,), daemon=True)
        writer.start()
        source = open_source([path], shuffle=shuffle)
        assert source.again == (shuffle is not None)
        assert sorted(rows_of(source), key=ROWS.index) == ROWS
        writer.join(20)
        if source.again:
            assert sorted(rows_of(source), key=ROWS.index) == ROWS


def test_values_of_tables_have_a_form_in_json(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5, 600000)
    columns = {
        "binary": pa.array([b"\xff\x00"]),
        "time": pa.array([moment], pa.timestamp("us")),
        "nanos": pa.array([1700000000123456789], pa.timestamp("ns")),
        "zoned": pa.array([moment], pa.timestamp("us", "UTC")),
        "day": pa.array([datetime.date(2024, 1, 2)]),
        "money": pa.array([decimal.Decimal("12345678901234567890.50")]),
        "nan": pa.array([float("nan")]),
        "took": pa.array([datetime.timedelta(seconds=1.5)]),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "nested": pa.array([{"image": {"bytes": b"abc", "path": None}}]),
        "label": pa.array(["a"]).dictionary_encode(),
        "big": pa.array([2**64 - 1], pa.uint64()),
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    assert rows_of(open_source([path])) == [
        {
            "binary": base64.b64encode(b"\xff\x00").decode(),
            "time": "2024-01-02T03:04:05.600000",
            "nanos": "2023-11-14T22:13:20.123456789",
            "zoned": "2024-01-02T03:04:05.600000+00:00",
            "day": "2024-01-02",
            "money": "12345678901234567890.50",
            "nan": None,
            "took": 1.5,
            "map": [["a", 1]],
            "nested": {"image": {"bytes": "YWJj", "path": None}},
            "label": "a",
            "big": 2**64 - 1,
        }
    ]


def test_a_value_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    seconds = pa.array([0] * 999 + [10**17], pa.timestamp("ms"))
    pq.write_table(pa.table({"q": ["x"] * 1000, "when": seconds}), path)
    with pytest.raises(ConfigError, match=r"a.parquet row 1000: the column 'when' \(timestamp\[ms\]\)"):
        open_source([path]).survey(PromptFormat(prompt_column="q"))
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"q": bad}), path)
    with pytest.raises(ConfigError, match=r"row 2: the column 'q' \(string\) cannot be read"):
        rows_of(open_source([path]))
    with pytest.raises(ConfigError, match="row 1: the column 'q' has no form in JSON .*64-bit"):
        rows_of(from_iterable([{"q": 2**70}]))
    with pytest.raises(ConfigError, match="row 1: the column 'q' has no form in JSON"):
        rows_of(from_iterable([{"q": "\ud800"}]))
    with pytest.raises(ConfigError, match="row 1 is str"):
        rows_of(from_iterable(["no row"]))  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n3\n", "line 3 has 1 cells; the header has 2"),
        ('a,b\n"1\n2",3\n4,5,6\n', "line 4 has 3 cells"),
        ('a,b\n1,"2\n', r"not CSV after line \d"),
        ("a,a\n1,2\n", "two columns named 'a'"),
        ("a,b\n1,\udcff\n", "is not UTF-8 text"),
    ],
)
def test_bad_csv_is_named_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=says):
        rows_of(open_source([path]))


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    text = "x" * 200_000
    (tmp_path / "a.csv").write_text(f"q\n{text}\n")
    assert rows_of(open_source([tmp_path / "a.csv"])) == [{"q": text}]


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(ConfigError, match="is no Parquet file, or is damaged"):
        rows_of(open_source([path]))
    packed = tmp_path / "a.csv.gz"
    csv_file(packed, ROWS)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="is damaged after line"):
        rows_of(open_source([packed]))
    with pytest.raises(ConfigError, match="unpack the file first"):
        parquet(tmp_path / "a.parquet.gz", ROWS[:1])
        open_source([tmp_path / "a.parquet.gz"])
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), path)
    with pytest.raises(ConfigError, match="two columns named 'a'"):
        rows_of(open_source([path]))


def test_row_groups_without_wanted_rows_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    parquet(path, ROWS)
    groups: list[int] = []
    group_of = ParquetInput._group

    def note(self: ParquetInput, file: Any, group: int, first: int, wanted: Any) -> Any:
        groups.append(group)
        return group_of(self, file, group, first, wanted)

    monkeypatch.setattr(ParquetInput, "_group", note)
    assert rows_of(open_source([path], skip=1500, limit=100)) == ROWS[1500:1600]
    assert groups == [2]


def test_python_rows_are_sources(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"q": "a", "blob": b"\xff"}, {"q": "b"}]
    source = from_iterable(rows)
    assert source.again
    assert rows_of(source) == [{"q": "a", "blob": "/w=="}, {"q": "b"}]
    assert not from_iterable(iter(rows)).again
    with pytest.raises(ConfigError, match="not str"):
        from_iterable("a path is no row")  # type: ignore[arg-type]
