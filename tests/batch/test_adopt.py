"""An output that open-r1's script began is continued in place; what is not certain is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.batch.job import Accounting, Job, JobSettings
from penstock.batch.status import read_status
from penstock.batch.steps import Steps
from penstock.batch.trace import Metadata, Trace
from penstock.errors import ConfigError
from penstock.inputs.jsonl import JsonlInput
from penstock.prompt import Prompt, PromptFormat

Row = dict[str, Any]

INPUT: list[Row] = [{"uuid": f"u{i}", "problem": f"What is {i} + {i}?", "level": i / 3} for i in range(8)]


def open_r1(row: Row, samples: int = 2) -> str:
    """A line as generate_reasoning.py writes it: with json.dumps, the row's columns first."""
    usage = {"prompt_tokens": 9, "total_tokens": 21, "completion_tokens": 12, "prompt_tokens_details": None}
    result = {
        **row,
        "generations": [f"<think>é</think> {row['problem']} {index}" for index in range(samples)],
        "finish_reasons": ["stop"] * samples,
        "api_metadata": [usage] * samples,
    }
    return json.dumps(result) + "\n"


class Files:
    def __init__(self, folder: Path) -> None:
        self.source = folder / "in.jsonl"
        self.out = folder / "out.jsonl"
        self.write_input(INPUT)
        self.asked: list[tuple[str, int]] = []

    def write_input(self, rows: list[Row]) -> None:
        self.source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    async def __call__(self, prompt: Prompt, index: int, steps: Steps) -> Trace:
        self.asked.append((json.loads(prompt.fields)["uuid"], index))
        return Trace(text="new", metadata=Metadata(prompt_tokens=1, completion_tokens=1, total_tokens=2))

    def run(self, samples: int = 2, id_column: str | None = "uuid") -> tuple[Accounting, int]:
        form = PromptFormat(prompt_column="problem", id_column=id_column)
        settings = JobSettings(out=self.out, form=form, num_generations=samples)

        async def main() -> tuple[Accounting, int]:
            with Job(JsonlInput(self.source), settings, {}) as job:
                async with asyncio.timeout(30):
                    return await job.run(self), job.adopted

        return asyncio.run(main())

    def uuids(self) -> list[str]:
        return [json.loads(line)["uuid"] for line in self.out.read_bytes().splitlines()]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.mark.parametrize("id_column", ["uuid", None])
@pytest.mark.parametrize("torn", ["", '{"uuid": "u7", "prob', '{"uuid": "u7\n{"uuid": "u3"'])
def test_it_is_continued_in_place(files: Files, id_column: str | None, torn: str) -> None:
    begun = open_r1(INPUT[5]) + open_r1(INPUT[2])
    files.out.write_text(begun + torn)
    assert files.run(id_column=id_column) == (Accounting(8, 8, 0), 2)
    assert files.out.read_text().startswith(begun)
    assert sorted(files.uuids()) == [row["uuid"] for row in INPUT]
    assert sorted(files.asked) == [(f"u{i}", index) for i in (0, 1, 3, 4, 6, 7) for index in (0, 1)]
    assert files.run(id_column=id_column) == (Accounting(8, 8, 0), 0)
    assert read_status(files.out).accounting == Accounting(8, 8, 0)


def test_rows_that_did_not_come_back_as_they_were_are_known_by_their_id(files: Files) -> None:
    files.out.write_text(open_r1(INPUT[5] | {"level": "1.67", "problem": "retold"}))
    assert files.run() == (Accounting(8, 8, 0), 1)
    assert sorted(files.uuids()) == [row["uuid"] for row in INPUT]


def test_more_samples_are_added_to_its_rows(files: Files) -> None:
    files.out.write_text("".join(map(open_r1, INPUT)))
    assert files.run(samples=3) == (Accounting(8, 8, 0), 8)
    assert sorted(files.asked) == [(row["uuid"], 2) for row in INPUT]
    row = json.loads(files.out.read_bytes().splitlines()[0])
    assert row["generations"][1:] == [f"<think>é</think> {row['problem']} 1", "new"]
    assert row["api_metadata"][0]["completion_tokens"] == 12


def test_the_output_of_a_job_that_lost_its_journal_is_taken_over(files: Files) -> None:
    files.run()
    before = files.out.read_bytes()
    files.out.with_name("out.jsonl.journal").unlink()
    assert files.run() == (Accounting(8, 8, 0), 8)
    assert files.out.read_bytes() == before
    assert len(files.asked) == 16


def stray(files: Files) -> None:
    files.out.write_text(open_r1(INPUT[0]) + open_r1(INPUT[1] | {"uuid": "other"}))


def twice(files: Files) -> None:
    files.out.write_text(open_r1(INPUT[0]) * 2)


def torn_in_the_middle(files: Files) -> None:
    glued = '{"uuid": "u1", "pro' + open_r1(INPUT[2])
    files.out.write_text(open_r1(INPUT[0]) + glued + open_r1(INPUT[3]))


def other_samples(files: Files) -> None:
    files.out.write_text(open_r1(INPUT[0]) + open_r1(INPUT[1], samples=4))


def one_of_several(files: Files) -> None:
    files.write_input([{**row, "problem": "the same", "uuid": f"{row['uuid']} new"} for row in INPUT])
    files.out.write_text(open_r1(INPUT[0] | {"problem": "the same"}))


def something_else(files: Files) -> None:
    files.out.write_text('{"text": "precious"}\n')


@pytest.mark.parametrize(
    ("begin", "told", "id_column"),
    [
        (stray, r"line 2: this row is in the output and not in .*in\.jsonl, going by its 'uuid'", "uuid"),
        (twice, "line 1: this row is in the output|line 2: this row is in the output", "uuid"),
        (torn_in_the_middle, "line 2 is not JSON.* Take it out of the file", "uuid"),
        (other_samples, "line 2 has 4 samples, and those before have 2", "uuid"),
        (one_of_several, "8 rows of .* have this 'problem', and it is not certain which one", None),
        (something_else, "is not empty and its journal .* knows nothing of it", "uuid"),
    ],
)
def test_what_is_not_certain_is_refused_and_nothing_is_touched(
    files: Files, begin: Callable[[Files], None], told: str, id_column: str | None
) -> None:
    begin(files)
    before = files.out.read_bytes()
    with pytest.raises(ConfigError, match=told):
        files.run(id_column=id_column)
    assert files.out.read_bytes() == before
    assert [path.name for path in files.out.parent.glob("out*")] == ["out.jsonl"]


def test_fewer_samples_than_it_has_are_refused(files: Files) -> None:
    files.out.write_text(open_r1(INPUT[0]))
    with pytest.raises(ConfigError, match="has 2 samples of a row: use -n 2 or more"):
        files.run(samples=1)
    assert not files.out.with_name("out.jsonl.journal").exists()
