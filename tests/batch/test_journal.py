"""The journal and the sink against crashes: torn, cut and corrupted files at any byte."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.batch.journal import Header, Journal, decode, encode
from penstock.batch.sink import Sink
from penstock.batch.trace import Metadata, Trace, decode_trace, encode_trace, row_line
from penstock.errors import ConfigError, ResumeRefused, WriteFailed

ROWS = 6
SAMPLES = 2
HEADER = Header(parameters={"model": "m", "n": SAMPLES}, rows=ROWS, digest="d")


def trace(row: int, index: int) -> Trace:
    return Trace(
        text=f"row {row} sample {index} " + "é\n" * row,
        finish_reason="stop",
        metadata=Metadata(prompt_tokens=1, completion_tokens=row, total_tokens=1 + row),
    )


class Files:
    def __init__(self, folder: Path) -> None:
        self.out = folder / "out.jsonl"
        self.journal = folder / "out.jsonl.journal"
        self.failures = folder / "out.jsonl.failures"

    def run(self, *, rows: int = ROWS, header: Header = HEADER) -> int:
        """A job over `rows` rows that generates what is owed; returns how many samples that was."""
        return asyncio.run(self._run(rows, header))

    async def _run(self, rows: int, header: Header) -> int:
        generated = 0
        with open_journal(self.journal, header) as journal:
            sink = Sink(self.out, self.failures, journal)
            async with sink:
                for row in range(rows):
                    if journal.state.is_written(row):
                        continue
                    spans = journal.state.samples.get(row, {})
                    traces = {index: decode_trace(journal.read(span)) for index, span in spans.items()}
                    for index in set(range(SAMPLES)) - traces.keys():
                        traces[index] = trace(row, index)
                        sink.add_sample(row, index, encode_trace(traces[index]))
                        generated += 1
                    sink.add_row(row, row_line(b'{"row":%d}' % row, [traces[i] for i in range(SAMPLES)]))
            sink.close()
        return generated

    def assert_complete(self) -> None:
        rows = [json.loads(line) for line in self.out.read_bytes().splitlines()]
        assert sorted(row["row"] for row in rows) == list(range(ROWS))
        for row in rows:
            assert row["generations"] == [trace(row["row"], index).text for index in range(SAMPLES)]


@contextmanager
def open_journal(path: Path, header: Header = HEADER) -> Iterator[Journal]:
    journal = Journal(path, header)
    try:
        yield journal
    finally:
        journal.close()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@given(st.sampled_from([b"s", b"w", b"t", b"r"]), st.binary(max_size=40).filter(lambda b: b"\n" not in b))
def test_a_record_is_read_back_and_any_flipped_bit_is_noticed(kind: bytes, rest: bytes) -> None:
    line = encode(kind, rest)[:-1]
    assert decode(line) == (kind, rest)
    for position in range(len(line)):
        flipped = bytearray(line)
        flipped[position] ^= 1
        assert decode(bytes(flipped)) in (None, (kind, rest))


def test_a_finished_job_has_nothing_left_to_do(files: Files) -> None:
    assert files.run() == ROWS * SAMPLES
    before = files.out.read_bytes()
    assert files.run() == 0
    assert files.out.read_bytes() == before
    files.assert_complete()


cuts = st.tuples(st.floats(0, 1), st.floats(0, 1))


@settings(max_examples=150, deadline=None)
@given(first=st.integers(1, ROWS), rounds=st.lists(cuts, min_size=1, max_size=3))
def test_files_cut_at_any_byte_are_completed(first: int, rounds: list[tuple[float, float]]) -> None:
    """Whatever is cut off either file, the next run ends with every row once."""
    with TemporaryDirectory() as folder:
        files = Files(Path(folder))
        files.run(rows=first)
        for journal_share, out_share in rounds:
            header, sample = files.journal.read_bytes().split(b"\n")[:2]
            cut_file(files.journal, journal_share, at_least=len(header) + len(sample) + 2)
            cut_file(files.out, out_share)
            files.run()
            files.assert_complete()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_corruption_anywhere_behind_the_header_is_repaired(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        files = Files(Path(folder))
        files.run()
        for path, start in ((files.journal, files.journal.read_bytes().index(b"\n") + 1), (files.out, 0)):
            content = bytearray(path.read_bytes())
            at = data.draw(st.integers(start, len(content) - 1))
            garbage = data.draw(st.binary(max_size=60))
            content[at : at + len(garbage)] = garbage
            path.write_bytes(content)
        files.run()
        files.assert_complete()


@given(share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_lost_output_is_written_again_without_generating(share: float) -> None:
    with TemporaryDirectory() as folder:
        files = Files(Path(folder))
        files.run()
        cut_file(files.out, share)
        assert files.run() == 0
        files.assert_complete()
        assert files.run() == 0
        files.assert_complete()


def cut_file(path: Path, share: float, at_least: int = 0) -> None:
    size = path.stat().st_size
    os.truncate(path, at_least + int(share * (size - at_least)))


def test_another_job_is_refused_by_name(files: Files) -> None:
    files.run()
    other = Header(parameters={"model": "other", "temperature": 0.5}, rows=ROWS, digest="e")
    with pytest.raises(ResumeRefused) as refused, open_journal(files.journal, other):
        pass
    assert refused.value.differences == [
        'model was "m" and is now "other"',
        "n was 2 and is now unset",
        "temperature was unset and is now 0.5",
        "the input's content is another",
    ]


def test_a_journal_without_records_can_become_another_job(files: Files) -> None:
    files.run(rows=0)
    assert files.run(header=Header(parameters={"model": "m", "n": 1}, rows=ROWS, digest="d")) > 0


def test_a_second_job_on_one_output_is_refused(files: Files) -> None:
    with open_journal(files.journal), pytest.raises(ConfigError, match="in use by another job"):
        files.run()


def test_an_output_no_journal_knows_is_not_touched(files: Files) -> None:
    files.out.write_text("precious\n")
    with pytest.raises(ConfigError, match="is not empty and its journal"):
        files.run()
    assert files.out.read_text() == "precious\n"
    assert not files.failures.exists()


def test_a_file_that_is_no_journal_is_refused(files: Files) -> None:
    files.journal.write_text("precious\n")
    with pytest.raises(ConfigError, match="not a penstock journal"):
        files.run()
    assert files.journal.read_text() == "precious\n"


def test_failures_are_listed_until_they_are_forgotten(files: Files) -> None:
    async def fail() -> None:
        with open_journal(files.journal) as journal:
            sink = Sink(files.out, files.failures, journal)
            async with sink:
                sink.add_failure(3, 1, b'{"row":3}')
            sink.close()

    asyncio.run(fail())
    assert files.failures.read_bytes() == b'{"row":3}\n'
    files.failures.unlink()
    with open_journal(files.journal) as journal:
        assert set(journal.state.failures) == {3}
        Sink(files.out, files.failures, journal).close()
        assert files.failures.read_bytes() == b'{"row":3}\n'
        journal.forget_failures()
    with open_journal(files.journal) as journal:
        assert not journal.state.failures


def test_a_full_disk_stops_the_run() -> None:
    """/dev/full takes every open and refuses every write, as a full disk does."""

    async def overfill(folder: Path) -> None:
        with open_journal(folder / "journal") as journal:
            sink = Sink(folder / "out", folder / "failures", journal)
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, sink._fd)
            os.close(full)
            try:
                async with sink, asyncio.timeout(10):
                    sink.add_row(0, b"{}")
                    while True:
                        await sink.room()
                        await asyncio.sleep(0.01)
            finally:
                sink.close()

    with TemporaryDirectory() as folder, pytest.raises(WriteFailed, match="No space left"):
        asyncio.run(overfill(Path(folder)))
