"""The rows of a job as its files hold them, whether it is running or not.

Guarantees: a row is one that the journal vouches for, so nothing that a crash has torn and no row twice; the
files are only read. Rows come again, the same ones, at each call.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from penstock.batch.parquet import decode_row
from penstock.batch.records import record_at, records
from penstock.batch.state import read_written
from penstock.batch.status import JournalFollower, journal_path
from penstock.batch.trace import Trace, decode_trace, row_line
from penstock.errors import ConfigError
from penstock.inputs.source import Source
from penstock.prompt import RESERVED_COLUMNS, PromptFormat

READ_BYTES: Final = 1 << 20
"""Bytes of the output read at a time."""

SAMPLE_COLUMNS: Final = ("sample", "generation", "finish_reason", "reasoning", "api_metadata", "provenance")
"""Columns of one sample, beside the row's own and those a rollout added."""


class JobRows:
    """What there is of the job that writes `out`: the rows of the output, and samples of the others.

    Without a journal the output alone is read, up to its last whole line. Raises ConfigError without either.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._follower: JournalFollower | None = None
        if journal_path(out).exists():
            self._follower = JournalFollower(out)
            for _ in self._follower.advance():
                pass
            self._follower.status()  # takes back what the output has lost
            self._end = self._follower.state.end
        else:
            self._end = _last_line_end(out)

    @property
    def has_journal(self) -> bool:
        return self._follower is not None

    def form(self) -> PromptFormat:
        """How the job makes prompts of rows."""
        assert self._follower is not None
        return PromptFormat.of(self._follower.header.parameters)

    def input(self) -> tuple[str, ...]:
        """Where the job's input is, as far as its journal says and it is still there."""
        target = self._follower.state.target if self._follower is not None else None
        return (target.source,) if target is not None and Path(target.source).exists() else ()

    def lines(self) -> Iterator[bytes]:
        """The rows of the output, without line ends."""
        end = 0
        if self._end == 0:
            return
        with self._out.open("rb", buffering=READ_BYTES) as file:
            for line in file:
                end += len(line)
                if end > self._end:
                    return
                if not line.isspace():
                    yield line[:-1]

    def samples(self) -> Iterator[bytes]:
        """The samples of the rows of the output, one by one. Raises ConfigError for a row that has a column
        by the name of one of a sample's."""
        if self._follower is None:
            for line in self.lines():
                yield from map(_encode, _samples_of_lists(decode_row(line)))
            return
        if self._end == 0:
            return
        with _opened(self._follower.path) as journal, _opened(self._out) as output:
            for place in self._written(journal):
                written, offsets = read_written(record_at(journal, place))
                row = decode_row(os.pread(output, written.end - written.start, written.start))
                traces = _traces(journal, offsets)
                found = _samples_of_lists(row) if traces is None else _samples_of_traces(row, traces)
                yield from map(_encode, found)

    def unfinished(self, source: Source, *, each: bool) -> Iterator[bytes]:
        """What there is of rows that are not in the output, in the order of `source`, the job's input: rows
        with the samples they have, or (`each`) these one by one."""
        assert self._follower is not None
        state, form = self._follower.state, self.form()
        with _opened(self._follower.path) as journal:
            state.rows.begin_pass()
            for position, (where, line) in enumerate(source.lines()):
                prompt = form.prompt(position, where, line)
                slot = state.rows.meet(prompt.hash)
                if state.is_done(slot) or not state.rows.heads[slot]:
                    continue
                traces = {}
                for index, offset in sorted(state.found(slot, journal).samples.items()):
                    record = record_at(journal, offset)
                    if record.kind == b"s":
                        traces[index] = decode_trace(record.payload(3))
                if not traces:
                    continue
                if each:
                    yield from map(_encode, _samples_of_traces(decode_row(line), traces))
                else:
                    yield row_line(line, list(traces.values()))

    def _written(self, journal: int) -> array[int]:
        """Where in the journal the record of each row of the output begins, in the order of the output."""
        ends, places = array("Q"), array("Q")
        for record in records(journal):
            if record.kind == b"w":
                try:
                    written, _ = read_written(record)
                except ValueError:
                    continue
                _cut(ends, places, written.start)
                ends.append(written.end)
                places.append(record.offset)
            elif record.kind == b"t":
                _cut(ends, places, int(record.rest))
            elif record.kind == b"b":
                _cut(ends, places, 0)
        _cut(ends, places, self._end)
        return places


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The file to read from, at any place."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _traces(journal: int, offsets: list[int]) -> dict[int, Trace] | None:
    """The samples of a row, whose lines begin at `offsets`; None where one cannot be read any more."""
    found = [record_at(journal, offset) for offset in offsets]
    if any(record.kind != b"s" for record in found):
        return None
    return {index: decode_trace(record.payload(3)) for index, record in enumerate(found)}


def _cut(ends: array[int], places: array[int], end: int) -> None:
    while ends and ends[-1] > end:
        ends.pop()
        places.pop()


def _samples_of_traces(row: Mapping[str, Any], traces: Mapping[int, Trace]) -> Iterator[dict[str, Any]]:
    kept = {index: trace for index, trace in traces.items() if not trace.dropped}
    added = {name for trace in kept.values() if trace.columns for name in trace.columns}
    own = _own(row, added)
    for index, trace in kept.items():
        yield {
            **own,
            "sample": index,
            "generation": trace.text,
            "finish_reason": trace.finish_reason,
            "reasoning": trace.reasoning,
            **{name: (trace.columns or {}).get(name) for name in added},
            "api_metadata": msgspec.to_builtins(trace.metadata),
            "provenance": msgspec.to_builtins(trace.provenance),
        }


def _samples_of_lists(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Where the row is all there is: `sample` is the place in its lists."""
    own = _own(row, set())
    texts = row.get("generations") or []
    for index, text in enumerate(texts):
        yield {
            **own,
            "sample": index,
            "generation": text,
            "finish_reason": _at(row.get("finish_reasons"), index),
            "reasoning": _at(row.get("reasonings"), index),
            "api_metadata": _at(row.get("api_metadata"), index),
        }


def _own(row: Mapping[str, Any], added: set[str]) -> dict[str, Any]:
    own = {name: value for name, value in row.items() if name not in RESERVED_COLUMNS and name not in added}
    if taken := [name for name in SAMPLE_COLUMNS if name in own or name in added]:
        raise ConfigError(
            f"The rows have a column {taken[0]!r} of their own, as each sample has: export whole rows."
        )
    return own


def _at(values: list[Any] | None, index: int) -> Any:
    return values[index] if values is not None and index < len(values) else None


def _encode(row: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(row)


def _last_line_end(out: Path) -> int:
    """Where the last whole line of `out` ends."""
    try:
        with out.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - READ_BYTES)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    return start + newline + 1
                end = start
    except OSError as error:
        raise ConfigError(f"{out} cannot be read ({error.strerror}): there is nothing to export.") from None
    return 0
