"""Chat messages into the prompt text of a checkpoint, as `transformers` renders it.

The template is untrusted code that came with the weights: it runs in jinja's immutable sandbox, sees plain
JSON values only, and whatever it raises becomes a `ConfigError`, a fault of the request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from penstock.engine.config import read_json
from penstock.engine.tokenizer import special_tokens
from penstock.errors import ConfigError

_CONTINUED_HERE: Final = "\ue000CONTINUED-HERE\ue001 "
"""Marks the end of the final message while it is rendered; private-use characters no prompt contains. The
space at its end tells whether the template strips what it is given."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which training marks assistant text with, renders its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """`tojson` without jinja's HTML escapes, with the options `transformers` lets templates use."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template cannot be compiled: {error}") from error
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a checkpoint folder, None when it has none.

        `chat_template.jinja` goes before the `chat_template` of tokenizer_config.json, where a list of named
        templates stands for its `default`.
        """
        settings = read_json(folder / "tokenizer_config.json") or {}
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return None if source is None else cls(source, special_tokens(folder))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text; with `continue_final_message` it ends where the last message's content ends.

        `arguments` are further variables of the template; they do not go before those named here.
        Raises ConfigError when the template refuses the messages.
        """
        if continue_final_message:
            messages = _marked(messages)
        try:
            text = self._template.render(
                {
                    "documents": None,
                    **self._special_tokens,
                    **(arguments or {}),
                    "messages": messages,
                    "tools": tools,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.TemplateError as error:
            raise ConfigError(str(error)) from error
        except Exception as error:  # the template's own code: a type error in it is the request's fault
            raise ConfigError(f"the chat template cannot render these messages: {error}") from error
        return _cut_at_mark(text) if continue_final_message else text


def _marked(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    content = messages[-1].get("content")
    if not isinstance(content, str):
        raise ConfigError("continue_final_message is set but the final message has no text to continue.")
    return [*messages[:-1], {**messages[-1], "content": content + _CONTINUED_HERE}]


def _cut_at_mark(text: str) -> str:
    end = text.rfind(_CONTINUED_HERE.strip())
    if end < 0:
        raise ConfigError(
            "continue_final_message is set but the final message does not appear in the rendered chat."
        )
    kept = text.startswith(_CONTINUED_HERE, end)
    return text[:end] if kept else text[:end].rstrip()
