"""What is exported is what the job has, whatever state it is in and however its rows differ."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import zstandard

from penstock.batch import export as exporting
from penstock.batch.trace import Trace
from penstock.cli.export import main
from penstock.errors import ConfigError
from penstock.inputs.opened import open_source
from tests.batch.finished import finish, sample

ROWS = [{"q": f"q{i}", "n": i if i < 9 else f"text {i}"} for i in range(12)]


def making(message: str, index: int) -> Trace | None:
    """One sample of q5 fails; one of q7 is dropped."""
    if (message, index) == ("q5", 1):
        return None
    return sample(message, index, dropped=(message, index) == ("q7", 0), columns={"score": index})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    out = tmp_path / "out.jsonl"
    assert finish(out, ROWS, making).done == 11
    return out


def run(*words: object) -> int:
    return main([str(word) for word in words])


def loaded(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_jsonl_has_the_bytes_of_the_output(out: Path, tmp_path: Path) -> None:
    assert run(out, "--to", tmp_path / "x.jsonl") == 0
    assert (tmp_path / "x.jsonl").read_bytes() == out.read_bytes()
    run(out, "--to", tmp_path / "x.jsonl.gz")
    assert gzip.decompress((tmp_path / "x.jsonl.gz").read_bytes()) == out.read_bytes()
    run(out, "--to", tmp_path / "x.jsonl.zst")
    assert len(list(open_source([tmp_path / "x.jsonl.zst"]).lines())) == 11
    unpacked = zstandard.ZstdDecompressor().stream_reader((tmp_path / "x.jsonl.zst").read_bytes()).read()
    assert unpacked == out.read_bytes()


def test_a_row_a_sample_with_where_it_came_from(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    run(out, "--to", path, "--per-sample")
    rows = {(row["q"], row["sample"]): row for row in loaded(path)}
    expected = {(f"q{i}", k) for i in range(12) for k in range(2)} - {("q5", 0), ("q5", 1), ("q7", 0)}
    assert set(rows) == expected
    assert rows["q3", 1] == {
        "q": "q3",
        "n": 3,
        "sample": 1,
        "generation": "q3 1",
        "finish_reason": "stop",
        "reasoning": "hm",
        "score": 1,
        "api_metadata": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
        "provenance": {"seed": 1},
    }


def test_samples_of_unfinished_rows_where_they_are_asked_for(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    run(out, "--to", path, "--partial")
    added = loaded(path)[-1]
    assert (added["q"], added["generations"], added["score"]) == ("q5", ["q5 0"], [0])
    assert len(loaded(path)) == 12
    run(out, "--to", path, "--partial", "--per-sample", "--overwrite")
    assert len(loaded(path)) == 22
    # What the output has lost is not exported from it, and not lost: the journal has it.
    last = loaded(out)[-1]["q"]
    out.write_bytes(out.read_bytes()[:-2])
    run(out, "--to", path, "--overwrite")
    assert last not in {row["q"] for row in loaded(path)}
    assert len(loaded(path)) == 10
    run(out, "--to", path, "--partial", "--overwrite")
    assert sorted(row["q"] for row in loaded(path)) == sorted(row["q"] for row in ROWS)
    (tmp_path / "in.jsonl").rename(tmp_path / "elsewhere.jsonl")
    with pytest.raises(ConfigError, match="needs the job's --input"):
        run(out, "--to", path, "--partial", "--overwrite")
    run(out, "--to", path, "--partial", "--overwrite", "--input", tmp_path / "elsewhere.jsonl")
    assert len(loaded(path)) == 12


def test_a_job_that_is_being_written_is_read_as_far_as_it_is_sure(out: Path, tmp_path: Path) -> None:
    whole = out.read_bytes()
    with out.open("ab") as file:
        file.write(b'{"q": "no journal knows me"}\n{"q": "tor')
    run(out, "--to", tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_bytes() == whole


def test_an_output_without_its_journal_is_exported_as_it_is(out: Path, tmp_path: Path) -> None:
    out.with_name("out.jsonl.journal").unlink()
    whole = loaded(out)
    with out.open("ab") as file:
        file.write(b'{"q": "tor')
    run(out, "--to", tmp_path / "x.jsonl")
    assert loaded(tmp_path / "x.jsonl") == whole
    run(out, "--to", tmp_path / "y.jsonl", "--per-sample")
    assert len(loaded(tmp_path / "y.jsonl")) == 21
    with pytest.raises(ConfigError, match="no journal"):
        run(out, "--to", tmp_path / "z.jsonl", "--partial")
    with pytest.raises(ConfigError, match="nothing to export"):
        run(tmp_path / "none.jsonl", "--to", tmp_path / "z.jsonl")


def restored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "n": json.loads(row["n"])} for row in rows]


def test_parquet_and_datasets_hold_rows_that_differ(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(out, "--to", tmp_path / "x.parquet")
    assert "The rows differ in 'n'" in capsys.readouterr().err
    assert restored(pq.read_table(tmp_path / "x.parquet").to_pylist()) == loaded(out)
    monkeypatch.setattr(exporting, "PART_BYTES", 500)
    run(out, "--to", f"{tmp_path}/parts/")
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 3
    assert len({pq.read_schema(part) for part in parts}) == 1
    assert restored(pq.read_table(tmp_path / "parts").to_pylist()) == loaded(out)
    run(out, "--to", f"hf:{tmp_path}/saved")
    saved = datasets.load_from_disk(tmp_path / "saved")
    assert restored(list(saved)) == loaded(out)
    assert sorted(child.name for child in tmp_path.iterdir() if child.name.startswith(".")) == []


def test_nothing_is_replaced_unasked(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    run(out, "--to", f"{folder}/")
    with pytest.raises(ConfigError, match="is not empty: --overwrite"):
        run(out, "--to", folder)
    run(out, "--to", folder, "--overwrite")
    run(out, "--to", f"hf:{folder}", "--overwrite")
    run(out, "--to", folder, "--overwrite")
    assert [child.name for child in folder.iterdir()] == ["part-00000.parquet"]
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="holds thesis.tex, which is no export"):
        run(out, "--to", folder, "--overwrite")
    run(out, "--to", tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="there already"):
        run(out, "--to", tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="own output"):
        run(out, "--to", out, "--overwrite")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--to", "x.txt"], "an export goes to a file"),
        (["--to", "/none/x.jsonl"], "no folder /none"),
        (["--to", "x.parquet", "--push-to-hub", "a/b"], "export --to FOLDER/"),
        (["--to", "x/", "--private"], "is for --push-to-hub"),
    ],
)
def test_a_wrong_target_is_one_sentence(out: Path, words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(out, *words)


def test_a_column_of_a_samples_name_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    finish(out, [{"q": "a", "sample": "mine"}], making)
    with pytest.raises(ConfigError, match="a column 'sample' of their own"):
        run(out, "--to", tmp_path / "x.jsonl", "--per-sample")
    assert not (tmp_path / "x.jsonl").exists()
