"""What a sample's own requests have brought so far: the steps of a rollout, in the journal.

Invariants:
1. A finished step is handed to the journal at once; a sample that is taken up again gets its steps back.
2. A step is known by its request, not by its place: the answer to the nth request of the same content is
   given to the nth one that asks it again. So requests made side by side replay as well as those made in
   turn, and a request that is another than the recorded one is asked anew, with all that follows from it.
3. A step that cannot be read is asked anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Final

import msgspec
import orjson

HASH_BYTES: Final = 8
"""Length of a request's hash: the requests of one sample are few."""


class Steps:
    """The steps of one sample.

    done: the payloads that earlier runs recorded, in order. record: takes the payload of each new one;
    without it they are only kept in `done`.
    """

    __slots__ = ("_record", "done")

    def __init__(
        self, done: list[bytes] | None = None, record: Callable[[bytes], None] | None = None
    ) -> None:
        self.done: list[bytes] = [] if done is None else done
        self._record = self.done.append if record is None else record

    def add(self, payload: bytes) -> None:
        """Record one more step: a line of JSON."""
        self._record(payload)


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """One recorded step."""

    request: str
    """Hash of what was asked, in hex."""
    nth: int
    """How often the same had been asked before, in this sample."""
    result: msgspec.Raw
    """What came of it, as JSON."""


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Step).decode


def request_hash(kind: str, request: Any) -> str:
    """The hash by which a request is known again. TypeError for what JSON cannot hold."""
    body = orjson.dumps([kind, request], option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    return blake2b(body, digest_size=HASH_BYTES).hexdigest()


class Recorder:
    """Replays the steps of one sample, and records the new ones."""

    __slots__ = ("_asked", "_found", "_steps", "replayed")

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._asked: Counter[str] = Counter()
        self._found: dict[tuple[str, int], bytes] = {}
        self.replayed = 0
        """Steps that were answered from the journal."""
        for payload in steps.done:
            try:
                step = _decode(payload)
            except msgspec.MsgspecError:
                continue
            self._found[step.request, step.nth] = bytes(step.result)

    def next(self, request: str) -> int:
        """How often `request` was asked before; from now on once more."""
        nth = self._asked[request]
        self._asked[request] += 1
        return nth

    def find(self, request: str, nth: int) -> bytes | None:
        """What the journal holds of a step."""
        return self._found.get((request, nth))

    def add(self, request: str, nth: int, result: bytes) -> None:
        """A step is finished; `result` is JSON."""
        self._steps.add(_encode(Step(request, nth, msgspec.Raw(result))))
