"""The account of a job read from its files: the same that opening it would give, whatever is missing."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from array import array
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.batch.job import Accounting
from penstock.batch.journal import Journal
from penstock.batch.records import Header, Target, encode
from penstock.batch.sink import Sink
from penstock.batch.status import (
    JournalFollower,
    Watched,
    count_rows,
    lock_holder,
    prompt_format,
    read_against,
    read_status,
)
from penstock.batch.trace import Metadata, Trace, encode_trace, row_line
from penstock.errors import ConfigError
from penstock.inputs.jsonl import JsonlInput
from penstock.inputs.source import Survey
from penstock.prompt import content_hash

ROWS = 5
SAMPLES = 2
HEADER = Header(
    parameters={"prompt_column": "q", "prompt_template": "Solve {q}"},
)
TRACE = Trace(
    text="é" * 20,
    finish_reason="stop",
    metadata=Metadata(prompt_tokens=3, completion_tokens=7, total_tokens=10),
)

STEP = st.tuples(st.sampled_from("sswwwfrp"), st.integers(0, ROWS - 1), st.integers(0, SAMPLES - 1))


pytestmark = pytest.mark.usefixtures("quick_disk")


def key(row: int) -> tuple[int, int]:
    """Hash and occurrence: rows 0 and 1, 2 and 3 have the same content."""
    return row_hash(row // 2), row % 2


def row_hash(number: int) -> int:
    return int.from_bytes(content_hash({"q": number})[:8], "little")


async def write_job(out: Path, steps: list[tuple[str, int, int]], samples: int = SAMPLES) -> None:
    """A job's files after these steps: samples, rows, failures, or failures forgotten."""
    journal = Journal(out.with_name(out.name + ".journal"), HEADER, samples)
    sink = Sink(out, out.with_name(out.name + ".failures"), journal)
    journal.aim(Target(samples=samples, rows=ROWS))
    written: set[int] = set()
    async with sink:
        for kind, row, index in steps:
            if kind == "r":
                journal.append(encode(b"r"))
            elif row in written:
                continue
            elif kind == "s":
                sink.add_sample(key(row), index, encode_trace(TRACE))
            elif kind == "p":
                sink.add_step(key(row), index, b"{}")
            elif kind == "f":
                sink.add_failure(key(row), index, b'{"error":"ServerFailed"}')
            else:
                places = [sink.add_sample(key(row), each, encode_trace(TRACE)) for each in range(samples)]
                sink.add_row(key(row), row_line(b'{"row":%d}' % row, [TRACE] * samples), places)
                written.add(row)
    sink.close()
    journal.close()


def opened(out: Path, samples: int) -> tuple[int, int, int, int]:
    """Rows done and failed, samples done and failed, as a job begins with them that is opened now."""
    journal = Journal(out.with_name(out.name + ".journal"), HEADER, samples)
    try:
        Sink(out, out.with_name(out.name + ".failures"), journal).close()
        state = journal.state
        return state.done, state.failed, state.done * samples + state.kept_samples, state.failed_samples
    finally:
        journal.close()


def cut(path: Path, missing: int, least: int = 0) -> None:
    """Without the last `missing` bytes, but `least` of them."""
    os.truncate(path, max(least, path.stat().st_size - missing))


MISSING = st.just(0) | st.integers(0, 1500)
"""Bytes missing at the end of a file."""


@settings(max_examples=150, deadline=None)
@given(
    st.lists(STEP, min_size=1, max_size=16),
    st.lists(STEP, max_size=8),
    st.integers(0, 1),
    MISSING,
    MISSING,
    st.booleans(),
)
def test_it_is_what_opening_the_job_finds_whatever_is_cut_off(
    steps: list[tuple[str, int, int]],
    then: list[tuple[str, int, int]],
    more: int,
    from_out: int,
    from_journal: int,
    garbled: bool,
) -> None:
    """One run, then another, which may ask for a third sample."""
    with TemporaryDirectory() as folder:
        out, samples = Path(folder) / "out.jsonl", SAMPLES
        asyncio.run(write_job(out, steps))
        journal = out.with_name("out.jsonl.journal")
        if more and any(step[0] in "sfwp" for step in steps):
            samples += more
            asyncio.run(write_job(out, then, samples))
        first = sum(len(line) + 1 for line in journal.read_bytes().split(b"\n")[:2])
        cut(out, from_out)
        cut(journal, from_journal, first)
        if garbled and out.stat().st_size:
            with out.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"?")
        before = out.read_bytes(), journal.read_bytes()
        status = read_status(out)
        assert (out.read_bytes(), journal.read_bytes()) == before, "nothing is written"
        rows = status.accounting
        assert rows.rows == ROWS and rows.owed == ROWS - rows.done - rows.failed >= 0
        assert status.parameters["num_generations"] in (SAMPLES, samples)
        if status.parameters["num_generations"] == SAMPLES:
            samples = SAMPLES  # the record of more is what was cut off
        assert status.samples == ROWS * samples
        found = (rows.done, rows.failed, status.samples_done, status.samples_failed)
        size, known = out.stat().st_size, status.samples_done
        if size and not known:
            return  # an output no journal knows of: a job refuses to open it
        assert found == opened(out, samples)


def test_what_the_journal_grows_by_is_taken_in_and_a_running_job_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    asyncio.run(write_job(out, [("w", 0, 0), ("s", 1, 0)]))
    watched = Watched(out)
    status = watched.look()
    assert (status.accounting.done, status.samples_done, status.samples_kept) == (1, 3, 1)
    assert (watched.progress.completion_tokens, status.running) == (21, None)
    asyncio.run(write_job(out, [("s", 1, 1), ("f", 2, 0)]))
    again = watched.look()
    assert (again.samples_done, again.samples_failed, again.accounting.failed) == (4, 1, 1)
    assert again == read_status(out) and watched.progress.completion_tokens == 28
    journal = Journal(out.with_name("out.jsonl.journal"), HEADER, SAMPLES)
    try:
        assert read_status(out).running == os.getpid() == lock_holder(journal.path)
        with pytest.raises(ConfigError, match="in use"):
            Journal(journal.path, HEADER, SAMPLES)
    finally:
        journal.close()
    assert read_status(out).running is None


def test_a_journal_that_began_anew_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    asyncio.run(write_job(out, [("w", 0, 0)]))
    follower = JournalFollower(out)
    assert len(list(follower.advance())) == 6
    os.truncate(follower.path, 10)
    with pytest.raises(ConfigError, match="begun anew"):
        list(follower.advance())


def test_the_journal_says_how_prompts_were_made(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert prompt_format(out) is None
    asyncio.run(write_job(out, []))
    form = prompt_format(out)
    assert form is not None
    assert form.messages("row", {"q": "this"}) == [{"role": "user", "content": "Solve this"}]


def test_the_command_says_it_in_words_and_in_json_and_by_its_exit_status(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    asyncio.run(write_job(out, [("w", n, 0) for n in range(3)] + [("s", 3, 0), ("f", 3, 1)]))

    def command(*arguments: str) -> tuple[int, str, str]:
        full = [sys.executable, "-m", "penstock", *arguments]
        ran = subprocess.run(full, capture_output=True, text=True, timeout=60, check=False)
        return ran.returncode, ran.stdout, ran.stderr

    code, said, _ = command("status", str(out))
    assert code == 1 and "3 of 5 done, 1 failed, 1 owed" in said and "run the same command again" in said
    assert "not running" in said
    code, said, _ = command("top", str(out))
    assert code == 1 and "3 of 5 done, 1 failed, 1 owed" in said
    asyncio.run(write_job(out, [("w", n, 0) for n in (3, 4)]))
    code, said, _ = command("status", "--json", str(out))
    assert code == 0 and '"rows":{"input":5,"done":5,"failed":0,"owed":0}' in said
    shutil.move(out.with_name("out.jsonl.journal"), tmp_path / "elsewhere")
    code, _, said = command("status", str(out))
    assert code == 2 and "is not there" in said and len(said.splitlines()) == 1
    source = tmp_path / "in.jsonl"
    source.write_text('{"q": "?"}\n' * 6)
    code, said, _ = command("status", str(out), "--input", str(source))
    assert code == 1 and said.startswith("rows  5 of 6 in the output, by their number alone")


def test_an_input_is_held_against_the_job(tmp_path: Path) -> None:
    out, source = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    asyncio.run(write_job(out, [("w", 0, 0), ("w", 1, 0), ("f", 2, 0), ("s", 4, 0)]))
    source.write_text("".join(f'{{"q": {number}}}\n' for number in (9, 2, 0, 1, 0)))
    survey = Survey(5, "", array("Q", [row_hash(number) for number in (9, 2, 0, 1, 0)]))
    with patch.object(JsonlInput, "survey", lambda self, form: survey):
        status, against = read_against(out, JsonlInput(source))
    assert status.accounting == Accounting(5, 2, 1)
    assert (against.accounting, against.strays) == (Accounting(5, 2, 1), 0)
    fewer = Survey(1, "", array("Q", [row_hash(1)]))
    with patch.object(JsonlInput, "survey", lambda self, form: fewer):
        _, against = read_against(out, JsonlInput(source))
    assert (against.accounting, against.strays) == (Accounting(1, 0, 1), 3)


def test_without_a_journal_rows_are_counted(tmp_path: Path) -> None:
    out, source = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    source.write_text('{"q": "?"}\n\n' * 3)
    with pytest.raises(ConfigError, match="out.jsonl cannot be read"):
        count_rows(out, JsonlInput(source))
    out.write_text('{"q": "?"}\n\n{"q": "?"}\n{"q')
    assert count_rows(out, JsonlInput(source)) == Accounting(3, 2, 0)
    out.write_text('{"q": "?"}\n' * 4)
    with pytest.raises(ConfigError, match="4 rows and .* only 3"):
        count_rows(out, JsonlInput(source))
