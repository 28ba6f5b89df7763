"""An output that another program began, open-r1's generate_reasoning.py or a job that lost its journal, is
given a journal, so that it is continued in place.

Guarantees: every whole row of the output is matched with a row of the input, and counts as done; where that
cannot be said for certain of all of them, nothing is touched and a sentence says why. The journal appears at
once and whole. Torn lines at its end are left out: opening the job cuts them away.

A row is matched by its own columns; where those do not come back as they were (numbers, dates), by what
open-r1 goes by, md5(str(value)) of the id column, or of the prompt column where there is none.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import orjson

from penstock.batch.records import MOST_SAMPLES, Header, Target, encode, encode_json
from penstock.batch.trace import Metadata, Trace, encode_trace
from penstock.errors import ConfigError, WriteFailed
from penstock.inputs.source import Source, Survey
from penstock.prompt import RESERVED_COLUMNS, PromptFormat, content_hash, parse_row, row_hash

LISTS = ("generations", "finish_reasons", "api_metadata")
"""Columns by which such an output is known: lists with an element a sample."""

BUFFER = 1 << 20
"""Bytes written at a time."""

RowKey = tuple[int, int]
"""Hash and occurrence of a row."""


class Line(NamedTuple):
    """A row of the output."""

    number: int
    start: int
    data: bytes
    """With its line end."""


def is_adoptable(out: Path) -> bool:
    """Whether `out` begins with a row that has samples."""
    try:
        with out.open("rb") as file:
            row = orjson.loads(file.readline())
    except (OSError, orjson.JSONDecodeError):
        return False
    return isinstance(row, dict) and _samples(row) is not None


def adopt(
    out: Path,
    journal: Path,
    header: Header,
    samples: int,
    form: PromptFormat,
    source: Source,
    survey: Survey | None,
) -> int:
    """Write the journal `journal` of what `out` holds; `samples` samples of a row are asked for. Returns
    the number of its rows.

    Raises ConfigError where it is not certain which rows of `source` they are, and WriteFailed.
    """
    if survey is None:
        raise ConfigError(
            f"{out} was begun by another program: it can be continued only with an input that can be read "
            f"again, not with {source.name}."
        )
    found = _check_lines(out)
    if found > samples:
        raise ConfigError(f"{out} has {found} samples of a row: use -n {found} or more, or another --out.")
    keys = _match(out, form, source, survey)
    target = Target(samples=found, rows=survey.rows, digest=survey.digest, source=source.name)
    try:
        with tempfile.NamedTemporaryFile(dir=journal.parent, prefix=journal.name, delete=False) as file:
            try:
                end = 0
                pieces = [encode_json(b"job", header), encode_json(b"i", target)]
                for (line, row), key in zip(_rows(out), keys, strict=True):
                    place = end + sum(map(len, pieces))
                    pieces += _records(line, row, key, place)
                    if (size := sum(map(len, pieces))) > BUFFER:
                        file.writelines(pieces)
                        pieces, end = [], end + size
                file.writelines(pieces)
                file.flush()
                os.fdatasync(file.fileno())
                Path(file.name).replace(journal)
            except BaseException:
                Path(file.name).unlink()
                raise
    except OSError as error:
        raise WriteFailed(f"{journal} could not be written ({error.strerror}).") from None
    return len(keys)


def _lines(out: Path) -> Iterator[Line]:
    """The whole lines of the output."""
    start = 0
    with out.open("rb", buffering=BUFFER) as file:
        for number, data in enumerate(file, 1):
            if not data.endswith(b"\n"):
                return
            yield Line(number, start, data)
            start += len(data)


def _rows(out: Path) -> Iterator[tuple[Line, dict[str, Any]]]:
    """The rows of the output, up to the first line that is torn."""
    for line in _lines(out):
        try:
            yield line, parse_row("", line.data)
        except ConfigError:
            return


def _samples(row: dict[str, Any]) -> int | None:
    """Samples of a row of an output; None where it is no such row."""
    lists = [row.get(name) for name in LISTS]
    if not all(isinstance(values, list) for values in lists):
        return None
    counts = {len(values) for values in lists if values is not None}
    count = counts.pop()
    return count if not counts and 0 < count < MOST_SAMPLES else None


def _check_lines(out: Path) -> int:
    """Samples of every row. Raises ConfigError for a line that is no row, or has another number of them."""
    found = 0
    torn: ConfigError | None = None
    for line in _lines(out):
        where = f"{out} line {line.number}"
        try:
            samples = _samples(parse_row(where, line.data))
        except ConfigError as error:
            torn = torn or error
            continue
        if torn is not None:
            raise ConfigError(f"{torn} Take it out of the file to continue the rest.")
        if samples is None:
            raise ConfigError(
                f"{where} is no row of an output: {', '.join(LISTS)} must be lists of one length."
            )
        if found and samples != found:
            raise ConfigError(
                f"{where} has {samples} samples, and those before have {found}: give each its file."
            )
        found = samples
    return found


def _own(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in RESERVED_COLUMNS}


def _uuid(form: PromptFormat, row: dict[str, Any]) -> bytes:
    """What open-r1 takes for the row's name."""
    column = form.id_column or form.prompt_column
    value = None if column is None else row.get(column)
    return md5(str(value).encode(), usedforsecurity=False).digest()


def _match(out: Path, form: PromptFormat, source: Source, survey: Survey) -> list[RowKey]:
    """The row of the input for each line of the output."""
    there = Counter(survey.hashes)
    taken: Counter[int] = Counter()
    keys: list[RowKey | None] = []
    unknown: dict[bytes, list[int]] = {}
    for place, (_, whole) in enumerate(_rows(out)):
        row = _own(whole)
        hash = row_hash(content_hash(row))
        if taken[hash] < there[hash]:
            keys.append((hash, taken[hash]))
            taken[hash] += 1
        else:
            keys.append(None)
            unknown.setdefault(_uuid(form, row), []).append(place)
    if unknown:
        _match_by_uuid(out, form, source, survey, unknown, taken, keys)
    return [key for key in keys if key is not None]


def _match_by_uuid(
    out: Path,
    form: PromptFormat,
    source: Source,
    survey: Survey,
    unknown: dict[bytes, list[int]],
    taken: Counter[int],
    keys: list[RowKey | None],
) -> None:
    """Fill in the `keys` of the `unknown` places. Raises ConfigError."""
    free: dict[bytes, list[RowKey]] = {}
    seen: Counter[int] = Counter()
    for hash, (where, line) in zip(survey.hashes, source.lines(), strict=True):
        occurrence = seen[hash]
        seen[hash] += 1
        if occurrence >= taken[hash]:
            uuid = _uuid(form, parse_row(where, line))
            if uuid in unknown:
                free.setdefault(uuid, []).append((hash, occurrence))
    column = form.id_column or form.prompt_column
    for uuid, places in unknown.items():
        rows = free.get(uuid, [])
        where = f"{out} line {places[0] + 1}"
        if len(rows) < len(places):
            more = "more often than" if rows else "and not in"
            raise ConfigError(
                f"{where}: this row is in the output {more} {source.name}, going by its {column!r}: "
                "it was begun with another input. Give that one, or use another --out."
            )
        if len({hash for hash, _ in rows}) > 1:
            raise ConfigError(
                f"{where}: {len(rows)} rows of {source.name} have this {column!r}, and it is not certain "
                "which one this is. Name a column that tells them apart (--id-column), or use another --out."
            )
        for place, key in zip(places, rows, strict=False):
            keys[place] = key


def _records(line: Line, row: dict[str, Any], key: RowKey, place: int) -> list[bytes]:
    """The journal's records of a row, of which the first will stand at `place`."""
    reasonings = row.get("reasonings") or []
    records: list[bytes] = []
    places = []
    for index, (text, finish, usage) in enumerate(zip(*(row[name] for name in LISTS), strict=True)):
        trace = Trace(
            text=text if isinstance(text, str) else "",
            finish_reason=finish if isinstance(finish, str) else None,
            reasoning=reasonings[index] if len(reasonings) > index else None,
            metadata=_metadata(usage),
        )
        places.append(b"%d" % place)
        records.append(encode(b"s", b"%016x %d %d %b" % (*key, index, encode_trace(trace))))
        place += len(records[-1])
    span = (line.start, line.start + len(line.data), zlib.crc32(line.data))
    records.append(encode(b"w", b"%016x %d %d %d %d %b" % (*key, *span, b",".join(places))))
    return records


def _metadata(usage: Any) -> Metadata:
    try:
        return msgspec.convert(usage, Metadata)
    except msgspec.ValidationError:
        return Metadata(prompt_tokens=0, completion_tokens=0, total_tokens=0)
