"""One line of a file of traces, whoever wrote it.

`penstock generate` and open-r1 write lists with an element a sample; rollouts of reinforcement learning come
with one completion a line as often as with a group. Whatever a column holds, reading it raises nothing: what
is not of a known form is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec
import orjson

from penstock.errors import ConfigError
from penstock.prompt import PromptFormat
from penstock.sample import split_reasoning

LISTS: Final = ("generations", "completions", "responses", "outputs")
"""Columns of completions, a list of them each."""
SINGLE: Final = ("completion", "response", "output", "generation")
"""Columns of one completion."""
PROMPTS: Final = ("prompt", "problem", "question", "instruction", "messages", "query", "input")
"""Columns that hold the prompt, where no journal says which."""
IDS: Final = ("uuid", "id", "key", "prompt_id")
REWARDS: Final = ("rewards", "reward", "scores", "score")
_BESIDE: Final = ("reasonings", "reasoning", "finish_reasons", "finish_reason", "api_metadata")
SHOWN: Final = frozenset((*LISTS, *SINGLE, *_BESIDE))
"""Columns the page shows as samples."""


class Columns(msgspec.Struct, gc=False):
    """The columns an index is made of; all else in a line is skipped without being decoded."""

    generations: Any = None
    completions: Any = None
    responses: Any = None
    outputs: Any = None
    completion: Any = None
    response: Any = None
    output: Any = None
    generation: Any = None
    reasonings: Any = None
    reasoning: Any = None
    finish_reasons: Any = None
    finish_reason: Any = None
    api_metadata: Any = None
    completion_tokens: Any = None
    prompt_tokens: Any = None
    latency: Any = None
    rewards: Any = None
    reward: Any = None
    scores: Any = None
    score: Any = None
    error: Any = None


class Trace(NamedTuple):
    """One sample of a row; None: the file does not say."""

    text: str
    reasoning: str | None
    """From a column of its own."""
    finish: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    latency: float | None
    """Seconds."""
    reward: float | None
    metadata: Mapping[str, Any]

    def split(self) -> tuple[str | None, str]:
        """(reasoning, answer)."""
        inside, answer = split_reasoning(self.text)
        return (self.reasoning if inside is None else inside), answer

    @property
    def length(self) -> int:
        """Characters of text, the reasoning that stands elsewhere included."""
        if self.reasoning is None or self.reasoning in self.text:
            return len(self.text)
        return len(self.text) + len(self.reasoning)


_decode = msgspec.json.Decoder(Columns).decode


def decode_columns(line: bytes) -> Columns | None:
    """None for a line that is no JSON object."""
    try:
        return _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def decode_row(line: bytes) -> dict[str, Any] | None:
    """The whole row; None for a line that is no JSON object."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def columns_of(row: Mapping[str, Any]) -> Columns:
    return Columns(**{name: row[name] for name in Columns.__struct_fields__ if name in row})


def traces(columns: Columns) -> list[Trace]:
    """The samples of a row, in order."""
    texts = _completions(columns)
    reasonings = columns.reasoning if columns.reasonings is None else columns.reasonings
    finishes = columns.finish_reason if columns.finish_reasons is None else columns.finish_reasons
    reward = next((value for name in REWARDS if (value := getattr(columns, name)) is not None), None)
    found = []
    for i, text in enumerate(texts):
        metadata = _element(columns.api_metadata, i)
        if not isinstance(metadata, dict):
            metadata = {}
        reasoning, finish = _element(reasonings, i), _element(finishes, i)
        found.append(
            Trace(
                text if isinstance(text, str) else text_of(text),
                reasoning if isinstance(reasoning, str) else None,
                finish if isinstance(finish, str) else None,
                _whole(metadata.get("prompt_tokens", _element(columns.prompt_tokens, i))),
                _whole(metadata.get("completion_tokens", _element(columns.completion_tokens, i))),
                _number(metadata.get("latency", _element(columns.latency, i))),
                _reward(_element(reward, i)),
                metadata,
            )
        )
    return found


def text_of(content: Any) -> str:
    """The text of a message, of its content, of content in parts, or of a list of messages."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(text for part in content if (text := text_of(part)))
    if isinstance(content, dict):
        for name in ("content", "text"):
            if isinstance(content.get(name), str | list):
                return text_of(content[name])
        return f"[{content['type']}]" if isinstance(content.get("type"), str) else ""
    return ""


def messages(row: Mapping[str, Any], form: PromptFormat | None) -> list[tuple[str, str]]:
    """(role, text) of the prompt: as `form` says, else from the first known column there is."""
    if form is not None:
        try:
            return [_message(each) for each in form.messages("row", dict(row))]
        except ConfigError:
            pass
    value = next((row[name] for name in PROMPTS if row.get(name)), None)
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        return [_message(each) for each in value]
    return [] if value is None else [("user", value if isinstance(value, str) else show(value))]


def row_id(row: Mapping[str, Any], form: PromptFormat | None) -> str | None:
    """What names the row."""
    names = IDS if form is None or form.id_column is None else (form.id_column, *IDS)
    value = next((row[name] for name in names if isinstance(row.get(name), str | int)), None)
    return None if value is None else str(value)


def searched(row: Mapping[str, Any], where: str, form: PromptFormat | None) -> Iterator[str]:
    """The texts of a row that are looked through; `where`: prompt, answer, reasoning, id or all."""
    own = row.get("fields")
    failed = isinstance(own, dict) and "error" in row
    if where in ("all", "id"):
        yield row_id(row, form) or ""
    if where in ("all", "prompt"):
        for _, text in messages(own if failed and isinstance(own, dict) else row, form):
            yield text
    if where in ("all", "answer", "reasoning"):
        if failed:
            yield str(row.get("message", ""))
        for trace in traces(columns_of(row)):
            reasoning, answer = trace.split()
            if where != "answer" and reasoning is not None:
                yield reasoning
            if where != "reasoning":
                yield answer


def show(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _message(message: Mapping[str, Any]) -> tuple[str, str]:
    text = text_of(message.get("content"))
    calls = message.get("tool_calls")
    return str(message.get("role", "user")), f"{text}\n{show(calls)}".strip() if calls else text


def _completions(columns: Columns) -> list[Any]:
    for name in LISTS:
        value = getattr(columns, name)
        if isinstance(value, list):
            return value
        if isinstance(value, str):
            return [value]
    return [value for name in SINGLE if (value := getattr(columns, name)) is not None][:1]


def _element(value: Any, i: int) -> Any:
    """Of a list the element of sample `i`; anything else holds for every sample."""
    if isinstance(value, list):
        return value[i] if i < len(value) else None
    return value


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 1 << 31 else None


def _reward(value: Any) -> float | None:
    if isinstance(value, dict):
        value = next((value[name] for name in ("reward", "total", "value", "score") if name in value), None)
    return _number(value)
