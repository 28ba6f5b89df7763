"""Errors and statuses: what the router tells a client, and what an engine's status means for the fleet."""

from __future__ import annotations

from typing import Final

from penstock.errors import (
    ConfigError,
    ConnectFailed,
    DeadlineExceeded,
    Overloaded,
    PenstockError,
    PhaseTimeout,
    RequestRejected,
    ResponseError,
    ServerFailed,
)

NOT_ADMITTED: Final = frozenset({408, 429, 503})
"""Statuses that say: not now, not here."""


class Refused(Exception):
    """The router itself answers with an error."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


def refused_for(error: PenstockError) -> Refused:
    """What a client is told when no attempt is left."""
    if isinstance(error, ConnectFailed | ConfigError):
        return Refused(503, str(error), retry_after=1)
    if isinstance(error, PhaseTimeout | DeadlineExceeded):
        return Refused(504, str(error))
    return Refused(502, str(error))


def error_for(status: int) -> ResponseError:
    """The error an engine's status stands for. Its body is the client's, not ours."""
    message = "the engine answered with an error"
    if status in NOT_ADMITTED:
        return Overloaded(status, message)
    return (ServerFailed if status >= 500 else RequestRejected)(status, message)
