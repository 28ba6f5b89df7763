"""The engine in a thread of its own, and the prompts it works on.

Rules of the two threads:
- The loop submits and aborts; these are commands, carried out by the engine's thread before its next
  step, in order.
- A `Generation` belongs to the engine's thread from `submit` until its callback has been told of its end.
- The loop is woken at most once a step, and only when a stream has new tokens or something has ended.
- The callback of a submitted generation is called with `done` set exactly once, whatever happens: finished,
  aborted or failed. The one exception is a generation dropped by `discard`, which is not heard of again.
- If a step fails, the engine is dead: everything in flight fails, and all that is submitted later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from time import perf_counter
from typing import Final

from penstock.engine.detokenizer import Detokenizer
from penstock.engine.engine import LLMEngine, Output
from penstock.engine.metrics import Metrics
from penstock.engine.sampling import SamplingParams, TokenLogprobs
from penstock.errors import ConfigError, EngineError

STOP_TIMEOUT: Final = 10.0
"""Seconds `close` waits for the step in progress."""

logger = logging.getLogger(__name__)


class Sample:
    """One completion while it grows."""

    __slots__ = (
        "detokenizer",
        "finish_reason",
        "index",
        "last_token",
        "logprobs",
        "num_cached_tokens",
        "stop_reason",
        "token_ids",
    )

    def __init__(self, index: int, detokenizer: Detokenizer | None) -> None:
        self.index = index
        self.detokenizer = detokenizer
        """There when text is wanted token by token, or decides where to stop."""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        """`stop`, `length` or `abort`."""
        self.stop_reason: int | str | None = None
        """The stop string or the id of the stop token that ended it; None for an end-of-text token."""
        self.num_cached_tokens = 0
        self.last_token = 0.0
        """When the last token came, by `perf_counter`; 0 before the first."""


class Delta:
    """What one step added to a sample that is streamed; the sample itself may be further on by now."""

    __slots__ = ("finish_reason", "sample", "start", "stop", "stop_reason", "text")

    def __init__(self, sample: Sample, start: int, text: str) -> None:
        self.sample = sample
        self.start = start
        self.stop = len(sample.token_ids)
        """The new tokens are `sample.token_ids[start:stop]`, and likewise its logprobs."""
        self.text = text
        self.finish_reason = sample.finish_reason
        self.stop_reason = sample.stop_reason


class Generation:
    """The samples of one prompt. `notify(deltas, done, error)` is called on the loop.

    Streamed: after each step that added something, with the deltas. Not streamed: once, at the end.
    """

    __slots__ = (
        "arrival",
        "discarded",
        "id",
        "include_stop_token",
        "notify",
        "params",
        "prompt_token_ids",
        "samples",
        "streamed",
        "unfinished",
    )

    def __init__(
        self,
        id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        notify: Callable[[list[Delta], bool, Exception | None], None],
        *,
        detokenizers: Iterable[Detokenizer | None],
        streamed: bool,
        include_stop_token: bool,
    ) -> None:
        self.id = id
        """Unique among all in flight."""
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.notify = notify
        self.samples = [Sample(index, detokenizer) for index, detokenizer in enumerate(detokenizers)]
        self.streamed = streamed
        self.include_stop_token = include_stop_token
        """Whether the token that ends a sample is part of its text."""
        self.unfinished = len(self.samples)
        self.arrival = perf_counter()
        self.discarded = False
        """Set on the loop: whatever is still on the way is not delivered."""


Post = tuple[Generation, list[Delta], bool, Exception | None]


class AsyncEngine:
    """Drives an `LLMEngine` for an event loop. Start it on the loop that its callbacks are to run on.

    `eos_token_id` is the one end-of-text token that leaves no `stop_reason`.
    """

    def __init__(self, engine: LLMEngine, eos_token_id: int | None = None) -> None:
        self._engine = engine
        self._eos_token_id = eos_token_id
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._generations: dict[str, Generation] = {}
        self._posts: list[Post] = []
        self._thread = threading.Thread(target=self._run, name="penstock-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self.metrics = Metrics()
        self.stats = engine.stats()
        """As of the last step."""
        self.dead: asyncio.Future[EngineError]
        """Resolved when the engine has failed."""

    def start(self) -> None:
        """Starts the thread."""
        self._loop = asyncio.get_running_loop()
        self.dead = self._loop.create_future()
        self._thread.start()

    async def close(self) -> None:
        """Ends the thread after the step in progress; what is in flight is aborted."""
        self._command(self._stop)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join, STOP_TIMEOUT)
        if self._thread.is_alive():
            logger.error("the engine's step did not end within %s s", STOP_TIMEOUT)

    # -- the loop's side --------------------------------------------------------------------------

    def submit(self, generation: Generation) -> None:
        """Queue a prompt. Raises EngineError when the engine is dead."""
        if self.dead.done():
            raise self.dead.result()
        self._command(partial(self._add, generation))

    def abort(self, generation: Generation) -> None:
        """End a generation now; its callback is called with what there is, finish reason `abort`."""
        self._command(partial(self._abort, generation, True))

    def discard(self, generation: Generation) -> None:
        """End a generation that nobody waits for: its callback is not called again."""
        generation.discarded = True
        self._command(partial(self._abort, generation, False))

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes: what is submitted after this does not find them."""
        self._command(self._engine.reset_prefix_cache)

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    @staticmethod
    def _deliver(posts: list[Post]) -> None:
        for generation, deltas, done, error in posts:
            if generation.discarded:
                continue
            try:
                generation.notify(deltas, done, error)
            except Exception as failure:
                logger.exception("delivering %s failed", generation.id)
                with contextlib.suppress(Exception):  # a response that had already ended
                    generation.notify([], True, EngineError(f"the answer could not be written: {failure!r}"))

    # -- the engine's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        engine, commands, wake = self._engine, self._commands, self._wake
        try:
            while True:
                while commands:
                    commands.popleft()()
                if self._closing:
                    break
                if engine.has_unfinished():
                    self._take(engine.step())
                    self.stats = engine.stats()
                    self._flush()
                else:
                    self.stats = engine.stats()
                    self._flush()
                    wake.wait()
                    wake.clear()
        except Exception as error:
            logger.exception("the engine failed")
            self._die(EngineError(f"the engine failed: {type(error).__name__}: {error}"))
        else:
            self._die(EngineError("the engine is shutting down"))

    def _take(self, outputs: list[Output]) -> None:
        """Takes in the new tokens of one step."""
        now = perf_counter()
        generations = self._generations
        for output in outputs:
            generation = generations.get(output.request_id)
            if generation is None:
                continue
            sample = generation.samples[output.index]
            if sample.finish_reason is not None:
                continue
            start = len(sample.token_ids)
            self._time(generation, sample, output, now)
            sample.token_ids += output.token_ids
            if output.logprobs is not None:
                sample.logprobs += output.logprobs
            sample.finish_reason = output.finish_reason
            if output.finish_reason == "stop":
                sample.stop_reason = self._stop_reason(generation.params, output.token_ids[-1])
            if sample.detokenizer is not None:
                self._read(generation, sample, output)
            if sample.finish_reason is not None:
                self._finished(generation, sample, now)
            if generation.streamed:
                assert sample.detokenizer is not None
                delta = Delta(sample, start, sample.detokenizer.take())
                self._posts.append((generation, [delta], generation.unfinished == 0, None))
            elif generation.unfinished == 0:
                self._posts.append((generation, [], True, None))

    def _stop_reason(self, params: SamplingParams, token_id: int) -> int | None:
        """As vLLM: of the end-of-text tokens a checkpoint may have, only the tokenizer's own goes unnamed."""
        return None if token_id == self._eos_token_id and not params.ignore_eos else token_id

    def _read(self, generation: Generation, sample: Sample, output: Output) -> None:
        """Turns a sample's new tokens into text; ends it where a stop string is complete."""
        detokenizer = sample.detokenizer
        assert detokenizer is not None
        token_ids = output.token_ids
        if sample.finish_reason == "stop" and not generation.include_stop_token:
            token_ids = token_ids[:-1]
        for position, token_id in enumerate(token_ids, start=1):
            if (stop := detokenizer.append(token_id)) is not None:
                surplus = len(output.token_ids) - position
                del sample.token_ids[len(sample.token_ids) - surplus :]
                del sample.logprobs[len(sample.token_ids) :]
                if sample.finish_reason is None:
                    self._engine.abort(generation.id, sample.index)
                sample.finish_reason, sample.stop_reason = "stop", stop
                return
        if sample.finish_reason is not None:
            detokenizer.finish()

    def _finished(self, generation: Generation, sample: Sample, now: float) -> None:
        generation.unfinished -= 1
        if generation.unfinished == 0:
            del self._generations[generation.id]
        self.metrics.finished[sample.finish_reason or "error"] += 1
        self.metrics.whole_request.observe(now - generation.arrival)

    def _time(self, generation: Generation, sample: Sample, output: Output, now: float) -> None:
        if sample.last_token:
            self.metrics.between_tokens.observe(now - sample.last_token)
        else:
            sample.num_cached_tokens = output.num_cached_tokens
            self.metrics.first_token.observe(now - generation.arrival)
        sample.last_token = now

    def _add(self, generation: Generation) -> None:
        try:
            self._engine.add_request(generation.id, generation.prompt_token_ids, generation.params)
        except ConfigError as error:
            self._posts.append((generation, [], True, error))
        else:
            self._generations[generation.id] = generation

    def _abort(self, generation: Generation, wanted: bool) -> None:
        if self._generations.pop(generation.id, None) is None:
            return
        self._engine.abort(generation.id)
        deltas = []
        for sample in generation.samples:
            if sample.finish_reason is None:
                sample.finish_reason = "abort"
                self.metrics.finished["abort"] += 1
                if wanted and sample.detokenizer is not None:
                    sample.detokenizer.finish()
                if wanted and generation.streamed and sample.detokenizer is not None:
                    deltas.append(Delta(sample, len(sample.token_ids), sample.detokenizer.take()))
        generation.unfinished = 0
        if wanted:
            self._posts.append((generation, deltas, True, None))

    def _stop(self) -> None:
        self._closing = True

    def _flush(self) -> None:
        if self._posts:
            posts, self._posts = self._posts, []
            self._on_loop(self._deliver, posts)

    def _die(self, error: EngineError) -> None:
        """Fails all there is; later submissions fail at once."""
        self._posts += [(generation, [], True, error) for generation in self._generations.values()]
        self.metrics.finished["error"] += sum(g.unfinished for g in self._generations.values())
        self._generations.clear()
        self._flush()
        self._on_loop(self._bury, error)

    def _bury(self, error: EngineError) -> None:
        """On the loop: nothing is submitted after this; what was queued before it fails here."""
        if not self.dead.done():
            self.dead.set_result(error)
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, partial) and command.func == self._add:
                self._deliver([(command.args[0], [], True, error)])

    def _on_loop(self, callback: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(callback, *arguments)
