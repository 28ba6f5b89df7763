"""What a function of the user's own returned or raised, as the trace of a sample or as its failure.

Guarantees: errors of engines keep their types, so that the job can tell what concerns all rows; any other
exception fails the one sample; what ends a program (Ctrl-C, exit, a cancellation from outside) passes
through. What is in a trace can be written as JSON and takes no column of the row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from inspect import isawaitable
from pathlib import Path
from traceback import walk_tb
from typing import Any, Final

import msgspec

from penstock.batch.function import Function
from penstock.batch.rollout import Tally
from penstock.batch.trace import Metadata, Provenance, Trace
from penstock.errors import ConfigError, ResponseError, RolloutFailed, SampleFailed, TransportError
from penstock.prompt import RESERVED_COLUMNS
from penstock.sample import Sample
from penstock.wire.openai import reasoning_of

MAX_MESSAGE: Final = 2000
"""Characters of an exception's message that are kept."""

OWN: Final = ("text", "reasoning", "finish_reason")
"""What of a rollout's mapping is no column of its own."""

PACKAGE: Final = str(Path(__file__).parents[1])

_encode: Final = msgspec.json.Encoder().encode


async def call(function: Function, *arguments: Any) -> Any:
    """What the function returns, awaited. Errors of engines pass; any other exception is RolloutFailed."""
    try:
        result = function(*arguments)
        return await result if isawaitable(result) else result
    except (ResponseError, TransportError, SampleFailed):
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RolloutFailed("the function was cancelled by itself", "CancelledError") from error
    except Exception as error:
        raise RolloutFailed(_told(error), type(error).__name__) from error


def _told(error: Exception) -> str:
    """What an exception of the user's own code says, and where it was raised."""
    message = (str(error) or repr(error))[:MAX_MESSAGE]
    places = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    own = [place for place in places if not place[0].startswith(PACKAGE)]
    if not own:
        return message
    file = own[0][0]  # that of the function: what it calls may lie anywhere
    line = [line for name, line in own if name == file][-1]
    return f"{message} ({Path(file).name}:{line})"


def trace_of(result: Any, tally: Tally, row: Mapping[str, Any], seconds: float, tries: int) -> Trace:
    """The trace of what a rollout returned. Raises RolloutFailed for what is no sample, ConfigError for a
    column whose name is taken."""
    last = tally.last
    columns: dict[str, Any] = {}
    if isinstance(result, Sample):
        text, reasoning, finish, last = result.text, result.reasoning, result.finish_reason, result
    else:
        finish = None if last is None else last.finish_reason
        if isinstance(result, str):
            text, reasoning = result, None
        elif isinstance(result, Mapping):
            columns = _columns(result, row)
            text, reasoning = result.get("text", ""), result.get("reasoning")
            finish = result.get("finish_reason", finish)
        else:
            raise RolloutFailed(
                f"the rollout returned {type(result).__name__}: it must return text, a Sample or a mapping",
                "TypeError",
            )
        if (
            not isinstance(text, str)
            or not isinstance(reasoning, str | None)
            or not isinstance(finish, str | None)
        ):
            raise RolloutFailed(
                "text, reasoning and finish_reason of a rollout's mapping must be text", "TypeError"
            )
    if reasoning is None:
        reasoning = last.reasoning if last is not None and last.text == text else reasoning_of(text)
    return Trace(
        text=text,
        finish_reason=finish,
        reasoning=reasoning,
        columns=columns or None,
        metadata=Metadata(
            prompt_tokens=tally.prompt,
            completion_tokens=tally.completion,
            total_tokens=tally.prompt + tally.completion,
            model=None if last is None else last.model,
            id=None if last is None else last.request_id,
            endpoint=None if last is None else last.endpoint,
            attempts=tally.attempts,
            latency=round(seconds, 4),
            requests=tally.requests,
        ),
        provenance=Provenance(
            finished=round(time.time(), 3),
            seed=tally.seed,
            max_tokens=tally.max_tokens,
            cached_tokens=tally.cached,
            tries=tries,
        ),
    )


def _columns(result: Mapping[Any, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The further columns of a rollout's mapping, as JSON.

    Raises RolloutFailed, and ConfigError for a name that is taken: so it would be in every row.
    """
    columns: dict[str, Any] = {}
    for name, value in result.items():
        if name in OWN:
            continue
        if not isinstance(name, str):
            raise RolloutFailed(f"the rollout returned a column {name!r}, which is no text", "TypeError")
        if name in row or name in RESERVED_COLUMNS:
            taken = "the row has itself" if name in row else "no result can have"
            raise ConfigError(f"The rollout returned a column {name!r}, which {taken}: rename it.")
        try:
            columns[name] = msgspec.Raw(_encode(value))
        except (TypeError, ValueError) as error:
            raise RolloutFailed(
                f"the column {name!r} of a rollout is not JSON: {error}", "TypeError"
            ) from error
    return columns


def reason_of(verdict: Any) -> str:
    """Why a try was rejected. Raises ConfigError for what is no verdict."""
    if verdict is False:
        return ""
    if isinstance(verdict, str) and verdict:
        return verdict
    raise ConfigError(
        f"validate returned {verdict!r}: it must return True, False or the reason of a rejection."
    )
