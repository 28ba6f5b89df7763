"""How a completion whose engine died is asked of another: from the tokens so far, or from the text.

Pure functions of the request and of what has come. It guarantees:
- what has been given out stays: the continuation adds to it, and both together are as long as was asked for;
- where the engine gives token ids the other gets exactly these, so that greedy output is that of an
  uninterrupted run; else the text is continued (`continue_final_message`), which is tokenized anew;
- a text that engines may have held back at the seam (half a character, the beginning of a stop string) is
  neither lost nor doubled, and a stop string across the seam is found;
- what cannot be continued rightly (tools, a grammar) is not continued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from penstock.sample import THINK_CLOSE, THINK_OPEN
from penstock.wire.openai_stream import Partial

CHAT: Final = "/chat/completions"
TEXT: Final = "/completions"

DEFAULT_MAX_TOKENS: Final = 16
"""Length of a text completion that asks for none, in the OpenAI API. A chat goes on to the end of the
context."""

UNCONTINUED: Final = frozenset(
    {
        "tools",
        "tool_choice",
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "regex",
        "ebnf",
        "json_schema",
        "echo",
        "suffix",
        "best_of",
        "use_beam_search",
        "presence_penalty",
        "frequency_penalty",
        "truncate_prompt_tokens",
    }
)
"""Fields whose meaning a continuation would change."""

_OF_CHAT: Final = frozenset(
    {
        "messages",
        "max_completion_tokens",
        "top_logprobs",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "chat_template_kwargs",
        "documents",
        "reasoning_effort",
        "include_reasoning",
        "separate_reasoning",
        "stream_reasoning",
    }
)
"""Fields of a chat request that a text request does not know; its prompt has them in it already."""


class Request(NamedTuple):
    """A route of the OpenAI API and the fields of the body."""

    route: str
    fields: Mapping[str, Any]


class Seam:
    """The text around the place where two engines' outputs meet.

    held: what the first engine had generated and not given out. stops: the stop strings; the first engine had
    not decided whether one begins in `held`, and the second does not see its beginning.
    """

    def __init__(self, held: str, stops: Sequence[str], *, include_stop: bool) -> None:
        self._text = held
        self._before = len(held)
        self._stops = stops if held else ()
        self._reach = max(map(len, self._stops), default=1) - 1
        """Characters of the second engine's text that a stop string across the seam may take."""
        self._include_stop = include_stop

    def feed(self, text: str, *, last: bool, ended_by: str = "") -> tuple[str, str | None, bool]:
        """Takes the second engine's next text: (what may be given out, the stop string met, all decided).

        ended_by: the stop string that the second engine met; it may have begun earlier than that one saw.
        """
        self._text += text
        found = self._across(self._text if self._include_stop else self._text + ended_by)
        if found is not None:
            at, stop = found
            return self._text[:at] + (stop if self._include_stop else ""), stop, True
        if not last and len(self._text) - self._before < self._reach:
            return "", None, False
        return self._text, None, True

    def _across(self, text: str) -> tuple[int, str] | None:
        """Where the stop string begins that is complete first, of those that begin in `held` and end after
        it."""
        matches = [
            (at + len(stop), at, stop)
            for stop in self._stops
            if 0 <= (at := text.find(stop, max(0, self._before - len(stop) + 1))) < self._before
        ]
        if not matches:
            return None
        _, at, stop = min(matches)
        return at, stop


class Splice:
    """What the text of a continuation goes through before it is given out, see `Partial.splice`.

    in_reasoning: the first engine told reasoning from text and was still reasoning; the text route does not.
    """

    def __init__(self, seam: Seam | None, *, in_reasoning: bool) -> None:
        self._seam = seam
        self._in_reasoning = in_reasoning
        self._tag = ""
        """The end of the reasoning so far, which may be the beginning of the closing tag."""

    def __call__(self, text: str, last: bool, ended_by: str) -> tuple[str, str, str | None]:
        stop = None
        if self._seam is not None:
            text, stop, decided = self._seam.feed(text, last=last, ended_by=ended_by)
            if decided:
                self._seam = None
        if not self._in_reasoning:
            return text, "", stop
        reasoning, closed, text = (self._tag + text).partition(THINK_CLOSE)
        self._in_reasoning = not closed
        whole = len(reasoning) if closed or last or stop else len(reasoning) - _beginning_of_close(reasoning)
        self._tag = reasoning[whole:]
        return text, reasoning[:whole], stop


def stop_strings(fields: Mapping[str, Any]) -> tuple[str, ...]:
    stop = fields.get("stop") or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def held_text(whole: str, text: str, reasoning: str) -> str | None:
    """What of `whole`, the text of all tokens so far, has not been given out; None where that cannot be said.

    Reasoning has been given out without its tags; of white space at the start engines make what they will.
    """
    given = text
    if reasoning:
        before, opened, inside = whole.partition(THINK_OPEN)
        whole = inside if opened and not before.strip() else whole
        given = text or reasoning
        if text:
            whole = whole.partition(THINK_CLOSE)[2]
    for start in (whole, " " + whole, whole.removeprefix(" "), whole.lstrip()):
        if start.startswith(given):
            return start[len(given) :]
    return None


def may_continue(request: Request) -> bool:
    """Whether a continuation of such a request means the same."""
    return not any(request.fields.get(name) for name in UNCONTINUED)


def count_tokens(partial: Partial) -> int:
    """Tokens so far: exact with token ids or where the engine counts them, else as many as pieces came."""
    return len(partial.token_ids) if partial.has_token_ids else partial.counted


def asked_tokens(request: Request) -> int | None:
    """Tokens asked for at most; None: as many as the context holds."""
    asked: int | None = request.fields.get("max_tokens")
    if request.route == TEXT:
        return DEFAULT_MAX_TOKENS if asked is None else asked
    return request.fields.get("max_completion_tokens") or asked


def by_token_ids(request: Request, partial: Partial, context: int | None) -> Request | None:
    """The rest, asked for with the token ids so far; None where they are not known.

    `context`: the tokens the model takes, needed where a chat has no bound.
    """
    if not (partial.has_token_ids and partial.token_ids and partial.prompt_token_ids):
        return None
    if not all(map(_is_text, request.fields.get("messages", ()))):
        return None  # the ids of a prompt with images do not hold the images
    prompt = [*partial.prompt_token_ids, *partial.token_ids]
    asked = asked_tokens(request)
    if asked is None:
        if context is None:
            return None
        asked = context - len(partial.prompt_token_ids)
    fields = {name: value for name, value in request.fields.items() if name not in _OF_CHAT}
    if request.route == CHAT and fields.pop("logprobs", None):
        fields["logprobs"] = request.fields.get("top_logprobs", 0)
    return Request(TEXT, {**fields, "prompt": prompt, **_rest(request, len(partial.token_ids), asked)})


def by_text(request: Request, partial: Partial) -> Request | None:
    """The rest, asked for with the text so far; None where that is not all of what was generated."""
    text = "".join(partial.text)
    if any(partial.reasoning):
        return None
    rest = _rest(request, count_tokens(partial), asked_tokens(request))
    if request.route == CHAT:
        messages = [*request.fields["messages"]]
        before = ""
        if request.fields.get("continue_final_message"):
            before = messages.pop()["content"]
            if not isinstance(before, str):
                return None
        messages.append({"role": "assistant", "content": before + text})
        flags = {"continue_final_message": True, "add_generation_prompt": False}
        fields = {name: value for name, value in request.fields.items() if name != "max_completion_tokens"}
        return Request(CHAT, {**fields, "messages": messages, **flags, **rest})
    prompt = request.fields["prompt"]
    if not isinstance(prompt, str):
        return None
    return Request(TEXT, {**request.fields, "prompt": prompt + text, **rest})


def _is_text(message: Mapping[str, Any]) -> bool:
    """Whether the prompt's tokens hold all of the message."""
    content = message.get("content")
    return not isinstance(content, list) or all(part.get("type") == "text" for part in content)


def _rest(request: Request, count: int, asked: int | None) -> dict[str, Any]:
    """The fields that say how much is still to come after `count` tokens."""
    fields: dict[str, Any] = {}
    if asked is not None:
        fields["max_tokens"] = asked - count
    if request.fields.get("min_tokens"):
        fields["min_tokens"] = max(0, request.fields["min_tokens"] - count)
    if request.fields.get("seed") is not None:
        fields["seed"] = request.fields["seed"] + count  # the same seed would draw the same numbers again
    return fields


def _beginning_of_close(text: str) -> int:
    """Length of the end of `text` that may be the beginning of the closing tag."""
    lengths = range(min(len(text), len(THINK_CLOSE) - 1), 0, -1)
    return next((length for length in lengths if THINK_CLOSE.startswith(text[-length:])), 0)
