"""How many samples may fail before a job stops."""

from __future__ import annotations

from typing import Final

import msgspec

from penstock.errors import ConfigError

JUDGED_SAMPLES: Final = 100
"""Samples that have ended before a share of failures says anything: one of the first two is half of them."""


class FailureLimit(msgspec.Struct, frozen=True):
    """A job stops when more samples than this have failed in the run. Exactly one of the two is set."""

    count: int | None = None
    share: float | None = None
    """Of the samples that have ended, 0 … 1; judged once `JUDGED_SAMPLES` have."""

    @classmethod
    def parse(cls, text: str) -> FailureLimit:
        """`20` or `5%`. Raises ConfigError for anything else."""
        try:
            if text.endswith("%"):
                limit = cls(share=float(text[:-1]) / 100)
                sound = 0 <= (limit.share or 0) <= 1
            else:
                limit = cls(count=int(text))
                sound = (limit.count or 0) >= 0
        except ValueError:
            sound = False
        if not sound:
            raise ConfigError(
                f"{text!r} is no limit of failures: give a number of samples, or a share as 5%."
            )
        return limit

    def is_exceeded(self, failed: int, done: int) -> bool:
        """Whether a run in which `failed` samples failed and `done` are done is to stop."""
        if self.count is not None:
            return failed > self.count
        assert self.share is not None
        ended = failed + done
        return ended >= JUDGED_SAMPLES and failed > self.share * ended

    def __str__(self) -> str:
        return f"{100 * (self.share or 0):.3g} %" if self.count is None else f"{self.count:,}"
