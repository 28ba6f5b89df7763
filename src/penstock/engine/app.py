"""The engine behind HTTP: vLLM's routes on one event loop, the model in a thread beside it.

Handlers are plain functions: they read the whole request, check it, submit it and return; answers are written
by callbacks. So a request costs no task, and a client that goes away costs the engine nothing after the step
in progress. Every request gets an answer: a result, an error in OpenAI's form, or, when the engine has died,
a 500.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any, Final, TypeVar

import orjson

from penstock.engine import metrics
from penstock.engine.access import UNAUTHORIZED, ApiKeys
from penstock.engine.answers import Answer, ChatAnswer, CompletionAnswer, Served
from penstock.engine.async_engine import AsyncEngine
from penstock.engine.chat_template import ChatTemplate
from penstock.engine.control import Control
from penstock.engine.engine import LLMEngine
from penstock.engine.params import Defaults, Limits, check_prompt, completion_length, sampling_params
from penstock.engine.protocol import ChatRequest, CompletionRequest, Templated, TokenizeRequest, plain_message
from penstock.engine.tokenizer import Tokenizer
from penstock.errors import ConfigError, EngineError
from penstock.wire.openai_server import (
    AbortRequest,
    DetokenizeRequest,
    Reader,
    Refused,
    Routes,
    handler_of,
    json_of,
    model_cards,
    package_version,
    random_id,
    refusal,
)
from penstock.wire.server import Exchange

R = TypeVar("R", ChatRequest, CompletionRequest)

MIN_MAX_BODY: Final = 64 << 20
"""Bytes a request may have at least."""

_CHAT: Final = Reader(ChatRequest)
_COMPLETION: Final = Reader(CompletionRequest)
_TOKENIZE: Final = Reader(TokenizeRequest)
_DETOKENIZE: Final = Reader(DetokenizeRequest)
_ABORT: Final = Reader(AbortRequest)


class EngineApp:
    """The routes, over one engine. `handle` is the handler of an `HttpServer`."""

    def __init__(
        self,
        llm: LLMEngine,
        *,
        served_model_names: tuple[str, ...] = (),
        prompt_tokens_details: bool = False,
        api_keys: tuple[str, ...] = (),
    ) -> None:
        folder = Path(llm.config.model)
        self.names = served_model_names or (llm.config.model,)
        self._tokenizer = Tokenizer(folder)
        self.engine = AsyncEngine(llm, self._tokenizer.eos_token_id)
        self.limits = Limits(max_model_len=llm.max_model_len, vocab_size=llm.vocab_size)
        self.max_body = max(MIN_MAX_BODY, llm.weights.largest_bytes() + MIN_MAX_BODY // 64)
        """Bytes of a request: any tensor of the model can be sent in one."""
        self._root = llm.config.model
        self._created = int(time.time())
        self._defaults = Defaults.load(folder)
        self._template = ChatTemplate.load(folder)
        self._served = Served(
            engine=self.engine,
            tokenizer=self._tokenizer,
            model=self.names[0],
            fingerprint=fingerprint(llm),
            prompt_tokens_details=prompt_tokens_details,
        )
        self._keys = ApiKeys(api_keys) if api_keys else None
        self._answers: set[Answer[Any]] = set()
        """Those in flight."""
        self._serials = count()
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
            **Control(self.engine, llm).routes,
        }

    def handle(self, exchange: Exchange) -> None:
        """Routes one request."""
        if self._keys is not None and not self._keys.admit(exchange.request):
            exchange.respond(401, UNAUTHORIZED)
            return
        handler = handler_of(self._routes, exchange)
        if handler is not None:
            try:
                handler(exchange)
            except (ConfigError, EngineError) as error:
                exchange.respond(*refusal(error))

    # -- generation -------------------------------------------------------------------------------

    def _chat(self, exchange: Exchange) -> None:
        request = _CHAT.read(json_of(exchange.request))
        request.check()
        self._check_model(request.model)
        wanted = completion_length(request, self.limits)
        prompt = self._encode(self._render(request), request.add_special_tokens)
        self._generate(ChatAnswer, exchange, request, [prompt], wanted, "chatcmpl-")

    def _completion(self, exchange: Exchange) -> None:
        request = _COMPLETION.read(json_of(exchange.request))
        request.check()
        self._check_model(request.model)
        wanted = completion_length(request, self.limits)
        prompts = [
            self._encode(prompt, request.add_special_tokens) if isinstance(prompt, str) else prompt
            for prompt in request.prompts()
        ]
        self._generate(CompletionAnswer, exchange, request, prompts, wanted, "cmpl-")

    def _generate(
        self,
        kind: Callable[[Served, Exchange, R, str, Callable[[Answer[Any]], None]], Answer[R]],
        exchange: Exchange,
        request: R,
        prompts: list[list[int]],
        wanted: int | None,
        prefix: str,
    ) -> None:
        if wanted is None:
            wanted = self._defaults.max_new_tokens or self.limits.max_model_len
        params = []
        for prompt in prompts:
            check_prompt(prompt, self.limits)
            room = self.limits.max_model_len - len(prompt)
            params.append(sampling_params(request, self._defaults, self.limits, min(wanted, room)))
        id = exchange.request.headers.get("x-request-id") or request.request_id or random_id()
        answer = kind(self._served, exchange, request, prefix + id, self._answers.discard)
        answer.begin(prompts, params, next(self._serials))
        self._answers.add(answer)

    def _check_model(self, name: str | None) -> None:
        if name and name not in self.names:
            raise Refused(
                f"The model `{name}` does not exist. Valid aliases: {', '.join(self.names)}.",
                param="model",
                type="NotFoundError",
                code=404,
            )

    def _render(self, request: Templated) -> str:
        if self._template is None:
            raise Refused("This model has no chat template: use /v1/completions.")
        return self._template.render(
            [plain_message(message) for message in request.messages],
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            tools=request.tools,
            arguments=request.template_arguments(),
        )

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt. Raises Refused when it cannot fit, without tokenizing it."""
        most = self.limits.max_model_len * self._tokenizer.longest_token
        if len(text) > most:
            raise Refused(
                f"This model's maximum context length is {self.limits.max_model_len} tokens. However, your "
                f"prompt contains {len(text)} characters, more than the {most} that so many tokens can have. "
                "Please reduce the length of the input prompt.",
                param="input_text",
            )
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    # -- tokens -----------------------------------------------------------------------------------

    def _tokenize(self, exchange: Exchange) -> None:
        request = _TOKENIZE.read(json_of(exchange.request))
        request.check()
        self._check_model(request.model)
        text = self._render(request) if request.prompt is None else request.prompt
        special = (
            request.prompt is not None if request.add_special_tokens is None else request.add_special_tokens
        )
        tokens = self._tokenizer.encode(text, add_special_tokens=special)
        answer = {
            "count": len(tokens),
            "max_model_len": self.limits.max_model_len,
            "tokens": tokens,
            "token_strs": self._tokenizer.pieces(tokens) if request.return_token_strs else None,
        }
        exchange.respond(200, orjson.dumps(answer))

    def _detokenize(self, exchange: Exchange) -> None:
        request = _DETOKENIZE.read(json_of(exchange.request))
        self._check_model(request.model)
        text = self._tokenizer.decode(request.tokens, skip_special_tokens=False)
        exchange.respond(200, orjson.dumps({"prompt": text}))

    # -- control ----------------------------------------------------------------------------------

    def _abort(self, exchange: Exchange) -> None:
        """`{"request_ids": […]}` or `{"request_id": …}`; with neither, everything in flight.

        A request is named by the id of its response, with vLLM's number of the prompt behind it or not, or
        by the X-Request-Id it came with.
        """
        request = _ABORT.read(exchange.request.body)
        ids = set(request.request_ids or ())
        if request.request_id is not None:
            ids.add(request.request_id)
        aborted = [answer for answer in self._answers if not ids or answer.named() & ids]
        for answer in aborted:
            answer.abort()
        count = len(ids) if ids else sum(len(answer.generations) for answer in aborted)
        exchange.respond(200, orjson.dumps({"status": "aborted", "aborted": count}))

    # -- state ------------------------------------------------------------------------------------

    def _health(self, exchange: Exchange) -> None:
        exchange.respond(503 if self.engine.dead.done() else 200, b"")

    def _version(self, exchange: Exchange) -> None:
        exchange.respond(200, orjson.dumps({"version": package_version()}))

    def _load(self, exchange: Exchange) -> None:
        exchange.respond(200, orjson.dumps({"server_load": len(self._answers)}))

    def _models(self, exchange: Exchange) -> None:
        cards = model_cards(self.names, self._root, self.limits.max_model_len, self._created)
        exchange.respond(200, orjson.dumps(cards))

    def _metrics(self, exchange: Exchange) -> None:
        text = self.engine.metrics.render(self.engine.stats, self.names[0])
        exchange.respond(200, text, metrics.CONTENT_TYPE)


def fingerprint(llm: LLMEngine) -> str:
    """Names the software and the settings that decide what is generated."""
    settings = repr((llm.config, llm.model_config)).encode()
    return f"penstock-{package_version()}-{blake2b(settings, digest_size=4).hexdigest()}"
