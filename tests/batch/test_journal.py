"""The journal and the sink against crashes: torn, cut and corrupted files at any byte."""

from __future__ import annotations

import asyncio
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.batch.journal import Journal
from penstock.batch.records import Header, Target, decode, encode
from penstock.batch.sink import Place, Sink
from penstock.batch.trace import Metadata, Trace, decode_trace, encode_trace, row_line
from penstock.errors import ConfigError, ResumeRefused, WriteFailed

ROWS = 6
SAMPLES = 2
HEADER = Header(parameters={"model": "m", "n": SAMPLES})


pytestmark = pytest.mark.usefixtures("quick_disk")


def key(row: int) -> tuple[int, int]:
    """Hash and occurrence: two rows each have the same content."""
    return 7 + row // 2, row % 2


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

    def run(self, *, rows: int = ROWS, header: Header = HEADER, samples: int = SAMPLES) -> int:
        """A job over `rows` rows that generates what is owed; returns how many samples that was."""
        return asyncio.run(self._run(rows, header, samples))

    async def _run(self, rows: int, header: Header, samples: int) -> int:
        generated = 0
        with open_journal(self.journal, header, samples) as journal:
            sink = Sink(self.out, self.failures, journal)
            journal.aim(Target(samples=samples, rows=rows))
            async with sink:
                for row in range(rows):
                    slot = journal.state.rows.slot(*key(row))
                    if journal.state.is_done(slot):
                        continue
                    found = journal.state.found(slot, journal.fd).samples
                    traces: dict[int, Trace] = {}
                    places: dict[int, Place] = {}
                    for index, offset in found.items():
                        if (payload := journal.payload(offset)) is not None:
                            traces[index], places[index] = decode_trace(payload), offset
                    for index in set(range(samples)) - traces.keys():
                        traces[index] = trace(row, index)
                        places[index] = sink.add_sample(key(row), index, encode_trace(traces[index]))
                        generated += 1
                    order = range(samples)
                    line = row_line(b'{"row":%d}' % row, [traces[index] for index in order])
                    sink.add_row(key(row), line, [places[index] for index in order])
            sink.close()
        return generated

    def there(self, samples: int) -> int:
        """Finished samples that a job would find, which asks for `samples` of each row."""
        with open_journal(self.journal, samples=samples) as journal:
            Sink(self.out, self.failures, journal).close()
            return journal.state.done * samples + journal.state.kept_samples

    def assert_complete(self, samples: int = SAMPLES) -> None:
        rows = [json.loads(line) for line in self.out.read_bytes().splitlines()]
        assert sorted(row["row"] for row in rows) == list(range(ROWS))
        for row in rows:
            assert row["generations"] == [trace(row["row"], index).text for index in range(samples)]


@contextmanager
def open_journal(path: Path, header: Header = HEADER, samples: int = SAMPLES) -> Iterator[Journal]:
    journal = Journal(path, header, samples)
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
    assert (decode(0, line).kind, decode(0, line).rest) == (kind, rest)
    for position in range(len(line)):
        flipped = bytearray(line)
        flipped[position] ^= 1
        found = decode(0, bytes(flipped))
        assert found.kind == b"" or (found.kind, found.rest) == (kind, rest)


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
            first_lines = files.journal.read_bytes().split(b"\n")[:3]
            cut_file(files.journal, journal_share, at_least=sum(len(line) + 1 for line in first_lines))
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


@settings(max_examples=100, deadline=None)
@given(rounds=st.lists(st.tuples(st.integers(1, 4), st.integers(1, ROWS), cuts), min_size=1, max_size=4))
def test_samples_are_added_whatever_is_cut_off_between(
    rounds: list[tuple[int, int, tuple[float, float]]],
) -> None:
    """Rows and samples of a row grow from run to run; the last half of each file may be lost between."""
    with TemporaryDirectory() as folder:
        files = Files(Path(folder))
        samples = rows = 0
        for more, wanted, (journal_share, out_share) in rounds:
            samples, rows = max(samples, more), max(rows, wanted)
            there = files.there(samples)
            assert files.run(rows=rows, samples=samples) == rows * samples - there
            with open_journal(files.journal, samples=samples) as journal:
                assert (journal.state.done, journal.state.kept_samples) == (rows, 0)
                assert not journal.state.damaged
            first_lines = files.journal.read_bytes().split(b"\n")[:3]
            least = sum(len(line) + 1 for line in first_lines)
            cut_file(files.journal, 0.5 + journal_share / 2, at_least=least)
            cut_file(files.out, 0.5 + out_share / 2)
        files.run(samples=samples)
        files.assert_complete(samples)


def test_an_old_output_is_kept_until_the_new_one_has_every_row(files: Files) -> None:
    files.run()
    old, aside = files.out.read_bytes(), files.out.with_name("out.jsonl.n2")
    assert files.run(rows=3, samples=3) == 3
    assert aside.read_bytes() == old
    assert len(files.out.read_bytes().splitlines()) == 3
    assert files.run(rows=4, samples=3) == 1, "what was there is not generated again"
    # Killed between the renaming and its record, it is simply done again.
    files.out.unlink()
    assert files.run(samples=3) == 2
    files.assert_complete(3)
    with pytest.raises(ResumeRefused, match="up to 3 samples of a row, and 2 are asked for"):
        files.run()


def test_a_journal_of_the_first_format_is_refused_in_a_sentence(files: Files) -> None:
    files.journal.write_bytes(
        encode(b"job", b'{"parameters":{},"rows":1,"digest":"d","version":1,"penstock":"0.1"}')
        + encode(b"s", b"0 0 {}")
    )
    with pytest.raises(ConfigError, match=r"was written by penstock 0\.1, in format 1; this penstock reads"):
        files.run()


def test_a_copied_journal_writes_its_output_again(files: Files) -> None:
    files.run()
    with TemporaryDirectory() as folder:
        other = Files(Path(folder))
        other.journal.write_bytes(files.journal.read_bytes())
        assert other.run() == 0
        other.assert_complete()


def test_a_row_that_stands_twice_in_the_output_is_written_once(files: Files) -> None:
    """As two jobs would leave it that wrote at the same time, where locks do not work."""
    files.run()
    row = files.out.read_bytes().splitlines(keepends=True)[0]
    end = files.out.stat().st_size
    with files.out.open("ab") as file:
        file.write(row)
    fields = (*key(0), end, end + len(row), zlib.crc32(row), b"0,0")
    with files.journal.open("ab") as file:
        file.write(encode(b"w", b"%016x %d %d %d %d %b" % fields))
    assert files.run() == 0
    files.assert_complete()


def test_another_job_is_refused_by_name(files: Files) -> None:
    files.run()
    other = Header(parameters={"model": "other", "temperature": 0.5})
    with pytest.raises(ResumeRefused) as refused, open_journal(files.journal, other):
        pass
    assert refused.value.differences == [
        'model was "m" and is now "other"',
        "n was 2 and is now unset",
        "temperature was unset and is now 0.5",
    ]


def test_a_journal_without_records_can_become_another_job(files: Files) -> None:
    files.run(rows=0)
    assert files.run(header=Header(parameters={"model": "m", "n": 1})) > 0


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
                sink.add_failure(key(3), 1, b'{"row":3}')
            sink.close()

    asyncio.run(fail())
    assert files.failures.read_bytes() == b'{"row":3}\n'
    files.failures.unlink()
    with open_journal(files.journal) as journal:
        state = journal.state
        assert (state.failed, state.failed_samples) == (1, 1)
        assert state.is_failed(state.rows.find(*key(3)))
        Sink(files.out, files.failures, journal).close()
        assert files.failures.read_bytes() == b'{"row":3}\n'
        journal.forget_failures()
    with open_journal(files.journal) as journal:
        assert (journal.state.failed, journal.state.failed_samples) == (0, 0)


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
                    sink.add_row(key(0), b"{}", [0])
                    while True:
                        await sink.room()
                        await asyncio.sleep(0.01)
            finally:
                sink.close()

    with TemporaryDirectory() as folder, pytest.raises(WriteFailed, match="No space left"):
        asyncio.run(overfill(Path(folder)))
