"""The scripted engine behind HTTP: vLLM's routes, and those that tell what became of each request.

Handlers are plain functions on the loop: they check a request, give its samples to the batch and return; the
batch has the answer written. Chaos strikes only requests that generate, after they have been checked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from hashlib import blake2b
from random import Random
from typing import Any, Final, cast, get_args
from urllib.parse import parse_qs

import orjson

from penstock.scripted import metrics
from penstock.scripted.answers import Answer, Asked, StreamAnswer, WholeAnswer
from penstock.scripted.batch import Batch, PauseMode
from penstock.scripted.chaos import IN_THE_MIDDLE, Draws, Fault
from penstock.scripted.config import ScriptedConfig
from penstock.scripted.connection import Line
from penstock.scripted.forms import CHAT, TEXT, Form
from penstock.scripted.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Prompt,
    TokenizeRequest,
)
from penstock.scripted.samples import Reason, Sample
from penstock.scripted.text import decode, encode, tag_of
from penstock.wire.openai_server import (
    AbortRequest,
    DetokenizeRequest,
    Reader,
    Refused,
    Routes,
    error_body,
    handler_of,
    json_of,
    model_cards,
    package_version,
    random_id,
    refusal,
)
from penstock.wire.server import Exchange, Request

PARTS: Final = frozenset({"weights", "kv_cache"})
"""What sleeps, by vLLM's tags."""

UNSENT_LENGTH: Final = 256
"""Tokens of a chat that asks for no length, where none is scripted."""

_CHAT: Final = Reader(ChatRequest)
_COMPLETION: Final = Reader(CompletionRequest)
_TOKENIZE: Final = Reader(TokenizeRequest)
_DETOKENIZE: Final = Reader(DetokenizeRequest)
_ABORT: Final = Reader(AbortRequest)


class ScriptedApp:
    """The routes. `handle` is the handler of an `HttpServer` whose connections are `Line`s."""

    def __init__(self, config: ScriptedConfig) -> None:
        self.config = config
        self.lines: dict[Line, None] = {}
        self.line: Line | None = None
        self.batch = Batch(
            config.capacity,
            Draws(config.chaos.faults, config.seed),
            config.seed,
            model=config.model,
            fingerprint=f"penstock-scripted-{blake2b(repr(config).encode(), digest_size=4).hexdigest()}",
        )
        self._created = int(time.time())
        self._ttft = Random(f"{config.seed}/ttft")
        self._routes: Routes = {
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._completion},
            "/v1/models": {"GET": self._models},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health, "POST": self._health},
            "/version": {"GET": self._version},
            "/load": {"GET": self._load},
            "/metrics": {"GET": self._metrics},
            "/abort_requests": {"POST": self._abort},
            "/abort": {"POST": self._abort},
            "/pause": {"POST": self._pause},
            "/resume": {"POST": self._resume},
            "/is_paused": {"GET": self._is_paused},
            "/sleep": {"POST": self._sleep},
            "/wake_up": {"POST": self._wake_up},
            "/is_sleeping": {"GET": self._is_sleeping},
            "/reset_prefix_cache": {"POST": self._reset_prefix_cache},
            "/scripted/counts": {"GET": self._counts},
            "/scripted/requests": {"GET": self._requests},
            "/scripted/reset": {"POST": self._reset},
        }

    def handle(self, exchange: Exchange) -> None:
        """Routes one request."""
        handler = handler_of(self._routes, exchange)
        if handler is not None:
            try:
                handler(exchange)
            except Refused as error:
                exchange.respond(*refusal(error))

    # -- generation ---------------------------------------------------------------------------------

    def _chat(self, exchange: Exchange) -> None:
        self._generate(exchange, _CHAT, CHAT)

    def _completion(self, exchange: Exchange) -> None:
        self._generate(exchange, _COMPLETION, TEXT)

    def _generate(self, exchange: Exchange, reader: Reader[Any], form: Form) -> None:
        account = self.batch.account
        named = exchange.request.headers.get("x-request-id")
        try:
            request = reader.read(json_of(exchange.request))
        except Refused:
            account.ended(account.arrived(named or random_id()), "refused")
            raise
        given = named or request.request_id or request.rid
        id = given or random_id()
        entry = account.arrived(id)
        try:
            samples = self._samples(request, entry.base if given else "")
        except Refused:
            account.ended(entry, "refused")
            raise
        entry.samples = len(samples)
        line = self.line
        assert line is not None
        asked = Asked(exchange, line, request, form, entry, form.prefix + id, int(time.time()))
        self._answer(asked, samples, self.batch.draws.draw())

    def _answer(self, asked: Asked, samples: list[Sample], fault: Fault | None) -> None:
        """Begins an answer, or what a fault makes of it."""
        batch, account, entry = self.batch, self.batch.account, asked.entry
        kind: type[Answer] = StreamAnswer if asked.request.stream else WholeAnswer
        if fault is None:
            kind(batch, asked, samples).begin()
        elif fault.name in IN_THE_MIDDLE:
            answer = kind(batch, asked, samples, fault)
            answer.strike_at = batch.strikes_at(samples[0])
            answer.begin()
        elif fault.name == "slow":
            account.struck(entry, fault.name)
            for sample in samples:
                sample.ttft += fault.duration or 0.0
            kind(batch, asked, samples).begin()
        elif fault.name == "stall" and fault.duration is not None:
            account.struck(entry, fault.name)
            answer = kind(batch, asked, samples)
            asked.exchange.on_disconnect = answer.gone
            asyncio.get_running_loop().call_later(fault.duration, self._begin_late, answer)
        else:
            account.struck(entry, fault.name)
            account.ended(entry, "faulted")
            self._refuse(asked, fault)

    def _refuse(self, asked: Asked, fault: Fault) -> None:
        """What comes instead of an answer; nothing at all for a stall."""
        if fault.status is not None:
            headers = None if fault.retry_after is None else {"retry-after": f"{fault.retry_after:g}"}
            body = error_body("The script says so.", "ScriptedError", fault.status)
            asked.exchange.respond(fault.status, body, headers=headers)
        elif fault.name == "reset":
            asked.line.reset()

    def _begin_late(self, answer: Answer) -> None:
        if not answer.exchange.disconnected:
            answer.begin()

    def _samples(self, request: GenerationRequest, name: str) -> list[Sample]:
        """The samples asked for. Raises Refused for what cannot be answered."""
        request.check()
        self._check_model(request.model)
        n = request.n or 1
        stops = request.stops()
        samples = []
        for number, prompt in enumerate(request.prompts()):
            for index in range(number * n, number * n + n):
                sample = self._sample(request, prompt, index, name)
                if stops:
                    sample.stop_at(
                        stops, include=request.include_stop_str_in_output, min_tokens=request.min_tokens
                    )
                samples.append(sample)
        return samples

    def _check_model(self, name: str | None) -> None:
        if name and name not in self.config.names:
            raise Refused(
                f"The model `{name}` does not exist.", param="model", type="NotFoundError", code=404
            )

    def _sample(self, request: GenerationRequest, prompt: Prompt, index: int, name: str) -> Sample:
        config = self.config
        room = config.context - prompt.tokens
        if room < 1:
            raise Refused(
                f"This model's maximum context length is {config.context} tokens. However, your prompt "
                f"contains {prompt.tokens} input tokens. Please reduce the length of the input prompt.",
                param="input_tokens",
            )
        if request.wanted is not None and request.wanted > config.context:
            raise Refused(
                f"max_tokens={request.wanted} cannot be greater than max_model_len={config.context}. "
                "Please request fewer output tokens.",
                param="max_tokens",
            )
        if prompt.start is not None:
            tag, first = prompt.start
        else:
            tag, first = tag_of(config.seed, prompt.key, f"{request.seed}/{name}", index), 0
        length, reason = self._length(request, tag, first, room)
        sample = Sample(prompt, index, tag, first, length, reason)
        sample.ttft = config.ttft.sample(self._ttft)
        return sample

    def _length(self, request: GenerationRequest, tag: str, first: int, room: int) -> tuple[int, Reason]:
        """How many tokens a sample has, and why no more. A continuation ends where the whole would have."""
        scripted = self.config.length
        most = room if request.wanted is None else min(request.wanted, room)
        if scripted is None:
            if request.wanted is None and not request.ignore_eos:
                return min(most, max(1, UNSENT_LENGTH - first)), "stop"
            return most, "length"
        whole = round(scripted.sample(Random(f"{self.config.seed}/{tag}")))
        own = max(1, whole - first, request.min_tokens)
        return (most, "length") if request.ignore_eos or own > most else (own, "stop")

    # -- what it is ---------------------------------------------------------------------------------

    def _models(self, exchange: Exchange) -> None:
        config = self.config
        reply(exchange, model_cards(config.names, config.model, config.context, self._created))

    def _tokenize(self, exchange: Exchange) -> None:
        request = _TOKENIZE.read(json_of(exchange.request))
        self._check_model(request.model)
        tokens = encode(request.text())
        strings = [decode([token]) for token in tokens] if request.return_token_strs else None
        answer = {"count": len(tokens), "max_model_len": self.config.context}
        reply(exchange, answer | {"tokens": tokens, "token_strs": strings})

    def _detokenize(self, exchange: Exchange) -> None:
        reply(exchange, {"prompt": decode(_DETOKENIZE.read(json_of(exchange.request)).tokens)})

    def _health(self, exchange: Exchange) -> None:
        exchange.respond(200, b"")

    def _version(self, exchange: Exchange) -> None:
        reply(exchange, {"version": package_version()})

    def _load(self, exchange: Exchange) -> None:
        reply(exchange, {"server_load": len(self.batch.answers)})

    def _metrics(self, exchange: Exchange) -> None:
        exchange.respond(200, metrics.render(self.batch), metrics.CONTENT_TYPE)

    # -- control ------------------------------------------------------------------------------------

    def _abort(self, exchange: Exchange) -> None:
        """`{"request_ids": […]}` or `{"request_id": …}`; with neither, everything in flight."""
        request = _ABORT.read(exchange.request.body)
        ids = set(request.request_ids or ())
        if request.request_id is not None:
            ids.add(request.request_id)
        aborted = [answer for answer in self.batch.answers if not ids or answer.named() & ids]
        for answer in aborted:
            answer.stop()
        reply(exchange, {"status": "aborted", "aborted": len(ids) if ids else len(aborted)})

    def _pause(self, exchange: Exchange) -> None:
        self.batch.pause(_mode(exchange.request), lambda: reply(exchange, {"status": "paused"}))

    def _resume(self, exchange: Exchange) -> None:
        self.batch.resume()
        reply(exchange, {"status": "resumed"})

    def _is_paused(self, exchange: Exchange) -> None:
        reply(exchange, {"is_paused": self.batch.paused})

    def _sleep(self, exchange: Exchange) -> None:
        level = _query(exchange.request, "level") or "1"
        if level not in ("0", "1", "2"):
            raise Refused(f"level must be 0, 1 or 2, not {level!r}.", param="query.level", type="Bad Request")
        mode = _mode(exchange.request)
        self.batch.asleep |= PARTS if level != "0" else set()
        self.batch.pause(mode, lambda: reply(exchange, {"status": "sleeping", "level": int(level)}))

    def _wake_up(self, exchange: Exchange) -> None:
        tags = parse_qs(exchange.request.query).get("tags")
        if tags is not None and not PARTS.issuperset(tags):
            raise Refused(
                f"tags must be of {sorted(PARTS)}, not {tags}.", param="query.tags", type="Bad Request"
            )
        self.batch.wake(set(PARTS if tags is None else tags))
        reply(exchange, {"status": "sleeping" if self.batch.asleep else "awake", "tags": tags})

    def _is_sleeping(self, exchange: Exchange) -> None:
        """As in vLLM a pause counts as the lightest sleep."""
        reply(exchange, {"is_sleeping": self.batch.paused or bool(self.batch.asleep)})

    def _reset_prefix_cache(self, exchange: Exchange) -> None:
        reply(exchange, {"success": True})

    # -- the account --------------------------------------------------------------------------------

    def _counts(self, exchange: Exchange) -> None:
        schedule = self.batch.schedule
        now = {
            "running": len(schedule.running),
            "waiting": len(schedule.waiting),
            "connections": len(self.lines),
            "generation_tokens": schedule.generation_tokens,
            "preemptions": schedule.preemptions,
            "slipped_seconds": round(schedule.slipped, 6),
        }
        reply(exchange, self.batch.account.counts() | now)

    def _requests(self, exchange: Exchange) -> None:
        id, state = _query(exchange.request, "id"), _query(exchange.request, "state")
        reply(exchange, {"requests": list(self.batch.account.requests(id, state))})

    def _reset(self, exchange: Exchange) -> None:
        self.batch.account.reset()
        reply(exchange, {"status": "reset"})


def reply(exchange: Exchange, answer: Mapping[str, Any]) -> None:
    """Answer 200."""
    exchange.respond(200, orjson.dumps(answer))


def _query(request: Request, name: str) -> str | None:
    """The last value of a query parameter."""
    values = parse_qs(request.query).get(name)
    return values[-1] if values else None


def _mode(request: Request) -> PauseMode:
    mode = _query(request, "mode") or "abort"
    if mode not in get_args(PauseMode):
        raise Refused(
            f"mode must be 'abort', 'wait' or 'keep', not {mode!r}.", param="query.mode", type="Bad Request"
        )
    return cast(PauseMode, mode)
