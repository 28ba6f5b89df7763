"""The stream of prompts, each known by its position; what is owed from earlier comes first.

It guarantees:
- prompts are read lazily, at most `window` ahead; with a window of one they are begun in order;
- a prompt that is put back is the next, the lowest position first;
- on a resume each position holds the prompt it held before, or the resume is refused.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import orjson

from penstock.errors import ConfigError, ResumeRefused
from penstock.prompt import Prompt, PromptFormat
from penstock.rollout.ledger import Kept, Ledger
from penstock.rollout.selection import SOLVED, Curriculum

Item = Prompt | str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A prompt, a text, a row with a column `prompt`, or a conversation."""

BREATH: Final = 500
"""Prompts that are looked at without a pause for the event loop."""
MAX_PASSED: Final = 100_000
"""Prompts passed over in a row after which the stream counts as ended: all that is left is solved."""

FORMAT: Final = PromptFormat()


class Next(NamedTuple):
    """A prompt and its place in the stream."""

    position: int
    prompt: Prompt
    key: str


class Source:
    """Prompts in turn. window: how many the curriculum chooses from. Raises ConfigError."""

    def __init__(
        self, prompts: Iterable[Item], ledger: Ledger, curriculum: Curriculum, *, window: int = 1
    ) -> None:
        if window < 1:
            raise ConfigError(f"the window of a curriculum must be at least 1, not {window}")
        self._items = enumerate(iter(prompts))
        self._ledger = ledger
        self._curriculum = curriculum
        self._window = window
        self._offered: list[Next] = []
        self._owed: list[Next] = []
        """A heap."""
        self._solved = ledger.solved()
        self.ended = False
        """There is nothing more to be read."""
        self.passed = 0
        """Prompts passed over because they are solved."""

    @property
    def exhausted(self) -> bool:
        """There is nothing left to begin."""
        return self.ended and not self._offered and not self._owed

    def put_back(self, one: Next) -> None:
        """It is to be begun again."""
        heapq.heappush(self._owed, one)

    def solved(self, key: str) -> None:
        """Prompts of this key are passed over from now on."""
        self._solved.add(key)

    async def restore(self) -> list[tuple[Next, Kept]]:
        """Reads up to the last position the ledger knows: what is owed is put back, and what was generated
        is returned. Raises ResumeRefused, ConfigError."""
        kept = {one.position: one for one in self._ledger.kept()}
        found = []
        last = self._ledger.last_position()
        for one in self._read(last + 1):
            before = self._ledger.state(one.position)
            if one.position % BREATH == 0:
                await asyncio.sleep(0)
            if before is None:
                self._offered.append(one)  # a curriculum had not chosen it
                continue
            state, key = before
            if key != one.key:
                raise ResumeRefused(
                    f"prompt {one.position} was {key!r} and is now {one.key!r}: "
                    "the ledger belongs to other prompts",
                    [f"prompt {one.position} is another"],
                )
            if state == "leased":
                self.put_back(one)
            elif state == "generated":
                found.append((one, kept[one.position]))
        if self.ended:
            raise ResumeRefused(
                f"the ledger knows {last + 1} prompts, and there are fewer now", ["prompts are missing"]
            )
        return found

    async def next(self) -> Next | None:
        """The prompt to begin next; None: there is none, unless one is put back. Raises ConfigError."""
        if self._owed:
            return heapq.heappop(self._owed)
        passed = 0
        while True:
            self._offered += self._read(self._window - len(self._offered))
            if not self._offered:
                return None
            choice = self._curriculum.choose([one.prompt for one in self._offered])
            if not 0 <= choice < len(self._offered):
                raise ConfigError(
                    f"the curriculum chose prompt {choice} of the {len(self._offered)} it was offered"
                )
            one = self._offered.pop(choice)
            if one.key not in self._solved:
                return one
            self._ledger.passed_over(one.position, one.key, SOLVED)
            self.passed += 1
            passed += 1
            if passed == MAX_PASSED:
                self.ended, self._offered = True, []
            if passed % BREATH == 0:
                await asyncio.sleep(0)

    def _read(self, count: int) -> Iterator[Next]:
        """The next prompts of the stream, `count` or as many as there are."""
        if self.ended:
            return
        read = 0
        for position, item in islice(self._items, max(0, count)):
            read += 1
            prompt = as_prompt(position, item)
            yield Next(position, prompt, prompt.key)
        self.ended = read < count


def as_prompt(position: int, item: Item) -> Prompt:
    """Raises ConfigError for what is no prompt."""
    if isinstance(item, Prompt):
        return item
    row = item if isinstance(item, Mapping) else {"prompt": item}
    try:
        line = orjson.dumps(row)
    except TypeError as error:
        raise ConfigError(f"prompt {position} cannot be written as JSON: {error}") from None
    return FORMAT.prompt(position, f"prompt {position}", line)
