"""Memory does not grow with the number of rows, whatever they are read from."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROWS = 150_000
TEXT = "x" * 600

READ = """
import resource, sys
from penstock.inputs.opened import open_source
from penstock.prompt import PromptFormat
path, limit, shuffle = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
source = open_source([path], limit=limit, shuffle=1 if shuffle else None)
print(source.survey(PromptFormat(prompt_column="q")).rows)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    with (
        (folder / "a.jsonl").open("w") as plain,
        gzip.open(folder / "a.jsonl.gz", "wt", compresslevel=1) as packed,
        (folder / "a.csv").open("w") as table,
    ):
        table.write("n,q\n")
        for i in range(ROWS):
            line = json.dumps({"n": i, "q": f"{i} {TEXT}"}) + "\n"
            plain.write(line)
            packed.write(line)
            table.write(f"{i},{i} {TEXT}\n")
    columns = {"n": list(range(ROWS)), "q": [f"{i} {TEXT}" for i in range(ROWS)]}
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=ROWS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [0, 1])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_memory_is_flat(folder: Path, name: str, shuffled: int) -> None:
    def read(limit: int) -> int:
        command = [sys.executable, "-c", READ, str(folder / name), str(limit), str(shuffled)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        rows, megabytes = map(int, done.stdout.split())
        assert rows == limit
        return megabytes

    assert read(ROWS) - read(10_000) < 50  # held in memory they would be 110 MB
