"""Every row of a job and how far it is, in flat arrays: 17 bytes a place, about 28 a row.

A row is named by the hash of its content and its occurrence: 0 for the first row of this hash in the order of
the input, 1 for the next. So rows of equal content are rows of their own, and a collision of hashes is only
one more occurrence.

Guarantees: open addressing, in which the occurrence is part of where the search begins: a million equal rows
are found as fast as a million different ones. A slot number holds until the next row is added.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

DONE: Final = 1
"""The row is in the output, with as many samples as are asked for."""
FAILED: Final = 2
"""A sample of the row was given up."""
MET: Final = 4
"""The row was met in this pass over the input."""
FIRST: Final = 8
"""Occurrence 0. Its note counts the rows of its hash that were met in this pass; any other row's note is its
occurrence."""

LOAD: Final = 0.6
"""Share of the places in use, at most: a search then looks at four places on average."""

GROWTH: Final = 1.5
"""How many times as many places there are after the table was full."""

SMALLEST: Final = 1024
"""Places of a table about which nothing is known."""

SPREAD: Final = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: multiples of it are spread evenly (Knuth, volume 3, 6.4)."""

MASK: Final = (1 << 64) - 1


class RowTable:
    """Rows by (hash, occurrence). A hash is 1 … 2^64 - 1; 0 marks a free place."""

    __slots__ = ("_count", "_full", "_size", "flags", "hashes", "heads", "notes")

    def __init__(self, rows: int = 0) -> None:
        self._count = 0
        self._allocate(max(SMALLEST, int(rows / LOAD) + 1))

    def __len__(self) -> int:
        return self._count

    def _allocate(self, size: int) -> None:
        self._size = size
        self._full = int(size * LOAD)
        self.hashes = array("Q", bytes(8 * size))
        self.notes = array("I", bytes(4 * size))
        self.heads = array("I", bytes(4 * size))
        """Where the list of a row's records begins; 0: nowhere. It is the owner's to use."""
        self.flags = bytearray(size)

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows in all, so that the table need not grow."""
        if rows > self._full:
            self._move(int(rows / LOAD) + 1)

    def find(self, hash: int, occurrence: int) -> int:
        """The slot of a row; negative where there is none."""
        hashes, size = self.hashes, self._size
        place = ((hash + occurrence * SPREAD) & MASK) % size
        while found := hashes[place]:
            if found == hash and self.occurrence(place) == occurrence:
                return place
            place += 1
            if place == size:
                place = 0
        return ~place

    def slot(self, hash: int, occurrence: int) -> int:
        """The slot of a row, which is added where it is new."""
        place = self.find(hash, occurrence)
        if place >= 0:
            return place
        if self._count >= self._full:
            self._move(int(self._size * GROWTH))
            place = self.find(hash, occurrence)
        place = ~place
        self.hashes[place] = hash
        if occurrence:
            self.notes[place] = occurrence
        else:
            self.flags[place] = FIRST
        self._count += 1
        return place

    def occurrence(self, slot: int) -> int:
        return 0 if self.flags[slot] & FIRST else self.notes[slot]

    def begin_pass(self) -> None:
        """The input is read from its beginning: no row is met yet."""
        flags, notes = self.flags, self.notes
        for place, flag in enumerate(flags):
            if flag & MET:
                flags[place] = flag & ~MET
            if flag & FIRST:
                notes[place] = 0

    def meet(self, hash: int) -> int:
        """The slot of the next row of this hash in the order of the input."""
        first = self.slot(hash, 0)
        occurrence = self.notes[first]
        self.notes[first] = occurrence + 1
        slot = self.slot(hash, occurrence) if occurrence else first
        self.flags[slot] |= MET
        return slot

    def where(self, mask: int, value: int) -> Iterator[int]:
        """The slots of rows whose flags under `mask` are `value`. No row may be added meanwhile."""
        hashes = self.hashes
        return (place for place, flag in enumerate(self.flags) if flag & mask == value and hashes[place])

    def arrays(self) -> list[array[int] | bytearray]:
        """All there is of the table but its number of rows."""
        return [self.hashes, self.notes, self.heads, self.flags]

    def restore(self, arrays: list[array[int] | bytearray], rows: int) -> None:
        """Become the table of which these were the arrays."""
        hashes, notes, heads, flags = arrays
        assert isinstance(flags, bytearray)
        assert not isinstance(hashes, bytearray)
        assert not isinstance(notes, bytearray)
        assert not isinstance(heads, bytearray)
        self.hashes, self.notes, self.heads, self.flags = hashes, notes, heads, flags
        self._size, self._count = len(flags), rows
        self._full = int(self._size * LOAD)

    def _move(self, size: int) -> None:
        """Make it `size` places."""
        hashes, notes, heads, flags = self.hashes, self.notes, self.heads, self.flags
        self._allocate(size)
        for place, hash in enumerate(hashes):
            if hash:
                flag = flags[place]
                new = ~self.find(hash, 0 if flag & FIRST else notes[place])
                self.hashes[new], self.flags[new] = hash, flag
                self.notes[new], self.heads[new] = notes[place], heads[place]
