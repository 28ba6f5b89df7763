"""A row as the page is given it. All of it is text and numbers; the page shows text as text."""

from __future__ import annotations

from typing import Any, Final

import orjson

from penstock.prompt import PromptFormat
from penstock.viewer.index import Table
from penstock.viewer.trace_row import SHOWN, Trace, columns_of, decode_row, messages, row_id, show, traces

PREVIEW: Final = 180
"""Characters of a prompt in the list."""
COLUMN: Final = 4000
"""Characters of a further column in the detail; all of it is in the raw row."""


def item(table: Table, number: int, line: bytes, form: PromptFormat | None) -> dict[str, Any]:
    """A row in the list."""
    row = decode_row(line)
    prompt = [] if row is None else messages(_own(row), form)
    text = prompt[-1][1] if prompt else ""
    latency, reward = table.latency[number], table.reward[number]
    return {
        "n": number,
        "id": None if row is None else row_id(row, form),
        "text": " ".join(text[: 4 * PREVIEW].split())[:PREVIEW],
        "samples": 0 if row is None else len(traces(columns_of(row))),
        "finish": table.finishes_of(number),
        "tokens": max(table.tokens[number], 0) or None,
        "length": table.length[number],
        "time": latency if latency == latency else None,
        "reward": reward if reward == reward else None,
        "readable": row is not None,
    }


def detail(number: int, line: bytes, form: PromptFormat | None) -> dict[str, Any]:
    """All that is known of a row."""
    row = decode_row(line)
    if row is None:
        return {"n": number, "id": None, "bytes": len(line), "readable": False, "messages": [], "samples": [],
                "columns": [], "failure": None}  # fmt: skip
    own = _own(row)
    failure = None
    if own is not row:
        failure = {name: row.get(name) for name in ("error", "message", "status", "index", "row")}
    return {
        "n": number,
        "id": row_id(row, form),
        "bytes": len(line),
        "readable": True,
        "messages": [{"role": role, "text": text} for role, text in messages(own, form)],
        "samples": [_sample(trace) for trace in traces(columns_of(row))],
        "columns": [[name, show(value)[:COLUMN]] for name, value in own.items() if name not in SHOWN],
        "failure": failure,
    }


def raw(line: bytes) -> bytes:
    """The row indented; the line itself where it is no JSON."""
    row = decode_row(line)
    return line if row is None else orjson.dumps(row, option=orjson.OPT_INDENT_2)


def _own(row: dict[str, Any]) -> dict[str, Any]:
    """The row of the dataset: of a failure the one it carries."""
    fields = row.get("fields")
    return fields if "error" in row and isinstance(fields, dict) else row


def _sample(trace: Trace) -> dict[str, Any]:
    reasoning, answer = trace.split()
    tokens, seconds = trace.completion_tokens, trace.latency
    return {
        "reasoning": reasoning,
        "answer": answer,
        "finish": trace.finish,
        "prompt_tokens": trace.prompt_tokens,
        "tokens": tokens,
        "time": seconds,
        "speed": tokens / seconds if tokens and seconds else None,
        "reward": trace.reward,
        "length": trace.length,
        "metadata": [[name, show(value)] for name, value in trace.metadata.items()],
    }
