"""What a journal says, condensed.

Guarantees: memory is that of `RowTable`, and 12 bytes for each record of a row that is not done; a row's
records are forgotten once it stands in the output with all its samples. So a job that asks for more samples
of a million rows holds 12 bytes a row for those that are there.

A row that is voided after it was done has lost its records' places: `needs_rescan` says so, and `scan` then
goes through the journal once more, now knowing which rows will be void.
"""

from __future__ import annotations

import os
import zlib
from array import array
from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec

from penstock.batch.cuts import Cuts
from penstock.batch.records import MOST_SAMPLES, Record, Target, record_at, records, row_fields
from penstock.batch.rows import DONE, FAILED, MET, RowTable
from penstock.errors import PenstockError

VERIFIED_TAIL: Final = 8 << 20
"""Bytes at the end of the output that are checked against their checksums when a job is opened: more than
is written between two calls of fdatasync."""

SAMPLE: Final = 0
FAILURE: Final = 1
STEP: Final = 2
WRITTEN: Final = 3
"""Kinds of what is kept of a row. The last is a `w` record of fewer samples than are asked for now."""

_KIND_SHIFT: Final = 62
_INDEX_SHIFT: Final = 48
_OFFSET_MASK: Final = (1 << _INDEX_SHIFT) - 1

RESERVED_ROWS: Final = 1 << 24
"""Rows for which room is made because a journal says so, at most: it may be wrong."""


class Written(NamedTuple):
    """A `w` record: bytes `start` to `end` of the output hold a row."""

    hash: int
    occurrence: int
    start: int
    end: int
    crc: int
    samples: int


class Kept(NamedTuple):
    """Something the journal has of a row that is not done."""

    kind: int
    number: int
    """The sample's index; of WRITTEN how many samples there are."""
    offset: int
    """Where its line begins in the journal."""


class Found(NamedTuple):
    """All the journal has of a row that is not done: places of lines, by the index of the sample."""

    samples: dict[int, int]
    failures: dict[int, int]
    steps: dict[int, list[int]]


class Strays(NamedTuple):
    """Rows that were not met in a pass over the input."""

    done: int
    """Rows in the output."""
    begun: int
    """Rows of which some samples are done."""
    samples: int
    """Samples of those."""
    unfinished: list[tuple[int, int]]
    """Rows of which a sample was given up."""


class NewBeginning(PenstockError):
    """The journal goes on with another number of samples a row: read it anew with `samples`."""

    def __init__(self, samples: int) -> None:
        super().__init__(f"The output was begun anew with {samples} samples a row.")
        self.samples = samples


class State:
    """Takes in records in order. `samples` is the number of samples of a row that makes it done."""

    def __init__(self, samples: int, rows: int = 0, cuts: Cuts | None = None) -> None:
        self.samples = samples
        self.rows = RowTable(rows)
        self.done = 0
        """Rows in the output with all their samples."""
        self.failed = 0
        """Other rows of which a sample was given up."""
        self.kept_samples = 0
        self.failed_samples = 0
        self.end = 0
        """Where the output ends, as far as the records say."""
        self.tail: deque[Written] = deque()
        """The last written rows, as many as `VERIFIED_TAIL` covers."""
        self.gap: int | None = None
        """Where the records of the output have a hole: the output is void from there on."""
        self.damaged = 0
        """Lines whose checksum did not fit, or that made no sense."""
        self.target: Target | None = None
        """What the last run was asked for."""
        self.begun = 0
        """Samples of a row, as the output was last begun with; 0: nothing is known."""
        self.befores: list[int] = []
        """What it was before, each time it was begun anew."""
        self.cuts: list[tuple[int, int]] = []
        self.before_tail = 0
        """Where the output ended before the first row of `tail`."""
        self.free = 0
        """The first place of the list of free ones; 0: there is none."""
        self._known = cuts
        self._forgotten: set[tuple[int, int]] = set()
        """Rows that were done and are void, so that their records' places are not known."""
        self._deep = False
        self._items = array("Q", [0])
        self._nexts = array("I", [0])

    @property
    def needs_rescan(self) -> bool:
        """Whether rows are void whose records can only be found by going through the journal again."""
        return self._deep or bool(self._forgotten)

    def apply(self, record: Record) -> None:
        """Take in one record. A damaged one is counted. Raises NewBeginning for one that asks for more
        samples of each row than this state counts with."""
        try:
            self._apply(record)
        except (ValueError, IndexError, TypeError, OverflowError, msgspec.MsgspecError):
            self.damaged += 1

    def _apply(self, record: Record) -> None:
        kind = record.kind
        if kind == b"s":
            self._add(SAMPLE, record)
        elif kind == b"w":
            self._write(record)
        elif kind == b"f":
            self._add(FAILURE, record)
        elif kind == b"p":
            self._add(STEP, record)
        elif kind == b"t":
            self.cut(record.offset, int(record.rest))
        elif kind == b"b":
            self.begin_anew(record.offset, int(record.rest))
        elif kind == b"i":
            self._aim(msgspec.json.decode(record.rest, type=Target))
        elif kind == b"d":
            hash, occurrence = record.rest.split(b" ")
            self.forget(self.rows.slot(int(hash, 16), int(occurrence)))
        elif kind == b"r":
            self.forget_failures()
        elif kind not in (b"n", b"job"):
            raise ValueError(kind)

    def _add(self, kind: int, record: Record) -> None:
        hash, occurrence, index = row_fields(record)
        if not hash > 0 or not 0 <= index < MOST_SAMPLES or occurrence < 0:
            raise ValueError(record.kind)
        self.add(kind, hash, occurrence, index, record.offset)

    def add(self, kind: int, hash: int, occurrence: int, index: int, offset: int) -> None:
        """A sample, failure or step, whose line begins at `offset`."""
        slot = self.rows.slot(hash, occurrence)
        if not self.rows.flags[slot] & DONE:
            if self.rows.heads[slot] and not self._makes_room(slot, kind, index):
                return
            self._push(slot, kind, index, offset)

    def _makes_room(self, slot: int, kind: int, index: int) -> bool:
        """Whether a record of `kind` is to be kept; a finished or failed sample ends what was there of it."""
        kept = list(self._list(slot))
        if kind == STEP:
            return all(found.kind == STEP or found.number != index for found in kept)
        self.forget(slot)
        for found in reversed(kept):
            if found.kind == WRITTEN or found.number != index:
                self._push(slot, *found)
        return True

    def _push(self, slot: int, kind: int, index: int, offset: int) -> None:
        item = kind << _KIND_SHIFT | index << _INDEX_SHIFT | offset
        heads = self.rows.heads
        again = kind == SAMPLE and index < self._covered(slot)
        if place := self.free:
            self.free = self._nexts[place]
            self._items[place], self._nexts[place] = item, heads[slot]
        else:
            place = len(self._items)
            self._items.append(item)
            self._nexts.append(heads[slot])
        heads[slot] = place
        if not again:
            self._count(slot, kind, index, 1)

    def _covered(self, slot: int) -> int:
        """Samples of a row that a `w` record of fewer samples holds: another of one of them, made because the
        first was damaged, is not counted again."""
        if not self.rows.heads[slot]:
            return 0
        return max((kept.number for kept in self._list(slot) if kept.kind == WRITTEN), default=0)

    def _count(self, slot: int, kind: int, index: int, change: int) -> None:
        if kind == SAMPLE:
            self.kept_samples += change
        elif kind == WRITTEN:
            self.kept_samples += change * index
        elif kind == FAILURE:
            self.failed_samples += change
            if change > 0 and not self.rows.flags[slot] & FAILED:
                self.rows.flags[slot] |= FAILED
                self.failed += 1

    def _list(self, slot: int) -> Iterator[Kept]:
        place = self.rows.heads[slot]
        while place:
            item = self._items[place]
            yield Kept(item >> _KIND_SHIFT, item >> _INDEX_SHIFT & (MOST_SAMPLES - 1), item & _OFFSET_MASK)
            place = self._nexts[place]

    def forget(self, slot: int) -> None:
        """Forget the records of a row."""
        heads = self.rows.heads
        place, covered = heads[slot], self._covered(slot)
        while place:
            item = self._items[place]
            kind, number = item >> _KIND_SHIFT, item >> _INDEX_SHIFT & (MOST_SAMPLES - 1)
            if kind != SAMPLE or number >= covered:
                self._count(slot, kind, number, -1)
            following = self._nexts[place]
            self._nexts[place], self.free = self.free, place
            place = following
        heads[slot] = 0
        if self.rows.flags[slot] & FAILED:
            self.rows.flags[slot] &= ~FAILED
            self.failed -= 1

    def forget_failures(self) -> None:
        """What failed so far is owed again."""
        for slot in list(self.rows.where(FAILED, FAILED)):
            kept = list(self._list(slot))
            self.forget(slot)
            for found in reversed(kept):
                if found.kind != FAILURE:
                    self._push(slot, *found)

    def _write(self, record: Record) -> None:
        written = _written(record)
        if self._known is None or not self._known.voids(record.offset, written.end):
            self.write(written, record.offset)

    def write(self, written: Written, offset: int) -> None:
        """A row stands in the output; its record begins at `offset`."""
        slot = self.rows.slot(written.hash, written.occurrence)
        flags = self.rows.flags
        if written.start != self.end or flags[slot] & DONE:
            whole = min(written.start, self.end) if written.start >= self.end else 0
            self.gap = whole if self.gap is None else min(self.gap, whole)
        self.end = written.end
        self.tail.append(written)
        while self.tail[0].end < self.end - VERIFIED_TAIL:
            self.before_tail = self.tail.popleft().end
        if flags[slot] & DONE:
            return
        if written.samples >= self.samples:
            if self.rows.heads[slot]:
                self.forget(slot)
            flags[slot] |= DONE
            self.done += 1
            if self._forgotten:
                self._forgotten.discard((written.hash, written.occurrence))
            return
        kept = [
            found for found in self._list(slot) if found.kind != WRITTEN and found.number >= written.samples
        ]
        self.forget(slot)
        for found in (Kept(WRITTEN, written.samples, offset), *kept):
            self._push(slot, *found)

    def cut(self, offset: int, end: int) -> None:
        self.cuts.append((offset, end))
        while self.tail and self.tail[-1].end > end:
            self._void(self.tail.pop())
        if self._known is None and end < self.before_tail:
            self._deep = True
        self.before_tail = min(self.before_tail, end)
        self.end = min(self.end, end)
        if self.gap is not None and end <= self.gap:
            self.gap = None

    def _void(self, written: Written) -> None:
        slot = self.rows.slot(written.hash, written.occurrence)
        if self.rows.flags[slot] & DONE:
            self.rows.flags[slot] &= ~DONE
            self.done -= 1
            self._forgotten.add((written.hash, written.occurrence))

    def begin_anew(self, offset: int, samples: int) -> None:
        if samples > self.samples:
            raise NewBeginning(samples)
        self.cuts.append((offset, 0))
        self.befores.append(self.begun)
        self.begun = samples
        self.end, self.gap, self.before_tail = 0, None, 0
        self.tail.clear()

    def _aim(self, target: Target) -> None:
        if not self.begun:
            if target.samples > self.samples:
                raise NewBeginning(target.samples)
            self.begun = target.samples
        if target.rows is not None:
            self.rows.reserve(min(target.rows, RESERVED_ROWS))
        self.target = target

    def is_done(self, slot: int) -> bool:
        return bool(self.rows.flags[slot] & DONE)

    def is_failed(self, slot: int) -> bool:
        return bool(self.rows.flags[slot] & FAILED)

    def found(self, slot: int, fd: int) -> Found:
        """Where the records of a row that is not done lie in the journal `fd`."""
        found = Found({}, {}, {})
        if not self.rows.heads[slot]:
            return found
        for kind, index, offset in sorted(self._list(slot), key=lambda kept: kept.offset):
            if kind == SAMPLE:
                found.samples[index] = offset
            elif kind == FAILURE:
                found.failures[index] = offset
            elif kind == STEP:
                found.steps.setdefault(index, []).append(offset)
            else:
                _, places = read_written(record_at(fd, offset))
                for number, place in enumerate(places):
                    found.samples.setdefault(number, place)
        return found

    def strays(self) -> Strays:
        """What the last pass over the input did not meet."""
        done = begun = samples = 0
        unfinished = []
        rows = self.rows
        for slot in rows.where(MET, 0):
            if rows.flags[slot] & DONE:
                done += 1
            elif rows.flags[slot] & FAILED:
                unfinished.append((rows.hashes[slot], rows.occurrence(slot)))
            elif rows.heads[slot]:
                kinds = {SAMPLE: 1, STEP: 0}
                there = sum(kinds.get(kept.kind, kept.number) for kept in self._list(slot))
                begun += there > 0
                samples += there
        return Strays(done, begun, samples, unfinished)

    def arrays(self) -> list[array[int] | bytearray]:
        """What is large of the state."""
        return [*self.rows.arrays(), self._items, self._nexts]

    def restore(self, arrays: list[array[int] | bytearray], rows: int, before_tail: int, free: int) -> None:
        """Take these arrays, of a state of so many rows."""
        *table, items, nexts = arrays
        self.rows.restore(table, rows)
        assert not isinstance(items, bytearray)
        assert not isinstance(nexts, bytearray)
        self._items, self._nexts = items, nexts
        self.before_tail, self.free = before_tail, free

    def failures(self) -> Iterator[int]:
        """Where the lines of the failed samples begin, in no order. Nothing may be taken in meanwhile."""
        for slot in self.rows.where(FAILED, FAILED):
            for kept in self._list(slot):
                if kept.kind == FAILURE:
                    yield kept.offset


def read_written(record: Record) -> tuple[Written, list[int]]:
    """A `w` record and where the lines of the row's samples begin. ValueError where it makes no sense."""
    return _written(record), [int(place) for place in record.line.rpartition(b" ")[2].split(b",")]


def _written(record: Record) -> Written:
    hash, occurrence, start, end, crc, places = record.rest.split(b" ")
    samples = places.count(b",") + 1
    written = Written(int(hash, 16), int(occurrence), int(start), int(end), int(crc), samples)
    if not 0 <= written.start < written.end or not written.hash or samples >= MOST_SAMPLES:
        raise ValueError("w")
    return written


def scan(fd: int, state: State, start: int = 0) -> State:
    """What the journal `fd` says, if `state` is what it says up to `start`. Raises NewBeginning."""
    for record in records(fd, start):
        state.apply(record)
    return rescan(fd, state) if state.needs_rescan else state


def rescan(fd: int, state: State, limit: int | None = None) -> State:
    """What the journal `fd` says; `state` is what a first reading said. With `limit`: if the output were cut
    there, at or before the end of a row."""
    last = [] if limit is None else [((1 << 63) - 1, limit)]
    exact = State(state.samples, len(state.rows), Cuts([*state.cuts, *last]))
    for record in records(fd):
        exact.apply(record)
    exact._forgotten.clear()
    return exact


def sound_end(state: State, fd: int, output: int) -> int:
    """How far the file `output` is what the journal `fd` says of it."""
    end = state.end if state.gap is None else state.gap
    size = os.fstat(output).st_size
    if size < end or end < state.end:
        end = min(size, end)
        ends = [row.end for row in state.tail if row.end <= end]
        whole = state.before_tail if not ends and state.before_tail <= end else max(ends, default=-1)
        end = whole if whole >= 0 else rescan(fd, state, end).end
    for written in state.tail:
        if written.end > end:
            break
        line = os.pread(output, written.end - written.start, written.start)
        if zlib.crc32(line) != written.crc:
            return written.start
    return end
