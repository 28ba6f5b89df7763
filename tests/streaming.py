"""A model engine that streams over real sockets, and dies where a test wants it to.

It generates one fixed sequence, whose tokens may split characters and stop strings, as vLLM's chunks and with
vLLM's way of holding back what may become a stop string; asked to continue from token ids or from text it
goes on from there, as a greedy model would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from penstock.sample import Sample, Usage
from tests.scripted import Call, Step, http

PROMPT: Final = (900, 901, 902)
"""What any prompt is tokenized to."""
EOS: Final = 999
CONTEXT: Final = 64
"""Tokens of prompt and completion."""

DONE: Final = b"data: [DONE]\n\n"
HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
HALF: Final = "\ufffd"


def framed(data: bytes) -> bytes:
    """As a chunk of the chunked encoding."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(body: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % orjson.dumps(body)


@dataclass(frozen=True)
class Model:
    """Generates `pieces`, then the end of text; token `i` is the bytes `pieces[i]`."""

    pieces: tuple[bytes, ...]
    ids: bool = True
    """Whether it gives token ids."""
    think: str = ""
    """Its text up to and with this is reasoning, which chat tells apart."""
    hold: bool = True
    """As vLLM it holds back as many characters as the longest stop string has, less one; else what may begin
    one."""

    def text(self, ids: Sequence[int]) -> str:
        """What /detokenize says."""
        data = b"".join(b"" if id == EOS else self.pieces[id] for id in ids if id < 900 or id == EOS)
        return data.decode("utf-8", "replace")

    def logprob(self, id: int) -> float:
        return -0.25 * (id % 8) - 0.125

    def generate(self, request: dict[str, Any], chat: bool) -> list[dict[str, Any]]:
        """The chunks of the answer to a request."""
        start = self._start(request, chat)
        given = request.get("max_tokens") or request.get("max_completion_tokens")
        room = CONTEXT - len(PROMPT) - start
        limit = given or (room if chat else 16)
        assert limit <= room, "the context is too short"
        stops = [request["stop"]] if isinstance(request.get("stop"), str) else list(request.get("stop") or ())
        keep = max(map(len, stops), default=1) - 1
        chunks: list[dict[str, Any]] = []
        opening = {"prompt_token_ids": self._prompt(request, start)} if self.ids else {}
        if chat:
            chunks.append(self._chunk({"delta": {"role": "assistant", "content": ""}}, **opening))
        out, held, ids = "", "", list[int]()
        for number in range(limit):
            id = start + number
            id = EOS if id >= len(self.pieces) else id
            ids.append(id)
            whole = self.text(range(start, start + len(ids))) if id != EOS else out + held
            new = "" if whole.endswith(HALF) and id != EOS else whole[len(out + held) :]
            reason, stop = ("stop" if id == EOS else "length" if number + 1 == limit else None), None
            text = held + new
            found = [
                (at + len(one), at, one)
                for one in stops
                if new and (at := text.find(one, max(0, len(held) - len(one) + 1))) >= 0
            ]
            if found:
                end, at, stop = min(found)
                text, reason = text[: end if request.get("include_stop_str_in_output") else at], "stop"
            size = 0 if reason else min(keep, len(text)) if self.hold else _undecided(text, stops)
            piece, held = text[: len(text) - size], text[len(text) - size :]
            chunks.append(
                self._piece(request, chat, out, piece, id, reason, stop, first=number == 0, start=start)
            )
            out += piece
            if reason:
                break
        usage = {"prompt_tokens": len(PROMPT) + start, "completion_tokens": len(ids)}
        return [*chunks, {"id": "c", "model": "m", "choices": [], "usage": usage}]

    def _start(self, request: dict[str, Any], chat: bool) -> int:
        """The number of the token to begin with."""
        if isinstance(request.get("prompt"), list):
            tokens = request["prompt"]
            assert tokens[: len(PROMPT)] == list(PROMPT) or tokens == [1, 2]
            rest = tokens[len(PROMPT) :] if tokens != [1, 2] else []
            assert rest == list(range(len(rest))), "not what was generated"
            return len(rest)
        text = request["prompt"].partition("|")[2] if not chat else ""
        if chat and request.get("continue_final_message"):
            assert request["add_generation_prompt"] is False
            text = request["messages"][-1]["content"]
        for number in range(len(self.pieces) + 1):
            if self.text(range(number)) == text:
                return number
        raise AssertionError(f"{text!r} is nothing that was generated")

    def _prompt(self, request: dict[str, Any], start: int) -> list[int]:
        return request["prompt"] if isinstance(request.get("prompt"), list) else [*PROMPT, *range(start)]

    def _piece(
        self,
        request: dict[str, Any],
        chat: bool,
        before: str,
        piece: str,
        id: int,
        reason: str | None,
        stop: str | None,
        *,
        first: bool,
        start: int,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"finish_reason": reason, "stop_reason": stop}
        if request.get("logprobs") is not None and request.get("logprobs") is not False:
            logprob = self.logprob(id)
            choice["logprobs"] = (
                {"content": [{"logprob": logprob}]}
                if chat
                else {"token_logprobs": [logprob], "tokens": ["x"]}
            )
        if self.ids and request.get("return_token_ids"):
            choice["token_ids"] = [id]
        if not chat:
            choice["text"] = piece
            if first and self.ids:
                choice["prompt_token_ids"] = self._prompt(request, start)
            return self._chunk(choice)
        reasoning, text = "", piece
        if self.think:
            reasoning_end = len(self.think) - len("</think>")
            reasoning = piece[: max(0, reasoning_end - len(before))]
            text = piece[max(0, len(self.think) - len(before)) :]
        choice["delta"] = (
            {"content": text} if not reasoning else {"content": text or None, "reasoning": reasoning}
        )
        return self._chunk(choice)

    def _chunk(self, choice: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return {"id": "c", "model": "m", "choices": [{"index": 0, **choice}], **fields}


def _undecided(text: str, stops: Sequence[str]) -> int:
    for size in range(len(text), 0, -1):
        if any(len(stop) > size and text.endswith(stop[:size]) for stop in stops):
            return size
    return 0


Ending = Callable[[Call], Awaitable[None]]


async def closed(call: Call) -> None:
    call.close()


async def was_reset(call: Call) -> None:
    await asyncio.sleep(0.01)
    call.reset()


async def half_chunk(call: Call) -> None:
    await call.write(b'40\r\ndata: {"choi')
    call.close()


async def half_event(call: Call) -> None:
    await call.write(framed(b'data: {"choices": [{"ind') + b"0\r\n\r\n")


async def ended(call: Call) -> None:
    await call.write(b"0\r\n\r\n")


async def garbage(call: Call) -> None:
    await call.write(framed(b"data: {]\n\n"))
    await asyncio.Event().wait()


async def error_event(call: Call) -> None:
    error = {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "code": 500}
    await call.write(framed(event({"error": error}) + DONE) + b"0\r\n\r\n")


async def stalled(call: Call) -> None:
    await asyncio.Event().wait()


ENDINGS: Final[dict[str, Ending]] = {
    "closed": closed,
    "reset": was_reset,
    "half chunk": half_chunk,
    "half event": half_event,
    "ended": ended,
    "garbage": garbage,
    "error event": error_event,
    "stalled": stalled,
}


def stream(model: Model, *, cut: int | None = None, ending: Ending = closed, pause: float = 0.0) -> Step:
    """Streams the model's chunks; with `cut` it dies, as `ending` says, after so many of them."""

    async def step(call: Call) -> None:
        chunks = model.generate(call.json, call.path.endswith("/chat/completions"))
        await call.write(HEAD)
        for chunk in chunks[:cut]:
            await call.write(framed(event(chunk)))
            if pause:
                await asyncio.sleep(pause)
        if cut is None:
            await call.write(framed(DONE) + b"0\r\n\r\n")
        else:
            await ending(call)

    return step


def side(model: Model) -> dict[str, Step]:
    """The other routes of such an engine."""

    def answer(body: Callable[[Call], Any]) -> Step:
        async def step(call: Call) -> None:
            await call.write(http(200, orjson.dumps(body(call))))

        return step

    async def nothing(call: Call) -> None:
        await call.write(http(404, b'{"detail": "Not Found"}'))

    async def healthy(call: Call) -> None:
        await call.write(http(200, b""))

    return {
        "/health": healthy,
        "/metrics": nothing,
        "/abort_requests": nothing,
        "/detokenize": answer(lambda call: {"prompt": model.text(call.json["tokens"])}),
        "/v1/models": answer(lambda call: {"data": [{"id": "m", "max_model_len": CONTEXT}]}),
    }


def essence(sample: Sample) -> tuple[Any, ...]:
    """All of a sample that must not depend on who generated it, and in how many attempts."""
    return (
        sample.text,
        sample.reasoning,
        sample.finish_reason,
        sample.stop_reason,
        sample.token_ids,
        sample.prompt_token_ids,
        sample.logprobs,
        Usage(sample.usage.prompt_tokens, sample.usage.completion_tokens),
    )
