"""When an engine that has died is started again, and when not. Pure: the clock is handed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from penstock.errors import ConfigError
from penstock.servers.patterns import Kind

LASTING: Final = frozenset(
    {
        *(Kind.BAD_FLAG, Kind.MODEL_MISSING, Kind.MODEL_UNKNOWN, Kind.MODEL_GATED, Kind.PARALLEL_SIZE),
        *(Kind.TOO_LONG, Kind.NOT_INSTALLED),
    }
)
"""Causes that another start meets again."""


@dataclass(frozen=True, kw_only=True)
class Restart:
    """How often and how soon."""

    limit: int = 3
    """Deaths and failed starts in a row after which a server is given up."""
    base: float = 1.0
    """Seconds before the first restart; twice as long before each one after it."""
    cap: float = 60.0
    """Seconds before any restart at most."""
    forgiven_after: float = 600.0
    """Seconds a server has to have run for its earlier deaths not to count."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ConfigError(f"The number of restarts must not be negative, not {self.limit}.")
        for name in ("base", "cap", "forgiven_after"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}.")


class Restarts:
    """Those of one server."""

    def __init__(self, rule: Restart) -> None:
        self._rule = rule
        self.in_row = 0
        """Deaths and failed starts since it was last known to be well."""
        self.total = 0
        """Restarts in all."""
        self._ready_at: float | None = None

    def ready(self, now: float) -> None:
        self._ready_at = now

    def failed(self, now: float, kind: Kind | None) -> float | None:
        """It has died or could not start: seconds until it is started again; None: it is given up."""
        since, self._ready_at = self._ready_at, None
        if since is not None and now - since >= self._rule.forgiven_after:
            self.in_row = 0
        if self.in_row >= self._rule.limit or kind in LASTING:
            return None
        self.in_row += 1
        self.total += 1
        return min(self._rule.cap, self._rule.base * 2.0 ** min(self.in_row - 1, 64))
