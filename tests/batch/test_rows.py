"""The row table against a plain dict, and what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.batch import snapshot
from penstock.batch.journal import Journal
from penstock.batch.records import Header, Record, decode, encode
from penstock.batch.rows import DONE, MASK, SPREAD, RowTable
from penstock.batch.state import State

KEYS = st.tuples(st.integers(1, 9) | st.integers(1, MASK), st.integers(0, 5))


@given(st.lists(KEYS), st.integers(0, 3000))
def test_every_row_is_found_however_the_table_grows(keys: list[tuple[int, int]], reserved: int) -> None:
    table = RowTable()
    marked: set[tuple[int, int]] = set()
    for number, key in enumerate(keys):
        slot = table.slot(*key)
        assert bool(table.flags[slot] & DONE) == (key in marked)
        table.flags[slot] |= DONE
        marked.add(key)
        if number == len(keys) // 2:
            table.reserve(reserved)
    assert len(table) == len(marked)
    found = {(table.hashes[slot], table.occurrence(slot)) for slot in table.where(DONE, DONE)}
    assert found == marked


@given(st.lists(st.integers(1, 6)))
def test_equal_rows_are_told_apart_by_their_order_in_every_pass(hashes: list[int]) -> None:
    table = RowTable()
    for _ in range(2):
        seen: dict[int, int] = {}
        for hash in hashes:
            slot = table.meet(hash)
            assert (table.hashes[slot], table.occurrence(slot)) == (hash, seen.get(hash, 0))
            seen[hash] = seen.get(hash, 0) + 1
        table.begin_pass()
    assert len(table) == len(hashes)


def test_many_equal_rows_are_found_as_fast_as_different_ones() -> None:
    table = RowTable()
    for _ in range(20_000):
        table.meet(7)
    size = len(table.flags)
    away = [(table.find(7, n) - (7 + n * SPREAD & MASK)) % size for n in range(20_000)]
    assert sum(away) / len(away) < 4


def test_a_row_takes_thirty_bytes() -> None:
    rows = 100_000
    state = State(1, rows)
    for hash in range(1, rows + 1):
        state.rows.meet(hash * SPREAD & MASK)
    assert sum(memoryview(part).nbytes for part in state.arrays()) < 30 * rows


def test_a_snapshot_says_what_the_journal_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "LEAST_GROWTH", 1)
    path, header = tmp_path / "journal", Header(parameters={})
    journal = Journal(path, header, 2)
    lines = [
        (b"s", b"%016x 0 0 {}" % 5),
        (b"s", b"%016x 0 1 {}" % 5),
        (b"w", b"%016x 0 0 10 0 1,2" % 5),
        (b"s", b"%016x 1 1 {}" % 5),
        (b"f", b"%016x 1 0 {}" % 5),
        (b"p", b"%016x 0 0 {}" % 9),
    ]
    for kind, rest in lines:
        line = encode(kind, rest)
        journal.state.apply(decode(journal.end, line[:-1]))
        journal.append(line)
    journal.keep_state(last=True)
    journal.close()
    read: list[bytes] = []
    apply = State.apply

    def counted(state: State, record: Record) -> None:
        read.append(record.kind)
        apply(state, record)

    monkeypatch.setattr(State, "apply", counted)
    known = Journal(path, header, 2)
    assert read == [], "nothing had to be read again"
    monkeypatch.setattr(snapshot, "LEAST_GROWTH", 1 << 40)
    snapshot.path_beside(path).unlink()
    known.close()
    scanned = Journal(path, header, 2)
    for name in snapshot.NUMBERS:
        assert getattr(known.state, name) == getattr(scanned.state, name)
    for key in ((5, 0), (5, 1), (9, 0)):
        slots = [journal.state.rows.find(*key) for journal in (known, scanned)]
        one, other = (journal.state for journal in (known, scanned))
        assert one.is_done(slots[0]) == other.is_done(slots[1])
        assert one.found(slots[0], scanned.fd) == other.found(slots[1], scanned.fd)
    assert (scanned.state.done, scanned.state.kept_samples, scanned.state.failed_samples) == (1, 1, 1)
    scanned.close()
