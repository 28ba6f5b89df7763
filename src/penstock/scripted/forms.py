"""The two forms of an answer: a chat completion and a text completion, with vLLM's fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from penstock.scripted.answers import Answer
    from penstock.scripted.samples import Sample

Json = dict[str, Any]


class Form(Protocol):
    """How samples are written."""

    chunk_kind: ClassVar[str]
    prefix: ClassVar[str]
    """Of the ids of answers."""
    running_usage: ClassVar[Json]
    """Fields beside the counts in the usage of a chunk."""

    def body(self, answer: Answer) -> Json:
        """The whole answer."""
        ...

    def opening(self, answer: Answer, sample: Sample) -> list[Json]:
        """The choices of events before the first chunk of a sample; `more` holds fields beside `choices`."""
        ...

    def chunk(self, answer: Answer, sample: Sample, start: int, stop: int, text: str, last: bool) -> Json:
        """The choice of the event with tokens start:stop, whose text is given."""
        ...


class ChatForm:
    """/v1/chat/completions."""

    kind: ClassVar[str] = "chat.completion"
    chunk_kind: ClassVar[str] = "chat.completion.chunk"
    prefix: ClassVar[str] = "chatcmpl-"
    running_usage: ClassVar[Json] = {"completion_tokens_details": None}

    def body(self, answer: Answer) -> Json:
        choices = [self._choice(answer, sample) for sample in answer.samples]
        prompt = answer.samples[0].prompt
        own = {
            "prompt_logprobs": None,
            "prompt_token_ids": prompt.token_ids() if answer.request.return_token_ids else None,
            "prompt_text": None,
        }
        return _whole(answer, self.kind, choices, own)

    def _choice(self, answer: Answer, sample: Sample) -> Json:
        end = sample.length
        return {
            "index": sample.index,
            "message": {
                "role": "assistant",
                "content": sample.text(0, end).decode(),
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
            },
            "logprobs": self._logprobs(answer, sample, 0, end),
            "finish_reason": sample.reason,
            "stop_reason": sample.stop_reason,
            "token_ids": _ids(answer, sample, 0, end),
            "routed_experts": None,
        }

    def opening(self, answer: Answer, sample: Sample) -> list[Json]:
        prompt = sample.prompt.token_ids() if answer.request.return_token_ids else None
        delta = {"role": "assistant", "content": ""}
        choice = {"index": sample.index, "delta": delta, "logprobs": None, "finish_reason": None}
        return [choice | {"more": {"prompt_token_ids": prompt, "prompt_text": None}}]

    def chunk(self, answer: Answer, sample: Sample, start: int, stop: int, text: str, last: bool) -> Json:
        choice = {
            "index": sample.index,
            "delta": {"content": text},
            "logprobs": self._logprobs(answer, sample, start, stop),
            "finish_reason": sample.reason if last else None,
            "token_ids": _ids(answer, sample, start, stop),
        }
        return choice | {"stop_reason": sample.stop_reason} if last else choice

    def _logprobs(self, answer: Answer, sample: Sample, start: int, stop: int) -> Json | None:
        if answer.request.wanted_logprobs is None:
            return None
        content = []
        for place in range(start, stop):
            text = sample.text(place, place + 1)
            entry = {"token": text.decode(), "logprob": logprob(sample, place), "bytes": list(text)}
            top = [entry] if answer.request.wanted_logprobs else []
            content.append(entry | {"top_logprobs": top})
        return {"content": content}


class TextForm:
    """/v1/completions."""

    kind: ClassVar[str] = "text_completion"
    chunk_kind: ClassVar[str] = "text_completion"
    prefix: ClassVar[str] = "cmpl-"
    running_usage: ClassVar[Json] = {}

    def body(self, answer: Answer) -> Json:
        return _whole(answer, self.kind, [self._choice(answer, sample) for sample in answer.samples], {})

    def _choice(self, answer: Answer, sample: Sample) -> Json:
        end = sample.length
        return {
            "index": sample.index,
            "text": sample.text(0, end).decode(),
            "logprobs": self._logprobs(answer, sample, 0, end),
            "finish_reason": sample.reason,
            "stop_reason": sample.stop_reason,
            "token_ids": _ids(answer, sample, 0, end),
            "prompt_logprobs": None,
            "prompt_token_ids": sample.prompt.token_ids() if answer.request.return_token_ids else None,
            "routed_experts": None,
        }

    def opening(self, answer: Answer, sample: Sample) -> list[Json]:
        return []

    def chunk(self, answer: Answer, sample: Sample, start: int, stop: int, text: str, last: bool) -> Json:
        shown = answer.request.return_token_ids and start == 0
        return {
            "index": sample.index,
            "text": text,
            "logprobs": self._logprobs(answer, sample, start, stop),
            "finish_reason": sample.reason if last else None,
            "stop_reason": sample.stop_reason if last else None,
            "prompt_token_ids": sample.prompt.token_ids() if shown else None,
            "token_ids": _ids(answer, sample, start, stop),
        }

    def _logprobs(self, answer: Answer, sample: Sample, start: int, stop: int) -> Json | None:
        if answer.request.wanted_logprobs is None:
            return None
        tokens = [sample.text(place, place + 1).decode() for place in range(start, stop)]
        values = [logprob(sample, place) for place in range(start, stop)]
        offsets = []
        for token in tokens:
            offsets.append(sample.offset)
            sample.offset += len(token)
        top = [{token: value} for token, value in zip(tokens, values, strict=True)]
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": top}


def logprob(sample: Sample, place: int) -> float:
    """Of a token, made up: it follows from the position, in eighths from -1/8 to -1."""
    return -(1 + (sample.first + place) % 8) / 8


def _ids(answer: Answer, sample: Sample, start: int, stop: int) -> list[int] | None:
    return sample.token_ids(start, stop) if answer.request.return_token_ids else None


def _whole(answer: Answer, kind: str, choices: list[Json], own: Json) -> Json:
    return {
        "id": answer.id,
        "object": kind,
        "created": answer.created,
        "model": answer.batch.model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": answer.batch.fingerprint,
        "usage": answer.usage() | {"prompt_tokens_details": None, "completion_tokens_details": None},
        **own,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


CHAT = ChatForm()
TEXT = TextForm()
