"""The events of a streamed completion, and the sample that grows from them.

`Partial` takes the data of one event after the other, whichever way the engine has cut the completion, and
gives what each adds. It knows what is still missing, so that a stream that breaks off can be continued: see
`penstock.continuation`. An event that is an error is raised as the ResponseError it stands for; one that is
no chunk of a completion is MalformedResponse.

Tokens whose text is held back (half a character, the beginning of a stop string) are held back with it: what
has been given out is always whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from penstock.errors import MalformedResponse
from penstock.sample import Delta, Sample, Usage
from penstock.wire.connection import Response
from penstock.wire.openai import (
    UNREADABLE,
    ChatLogprobs,
    Origin,
    TextLogprobs,
    UsageBody,
    number,
    reasoning_of,
    response_error,
    usage_of,
)

DONE: Final = b"[DONE]"
INTERNAL_ERROR: Final = 500
_NOTHING: Final = (b"", b"null")
MAX_EXCERPT: Final = 200
"""Characters of an unreadable event that are quoted."""


class ChatDelta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class StreamChoice(msgspec.Struct):
    """A choice of a chat chunk (`delta`) or of a text chunk (`text`)."""

    index: int = 0
    delta: ChatDelta | None = None
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    matched_stop: str | int | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    weight_versions: tuple[tuple[int, int], ...] | None = None
    logprobs: msgspec.Raw = msgspec.Raw()


class Chunk(msgspec.Struct):
    """The data of one event."""

    choices: list[StreamChoice] = []
    id: str | None = None
    model: str | None = None
    usage: UsageBody | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    error: msgspec.Raw = msgspec.Raw()


class _ErrorBody(msgspec.Struct):
    code: int | str | None = None


_decode_chunk: Final = msgspec.json.Decoder(Chunk).decode
_decode_chat_logprobs: Final = msgspec.json.Decoder(ChatLogprobs).decode
_decode_text_logprobs: Final = msgspec.json.Decoder(TextLogprobs).decode


Splice = Callable[[str, bool, str], tuple[str, str, str | None]]
"""Takes the next text, whether it is the last, and the stop string that ended it; gives what of it is text,
what is reasoning, and the stop string it met itself. What it keeps back it gives with a later one."""


class Partial:
    """One completion as far as it has come."""

    def __init__(self) -> None:
        self.splice: Splice | None = None
        """What the text of a continuation goes through."""
        self.cut = False
        """It ended before the engine knew: at a stop string of which the engine had seen only the end."""
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.prompt_token_ids: tuple[int, ...] | None = None
        self.weight_versions: list[tuple[int, int]] = []
        """As in a sample; of tokens that were dropped and made again the later entry counts."""
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.usage: Usage | None = None
        self.model: str | None = None
        self.id: str | None = None
        self.prompt_tokens = 0
        """Without what was generated, as the engine counted them; 0: not known."""
        self._tokens_before = 0
        self._chunks_before = 0
        self.chunks = 0
        """Pieces with text so far: about the number of tokens, where these are not known."""
        self.has_token_ids = True
        """Every piece has come with its token ids."""
        self._held_ids: list[int] = []
        self._held_logprobs: list[float] = []

    def feed(self, data: bytes) -> Delta | None:
        """Takes in the data of one event; what it adds. Raises MalformedResponse or ResponseError."""
        try:
            chunk = _decode_chunk(data)
        except UNREADABLE as error:
            excerpt = data[:MAX_EXCERPT].decode("utf-8", "replace")
            raise MalformedResponse(
                f"an event is not a chunk of a completion ({error}): {excerpt}"
            ) from error
        if bytes(chunk.error) not in _NOTHING:
            raise response_error(Response(_status(chunk.error), {}, data))
        self.id = self.id or chunk.id
        self.model = self.model or chunk.model
        if chunk.prompt_token_ids is not None and self.prompt_token_ids is None:
            self.prompt_token_ids = chunk.prompt_token_ids
        if chunk.usage is not None:
            self.usage = usage_of(chunk.usage)
            if not self.prompt_tokens:  # a continuation has what came before in its prompt
                self.prompt_tokens = self.usage.prompt_tokens - self._tokens_before
        return self._take(chunk.choices[0]) if chunk.choices and not self.cut else None

    @property
    def counted(self) -> int:
        """Tokens so far, as the engine counts them, or else the pieces that came."""
        own = self.usage.completion_tokens if self.usage is not None else self.chunks - self._chunks_before
        return self._tokens_before + own

    def begin_again(self, tokens: int) -> None:
        """Another request goes on behind so many tokens; its usage is its own."""
        self._tokens_before = tokens
        self._chunks_before = self.chunks
        self.usage = None

    def drop_last_token(self) -> None:
        """It is to be generated again, or lies behind the end."""
        self.token_ids.pop()
        del self.logprobs[len(self.token_ids) :]

    def drop_held(self) -> None:
        """The stream has broken off: what it held back is lost."""
        self._held_ids.clear()
        self._held_logprobs.clear()

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def sample(self, origin: Origin) -> Sample:
        """The completion, once it is finished."""
        text, reasoning = "".join(self.text), "".join(self.reasoning)
        return Sample(
            text=text,
            reasoning=reasoning or reasoning_of(text),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            token_ids=tuple(self.token_ids) if self.has_token_ids and self.token_ids else None,
            prompt_token_ids=self.prompt_token_ids,
            logprobs=tuple(self.logprobs) or None,
            weight_versions=tuple(self.weight_versions) or None,
            usage=self.usage or Usage(),
            model=self.model,
            request_id=self.id,
            endpoint=origin.endpoint,
            attempts=origin.attempts,
            latency=origin.latency,
        )

    def _take(self, choice: StreamChoice) -> Delta | None:
        text, reasoning = choice.text or "", ""
        if choice.delta is not None:
            text = choice.delta.content or ""
            reasoning = choice.delta.reasoning or choice.delta.reasoning_content or ""
        if choice.prompt_token_ids is not None and self.prompt_token_ids is None:
            self.prompt_token_ids = choice.prompt_token_ids
        if choice.token_ids is not None:
            self._held_ids += choice.token_ids
        elif text or reasoning:
            self.has_token_ids = False
        if choice.weight_versions is not None:
            before = self._tokens_before  # those of a continuation are counted from its own first token
            self.weight_versions += [(first + before, version) for first, version in choice.weight_versions]
        if bytes(choice.logprobs) not in _NOTHING:
            self._held_logprobs += _logprobs(choice.logprobs, chat=choice.delta is not None)
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason
            self.stop_reason = choice.stop_reason if choice.stop_reason is not None else choice.matched_stop
        if self.splice is not None:
            ended_by = self.stop_reason if isinstance(self.stop_reason, str) else ""
            text, reasoning, stop = self.splice(text, self.finished, ended_by)
            if stop is not None:
                self.finish_reason, self.stop_reason = "stop", stop
                self.cut = True
        if not (text or reasoning or self.finished):
            return None
        return self._give_out(text, reasoning)

    def _give_out(self, text: str, reasoning: str) -> Delta:
        ids, self._held_ids = self._held_ids, []
        logprobs, self._held_logprobs = self._held_logprobs, []
        if text or reasoning:
            self.chunks += 1
            self.text.append(text)
            self.reasoning.append(reasoning)
        self.token_ids += ids
        self.logprobs += logprobs
        return Delta(text, reasoning, tuple(ids), tuple(logprobs))


def _logprobs(raw: msgspec.Raw, *, chat: bool) -> list[float]:
    """Of the sampled tokens. Raises MalformedResponse."""
    try:
        if chat:
            return [number(token.logprob) for token in _decode_chat_logprobs(raw).content or ()]
        return [number(value) for value in _decode_text_logprobs(raw).token_logprobs or ()]
    except UNREADABLE as error:
        raise MalformedResponse(f"the logprobs of a chunk cannot be read: {error}") from error


def _status(error: msgspec.Raw) -> int:
    """The status an error event stands for: its code, where that is an error's."""
    try:
        code = msgspec.json.decode(error, type=_ErrorBody).code
    except UNREADABLE:
        return INTERNAL_ERROR
    return code if isinstance(code, int) and 400 <= code < 600 else INTERNAL_ERROR
