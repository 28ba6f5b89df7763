"""The demo's task and its model: true traces, disjoint splits, exact checks, a whole folder."""

from __future__ import annotations

import itertools
import json
import re
import runpy
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from penstock.demo.arithmetic import (
    KINDS,
    LEVELS,
    Level,
    Problem,
    Split,
    Step,
    columns,
    problems,
    rows,
    verify,
)
from penstock.models import ARITHMETIC

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 2?"}]


def some(count: int, split: Split = "train", level: Level | None = None, seed: int = 5) -> list[Problem]:
    return list(itertools.islice(problems(seed, split=split, level=level), count))


def value(expression: str) -> int:
    """The value of an expression of digits, operators and brackets, by Python's own arithmetic."""
    assert re.fullmatch(r"[0-9+*() -]+", expression)
    return int(eval(re.sub(r"\b0+(?=\d)", "", expression)))


def setting(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ARITHMETIC / name).read_text())
    return content


def test_every_line_of_a_trace_is_true() -> None:
    for problem in some(2000):
        expected = None
        for line in problem.trace.split("\n"):
            left, equals, right = line.partition("=")
            if not equals:
                expected = value(line)
            elif left:
                assert value(left) == int(right), line
            else:
                assert int(right) == expected, problem.trace


def test_answers_are_those_of_the_expression() -> None:
    drawn = some(2000)
    assert all(problem.answer == str(value(problem.expression)) for problem in drawn)
    assert all(int(problem.answer) >= 0 for problem in drawn)
    assert {(problem.kind, problem.level) for problem in drawn} == set(itertools.product(KINDS, LEVELS))


SENTENCES = {
    r"Add (\d+) and (\d+)": r"\1 + \2",
    r"Subtract (\d+) from (\d+)": r"\2 - \1",
    r"Multiply (\d+) by (\d+)": r"\1 * \2",
    r"(.+), then add (\d+)": r"(\1) + \2",
    r"(.+), then subtract (\d+)": r"(\1) - \2",
    r"(.+), then multiply by (\d+)": r"(\1) * \2",
}


def test_the_question_says_what_the_expression_says() -> None:
    for problem in some(500):
        if problem.question.startswith("What"):
            assert problem.question == f"What is {problem.expression}?"
            continue
        read = problem.question.removesuffix(".")
        for sentence, symbols in reversed(SENTENCES.items()):
            read = re.sub(sentence, symbols, read)
        assert str(value(read)) == problem.answer


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_the_last_digits_of_the_columns_spell_the_result(x: int, y: int) -> None:
    upper, lower = max(x, y), min(x, y)
    for step in (Step("+", x, y), Step("-", upper, lower), Step("*", x, y % 10)):
        *inner, top = [column.partition("=")[2] for column in columns(step)]
        assert int(top + "".join(total[-1] for total in reversed(inner))) == step.result


def test_a_trace_is_the_column_method() -> None:
    assert list(columns(Step("+", 4827, 377))) == ["7+7=14", "2+7+1=10", "8+3+1=12", "4+0+1=5"]
    assert list(columns(Step("-", 5042, 97))) == ["2-7+10=5", "4-9-1+10=4", "0-0-1+10=9", "5-0-1=4"]
    assert list(columns(Step("*", 208, 7))) == ["8*7=56", "0*7+5=5", "2*7=14"]


def test_a_seed_gives_the_same_problems_again() -> None:
    assert some(100) == some(100)
    assert some(100) != some(100, seed=6)
    assert rows(3, 40) == rows(3, 80)[:40]
    first = some(1, "held_out")[0]
    assert first.expression == "86 - 83"


def test_no_held_out_problem_is_in_training() -> None:
    training = {problem.expression for problem in some(20_000)}
    held_out = {problem.expression for seed in range(4) for problem in some(500, "held_out", seed=seed)}
    assert not training & held_out
    assert len(training) == 20_000


def test_rows_are_distinct_and_half_hard() -> None:
    made = rows(11, 300)
    assert len({row["id"] for row in made}) == len({row["question"] for row in made}) == 300
    assert [row["level"] for row in made].count("hard") == 150
    held_out = {problem.question: problem for problem in some(300, "held_out", seed=11)}
    assert all(held_out[row["question"]].answer == row["answer"] for row in made)


@pytest.mark.parametrize("problem", some(20))
def test_verify_accepts_the_answer_only(problem: Problem) -> None:
    text, answer = problem.completion, problem.answer
    assert verify(text, answer)
    assert verify(text.removeprefix("<think>") + "\n", answer)
    assert verify(answer, answer)
    thought, _, _ = text.rpartition("\n")
    for wrong in ("", thought, thought + f"\n{answer}0", thought + f"\n{answer} or 7", text + "\n<think>"):
        assert not verify(wrong, answer), wrong
    assert not verify(f"<think>\n{answer}", answer)


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(ARITHMETIC / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    if not any(token in text for token in setting_tokens()):
        assert bytes(ids) == text.encode()


def setting_tokens() -> list[str]:
    return [token["content"] for token in setting("tokenizer_config.json")["added_tokens_decoder"].values()]


def test_the_thinking_tags_stay_when_special_tokens_are_left_out() -> None:
    tokenizer = Tokenizer.from_file(str(ARITHMETIC / "tokenizer.json"))
    ids = tokenizer.encode("<|im_start|><think>1</think>2<|im_end|><|endoftext|>").ids
    assert ids == [257, 259, ord("1"), 260, ord("2"), 258, 256]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>1</think>2"


def test_the_chat_template_renders_with_jinja_alone() -> None:
    template = jinja2.Environment().from_string(setting("tokenizer_config.json")["chat_template"])
    rendered = template.render(messages=MESSAGES, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert rendered.startswith(template.render(messages=MESSAGES))


def test_the_shipped_folder_is_whole() -> None:
    names = {file.name for file in ARITHMETIC.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in ARITHMETIC.iterdir()) < 5_000_000
    config = setting("config.json")
    assert (config["model_type"], config["tie_word_embeddings"]) == ("qwen3", False)
    assert setting("generation_config.json") == {"eos_token_id": 258, "pad_token_id": 256}
    with safe_open(str(ARITHMETIC / "model.safetensors"), framework="pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
    assert 1_000_000 <= sum(tensor.numel() for tensor in tensors) <= 1_500_000


@pytest.fixture(scope="module")
def script(shipped: tuple[Any, Any]) -> dict[str, Any]:
    """The names of the training script."""
    return runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "train_arithmetic.py"))


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    """The tokenizer and the model as `transformers` loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # seconds, spared to the tests without it

    return AutoTokenizer.from_pretrained(ARITHMETIC), AutoModelForCausalLM.from_pretrained(ARITHMETIC)


def test_transformers_renders_and_continues_a_chat(shipped: tuple[Any, Any]) -> None:
    tokenizer, _ = shipped
    begun = [*MESSAGES, {"role": "assistant", "content": "<think>\n1 + 2"}]
    text = tokenizer.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    assert text.endswith("What is 1 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\n1 + 2")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (258, 256)


@pytest.mark.parametrize(("level", "least", "most"), [("easy", 0.8, 1.0), ("hard", 0.15, 0.6)])
def test_the_model_solves_most_easy_and_some_hard_problems(
    shipped: tuple[Any, Any], level: Level, least: float, most: float
) -> None:
    tokenizer, model = shipped
    asked = some(48, "held_out", level, seed=9)
    chats = [[{"role": "user", "content": problem.question}] for problem in asked]
    inputs = tokenizer.apply_chat_template(
        chats,
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )
    out = model.generate(**inputs, max_new_tokens=160, do_sample=False)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(verify(text, problem.answer) for text, problem in zip(texts, asked, strict=True))
    assert least <= right / len(asked) <= most


def test_the_script_writes_the_settings_that_ship(tmp_path: Path, script: dict[str, Any]) -> None:
    script["write_settings"](tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_text() == (ARITHMETIC / file.name).read_text(), file.name


def test_only_the_completion_is_learnt(shipped: tuple[Any, Any], script: dict[str, Any]) -> None:
    tokenizer, _ = shipped
    ids, labels = (tensor.tolist() for tensor in next(script["batches"](tokenizer, 1)))
    for row, learnt in zip(ids, labels, strict=True):
        start, end = row.index(259), row.index(258, row.index(259))
        assert learnt[:start] == [-100] * start
        assert learnt[start : end + 1] == row[start : end + 1]
        assert set(learnt[end + 1 :]) <= {-100}
        assert set(row[end + 1 :]) <= {256}
