"""The account of a job read from its files: the same that opening it would give, whatever is missing."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.batch.job import Accounting
from penstock.batch.journal import Header, Journal
from penstock.batch.sink import Sink
from penstock.batch.status import (
    JournalFollower,
    Watched,
    count_rows,
    lock_holder,
    prompt_format,
    read_status,
)
from penstock.batch.trace import Metadata, Trace, encode_trace, row_line
from penstock.errors import ConfigError
from penstock.prompt import JsonlInput

ROWS = 5
SAMPLES = 2
HEADER = Header(
    parameters={"num_generations": SAMPLES, "prompt_column": "q", "prompt_template": "Solve {q}"},
    rows=ROWS,
    digest="d",
)
TRACE = Trace(
    text="é" * 20,
    finish_reason="stop",
    metadata=Metadata(prompt_tokens=3, completion_tokens=7, total_tokens=10),
)

STEP = st.tuples(st.sampled_from("sswwwfr"), st.integers(0, ROWS - 1), st.integers(0, SAMPLES - 1))


async def write_job(out: Path, steps: list[tuple[str, int, int]]) -> None:
    """A job's files after these steps: samples, rows, failures, or failures forgotten."""
    journal = Journal(out.with_name(out.name + ".journal"), HEADER)
    sink = Sink(out, out.with_name(out.name + ".failures"), journal)
    written: set[int] = set()
    async with sink:
        for kind, row, index in steps:
            if kind == "r":
                journal.forget_failures()
            elif row in written:
                continue
            elif kind == "s":
                sink.add_sample(row, index, encode_trace(TRACE))
            elif kind == "f":
                sink.add_failure(row, index, b'{"error":"ServerFailed"}')
            else:
                for each in range(SAMPLES):
                    sink.add_sample(row, each, encode_trace(TRACE))
                sink.add_row(row, row_line(b'{"row":%d}' % row, [TRACE] * SAMPLES))
                written.add(row)
    sink.close()
    journal.close()


def opened(out: Path) -> tuple[int, int, int, int]:
    """Rows done and failed, samples done and failed, as a job begins with them that is opened now."""
    journal = Journal(out.with_name(out.name + ".journal"), HEADER)
    try:
        Sink(out, out.with_name(out.name + ".failures"), journal).close()
        state = journal.state
        kept = sum(map(len, state.samples.values()))
        done = state.written()
        return done, len(state.failures), done * SAMPLES + kept, sum(map(len, state.failures.values()))
    finally:
        journal.close()


def cut(path: Path, missing: int, least: int = 0) -> None:
    """Without the last `missing` bytes, but `least` of them."""
    os.truncate(path, max(least, path.stat().st_size - missing))


MISSING = st.just(0) | st.integers(0, 1500)
"""Bytes missing at the end of a file."""


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=16), MISSING, MISSING, st.booleans())
def test_it_is_what_opening_the_job_finds_whatever_is_cut_off(
    steps: list[tuple[str, int, int]], from_out: int, from_journal: int, garbled: bool
) -> None:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out.jsonl"
        asyncio.run(write_job(out, steps))
        journal = out.with_name("out.jsonl.journal")
        first = len(journal.read_bytes().partition(b"\n")[0]) + 1
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
        assert rows.rows == ROWS == rows.done + rows.failed + rows.owed
        assert status.samples == ROWS * SAMPLES
        found = (rows.done, rows.failed, status.samples_done, status.samples_failed)
        size, known = out.stat().st_size, status.samples_done
        if size and not known:
            return  # an output no journal knows of: a job refuses to open it
        assert found == opened(out)


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
    journal = Journal(out.with_name("out.jsonl.journal"), HEADER)
    try:
        assert read_status(out).running == os.getpid() == lock_holder(journal.path)
        with pytest.raises(ConfigError, match="in use"):
            Journal(journal.path, HEADER)
    finally:
        journal.close()
    assert read_status(out).running is None


def test_a_journal_that_began_anew_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    asyncio.run(write_job(out, [("w", 0, 0)]))
    follower = JournalFollower(out)
    assert len(list(follower.advance())) == 3
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
