"""Prompts are those that transformers renders from the same template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from penstock.engine.chat_template import ChatTemplate
from penstock.errors import ConfigError
from tests.engine_server.checkpoint import CHAT_TEMPLATE

USER: dict[str, Any] = {"role": "user", "content": "What is <2> & 'two'? ü"}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "  Four, because  "},
]

TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "loop control": """
        {%- for message in messages %}
            {%- if message.role == 'system' %}{% continue %}{% endif %}
            {{- loop.index0 }}:{{ message['content'] | trim }}
            {%- if loop.index > 5 %}{% break %}{% endif %}
        {%- endfor %}""",
    "generation": """
        {%- for message in messages %}
            {%- if message.role == 'assistant' %}
                {%- generation %}{{ message.content }}{{ eos_token }}{%- endgeneration %}
            {%- else %}{{ bos_token + message.content }}{% endif %}
        {%- endfor %}""",
    "json": "{{ messages | tojson }}{{ {'b': 1, 'a': [1, 2]} | tojson(indent=2, sort_keys=True) }}",
    "namespace": """
        {%- set found = namespace(count=0) %}
        {%- for message in messages %}{% set found.count = found.count + 1 %}{{ message.content }}{% endfor %}
        {{- found.count }}{{ documents is none }}{{ tools is none }}{{ flavour | default('none') }}""",
    "tools": "{% for tool in tools %}{{ tool.function.name | upper }}{% endfor %}{{ messages[-1].content }}",
}


TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("continued", [False, True])
def test_prompt_is_that_of_transformers(name: str, continued: bool) -> None:
    source = TEMPLATES[name]
    settings: dict[str, Any] = {
        "tools": TOOLS if "tools" in source else None,
        "add_generation_prompt": not continued,
        "continue_final_message": continued,
    }
    render: Any = render_jinja_template
    try:
        prompts, _ = render([TURNS], chat_template=source, flavour="salt", **settings, **TOKENS)
    except ValueError:
        pytest.skip("transformers refuses to continue what the template does not name")
    rendered = ChatTemplate(source, TOKENS).render(TURNS, arguments={"flavour": "salt"}, **settings)
    assert [rendered] == prompts


def test_template_refuses_messages_with_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ConfigError, match=r"^roles must alternate$"):
        template.render([USER])


@pytest.mark.parametrize(
    "source",
    ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ messages[9].content.x }}", "{{ 1 / 0 }}"],
)
def test_what_a_template_may_not_or_cannot_do_is_the_requests_fault(source: str) -> None:
    with pytest.raises(ConfigError):
        ChatTemplate(source, {}).render([USER])


def test_continuation_needs_text_that_shows() -> None:
    with pytest.raises(ConfigError, match="no text to continue"):
        ChatTemplate(CHAT_TEMPLATE, {}).render([{"role": "assistant"}], continue_final_message=True)
    with pytest.raises(ConfigError, match="does not appear"):
        ChatTemplate("hello", {}).render(TURNS, continue_final_message=True)


def test_template_is_found_where_checkpoints_keep_it(tmp_path: Path) -> None:
    def write(name: str, value: Any) -> None:
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))

    assert ChatTemplate.load(tmp_path) is None
    write("special_tokens_map.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    named = [{"name": "other", "template": "no"}, {"name": "default", "template": "{{ bos_token }}1"}]
    for settings, prompt in (
        ({"chat_template": named}, "<s>1"),
        ({"chat_template": "{{ eos_token }}2"}, "</s>2"),
    ):
        write("tokenizer_config.json", settings)
        template = ChatTemplate.load(tmp_path)
        assert template is not None and template.render([USER]) == prompt
    write("chat_template.jinja", "3")
    template = ChatTemplate.load(tmp_path)
    assert template is not None and template.render([USER]) == "3"
    write("chat_template.jinja", "{% for %}")
    with pytest.raises(ConfigError, match="cannot be compiled"):
        ChatTemplate.load(tmp_path)
