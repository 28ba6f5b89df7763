"""Asking a reward function what a sample is worth, whatever kind of function it is.

It guarantees:
- a score comes within the bound, or it is a failed one that says so: never 0 for what could not be found out;
- an error of the function is a failed score, but ConfigError, which means that nothing can be scored, is
  raised;
- a function that is not async runs on a thread and does not stop the loop. A thread cannot be killed: one
  that hangs is left behind. What may hang belongs into `penstock.rollout.rewards`, which runs in processes.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Final

from penstock.errors import ConfigError
from penstock.prompt import Prompt
from penstock.rollout.score import Score
from penstock.rollout.waits import Waits
from penstock.sample import Sample

THREADS: Final = 32
"""Calls at a time of a function that is not async."""

RewardFunction = Callable[[Prompt, Sample], Any]
"""Returns, or is awaited for, a Score or a number."""


class Scoring:
    """Scores samples with `reward`, each within `timeout` seconds (None: no limit). Raises ConfigError."""

    def __init__(self, reward: RewardFunction, timeout: float | None, waits: Waits) -> None:
        if not callable(reward):
            raise ConfigError(f"a reward is a function of prompt and sample; {reward!r} is none")
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"the bound of a reward must be positive, not {timeout}")
        self._reward = reward
        self._timeout = timeout
        self._waits = waits
        call = getattr(type(reward), "__call__", None)  # noqa: B004 -- of an object, not whether there is one
        self._is_async = inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(call)
        self._threads = asyncio.Semaphore(THREADS)

    async def __call__(self, prompt: Prompt, sample: Sample) -> Score:
        """The score, which may be a failed one. Raises ConfigError."""
        scope = asyncio.timeout(self._timeout)
        try:
            with self._waits.on("samples", "rewards"):
                async with scope:
                    return as_score(await self._ask(prompt, sample))
        except ConfigError:
            raise
        except Exception as error:
            if scope.expired() and isinstance(error, TimeoutError):
                return Score.failure(f"the reward took longer than {self._timeout:g} s")
            return Score.failure(f"the reward failed: {type(error).__name__}: {error}")

    async def _ask(self, prompt: Prompt, sample: Sample) -> Any:
        if self._is_async:
            return await self._reward(prompt, sample)
        async with self._threads:
            found = await _on_a_thread(self._reward, prompt, sample)
        return await found if isinstance(found, Awaitable) else found


def as_score(found: Any) -> Score:
    """What a reward function has returned. Raises ConfigError for what is no reward."""
    if isinstance(found, Score):
        return found
    if isinstance(found, bool | int | float):
        value = float(found)
        return Score(value) if math.isfinite(value) else Score.failure(f"the reward is {value}")
    raise ConfigError(f"a reward is a Score or a number, not {type(found).__name__}")


async def _on_a_thread(call: RewardFunction, prompt: Prompt, sample: Sample) -> Any:
    """A daemon thread, for one that hangs must not keep the process from its end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if not future.done():
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

    def run() -> None:
        try:
            outcome: tuple[Any, BaseException | None] = (call(prompt, sample), None)
        except Exception as error:
            outcome = (None, error)
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass

    threading.Thread(target=run, name="penstock reward", daemon=True).start()
    return await future
