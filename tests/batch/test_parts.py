"""Parquet parts of an output that grows: each row once and one schema, whatever happened before."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import uvloop

from penstock.batch import parts as making
from penstock.batch.parts import Parts, parts_folder, parts_of
from penstock.errors import WriteFailed


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "PART_BYTES", 300)
    monkeypatch.setattr(making, "LOOK_INTERVAL", 0.01)


def grow(out: Path, first: int, count: int) -> None:
    with out.open("ab") as file:
        file.writelines(
            json.dumps({"n": i, "text": "x" * 20}).encode() + b"\n" for i in range(first, first + count)
        )


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_bytes().splitlines()]


def held(out: Path) -> list[dict[str, Any]]:
    """The rows of all parts, which have one schema."""
    files = sorted(parts_folder(out).glob("*.parquet"))
    assert [file.name for file in files] == [f"part-{i:05}.parquet" for i in range(len(files))]
    assert len({pq.read_schema(file).remove_metadata() for file in files}) <= 1
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_parts_are_made_as_it_grows_and_the_rest_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    grow(out, 0, 5)
    parts = Parts(out)
    parts.advance()
    assert held(out) == []
    grow(out, 5, 20)
    with out.open("ab") as file:
        file.write(b'{"n": "torn')
    parts.advance()
    made = held(out)
    assert made == rows_of_whole(out)[: len(made)]
    assert 15 < len(made) <= 25
    parts.finish()
    assert held(out) == rows_of_whole(out)
    before = {path: path.stat().st_ino for path in parts_folder(out).iterdir()}
    parts.finish()
    Parts(out).finish()
    assert {path: path.stat().st_ino for path in parts_folder(out).iterdir()} == before


def rows_of_whole(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def test_a_column_that_drifts_changes_the_parts_before(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    grow(out, 0, 30)
    Parts(out).finish()
    with out.open("ab") as file:
        file.write(b'{"n": 0.5, "late": [1]}\n')
    Parts(out).finish()
    assert held(out) == [{"text": None, "late": None, **row} for row in rows_of(out)]
    grow(out, 31, 30)
    with out.open("ab") as file:
        file.write(b'{"n": 1, "text": {"now": "an object"}}\n')
    parts = Parts(out)
    parts.finish()
    assert parts.as_json == ["text"]
    found = [{**row, "text": row["text"] and json.loads(row["text"])} for row in held(out)]
    assert found == [{"text": None, "late": None, **row} for row in rows_of(out)]


@pytest.mark.parametrize("seed", range(12))
def test_after_a_crash_parts_that_do_not_fit_are_made_again(tmp_path: Path, seed: int) -> None:
    """The output may lose its tail and go on with other rows; parts may be missing, torn or left over."""
    chance = random.Random(seed)
    out = tmp_path / "out.jsonl"
    grow(out, 0, 40)
    for turn in range(1, 6):
        parts = Parts(out)
        parts.advance() if chance.random() < 0.5 else parts.finish()
        data = out.read_bytes()
        if chance.random() < 0.7:
            cut = data.rfind(b"\n", 0, chance.randrange(1, len(data))) + 1
            out.write_bytes(data[:cut])
        grow(out, turn * 1000, chance.randrange(30))
        files = sorted(parts_folder(out).glob("*.parquet"))
        if files and chance.random() < 0.5:
            victim = chance.choice(files)
            victim.unlink() if chance.random() < 0.5 else victim.write_bytes(victim.read_bytes()[:-20])
        (parts_folder(out) / ".part-00001.parquet.tmp").write_bytes(b"half")
    Parts(out).finish()
    assert held(out) == rows_of(out)
    assert not list(parts_folder(out).glob(".*"))


def test_beside_a_job_and_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    out.touch()

    async def job(fails: bool) -> None:
        async with asyncio.timeout(30), parts_of(out):
            grow(out, len(rows_of(out)), 20)
            while not fails and not list(parts_folder(out).glob("part-*")):  # noqa: ASYNC110 - files
                await asyncio.sleep(0.01)
            grow(out, len(rows_of(out)), 20)
            if fails:
                raise KeyError

    uvloop.run(job(fails=False))
    assert held(out) == rows_of(out)
    with pytest.raises(KeyError):
        uvloop.run(job(fails=True))
    assert held(out) == rows_of(out)

    def full(*anything: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_batch", full)
    with pytest.raises(WriteFailed, match="part-.*No space left"):
        uvloop.run(job(fails=False))
    monkeypatch.undo()
    Parts(out).finish()
    assert held(out) == rows_of(out)
