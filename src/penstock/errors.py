"""The errors penstock raises, one type per boundary crossed.

    PenstockError
    ├── ConfigError                 what was asked for cannot be done, in one sentence for a person
    │   └── ResumeRefused           the job on disk is another job; `differences` says how
    ├── TransportError              no usable response came back
    │   ├── ConnectFailed           refused, unreachable, name or TLS failure: nothing was sent
    │   │   └── FleetDown           no endpoint has accepted a connection for as long as the caller would wait
    │   ├── ConnectionLost          the socket died after the request was (perhaps partly) sent
    │   ├── MalformedResponse       the bytes that came back are not the HTTP, SSE or JSON they should be
    │   └── PhaseTimeout            `phase` (connect, first_byte, idle) took longer than its bound
    ├── ResponseError               the server answered with an error status
    │   ├── RequestRejected         4xx: the same request would be refused again
    │   ├── Overloaded              429 or 503: come back later (`retry_after`)
    │   └── ServerFailed            any other 5xx
    ├── DeadlineExceeded            the time the caller gave a request is over
    ├── SampleFailed                engines answered, and yet there is no sample
    │   ├── SampleRejected          `validate` refused every try
    │   └── RolloutFailed           the rollout function raised, or returned what is no sample
    ├── EngineError                 an engine could not start or died
    │   └── StartFailed, EngineDied  with a diagnosis from its log; in penstock.servers.diagnosis
    ├── ControlFailed               a control call did not succeed everywhere; `outcomes` says where
    └── WriteFailed                 a journal or output could not be written; the run stops

Foreign errors (OSError, ssl, httptools, msgspec) are mapped to these where they arise, once.
Whether and where a failed request is sent again is decided by `penstock.fleet.retry.classify` from the
type alone, never from the words of a message: messages hold text from prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Phase = Literal["connect", "first_byte", "idle"]


class PenstockError(Exception):
    """Base of all errors raised by penstock."""

    attempts: int = 1
    """How often a request was sent before this was its end."""


class ConfigError(PenstockError, ValueError):
    """What was asked for cannot be done. The message names what is wrong and what to do, in one sentence."""


class ResumeRefused(ConfigError):
    """The output on disk belongs to a job with other parameters or another input."""

    def __init__(self, message: str, differences: list[str]) -> None:
        super().__init__(message)
        self.differences = differences


class TransportError(PenstockError):
    """No usable response came back."""


class ConnectFailed(TransportError):
    """The connection could not be made; nothing was sent."""


class FleetDown(ConnectFailed):
    """No endpoint of the fleet has accepted a connection for as long as the caller would wait."""


class ConnectionLost(TransportError):
    """The connection died before the response was complete.

    `response_started` is True once any byte of the response had arrived; `reused` is True when the
    connection had served an earlier request. A reused connection that dies before any response byte was
    most likely closed by an idle server before it read the request.
    """

    def __init__(self, message: str, *, response_started: bool = False, reused: bool = False) -> None:
        super().__init__(message)
        self.response_started = response_started
        self.reused = reused


class MalformedResponse(TransportError):
    """The bytes that came back are not what the protocol allows."""


class PhaseTimeout(TransportError, TimeoutError):
    """A phase of the exchange took longer than its bound."""

    def __init__(self, message: str, phase: Phase) -> None:
        super().__init__(message)
        self.phase: Phase = phase


class ResponseError(PenstockError):
    """The server answered with an error status.

    `message`, `type`, `param` and `code` are those of the OpenAI error body where there was one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after = retry_after
        """Seconds the server asked us to wait, None when it did not say."""


class RequestRejected(ResponseError):
    """A 4xx other than 408 and 429: sent again, the same request would be refused again."""


class Overloaded(ResponseError):
    """408, 429 or 503: the server asks us to come back later."""


class ServerFailed(ResponseError):
    """A 5xx other than 503."""


class DeadlineExceeded(PenstockError, TimeoutError):
    """The time the caller gave a request is over. The message says what it was waiting for."""


class SampleFailed(PenstockError):
    """Engines answered, and yet there is no sample. The job goes on."""


class SampleRejected(SampleFailed):
    """Validation refused every try; the message says why it refused the last."""


class RolloutFailed(SampleFailed):
    """A rollout function, or a `validate` function, raised or returned what is no sample.

    `name`: the class of what it raised.
    """

    def __init__(self, message: str, name: str = "RolloutFailed") -> None:
        super().__init__(message)
        self.name = name


class EngineError(PenstockError):
    """An engine could not start, or died. The message says which, why and what to do."""


class ControlFailed(PenstockError):
    """A control call was to succeed on every engine, or a weight update on at least one, and did not.

    What could be undone has been; the message says what was not. `outcomes`: what each engine answered, an
    `Outcome` of `penstock.control.engine` by the endpoint's name.
    """

    def __init__(self, message: str, outcomes: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.outcomes = outcomes


class TooManyFailures(PenstockError):
    """More samples of a job failed than it allows. The run stops; what was not done stays owed."""


class WriteFailed(PenstockError):
    """A journal or an output could not be written. The run stops: a failed write is never skipped."""
