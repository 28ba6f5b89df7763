"""One request of a sample, fitted to the context.

A completion that would not fit is asked for again, as long as there is room for. A prompt that leaves no room
fails as the engine refused it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from penstock.batch.context import Overflow, overflow_of
from penstock.client import Client, RequestOptions
from penstock.continuation import CHAT
from penstock.errors import RequestRejected, ResponseError, TransportError
from penstock.sample import Sample, SamplingParams

MAX_HALF: Final = 4
"""Tokens that may hold a character that is not whole."""
HALF: Final = "\ufffd"
"""What a tokenizer writes for a part of a character."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One request: a conversation or a text with what is asked of it."""

    route: str
    """`/chat/completions` or `/completions`."""
    content: Any
    """Messages; text or token ids."""
    params: SamplingParams | None = None
    extra: Mapping[str, Any] | None = None
    """Merged into the request's JSON."""
    model: str | None = None
    """None: the job's."""


class Asker:
    """Sends questions to `client`, each fitted to the context the engines have."""

    def __init__(self, client: Client, model: str | None = None) -> None:
        self.client = client
        self.model = model if model is not None else client.model
        """The model of questions that name none."""
        self._context: int | None = None
        """Tokens the engines take, once one has said so."""
        self._tokenizes = True
        self.gives_token_ids = True
        """The engines take the wish for token ids, as far as is known."""

    async def ask(self, question: Question, **options: Any) -> tuple[Sample, int | None]:
        """The answer, and the `max_tokens` asked for where that was less than the question's.

        options: those of a request. Raises TransportError, ResponseError.
        """
        if not self.may_fit(question.params):
            return await self.fitted(question, None, **options)
        try:
            return await self.send(question, options), None
        except RequestRejected as error:
            return await self.fitted(question, error, **options)

    def may_fit(self, params: SamplingParams | None) -> bool:
        """Whether a request for so many tokens is worth sending as it is."""
        if self._context is None or params is None or params.max_tokens is None:
            return True
        return params.max_tokens < self._context

    async def fitted(
        self, question: Question, refusal: RequestRejected | None, **options: Any
    ) -> tuple[Sample, int | None]:
        """As `ask`, for a question that was refused, or will be. Raises the refusal where it is of another
        kind, or where the prompt leaves no room."""
        params = question.params
        wanted = None if params is None else params.max_tokens
        overflow = None if refusal is None else overflow_of(refusal)
        if refusal is not None and (overflow is None or wanted is None):
            raise refusal
        if overflow is not None:
            self._context = overflow.context
        assert params is not None and wanted is not None and self._context is not None
        room = await self._room(question, overflow or Overflow(self._context))
        if room is not None and room < 1 and refusal is not None:
            raise refusal
        most = (
            None if room is None else max(1, min(wanted, room))
        )  # with room < 1 the engine says what is wrong
        params = msgspec.structs.replace(params, max_tokens=most)
        sample = await self.send(msgspec.structs.replace(question, params=params), options)
        return sample, most if most != wanted else None

    async def send(self, question: Question, options: Mapping[str, Any]) -> Sample:
        """The answer to a question as it stands."""
        given: RequestOptions = {**options, "extra_body": question.extra}  # type: ignore[typeddict-item]
        if (model := question.model or self.model) != self.client.model:
            given["model"] = model
        if question.route == CHAT:
            return await self.client.chat(question.content, question.params, **given)
        return await self.client.complete(question.content, question.params, **given)

    async def _room(self, question: Question, overflow: Overflow) -> int | None:
        """Tokens left for the completion; None: only the engine knows."""
        if overflow.prompt is not None:
            return overflow.context - overflow.prompt
        content = question.content
        if not isinstance(content, str) and question.route != CHAT:
            return overflow.context - len(content)
        if not self._tokenizes:
            return None
        try:
            tokens = await self.client.tokenize(content, model=question.model or self.model)
        except (TransportError, ResponseError):
            self._tokenizes = False
            return None
        return overflow.context - len(tokens)

    async def whole_tokens(self, sample: Sample) -> Sample:
        """The sample without the tokens of a last character that is not whole: they are generated again."""
        if not sample.token_ids:
            return sample
        try:
            for size in range(len(sample.token_ids), max(0, len(sample.token_ids) - MAX_HALF), -1):
                text = await self.client.detokenize(sample.token_ids[:size], model=self.model)
                if not text.endswith(HALF):
                    break
            else:
                return sample
        except (TransportError, ResponseError):
            return sample
        if size == len(sample.token_ids):
            return sample
        logprobs = None if sample.logprobs is None else sample.logprobs[:size]
        return msgspec.structs.replace(
            sample, text=sample.text.rstrip(HALF), token_ids=sample.token_ids[:size], logprobs=logprobs
        )
