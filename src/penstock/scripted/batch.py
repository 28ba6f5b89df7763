"""The virtual batch at work: one ticker on the loop moves the schedule and has answers written.

No task and no timer for a single stream. A turn of the ticker serves at most about SLICE samples, then the
loop reads what has come in.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Final, Literal

from penstock.scripted.account import Account
from penstock.scripted.chaos import Draws, Fault
from penstock.scripted.metrics import FIRST_TOKEN_SECONDS, WHOLE_REQUEST_SECONDS, Histogram
from penstock.scripted.samples import Sample
from penstock.scripted.schedule import Capacity, Schedule

if TYPE_CHECKING:
    from penstock.scripted.answers import Answer

SLICE: Final = 256
"""Samples served before the loop gets its turn."""

RESET_SECONDS: Final = 0.01
"""Between what was written of an answer and its RST, which would overtake what has not left the process."""

TIMER_SECONDS: Final = 0.001
"""The loop's timers are no finer: a timer that is less too late is left as it is."""

PauseMode = Literal["abort", "wait", "keep"]


class Batch:
    """The schedule, the answers in it, and what became of them. Its methods are called on the loop."""

    def __init__(self, capacity: Capacity, draws: Draws, seed: int, *, model: str, fingerprint: str) -> None:
        self.schedule: Schedule[Sample] = Schedule(capacity, Random(f"{seed}/itl"))
        self.account = Account()
        self.model = model
        self.fingerprint = fingerprint
        self.tokens_per_step = capacity.tokens_per_step
        self.answers: dict[Answer, None] = {}
        """In flight."""
        self.finish_reasons: Counter[str] = Counter()
        """Samples by how they ended."""
        self.first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.whole_request = Histogram(WHOLE_REQUEST_SECONDS)
        """Of samples, from their arrival."""
        self.paused = False
        self.asleep: set[str] = set()
        """Parts that sleep: weights, kv_cache."""
        self.draws = draws
        self._random = Random(f"{seed}/strikes")
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._when_idle: list[Callable[[], None]] = []

    # -- answers ------------------------------------------------------------------------------------

    def submit(self, answer: Answer) -> None:
        """Takes up the samples of an answer."""
        self.answers[answer] = None
        now = time.monotonic()
        for sample in answer.samples:
            sample.arrived = now
            self.schedule.submit(sample, now)
        self._arm()

    def drop(self, answer: Answer) -> list[Sample]:
        """Takes an answer out of the batch; its samples that had not ended."""
        now = time.monotonic()
        dropped = [sample for sample in answer.samples if self.schedule.abort(sample, now)]
        self.finish_reasons["abort"] += len(dropped)
        self.answers.pop(answer, None)
        self._arm()
        self._tell_idle()
        return dropped

    def over(self, answer: Answer) -> None:
        """An answer has been written."""
        self.answers.pop(answer, None)

    # -- faults -------------------------------------------------------------------------------------

    def strikes_at(self, sample: Sample) -> int:
        """After how many of its tokens a fault strikes that comes in the middle."""
        return self._random.randrange(sample.length)

    def strike(self, answer: Answer, fault: Fault) -> None:
        """The fault strikes in the middle of an answer."""
        if fault.name == "stall_mid":
            answer.stall(fault)
            return
        answer.faulted(fault.name)
        if fault.name == "reset_mid":
            asyncio.get_running_loop().call_later(RESET_SECONDS, answer.line.reset)
        else:
            answer.exchange.break_off()

    # -- control ------------------------------------------------------------------------------------

    def pause(self, mode: PauseMode, then: Callable[[], None]) -> None:
        """Admits nothing from now on. What runs is aborted, awaited or kept as it is; `then` it is done."""
        self.paused = True
        self.schedule.admitting = False
        if mode == "keep":
            self.schedule.freeze(time.monotonic())
        elif mode == "abort":
            for answer in list(self.answers):
                answer.stop()
        self._arm()
        self._when_idle.append(then)
        if mode == "keep":
            self._tell_all()
        else:
            self._tell_idle()

    def resume(self) -> None:
        """Undoes a pause; a sleep stays."""
        self.paused = False
        now = time.monotonic()
        self.schedule.admitting = not self.asleep
        if not self.asleep:
            self.schedule.thaw(now)
            self.schedule.admit(now)
        self._arm()
        self._tell_all()

    def wake(self, parts: set[str]) -> None:
        """Wakes parts of the engine; when none sleeps it works again."""
        self.asleep -= parts
        if not self.asleep:
            self.resume()

    def _tell_idle(self) -> None:
        if self._when_idle and not self.schedule.running:
            self._tell_all()

    def _tell_all(self) -> None:
        waiting, self._when_idle = self._when_idle, []
        for tell in waiting:
            tell()

    # -- the ticker ---------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Sets the timer for what is due next."""
        due = self.schedule.due
        if self._timer is not None:
            if self._timer_at <= due + TIMER_SECONDS and due != math.inf:
                return
            self._timer.cancel()
            self._timer = None
        if due != math.inf:
            self._timer_at = due
            delay = max(0.0, due - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._turn)

    def _turn(self) -> None:
        self._timer = None
        schedule = self.schedule
        now = time.monotonic()
        served = 0
        try:
            while served < SLICE and schedule.due <= now:
                made = schedule.advance(now)
                served += len(made)
                for sample in made:
                    self._count(sample, now)
                    sample.answer.progress(sample)
            self._tell_idle()
        finally:
            self._arm()

    def _count(self, sample: Sample, now: float) -> None:
        if sample.generated <= self.tokens_per_step:
            self.first_token.observe(now - sample.arrived)
        if sample.state == "ended":
            self.finish_reasons[sample.reason] += 1
            self.whole_request.observe(now - sample.arrived)

    def close(self) -> None:
        """Stops the ticker."""
        if self._timer is not None:
            self._timer.cancel()
