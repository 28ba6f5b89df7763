"""Lines of a file that grows, in pieces of any size, and of one that is not the same any more."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.viewer.lines import Lines, Replaced

LINES = st.lists(
    st.sampled_from(
        [b'{"a": 1}', b'{"text": "\\n \xc3\xa9"}', b"", b"  ", b"not json", b'{"b": {"c": []}}', b"[1]"]
    ),
    max_size=12,
)


@given(LINES, st.lists(st.integers(0, 200), max_size=6), st.booleans())
def test_each_line_is_given_once_whatever_the_file_grows_by(
    lines: list[bytes], cuts: list[int], ends: bool
) -> None:
    content = b"\n".join(lines) + (b"\n" if ends and lines else b"")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "out.jsonl"
        reader = Lines(path)
        given: list[tuple[int, bytes]] = []
        written = 0
        for cut in [*sorted(min(cut, len(content)) for cut in cuts), len(content)]:
            with path.open("ab") as file:
                file.write(content[written:cut])
            written = cut
            given += reader.fresh()
            assert all(content[at:].startswith(line) for at, line in given)
            assert reader.end + reader.torn == cut
        whole = content.splitlines(keepends=True)
        if whole and not whole[-1].endswith(b"\n") and not whole[-1].startswith(b"{"):
            whole.pop()  # it may go on
        assert [line for _, line in given] == [line.strip() for line in whole if line.strip()]
        assert list(reader.fresh()) == []


def test_a_torn_line_waits_and_a_whole_object_does_not(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"a":1}\n{"b":')
    reader = Lines(path)
    assert list(reader.fresh()) == [(0, b'{"a":1}')] and reader.torn == 5
    with path.open("ab") as file:
        file.write(b"2}")
    assert list(reader.fresh()) == [(8, b'{"b":2}')] and reader.torn == 0


def test_what_is_not_the_same_file_any_more_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"

    def read_two() -> Lines:
        path.write_bytes(b'{"a":1}\n{"b":2}\n')
        reader = Lines(path)
        assert len(list(reader.fresh())) == 2
        return reader

    reader = read_two()
    path.write_bytes(b'{"a":1}\n')
    with pytest.raises(Replaced):
        list(reader.fresh())
    reader = read_two()
    path.write_bytes(b'{"a":1}\n{"b":3}\n{"c":4}\n')
    with pytest.raises(Replaced):
        list(reader.fresh())
    reader = read_two()
    (tmp_path / "other").write_bytes(b'{"a":1}\n{"b":2}\n{"c":4}\n')
    (tmp_path / "other").rename(path)
    with pytest.raises(Replaced):
        list(reader.fresh())
    reader = read_two()
    path.unlink()
    with pytest.raises(Replaced):
        list(reader.fresh())


def test_a_file_that_is_not_there_yet_has_no_lines(tmp_path: Path) -> None:
    reader = Lines(tmp_path / "out.jsonl")
    assert list(reader.fresh()) == []
    (tmp_path / "out.jsonl").write_bytes(b"{}\n")
    assert list(reader.fresh()) == [(0, b"{}")]
