from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.inputs.jsonl import JsonlInput
from penstock.prompt import PromptFormat, Template, content_hash, read_template

ROWS = [{"question": f"What is {i} + {i}?", "answer": i + i} for i in range(20)]
FORM = PromptFormat(prompt_column="question")


def write(path: Path, rows: list[dict[str, Any]]) -> JsonlInput:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlInput(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_input_reads_like_plain(tmp_path: Path, suffix: str) -> None:
    plain = write(tmp_path / "in.jsonl", ROWS)
    packed = tmp_path / f"in.jsonl{suffix}"
    data = plain.path.read_bytes()
    if suffix == ".gz":
        packed.write_bytes(gzip.compress(data[:300]) + gzip.compress(data[300:]))
    elif suffix == ".zst":
        frames = [zstandard.ZstdCompressor().compress(part) for part in (data[:300], data[300:])]
        packed.write_bytes(b"".join(frames))
    source = JsonlInput(packed)
    assert [line for _, line in source.lines()] == [line for _, line in plain.lines()]
    assert source.survey(FORM) == plain.survey(FORM)


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))[:-12])
    with pytest.raises(ConfigError, match="damaged after line"):
        JsonlInput(path).survey(FORM)


def test_a_zstd_file_cut_off_at_the_end_of_a_line_is_damaged_not_short(tmp_path: Path) -> None:
    """Nothing but the frame, which does not end, says that rows are missing."""
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    packer = zstandard.ZstdCompressor().compressobj()
    data = b"".join(lines[:5])
    packed = packer.compress(data) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    path = tmp_path / "in.jsonl.zst"
    path.write_bytes(packed + packer.compress(b"".join(lines[5:])))
    with pytest.raises(ConfigError, match="damaged after line 5"):
        JsonlInput(path).survey(FORM)
    path.write_bytes(zstandard.ZstdCompressor().compress(data))
    assert JsonlInput(path).survey(FORM).rows == 5


def test_survey_does_not_see_white_space_or_column_order_but_sees_content(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", [{"question": "x", "n": 1}])
    two = tmp_path / "b.jsonl"
    two.write_text('\n  { "n": 1, "question": "x" }  \n\n')
    other = write(tmp_path / "c.jsonl", [{"question": "x", "n": 2}])
    assert one.survey(FORM) == JsonlInput(two).survey(FORM)
    assert one.survey(FORM) != other.survey(FORM)


@pytest.mark.parametrize(
    ("line", "form", "says"),
    [
        ("nonsense", FORM, r"line 2 is not JSON"),
        ("[1]", FORM, r"line 2 is JSON but not an object"),
        ('{"qestion": "x"}', FORM, r"line 2: there must be a column 'question'; did you mean 'qestion'"),
        ('{"question": 3}', FORM, r"line 2: 'question' must hold text"),
        ('{"question": "x", "generations": []}', FORM, r"line 2: the column 'generations'"),
        (
            '{"question": "x", "answer": 1}',
            PromptFormat(prompt_column="question", template=Template("{prompt} {anser}")),
            r"line 1: the prompt template wants a column 'anser'; did you mean 'answer'",
        ),
        (
            '{"question": "x", "id": null}',
            PromptFormat(prompt_column="question", id_column="id"),
            r"line 1: there must be a column 'id'",
        ),
    ],
)
def test_a_bad_row_is_named_before_anything_is_generated(
    tmp_path: Path, line: str, form: PromptFormat, says: str
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=says):
        JsonlInput(path).survey(form)


def test_missing_empty_and_unreadable_inputs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no input file"):
        JsonlInput(tmp_path / "none.jsonl").survey(FORM)
    with pytest.raises(ConfigError, match="is a folder"):
        JsonlInput(tmp_path).survey(FORM)
    with pytest.raises(ConfigError, match="holds no rows"):
        write(tmp_path / "empty.jsonl", []).survey(FORM)


def test_an_id_may_stand_on_several_rows(tmp_path: Path) -> None:
    """open-r1 names rows by the problem, which datasets hold more than once."""
    form = PromptFormat(prompt_column="question", id_column="question")
    rows = [{"question": "q", "source": i // 2} for i in range(4)]
    hashes = write(tmp_path / "a.jsonl", rows).survey(form).hashes
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]


def test_template_keeps_braces_that_are_no_columns() -> None:
    template = Template(r"Put it in \boxed{} or \boxed{{}}: {prompt} ({n})")
    assert template.columns() == {"prompt", "n"}
    assert template.fill({"prompt": "a {b}", "n": [1]}) == r"Put it in \boxed{} or \boxed{}: a {b} ([1])"


def test_messages_columns_and_system_prompt(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    form = PromptFormat(prompt_column="messages", system_prompt="Be brief.")
    prompt = form.prompt(0, "here", json.dumps({"messages": chat}).encode())
    assert prompt.messages == [{"role": "system", "content": "Be brief."}, *chat]
    with pytest.raises(ConfigError, match="chat messages"):
        PromptFormat(prompt_column="messages", template=Template("{prompt}")).messages(
            "here", {"messages": chat}
        )


json_rows = st.dictionaries(
    st.text(max_size=5), st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5)
)


@given(json_rows, st.randoms(use_true_random=False))
def test_content_hash_ignores_the_order_of_columns(row: dict[str, Any], random: Any) -> None:
    items = list(row.items())
    random.shuffle(items)
    assert content_hash(dict(items)) == content_hash(row)
    assert content_hash({**row, "another": 1}) != content_hash(row)


def test_a_jinja_template_has_the_columns_as_variables(tmp_path: Path) -> None:
    path = tmp_path / "x.jinja"
    path.write_text(
        "{% for c in choices %}{{ loop.index }}. {{ c }}\n{% endfor %}{{ prompt }} {{ row['a b'] }}\n"
    )
    form = PromptFormat(prompt_column="question", template=read_template(path))
    row = {"question": "Which?", "choices": ["x", "{y}"], "a b": 7}
    assert form.messages("here", row) == [{"role": "user", "content": "1. x\n2. {y}\nWhich? 7"}]
    assert PromptFormat.of(form.parameters()) == form
    with pytest.raises(ConfigError, match="here: the prompt template wants a column 'choices'; did you mean"):
        form.messages("here", {"question": "Which?", "choises": []})
    with pytest.raises(ConfigError, match="here: the prompt template cannot be filled .*'a b'"):
        form.messages("here", {"question": "Which?", "choices": []})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% for %}", "is not Jinja, line 1"),
        ("Solve it.", "names no column"),
        ("{{ q.__class__.__mro__ }}", "SecurityError"),
        ("{{ q / 0 }}", "cannot be filled"),
    ],
)
def test_a_jinja_template_that_does_not_work_is_told(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.j2"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        PromptFormat(template=read_template(path)).messages("here", {"q": 1})


def test_a_template_file_is_jinja_only_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("{{{% raw %}}} {q}")
    assert read_template(path).fill({"q": "a"}) == "{{% raw %}} a"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_template(tmp_path / "none.txt")


def test_a_template_without_prompt_needs_no_prompt_column() -> None:
    form = PromptFormat(template=Template("{a} and {b}"))
    assert form.messages("here", {"a": "x", "b": 1}) == [{"role": "user", "content": "x and 1"}]
    with pytest.raises(ConfigError, match="there must be a column 'prompt'"):
        PromptFormat(template=Template("{prompt}: {a}")).messages("here", {"a": "x"})


def test_sharegpt_conversations_become_messages_and_nulls_of_tables_go() -> None:
    form = PromptFormat(prompt_column="conversations")
    row = {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}]}
    assert form.messages("here", row) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "h"},
    ]
    with pytest.raises(ConfigError, match="a message from 'me'"):
        form.messages("here", {"conversations": [{"from": "me", "value": "h"}]})
    chat = [{"role": "assistant", "content": None, "tool_calls": [1], "name": None}]
    assert PromptFormat(prompt_column="m").messages("here", {"m": chat}) == [
        {"role": "assistant", "content": None, "tool_calls": [1]}
    ]


def test_the_hash_of_a_row_is_of_all_its_columns() -> None:
    row = {"q": "x", "id": 1, "extra": 1}
    for form in (PromptFormat(prompt_column="q", id_column="id"), PromptFormat(prompt_column=None)):
        assert form.hash("here", row) == form.hash("here", dict(reversed(row.items()))) != 0
        assert form.hash("here", row) != form.hash("here", {**row, "extra": 2})
        assert form.prompt(0, "here", json.dumps(row).encode()).hash == form.hash("here", row)
    assert PromptFormat(prompt_column=None).messages("here", row) == []
    with pytest.raises(ConfigError, match="the id column 'id' must hold text or a number"):
        PromptFormat(prompt_column="q", id_column="id").hash("here", {"q": "x", "id": [1]})
