"""What a job still has to generate, in the order of the input.

Guarantees: each owed sample is given out once; a row that is done is skipped without being parsed where the
input was surveyed. No more rows are held than are being worked on, and those the feed has read ahead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator

from penstock.batch.journal import Journal
from penstock.batch.rows import DONE
from penstock.batch.sink import Place, RowKey
from penstock.batch.trace import Trace, decode_trace
from penstock.errors import ConfigError
from penstock.inputs.feed import Feed, Numbered
from penstock.inputs.source import Survey
from penstock.prompt import RESERVED_COLUMNS, Prompt, PromptFormat, parse_row


class OwedRow:
    """A row on its way: its prompt and what is there of its samples."""

    __slots__ = ("failed", "prompt", "steps", "traces")

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.traces: dict[int, tuple[Trace, Place]] = {}
        """Finished samples by index, and where the journal has them."""
        self.steps: dict[int, list[bytes]] | None = None
        """Steps of samples that are not finished, from earlier runs; None: there are none."""
        self.failed = False

    @property
    def key(self) -> RowKey:
        return self.prompt.hash, self.prompt.occurrence


class OwedSamples:
    """Gives out every sample that is neither done nor failed."""

    def __init__(
        self, feed: Feed, journal: Journal, form: PromptFormat, samples: int, survey: Survey | None
    ) -> None:
        self.rows = 0
        """Rows of the input, as far as it was read."""
        self.on_complete: Callable[[OwedRow], None] = lambda row: None
        """Takes a row that lacks no sample, but is not in the output."""
        self.on_damaged: Callable[[int], None] = lambda samples: None
        """Takes how many samples of a row are there no more: their lines in the journal are damaged."""
        self._feed = feed
        self._journal = journal
        self._form = form
        self._samples = samples
        self._survey = survey
        self._queue: deque[tuple[OwedRow, int]] = deque()
        self._batch: Iterator[Numbered] = iter(())
        self._ended = False
        self._reading = asyncio.Lock()

    def take(self) -> tuple[OwedRow, int] | None:
        """An owed sample of the rows that are here: its row and index; None where there is none."""
        queue = self._queue
        while not queue:
            numbered = next(self._batch, None)
            if numbered is None:
                return None
            self._take(*numbered)
        return queue.popleft()

    async def next(self) -> tuple[OwedRow, int] | None:
        """An owed sample; None at the end of the input. Raises ConfigError when the input is bad, or is not
        what the survey found."""
        while (sample := self.take()) is None and not self._ended:
            await self._read(self._batch)
        return sample

    async def _read(self, done: Iterator[Numbered]) -> None:
        """The next batch after `done`, unless someone else has it already."""
        async with self._reading:
            if self._batch is not done:
                return
            batch = await self._feed.batch()
            self._batch = iter(batch)
            await asyncio.sleep(0)  # rows that are done take no time each, and there may be millions
            if not batch:
                self._ended = True
                if self._survey is not None and self.rows < self._survey.rows:
                    raise ConfigError("The input has become shorter while it was read.")

    def _take(self, position: int, where: str, line: bytes) -> None:
        hash = self._hash(position, where, line)
        self.rows += 1
        state = self._journal.state
        rows = state.rows
        slot = rows.meet(hash)
        if rows.flags[slot] & DONE:
            return
        row = OwedRow(self._form.prompt(position, where, line, hash, rows.occurrence(slot)))
        failed = self._resume(row, slot) if rows.heads[slot] else ()
        if len(row.traces) == self._samples:
            self.on_complete(row)
        for index in range(self._samples):
            if index not in row.traces and index not in failed:
                self._queue.append((row, index))

    def _hash(self, position: int, where: str, line: bytes) -> int:
        if self._survey is None:
            row = parse_row(where, line)
            if not RESERVED_COLUMNS.isdisjoint(row):
                taken = next(name for name in row if name in RESERVED_COLUMNS)
                raise ConfigError(f"{where}: the column {taken!r} is one of the result's own; rename it.")
            return self._form.hash(where, row)
        if position >= self._survey.rows:
            raise ConfigError(f"{where}: the input has grown while it was read; run the same command again.")
        return self._survey.hashes[position]

    def _resume(self, row: OwedRow, slot: int) -> dict[int, int]:
        """Takes up what the journal has of a row; its failures."""
        journal = self._journal
        found = journal.state.found(slot, journal.fd)
        damaged = 0
        for index, offset in found.samples.items():
            payload = journal.payload(offset)
            if payload is None:
                damaged += 1
            else:
                row.traces[index] = decode_trace(payload), offset
        if damaged:
            self.on_damaged(damaged)
        if found.steps:
            row.steps = {
                index: [payload for offset in offsets if (payload := journal.payload(offset)) is not None]
                for index, offsets in found.steps.items()
            }
        row.failed = bool(found.failures)
        return found.failures
