"""The queue between whoever asks for groups of rollouts and the engines that make them: rules only.

Prompts in, groups with rewards out. The clock is handed in. It guarantees:
- a request is in one place: it waits, is in the hands of one worker, or its result waits to be fetched;
- a request whose worker is not heard of for `expiry` seconds, or says that it has not got it, waits again,
  before the others;
- a worker gets only what its weights may make, and no more than its share of all there is, so that none
  stands idle while another has a heap;
- a result counts once, the first there is; what nobody asked for, or not any longer, is passed over.

Nothing here is remembered by a process that is restarted (another epoch): who asks then puts in again what it
has no result of, and workers say what they have in their hands.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from penstock.prompt import Prompt

EXPIRY: Final = 6.0
"""Seconds without a word of a worker after which others get what it had."""


class Request(msgspec.Struct, frozen=True):
    """A group is wanted of a prompt."""

    id: int
    position: int
    """Of the prompt in the stream of prompts."""
    prompt: Prompt
    version: int
    """The lowest policy version of the weights that may make it."""


class Result(msgspec.Struct, frozen=True):
    """A group, or why there is none."""

    id: int
    payload: bytes
    """The rollouts, as `penstock.cluster.rollout_worker` encodes them."""


class Taken(msgspec.Struct, frozen=True):
    """What a worker is given."""

    requests: tuple[Request, ...]
    cancelled: tuple[int, ...]
    """Of those in its hands: nobody wants them any longer."""


class Hand(msgspec.Struct):
    """A worker as the queue knows it."""

    heard: float
    held: set[int] = msgspec.field(default_factory=set)
    cancelled: set[int] = msgspec.field(default_factory=set)
    """In its hands as far as is known, and not wanted any longer."""
    version: int | None = None


class Queue:
    """now, everywhere: seconds of a clock that never goes back."""

    def __init__(self, *, expiry: float = EXPIRY) -> None:
        self._expiry = expiry
        self._waiting: OrderedDict[int, Request] = OrderedDict()
        self._leased: dict[int, tuple[Request, str]] = {}
        self._unknown: dict[int, str] = {}
        """In the hands of workers, and not asked for here: asked for, perhaps, before a restart."""
        self._results: OrderedDict[int, Result] = OrderedDict()
        self._hands: dict[str, Hand] = {}

    def __repr__(self) -> str:
        return (
            f"<Queue waiting={len(self._waiting)} leased={len(self._leased)} "
            f"results={len(self._results)} workers={len(self._hands)}>"
        )

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def leased(self) -> int:
        return len(self._leased)

    @property
    def results(self) -> int:
        """That are not fetched."""
        return len(self._results)

    # -- who asks ---------------------------------------------------------------------------------

    def put(self, requests: Iterable[Request]) -> None:
        """Groups are wanted. What is known here already stays as it is."""
        for request in requests:
            if request.id in self._waiting or request.id in self._leased or request.id in self._results:
                continue
            worker = self._unknown.pop(request.id, None)
            if worker is not None and worker in self._hands:
                self._lease(request, worker)
            else:
                self._waiting[request.id] = request

    def cancel(self, ids: Iterable[int]) -> None:
        """They are not wanted any longer."""
        for one in ids:
            self._waiting.pop(one, None)
            self._results.pop(one, None)
            leased = self._leased.pop(one, None)
            if leased is not None:
                hand = self._hands[leased[1]]
                hand.held.discard(one)
                hand.cancelled.add(one)

    def fetch(self, most: int) -> list[Result]:
        """Results, the oldest first. They stay until they are `fetched`: an answer may be lost."""
        return [result for result, _ in zip(self._results.values(), range(most), strict=False)]

    def fetched(self, ids: Iterable[int]) -> None:
        for one in ids:
            self._results.pop(one, None)

    # -- workers ----------------------------------------------------------------------------------

    def take(self, worker: str, version: int | None, room: int, holding: Sequence[int], now: float) -> Taken:
        """A worker with weights of `version` (None: not known, it gets nothing) has room for so many groups
        besides those it has in its hands, all of which it names."""
        hand = self._hands.setdefault(worker, Hand(now))
        hand.heard, hand.version = now, version
        held = set(holding)
        for one in hand.held - held:  # the answer that gave it was lost
            self._again(one)
        hand.held &= held
        hand.cancelled &= held
        hand.cancelled |= {one for one in held if one in self._leased and self._leased[one][1] != worker}
        self._unknown = {one: who for one, who in self._unknown.items() if who != worker}
        for one in held - hand.held - hand.cancelled:
            if one in self._waiting:  # it has had it since before a restart, or before it was believed dead
                self._lease(self._waiting.pop(one), worker)
            else:
                self._unknown[one] = worker
        requests = self._given(worker, version, room)
        return Taken(tuple(requests), tuple(sorted(hand.cancelled)))

    def done(self, worker: str, result: Result, now: float) -> None:
        """A worker has made a group."""
        if worker in self._hands:
            self._hands[worker].heard = now
        self._unknown.pop(result.id, None)
        known = self._leased.pop(result.id, None)
        if known is not None:
            self._hands[known[1]].held.discard(result.id)
        if known is None and self._waiting.pop(result.id, None) is None:
            return
        self._results[result.id] = result

    def lost(self, worker: str) -> None:
        """A worker is dead."""
        hand = self._hands.pop(worker, None)
        if hand is not None:
            for one in hand.held:
                self._again(one)
        self._unknown = {one: who for one, who in self._unknown.items() if who != worker}

    def expire(self, now: float) -> None:
        for worker in [name for name, hand in self._hands.items() if now - hand.heard >= self._expiry]:
            self.lost(worker)

    # -- inside -----------------------------------------------------------------------------------

    def _given(self, worker: str, version: int | None, room: int) -> list[Request]:
        if version is None:
            return []
        able = sum(hand.version is not None and hand.version >= version for hand in self._hands.values())
        share = -(-(len(self._waiting) + len(self._leased)) // max(1, able))
        room = min(room, max(0, share - len(self._hands[worker].held)))
        given: list[Request] = []
        for request in self._waiting.values():
            if len(given) >= room:
                break
            if request.version <= version:
                given.append(request)
        for request in given:
            del self._waiting[request.id]
            self._lease(request, worker)
        return given

    def _lease(self, request: Request, worker: str) -> None:
        self._leased[request.id] = request, worker
        self._hands[worker].held.add(request.id)

    def _again(self, one: int) -> None:
        leased = self._leased.pop(one, None)
        if leased is not None:
            self._waiting[one] = leased[0]
            self._waiting.move_to_end(one, last=False)
