"""From generations to response bodies: vLLM's objects, field for field.

An `Answer` is one HTTP request that generates. It submits a generation per prompt, and answers once: with one
body when all have ended, or with server-sent events as they come. A client that goes away takes its
generations with it. Fields vLLM always sends are always sent, null where they mean nothing here.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, TypeVar

import orjson

from penstock.engine.async_engine import AsyncEngine
from penstock.engine.detokenizer import Detokenizer
from penstock.engine.generation import Delta, Generation, Sample
from penstock.engine.protocol import ChatRequest, CompletionRequest, GenerationRequest
from penstock.engine.sampling import SamplingParams, TokenLogprobs
from penstock.engine.tokenizer import Tokenizer
from penstock.wire.openai_server import refusal
from penstock.wire.server import Exchange

EVENTS: Final = "text/event-stream; charset=utf-8"
LAST_EVENT: Final = b"data: [DONE]\n\n"
LEAST_LOGPROB: Final = -9999.0
"""Stands for minus infinity, which JSON does not have."""

Json = dict[str, Any]
R = TypeVar("R", bound=GenerationRequest)


@dataclass(frozen=True)
class Served:
    """What all answers of one server share."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    model: str
    fingerprint: str
    prompt_tokens_details: bool
    """Whether usage says how many prompt tokens came from the prefix cache."""


class Answer(ABC, Generic[R]):
    """One request that generates, from its validated form to the last byte of its response."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(
        self, served: Served, exchange: Exchange, request: R, id: str, ended: Callable[[Answer[Any]], None]
    ) -> None:
        self.served = served
        self.request = request
        self.id = id
        self.generations: list[Generation] = []
        self._exchange = exchange
        self._ended = ended
        self._created = int(time.time())
        self._unfinished = 0
        self._opened: set[int] = set()

    def begin(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], serial: int) -> None:
        """Submits the prompts; `serial` makes their ids unique. Raises Refused, EngineError."""
        request, tokenizer, stop = self.request, self.served.tokenizer, self.request.stop_strings()
        streamed = bool(request.stream)
        for index, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            detokenizers = [
                Detokenizer(
                    tokenizer.stream(prompt, skip_special_tokens=request.skip_special_tokens),
                    stop,
                    include_stop=request.include_stop_str_in_output,
                    min_tokens=wanted.min_tokens,
                )
                if streamed or stop
                else None
                for _ in range(wanted.n)
            ]
            self.generations.append(
                Generation(
                    f"{self.id}-{index}-{serial}",
                    prompt,
                    wanted,
                    self._streamer(index) if streamed else self._collect,
                    detokenizers=detokenizers,
                    streamed=streamed,
                    include_stop_token=request.include_stop_str_in_output,
                )
            )
        self._unfinished = len(self.generations)
        for generation in self.generations:
            self.served.engine.submit(generation)
        self._exchange.on_disconnect = self.discard
        if streamed:
            self._exchange.start(200, EVENTS)

    def named(self) -> set[str]:
        """All the names an abort may use for this request."""
        numbered = (f"{self.id}-{index}" for index in range(len(self.generations)))
        return {self.id, self.id.partition("-")[2], *numbered}

    def abort(self) -> None:
        """Ends the generations; the client gets what there is, with finish reason `abort`."""
        for generation in self.generations:
            self.served.engine.abort(generation)

    def discard(self) -> None:
        """Ends the generations; nobody waits for the answer."""
        self._ended(self)
        for generation in self.generations:
            self.served.engine.discard(generation)

    # -- not streamed -----------------------------------------------------------------------------

    def _collect(self, deltas: list[Delta], done: bool, error: Exception | None) -> None:
        self._unfinished -= 1
        if error is not None:
            self.discard()
            self._exchange.respond(*refusal(error))
        elif self._unfinished == 0:
            self._ended(self)
            self._exchange.respond(200, orjson.dumps(self.body()))

    def body(self) -> Json:
        """The whole answer. All generations have ended."""
        choices = [
            self.choice(generation, number * generation.params.n + sample.index, sample)
            for number, generation in enumerate(self.generations)
            for sample in generation.samples
        ]
        return {
            "id": self.id,
            "object": self.kind,
            "created": self._created,
            "model": self.served.model,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": self.served.fingerprint,
            "usage": self._usage()
            | {"prompt_tokens_details": self._details(), "completion_tokens_details": None},
            **self.own_fields(),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    @abstractmethod
    def choice(self, generation: Generation, index: int, sample: Sample) -> Json:
        """One entry of `choices`."""

    @abstractmethod
    def own_fields(self) -> Json:
        """Fields that only this kind of answer has."""

    def text_of(self, generation: Generation, sample: Sample) -> str:
        """The whole text of an ended sample."""
        if sample.detokenizer is not None:
            return sample.detokenizer.take()
        token_ids = sample.token_ids
        if sample.finish_reason == "stop" and not generation.include_stop_token:
            token_ids = token_ids[:-1]
        return self.served.tokenizer.text(
            generation.prompt_token_ids, token_ids, skip_special_tokens=self.request.skip_special_tokens
        )

    # -- streamed ---------------------------------------------------------------------------------

    def _streamer(self, number: int) -> Callable[[list[Delta], bool, Exception | None], None]:
        """The callback of the generation with this number."""

        def stream(deltas: list[Delta], done: bool, error: Exception | None) -> None:
            generation = self.generations[number]
            events = bytearray()
            if deltas and number not in self._opened:
                self._opened.add(number)
                events += self.opening(generation)
            for delta in deltas:
                if delta.text or delta.stop > delta.start or delta.finish_reason is not None:
                    events += self._event(generation, number, delta)
            self._unfinished -= done
            if error is not None:
                self.discard()
                events += b"data: %s\n\n" % refusal(error)[1] + LAST_EVENT
            elif self._unfinished == 0:
                self._ended(self)
                events += self._closing() + LAST_EVENT
            self._exchange.send(bytes(events))
            if error is not None or self._unfinished == 0:
                self._exchange.end()

        return stream

    @abstractmethod
    def opening(self, generation: Generation) -> bytes:
        """Events before the first delta of a generation."""

    @abstractmethod
    def delta_choice(self, generation: Generation, index: int, delta: Delta) -> Json:
        """The entry of `choices` in the event of one delta."""

    def _event(self, generation: Generation, number: int, delta: Delta) -> bytes:
        index = number * generation.params.n + delta.sample.index
        more: Json = {}
        if delta.finish_reason is not None and not self.includes_usage:
            more["system_fingerprint"] = self.served.fingerprint
        if self.continuous_usage:
            more["usage"] = self.delta_usage(generation, delta.stop)
        return self.event([self.delta_choice(generation, index, delta)], more)

    def event(self, choices: list[Json], more: Json) -> bytes:
        """One server-sent event."""
        return b"data: %s\n\n" % orjson.dumps(
            {
                "id": self.id,
                "object": self.chunk_kind,
                "created": self._created,
                "model": self.served.model,
                "choices": choices,
                **more,
            }
        )

    def _closing(self) -> bytes:
        if not self.includes_usage:
            return b""
        usage = self._usage()
        if (details := self._details()) is not None:
            usage["prompt_tokens_details"] = {
                name: value for name, value in details.items() if value is not None
            }
        return self.event([], {"usage": usage, "system_fingerprint": self.served.fingerprint})

    @property
    def includes_usage(self) -> bool:
        """The stream ends with an event that has the usage."""
        return self.request.stream_options is not None and bool(self.request.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Each event has the usage so far."""
        options = self.request.stream_options
        return self.includes_usage and options is not None and bool(options.continuous_usage_stats)

    # -- usage ------------------------------------------------------------------------------------

    def delta_usage(self, generation: Generation, completion_tokens: int) -> Json:
        """The usage of one sample so far."""
        prompt_tokens = len(generation.prompt_token_ids)
        return {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
        }

    def _usage(self) -> Json:
        prompt = sum(len(generation.prompt_token_ids) for generation in self.generations)
        completion = sum(len(s.token_ids) for generation in self.generations for s in generation.samples)
        return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}

    def _details(self) -> Json | None:
        if not self.served.prompt_tokens_details:
            return None
        cached = sum(generation.samples[0].num_cached_tokens for generation in self.generations)
        return {"cached_tokens": cached, "created_cache_tokens": None, "multimodal_tokens": None}

    def returned_ids(self, token_ids: Sequence[int]) -> Sequence[int] | None:
        """The ids if the request asked for ids."""
        return token_ids if self.request.return_token_ids else None

    def versions(self, generation: Generation, sample: Sample, start: int, stop: int) -> Json:
        """The field with the versions of the weights that made tokens start:stop, if it was asked for."""
        if not self.request.return_weight_versions:
            return {}
        return {"weight_versions": generation.weight_versions(sample, start, stop)}

    def ranked(self, sample: Sample, position: int) -> list[tuple[int, str, float]]:
        """(id, text, logprob) of the token at a position, then of the likeliest ones, each id once."""
        entry: TokenLogprobs = sample.logprobs[position]
        token_id = sample.token_ids[position]
        preceding = sample.token_ids[max(0, position - 4) : position]
        text = self.served.tokenizer.token_text
        others = [(other, logprob) for other, logprob in entry.top if other != token_id]
        return [
            (other, text(other, preceding), max(logprob, LEAST_LOGPROB))
            for other, logprob in ((token_id, entry.logprob), *others)
        ]


class ChatAnswer(Answer[ChatRequest]):
    """/v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    @property
    def role(self) -> str:
        """Who speaks: the assistant, unless the template was not asked for its turn."""
        return "assistant" if self.request.add_generation_prompt else str(self.request.messages[-1]["role"])

    def choice(self, generation: Generation, index: int, sample: Sample) -> Json:
        return {
            "index": index,
            "message": {
                "role": self.role,
                "content": self.text_of(generation, sample),
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
            },
            "logprobs": self._logprobs(sample, 0, len(sample.token_ids)),
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
            "token_ids": self.returned_ids(sample.token_ids),
            "routed_experts": None,
            **self.versions(generation, sample, 0, len(sample.token_ids)),
        }

    def own_fields(self) -> Json:
        prompt = self.generations[0].prompt_token_ids
        return {"prompt_logprobs": None, "prompt_token_ids": self.returned_ids(prompt), "prompt_text": None}

    def opening(self, generation: Generation) -> bytes:
        prompt = generation.prompt_token_ids
        more: Json = {"prompt_token_ids": self.returned_ids(prompt), "prompt_text": None}
        if self.continuous_usage:
            more["usage"] = self.delta_usage(generation, 0)
        events = []
        for sample in generation.samples:
            delta = {"role": self.role, "content": ""}
            choice = {"index": sample.index, "delta": delta, "logprobs": None, "finish_reason": None}
            events.append(self.event([choice], more))
        return b"".join(events)

    def delta_choice(self, generation: Generation, index: int, delta: Delta) -> Json:
        sample = delta.sample
        choice = {
            "index": index,
            "delta": {"content": delta.text},
            "logprobs": self._logprobs(sample, delta.start, delta.stop),
            "finish_reason": delta.finish_reason,
            "token_ids": self.returned_ids(sample.token_ids[delta.start : delta.stop]),
            **self.versions(generation, sample, delta.start, delta.stop),
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        return choice

    def delta_usage(self, generation: Generation, completion_tokens: int) -> Json:
        return super().delta_usage(generation, completion_tokens) | {"completion_tokens_details": None}

    def _logprobs(self, sample: Sample, start: int, stop: int) -> Json | None:
        if not self.request.logprobs:
            return None
        return {"content": [self._token(sample, position) for position in range(start, stop)]}

    def _token(self, sample: Sample, position: int) -> Json:
        ranked = self.ranked(sample, position)
        own = ranked[0]
        # With ids in place of texts, vLLM still gives the bytes of the token's text, but not of the others'.
        entries = [self._entry(*one) for one in ranked[: self.request.top_logprobs or 0]]
        return self._entry(*own) | {"bytes": list(own[1].encode()), "top_logprobs": entries}

    def _entry(self, token_id: int, text: str, logprob: float) -> Json:
        shown = f"token_id:{token_id}" if self.request.return_tokens_as_token_ids else text
        return {"token": shown, "logprob": logprob, "bytes": list(shown.encode())}


class CompletionAnswer(Answer[CompletionRequest]):
    """/v1/completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(
        self,
        served: Served,
        exchange: Exchange,
        request: CompletionRequest,
        id: str,
        ended: Callable[[Answer[Any]], None],
    ) -> None:
        super().__init__(served, exchange, request, id, ended)
        self._offsets: dict[int, int] = {}
        """By index of the choice: characters of token texts streamed so far."""
        self._shown_prompts: set[int] = set()

    def own_fields(self) -> Json:
        return {}

    def opening(self, generation: Generation) -> bytes:
        return b""

    def choice(self, generation: Generation, index: int, sample: Sample) -> Json:
        return {
            "index": index,
            "text": self.text_of(generation, sample),
            "logprobs": self._logprobs(index, sample, 0, len(sample.token_ids)),
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
            "token_ids": self.returned_ids(sample.token_ids),
            "prompt_logprobs": None,
            "prompt_token_ids": self.returned_ids(generation.prompt_token_ids),
            "routed_experts": None,
            **self.versions(generation, sample, 0, len(sample.token_ids)),
        }

    def delta_choice(self, generation: Generation, index: int, delta: Delta) -> Json:
        sample = delta.sample
        prompt = None
        if index not in self._shown_prompts:
            self._shown_prompts.add(index)
            prompt = self.returned_ids(generation.prompt_token_ids)
        return {
            "index": index,
            "text": delta.text,
            "logprobs": self._logprobs(index, sample, delta.start, delta.stop),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "prompt_token_ids": prompt,
            "token_ids": self.returned_ids(sample.token_ids[delta.start : delta.stop]),
            **self.versions(generation, sample, delta.start, delta.stop),
        }

    def _logprobs(self, index: int, sample: Sample, start: int, stop: int) -> Json | None:
        if self.request.logprobs is None:
            return None
        offset = self._offsets.get(index, 0)
        offsets, tokens, logprobs, top = [], [], [], []
        for position in range(start, stop):
            shown = [
                (self._shown(token_id, text), value)
                for token_id, text, value in self.ranked(sample, position)
            ]
            offsets.append(offset)
            tokens.append(shown[0][0])
            logprobs.append(shown[0][1])
            top.append(dict(shown))
            offset += len(shown[0][0])
        self._offsets[index] = offset
        return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": tokens, "top_logprobs": top}

    def _shown(self, token_id: int, text: str) -> str:
        return f"token_id:{token_id}" if self.request.return_tokens_as_token_ids else text
