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
COMPLETED: Final = "completed"
UNSEEN: Final = "unseen"
"""What is said of a request that no engine has heard of."""


class Record(msgspec.Struct, frozen=True):
    """A request as an engine saw it."""

    id: str
    state: str
    """`in_flight`, `completed`, or another word for how it ended without a whole answer."""
    fault: str | None = None
    """What was done to it on purpose."""


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
    faults: dict[str, int] = {}
    """What was done to requests on purpose, each attempt for itself."""
    recovered: int = 0
    """Requests that were answered though something was done to them."""
    unanswered: dict[str, int] = {}
    """Requests without an answer, by what the engine says of the last attempt: the fault, or the state it
    ended in; `completed` are the lost ones, and `unseen` those that never reached an engine."""


def account(run: str, unanswered: Set[int], records: Iterable[Record]) -> Account:
    """Holds the requests of a run that got no answer against what the engines say, after the run."""
    form = re.compile(re.escape(run) + r"\.(\d+)(?:-\d+)?")
    completed: Counter[int] = Counter()
    orphaned: list[int] = []
    struck: set[int] = set()
    faults: Counter[str] = Counter()
    last: dict[int, str] = {}
    for record in records:
        match = form.fullmatch(record.id)
        if match is None:
            continue  # another run's, or someone else's
        number = int(match[1])
        if record.fault is not None:
            struck.add(number)
            faults[record.fault] += 1
        if last.get(number) != COMPLETED:
            last[number] = record.fault or record.state
        if record.state == COMPLETED:
            completed[number] += 1
            last[number] = COMPLETED
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
        faults=dict(faults),
        recovered=len(struck - unanswered),
        unanswered=dict(Counter(last.get(number, UNSEEN) for number in unanswered)),
    )
