"""Rows of a dataset → prompts.

Guarantees: a prompt keeps its row's own bytes, so what is written out later is what was read. The key of a
row is the value of its id column, else a hash of its content that does not depend on white space or on the
order of columns.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import msgspec
import orjson

from penstock.errors import ConfigError

Message = dict[str, Any]

KEY_BYTES = 16
"""Length of a content hash: at 2^64 rows a collision is still unlikely."""

RESERVED_COLUMNS = frozenset({"generations", "finish_reasons", "api_metadata", "reasonings"})
"""Columns of a result, which an input must not have of its own."""

JINJA_SUFFIXES = (".jinja", ".jinja2", ".j2")

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Who speaks in a ShareGPT conversation, and the role that is."""

_UNDEFINED = re.compile(r"'(\w+)' is undefined")
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")


class Prompt(msgspec.Struct, frozen=True):
    """One row, ready to be sent."""

    position: int
    """Place of the row in the input, from 0."""
    id: str | None
    """Value of the id column, where there is one."""
    messages: list[Message]
    fields: bytes
    """The row itself: one JSON object, without a line end."""
    hash: int = 0
    """See `row_hash`; 0 where the prompt was not made of a row."""
    occurrence: int = 0
    """How many rows of the same hash stand before it in the input."""

    @property
    def key(self) -> str:
        """The row's name: its id, else the hash of its content."""
        return content_hash(orjson.loads(self.fields)).hex() if self.id is None else self.id


class Template(msgspec.Struct, frozen=True):
    """A user message with places for columns.

    `columns`: `{column}` is a place; `{{` and `}}` stand for braces, any other brace for itself. `jinja`: the
    columns are Jinja's variables, and `row` is the whole row (a column of that name hides it).
    """

    text: str
    syntax: Literal["columns", "jinja"] = "columns"

    def columns(self) -> frozenset[str]:
        """The names the text uses. Raises ConfigError for what is not Jinja, or where jinja2 is missing."""
        return _jinja(self.text).names if self.syntax == "jinja" else _places(self.text)

    def fill(self, values: Mapping[str, Any]) -> str:
        """The text with each place filled.

        Raises KeyError(column) where `values` lacks one, ValueError where Jinja cannot make a text of them.
        """
        if self.syntax == "jinja":
            return _jinja(self.text).render(values)

        def replace(match: re.Match[str]) -> str:
            if (name := match[1]) is None:
                return match[0][0]
            value = values[name]
            return value if isinstance(value, str) else orjson.dumps(value).decode()

        return _PLACEHOLDER.sub(replace, self.text)


def read_template(path: Path) -> Template:
    """The template in `path`: Jinja where the name ends in .jinja, .jinja2 or .j2, else `{column}` places.

    Raises ConfigError where it cannot be read, is not Jinja, or names no column.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"The prompt template {path} cannot be read ({reason}).") from None
    template = Template(text, "jinja" if path.suffix in JINJA_SUFFIXES else "columns")
    if not template.columns():
        raise ConfigError(f"The prompt template {path} names no column: every row would be the same prompt.")
    return template


class _Jinja:
    """A compiled template, in the sandbox: a template may come with a dataset."""

    def __init__(self, text: str) -> None:
        try:
            import jinja2
            from jinja2 import meta
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ConfigError(
                "Jinja templates need the package jinja2: pip install 'penstock[datasets]'."
            ) from None
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        try:
            self._template = environment.from_string(text)
            self.names = frozenset(meta.find_undeclared_variables(environment.parse(text)))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"The prompt template is not Jinja, line {error.lineno}: {error.message}"
            ) from None

    def render(self, values: Mapping[str, Any]) -> str:
        try:
            return self._template.render({"row": values, **values})
        except Exception as error:  # whatever a filter or an attribute raises is the template's
            missing = _UNDEFINED.fullmatch(str(error))
            if missing is not None and missing[1] in self.names:
                raise KeyError(missing[1]) from None
            raise ValueError(f"{type(error).__name__}: {error}") from None


@lru_cache(maxsize=16)
def _places(text: str) -> frozenset[str]:
    return frozenset(name for name in _PLACEHOLDER.findall(text) if name)


@lru_cache(maxsize=16)
def _jinja(text: str) -> _Jinja:
    return _Jinja(text)


class PromptFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How a row becomes a prompt."""

    prompt_column: str | None = "prompt"
    """A column of text (one user message) or of chat messages: `role` and `content`, taken as they are, or
    ShareGPT's `from` and `value`. It may be missing where there is a template that does without it. None: a
    prompt has no messages (a rollout function makes its own of the row)."""
    id_column: str | None = None
    template: Template | None = None
    """The user message; `prompt` in it is the prompt column, any other name a column."""
    system_prompt: str | None = None

    def parameters(self) -> dict[str, Any]:
        """What of a job's fingerprint is the prompt's, without what is not set; `of` reads it back."""
        found: dict[str, Any] = {
            "prompt_column": self.prompt_column,
            "id_column": self.id_column,
            "prompt_template": self.template.text if self.template else None,
            "prompt_template_syntax": self.template.syntax if self.template else None,
            "system_prompt": self.system_prompt,
        }
        if found["prompt_template_syntax"] == "columns":
            del found["prompt_template_syntax"]
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> PromptFormat:
        """The format that has these `parameters`; others among them are not looked at."""
        text = parameters.get("prompt_template")
        syntax = parameters.get("prompt_template_syntax", "columns")
        return cls(
            prompt_column=parameters.get("prompt_column"),
            id_column=parameters.get("id_column"),
            template=None if text is None else Template(text, syntax),
            system_prompt=parameters.get("system_prompt"),
        )

    def prompt(self, position: int, where: str, line: bytes, hash: int = 0, occurrence: int = 0) -> Prompt:
        """hash: of the row, where it is known. Raises ConfigError, which names `where`, for a row that is no
        JSON object or lacks a column."""
        row = parse_row(where, line)
        id, messages = self.id(where, row), self.messages(where, row)
        return Prompt(position, id, messages, line, hash or row_hash(content_hash(row)), occurrence)

    def hash(self, where: str, row: dict[str, Any]) -> int:
        """See `row_hash`. Raises ConfigError, which names `where`, for an id that is none."""
        self.id(where, row)
        return row_hash(content_hash(row))

    def id(self, where: str, row: dict[str, Any]) -> str | None:
        if self.id_column is None:
            return None
        value = _column(where, row, self.id_column)
        if isinstance(value, bool | list | dict) or value is None:
            raise ConfigError(f"{where}: the id column {self.id_column!r} must hold text or a number.")
        return str(value)

    def messages(self, where: str, row: dict[str, Any]) -> list[Message]:
        if self.template is not None:
            messages = [{"role": "user", "content": self._user_text(where, row, self.template)}]
        elif self.prompt_column is None:
            return []
        else:
            content = _column(where, row, self.prompt_column)
            if isinstance(content, str):
                messages = [{"role": "user", "content": content}]
            else:
                messages = _chat(where, self.prompt_column, content)
        if self.system_prompt is not None:
            return [{"role": "system", "content": self.system_prompt}, *messages]
        return messages

    def _user_text(self, where: str, row: dict[str, Any], template: Template) -> str:
        if "prompt" in template.columns() and self.prompt_column is not None:
            prompt = _column(where, row, self.prompt_column)
            if not isinstance(prompt, str):
                raise ConfigError(
                    f"{where}: {self.prompt_column!r} must hold text for the template's 'prompt': "
                    "to chat messages no template applies."
                )
            row = row | {"prompt": prompt}
        try:
            return template.fill(row)
        except KeyError as missing:
            raise ConfigError(
                _missing_column(where, missing.args[0], row, "the prompt template wants")
            ) from None
        except ValueError as error:
            raise ConfigError(f"{where}: the prompt template cannot be filled ({error}).") from None


def _chat(where: str, column: str, content: Any) -> list[Message]:
    """Chat messages as a request has them. Columns of tables fill in null what a message does not have."""
    if isinstance(content, list) and content and all(isinstance(message, dict) for message in content):
        if all("role" in message for message in content):
            return [_without_nulls(message) if None in message.values() else message for message in content]
        if all("from" in message and "value" in message for message in content):
            return [_of_sharegpt(where, column, message) for message in content]
    raise ConfigError(f"{where}: {column!r} must hold text or a list of chat messages.")


def _without_nulls(message: Message) -> Message:
    return {name: value for name, value in message.items() if value is not None or name == "content"}


def _of_sharegpt(where: str, column: str, message: Message) -> Message:
    role = SHAREGPT_ROLES.get(message["from"])
    if role is None:
        raise ConfigError(
            f"{where}: {column!r} has a message from {message['from']!r}: "
            f"known are {', '.join(SHAREGPT_ROLES)}."
        )
    return {"role": role, "content": message["value"]}


def parse_row(where: str, line: bytes) -> dict[str, Any]:
    """The JSON object in `line`; raises ConfigError, which names `where`."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON ({error}).") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is JSON but not an object: each line must be one row, {{…}}.")
    return row


def content_hash(row: dict[str, Any]) -> bytes:
    return blake2b(orjson.dumps(row, option=orjson.OPT_SORT_KEYS), digest_size=KEY_BYTES).digest()


def row_hash(content: bytes) -> int:
    """64 bits that name a row, of its `content_hash`; never 0.

    Of the whole row, whether or not there is an id column: rows of one id may differ, and what is written for
    a row has all of its columns.
    """
    return int.from_bytes(content[:8], "little") or 1


def _column(where: str, row: dict[str, Any], name: str) -> Any:
    try:
        return row[name]
    except KeyError:
        raise ConfigError(_missing_column(where, name, row, "there must be")) from None


def _missing_column(where: str, name: str, row: dict[str, Any], wanted: str) -> str:
    near = difflib.get_close_matches(name, row, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}? It has {', '.join(map(repr, row))}" if near else "; it is empty"
    return f"{where}: {wanted} a column {name!r}{hint}."
