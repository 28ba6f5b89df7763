"""What a reward compares with: the columns of a prompt's row."""

from __future__ import annotations

import difflib
from typing import Any

import orjson

from penstock.prompt import Prompt


class NoReference(Exception):
    """The row does not have what the reward needs. The message says which row and which column."""


def value(prompt: Prompt, column: str) -> Any:
    """What stands in a column of the prompt's row. Raises NoReference when it is missing or null."""
    row = orjson.loads(prompt.fields)
    found = row.get(column)
    if found is None:
        near = difflib.get_close_matches(column, row, n=1)
        hint = f"; did you mean {near[0]!r}?" if near and near[0] != column else ""
        raise NoReference(f"row {prompt.position} has nothing in the column {column!r}{hint}")
    return found


def text(prompt: Prompt, column: str) -> str:
    """As `value`; what is no text as JSON."""
    found = value(prompt, column)
    return found if isinstance(found, str) else orjson.dumps(found).decode()
