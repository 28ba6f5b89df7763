"""Prompts from files: conversations in ShareGPT's form, JSONL, and recorded traces.

At most `limit` prompts are read, from the beginning of the file. What is wrong with a file is a ConfigError
that names the place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Final

import orjson

from penstock.errors import ConfigError
from penstock.inputs.jsonl import JsonlInput
from penstock.loadtest.lengths import LONGEST
from penstock.loadtest.workload import Item, words
from penstock.prompt import PromptFormat, parse_row

LIMIT: Final = 10_000
"""Prompts read from a file."""
BLOCK: Final = 512
"""Tokens of a block that a trace's `hash_ids` name; equal ids are equal text. Source: the traces of
https://github.com/kvcache-ai/Mooncake"""
ROLES: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def read_dataset(path: Path, *, prompt_column: str = "prompt", limit: int = LIMIT) -> list[Item]:
    """Prompts of a file: a JSON array of conversations as ShareGPT has them, or JSONL.

    A row has `conversations`, of which everything up to the first reply is asked and the reply's words are
    the tokens asked for; or the prompt column (text or chat messages), and `max_tokens` if it likes. A
    conversation without a question or a reply is skipped. Raises ConfigError.
    """
    form, items = PromptFormat(prompt_column=prompt_column), []
    for where, row in _rows(path):
        if "conversations" in row:
            item = _conversation(where, row["conversations"])
        elif "messages" in row and prompt_column not in row:
            item = Item(
                tuple(PromptFormat(prompt_column="messages").messages(where, row)), _asked(where, row)
            )
        else:
            item = Item(tuple(form.messages(where, row)), _asked(where, row))
        if item is not None:
            items.append(item)
        if len(items) == limit:
            break
    if not items:
        raise ConfigError(f"{path} holds no prompt.")
    return items


def read_trace(path: Path, *, seed: int, limit: int = LIMIT) -> tuple[list[Item], tuple[float, ...]]:
    """Prompts and their send times, in seconds after the first, of a recorded trace.

    JSONL, a row per request: `timestamp` in milliseconds; then `messages` or `prompt`, or `input_length` in
    tokens, which becomes so many words, those of a block the same wherever its id stands in `hash_ids`; and
    `output_length` or `max_tokens`. Raises ConfigError.
    """
    found: list[tuple[float, Item]] = []
    for where, row in _rows(path):
        found.append((_number(where, row, "timestamp", 0.0) / 1000, _recorded(where, row, seed)))
        if len(found) == limit:
            break
    if not found:
        raise ConfigError(f"{path} holds no request.")
    found.sort(key=lambda pair: pair[0])
    return [item for _, item in found], tuple([time - found[0][0] for time, _ in found])


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a JSON array or of JSONL."""
    lines = JsonlInput(path).lines()
    first = next(lines, None)
    if first is None:
        return
    if not first[1].startswith(b"["):
        yield first[0], parse_row(*first)
        for where, line in lines:
            yield where, parse_row(where, line)
        return
    try:
        rows = orjson.loads(b"\n".join([first[1], *(line for _, line in lines)]))
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON ({error}).") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: entry {number} is not an object.")
        yield f"{path} entry {number}", row


def _conversation(where: str, turns: Any) -> Item | None:
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns
    ):
        raise ConfigError(f"{where}: conversations must be a list of turns with `from` and `value`.")
    messages: list[dict[str, Any]] = []
    for turn in turns:
        role = ROLES.get(turn.get("from"), "user")
        if role == "assistant":
            reply = len(turn["value"].split())
            asked = any(message["role"] == "user" for message in messages)
            return Item(tuple(messages), reply) if asked and reply else None
        messages.append({"role": role, "content": turn["value"]})
    return None


def _recorded(where: str, row: dict[str, Any], seed: int) -> Item:
    name = "max_tokens" if "max_tokens" in row else "output_length"
    asked = int(_number(where, row, name, 1.0))
    for column in ("messages", "prompt"):
        if column in row:
            return Item(tuple(PromptFormat(prompt_column=column).messages(where, row)), asked)
    length, ids = int(_number(where, row, "input_length", 1.0)), row.get("hash_ids", [])
    if not isinstance(ids, list):
        raise ConfigError(f"{where}: hash_ids must be a list.")
    blocks = [words(Random(f"{seed} {block}"), BLOCK) for block in ids[: -(-length // BLOCK)]]
    if length > len(blocks) * BLOCK:
        blocks.append(words(Random(f"{seed} {where}"), length - len(blocks) * BLOCK))
    text = " ".join(" ".join(blocks).split(" ")[:length])
    return Item(({"role": "user", "content": text},), asked)


def _asked(where: str, row: dict[str, Any]) -> int | None:
    return int(_number(where, row, "max_tokens", 1.0)) if "max_tokens" in row else None


def _number(where: str, row: dict[str, Any], name: str, least: float) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: {name} must be a number.")
    if not least <= value or (least and value > LONGEST):
        raise ConfigError(f"{where}: {name} is {value:g}.")
    return float(value)
