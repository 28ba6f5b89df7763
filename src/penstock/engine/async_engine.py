"""The engine in a thread of its own, and the prompts it works on.

Rules of the two threads:
- Whatever changes the engine is a command, carried out by the engine's thread before its next step, in
  order: submit and abort from the loop, control from any thread.
- A `Generation` belongs to the engine's thread from `submit` until its callback has been told of its end.
- The loop is woken at most once a step, and only when a stream has new tokens or something has ended.
- The callback of a submitted generation is called with `done` set exactly once, whatever happens: finished,
  aborted or failed. The one exception is a generation dropped by `discard`, which is not heard of again.
- A control command ends with a result or an error, and after all that it ended has been delivered.
- If a step fails, or a command other than by refusing, the engine is dead: everything in flight fails, and
  all that is submitted later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from penstock.engine.engine import LLMEngine, Output
from penstock.engine.generation import Delta, Generation, Sample
from penstock.engine.metrics import Metrics
from penstock.engine.sampling import SamplingParams
from penstock.engine.scheduler import Pause
from penstock.engine.weight_update import tensor_digests
from penstock.errors import ConfigError, EngineError, PenstockError

if TYPE_CHECKING:
    import torch

STOP_TIMEOUT: Final = 10.0
"""Seconds `close` waits for the step in progress."""

PauseMode = Literal["abort", "wait", "keep"]
"""What becomes of the requests in flight: ended, finished, or frozen where they are."""

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def _nothing() -> None:
    """What a pause does that keeps the caches."""


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
        self._failure: EngineError | None = None
        """Why no command is carried out any more."""
        self._draining: list[tuple[Callable[[], object], Future[Any]]] = []
        """What is to be done and told when nothing runs any more."""
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

    # -- control, from any thread -----------------------------------------------------------------

    @property
    def paused(self) -> bool:
        """Whether requests are held back, by a pause or by sleep."""
        return self._engine.paused

    @property
    def weight_version(self) -> int:
        """Of the weights in place."""
        return self._engine.weight_version

    def pause(self, mode: PauseMode, clear_cache: bool) -> Future[None]:
        """Hold requests back; done when none runs any more. See PauseMode.

        `clear_cache` forgets cached prefixes, and the keys and values of what is frozen, which are computed
        again. ConfigError when another command puts an end to the waiting.
        """
        then = partial(self._engine.reset_prefix_cache, clear_cache) if clear_cache else _nothing
        return self._control(partial(self._halt, mode), then)

    def sleep(self, level: int, mode: PauseMode) -> Future[None]:
        """Pause, then give memory back: see LLMEngine.sleep."""
        return self._control(partial(self._halt, mode), partial(self._engine.sleep, level))

    def resume(self) -> Future[None]:
        """End a pause. ConfigError while the engine is asleep."""
        return self._control(self._resume)

    def wake_up(self, tags: list[str] | None) -> Future[bool]:
        """See LLMEngine.wake_up."""
        return self._control(partial(self._wake_up, tags))

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> Future[bool]:
        """See LLMEngine.reset_prefix_cache."""
        return self._control(partial(self._engine.reset_prefix_cache, reset_running_requests))

    def replace_weights(self, tensors: Mapping[str, torch.Tensor], version: int | None) -> Future[int]:
        """See LLMEngine.replace_weights; the version they have."""
        return self._control(partial(self._replace_weights, tensors, version))

    def set_weight_version(self, version: int) -> Future[int]:
        """Call the weights in place by another version."""
        return self._control(partial(self._replace_weights, None, version))

    def weight_digests(self) -> Future[dict[str, str]]:
        """See `tensor_digests`: of the parameters in place, in the engine's dtype."""
        return self._control(partial(tensor_digests, self._engine.weights.parameters))

    def _control(
        self, function: Callable[[], Result], then: Callable[[], object] | None = None
    ) -> Future[Result]:
        """Have the engine's thread call a function, and `then`, if given, when nothing runs any more."""
        future: Future[Result] = Future()
        self._command(partial(self._carry_out, function, then, future))
        if self._failure is not None:
            self._refuse_commands(self._failure)
        return future

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
                if engine.can_run():
                    self._take(engine.step())
                    self.stats = engine.stats()
                    self._flush()
                elif self._draining:
                    self._drained()
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
            generation.weight_version = self._engine.weight_version
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

    def _carry_out(
        self, function: Callable[[], Any], then: Callable[[], object] | None, future: Future[Any]
    ) -> None:
        try:
            result = function()
        except PenstockError as error:
            future.set_exception(error)
        except Exception as error:
            future.set_exception(EngineError(f"the engine failed: {type(error).__name__}: {error}"))
            raise
        else:
            if then is not None:
                self._draining.append((then, future))
                return
            self.stats = self._engine.stats()
            self._flush()
            future.set_result(result)

    def _halt(self, mode: PauseMode) -> None:
        if mode == "abort":
            for generation in list(self._generations.values()):
                self._abort(generation, True)
        elif mode == "keep":
            self._interrupt_draining("a pause that keeps requests came before those in flight had finished")
        self._engine.pause(Pause.ALL if mode == "keep" else Pause.NEW)

    def _drained(self) -> None:
        draining, self._draining = self._draining, []
        for then, future in draining:
            self._carry_out(then, None, future)

    def _interrupt_draining(self, why: str) -> None:
        draining, self._draining = self._draining, []
        for _, future in draining:
            future.set_exception(ConfigError(f"Not waited for to the end: {why}."))

    def _resume(self) -> None:
        self._engine.pause(Pause.NONE)
        self._interrupt_draining("the engine was resumed")

    def _wake_up(self, tags: list[str] | None) -> bool:
        awake = self._engine.wake_up(tags)
        if awake:
            self._interrupt_draining("the engine was woken up")
        return awake

    def _replace_weights(self, tensors: Mapping[str, torch.Tensor] | None, version: int | None) -> int:
        engine = self._engine
        before = engine.weight_version
        if tensors is not None:
            engine.replace_weights(tensors, version)
        elif version is not None:
            engine.weight_version = version
        if engine.weight_version != before:
            for generation in self._generations.values():
                for sample in generation.samples:
                    if sample.finish_reason is None:
                        change = len(sample.token_ids), engine.weight_version
                        sample.version_changes = (*sample.version_changes, change)
        return engine.weight_version

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
        self._failure = error
        self._refuse_commands(error)

    def _refuse_commands(self, error: EngineError) -> None:
        with contextlib.suppress(IndexError):  # none is left; two threads may be here at once
            while True:
                command = self._commands.popleft()
                if isinstance(command, partial) and command.func == self._add:
                    self._deliver([(command.args[0], [], True, error)])
                elif isinstance(command, partial) and command.func == self._carry_out:
                    command.args[2].set_exception(error)
        draining, self._draining = self._draining, []
        for _, future in draining:
            future.set_exception(error)

    def _on_loop(self, callback: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(callback, *arguments)
