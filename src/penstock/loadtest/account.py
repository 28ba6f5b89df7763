"""Generations that were lost, done twice, or left behind: the requests' outcomes held against the engines'.

Pure. The engines are asked elsewhere (the scripted engine's /scripted/requests); the requests of a run are
known by their ids: the run's name, a dot, the request's number, and for a further attempt -2, -3, ….
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Set
from typing import Final

import msgspec

EXAMPLES: Final = 5
"""Ids named of each kind."""


class Record(msgspec.Struct, frozen=True):
    """A request as an engine saw it."""

    id: str
    state: str
    """`in_flight`, `completed`, or another word for how it ended without a whole answer."""


class Account(msgspec.Struct, frozen=True):
    """What became of the generations of a run."""

    generated: int
    """Completed by the engines."""
    lost: int
    """Requests that an engine completed, and whose answer never reached who asked."""
    duplicated: int
    """Generations completed beyond the first of their request."""
    orphaned: int
    """Still running on an engine when nobody waits for them any longer: slots that leak."""
    examples: dict[str, list[str]] = {}
    """Some ids of each kind."""
    forgotten: int = 0
    """Requests the engines no longer remember: with any, the counts above are too low."""


def account(run: str, unanswered: Set[int], records: Iterable[Record]) -> Account:
    """Holds the requests of a run that got no answer against what the engines say, after the run."""
    form = re.compile(re.escape(run) + r"\.(\d+)(?:-\d+)?")
    completed: Counter[int] = Counter()
    orphaned: list[int] = []
    for record in records:
        match = form.fullmatch(record.id)
        if match is None:
            continue  # another run's, or someone else's
        number = int(match[1])
        if record.state == "completed":
            completed[number] += 1
        elif record.state == "in_flight":
            orphaned.append(number)
    lost = [number for number in completed if number in unanswered]
    twice = [number for number, times in completed.items() if times > 1]
    named = {"lost": lost, "duplicated": twice, "orphaned": orphaned}
    return Account(
        generated=completed.total(),
        lost=len(lost),
        duplicated=completed.total() - len(completed),
        orphaned=len(orphaned),
        examples={
            kind: [f"{run}.{number}" for number in sorted(numbers)[:EXAMPLES]]
            for kind, numbers in named.items()
            if numbers
        },
    )
