"""Rewards that are pure functions of a text, and the rewards made of them."""

from __future__ import annotations

import asyncio
import time
from fractions import Fraction
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.prompt import Prompt
from penstock.rollout.rewards import plain
from penstock.rollout.rewards.text import (
    boxed,
    exact_match,
    final_answer,
    has_format,
    length_penalty,
    numeric,
    overlong_penalty,
    parse_number,
    same_number,
    tokens_of,
    whole_text,
)
from penstock.rollout.score import Reward, Score
from penstock.sample import Sample, Usage

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k" / "test.jsonl"


def prompt(**row: object) -> Prompt:
    return Prompt(0, None, [{"role": "user", "content": "?"}], orjson.dumps(row))


def ask(reward: Reward, sample: Sample | str, **row: object) -> Score:
    one = Sample(text=sample) if isinstance(sample, str) else sample
    return asyncio.run(_ask(reward, prompt(**row), one))


async def _ask(reward: Reward, row: Prompt, sample: Sample) -> Score:
    return await reward(row, sample)


def test_exact_match() -> None:
    assert exact_match(" yes\n", "yes")
    assert not exact_match("Yes", "yes")
    assert ask(plain.ExactMatch(), "<think>no</think> yes", answer="yes") == Score(1.0)
    assert ask(plain.ExactMatch(), "<think>yes", answer="yes") == Score(0.0), "cut off while thinking"
    assert ask(plain.ExactMatch(column="n"), "3", n=3) == Score(1.0)


# -- numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-2", -2),
        ("−5", -5),
        ("+7.", 7),
        ("1,234.50", Fraction(2469, 2)),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{1}{2}", Fraction(-1, 2)),
        ("$18", 18),
        (r"\$1{,}000", 1000),
        ("$-3$", -3),
        ("1e3", 1000),
        ("2.5E-1", Fraction(1, 4)),
        ("18 dollars", 18),
        (r"10\text{ cm}", 10),
        ("5km", 5),
        ("007", 7),
    ],
)
def test_numbers(text: str, value: int | Fraction) -> None:
    assert parse_number(text) == (Fraction(value), False)


@pytest.mark.parametrize("text", ["5%", r"5\%", "5 percent", "5 %."])
def test_percentages(text: str) -> None:
    assert parse_number(text) == (Fraction(5), True)


@pytest.mark.parametrize(
    "text",
    ["", "x", "5x", "12 34", "1,23", "1/0", "x = 3", "1.2.3", "--1", "1e9999", "5 km/h", "9" * 101, "٣٤x"],
)
def test_what_is_no_number(text: str) -> None:
    assert parse_number(text) is None


@given(st.integers(-(10**15), 10**15), st.integers(0, 3))
def test_every_way_to_write_a_number_is_read(mantissa: int, digits: int) -> None:
    value = Fraction(mantissa, 10**digits)
    for form in (f"{mantissa / 10**digits:.{digits}f}", f"{mantissa / 10**digits:,.{digits}f}"):
        if digits == 0 or Fraction(form.replace(",", "")) == value:  # a float may have rounded it
            assert parse_number(form) == (value, False)
    fraction = f"{value.numerator}/{value.denominator}"
    assert parse_number(fraction) == (value, False)
    sign = "-" if value < 0 else ""
    assert parse_number(rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}") == (value, False)


@given(st.text())
def test_any_text_is_a_number_or_none(text: str) -> None:
    parse_number(text)
    answer = final_answer(text, last_number=True)
    assert answer is None or isinstance(answer, str)
    has_format(text)


@given(st.text(alphabet="0123456789.,/-+eE%$\\{} frac"))
def test_what_is_nearly_a_number(text: str) -> None:
    assert same_number(text, text) == (parse_number(text) is not None)


def test_equality_is_exact_and_knows_percent() -> None:
    assert same_number("0.1", "1/10")
    assert not same_number("0.3333", "1/3")
    assert same_number("50%", "0.5") and same_number("50%", "50") and same_number("1/2", "50%")
    assert not same_number("50%", "5")
    assert same_number("100%", "1") and not same_number("100%", "10000%")
    assert not same_number("x", "x")


def test_the_last_marked_answer_counts() -> None:
    assert final_answer(r"\boxed{1} then \boxed{\frac{1}{2}} done 7") == r"\frac{1}{2}"
    assert final_answer(r"\fbox {2}") == "2"
    assert final_answer("#### 1\nno\n#### 1,000 \nmore") == "1,000"
    assert final_answer("<answer>1</answer><answer> 2 </answer>") == "2"
    assert final_answer("the answer is 7") is None
    assert final_answer("of 3 cats, -4.5 remain.", last_number=True) == "-4.5"
    assert final_answer("x2 y", last_number=True) is None


@given(st.text(alphabet=r"ab{}\ ", max_size=20), st.text(alphabet="ab {", max_size=5))
def test_a_box_is_found_behind_anything(before: str, after: str) -> None:
    assert boxed(before + r" \boxed{x{y}\}z}" + after) == r"x{y}\}z" or before.endswith("\\")


def test_broken_boxes() -> None:
    assert boxed(r"\boxed{1} \boxed{2") == "1"
    assert boxed(r"\boxed{a\boxed{b}c}") == "b"
    assert boxed("}}}{{") is None


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 50_000, "1,234," * 50_000, "-1/" * 100_000, "</answer>" * 40_000]
)
def test_degenerate_texts_take_linear_time(text: str) -> None:
    before = time.process_time()
    final_answer(text, last_number=True)
    has_format(text)
    assert time.process_time() - before < 1.0


def test_numeric() -> None:
    solution = "He has <<3*6=18>>18 dollars.\n#### 18"
    assert numeric(r"so \boxed{18}", solution)
    assert numeric("#### 18.0", "18")
    assert not numeric("It is 18", solution)
    assert numeric("It is 18.", solution, last_number=True)
    reward = plain.Numeric()
    assert ask(reward, r"<think>\boxed{18}</think> \boxed{17}", answer=solution) == Score(0.0)
    assert ask(plain.Numeric(last_number=True), "18", answer=18) == Score(1.0)
    failed = ask(reward, r"\boxed{1}", answer="eighteen")
    assert failed.failed is not None and "'eighteen' is no number" in failed.failed
    assert (
        ask(reward, "1", anwser=1).failed
        == "row 0 has nothing in the column 'answer'; did you mean 'anwser'?"
    )
    assert ask(reward, "1", answer=None).failed == "row 0 has nothing in the column 'answer'"


@pytest.mark.skipif(not GSM8K.exists(), reason="there is no GSM8K beside the checkout")
def test_the_references_of_gsm8k_are_numbers() -> None:
    rows = [orjson.loads(line) for line in GSM8K.read_bytes().splitlines()]
    assert all(numeric(row["answer"], row["answer"]) for row in rows)
    number = [row["answer"].rpartition("#### ")[2] for row in rows]
    assert all(
        numeric(f"The answer is {one}.", row["answer"], last_number=True)
        for one, row in zip(number, rows, strict=True)
    )


# -- format and length --------------------------------------------------------------------------------


def test_format() -> None:
    good = "<think>a</think>\n<answer>b</answer>"
    assert has_format(good) and has_format(f"\n{good}\n") and has_format("a</think><answer>b</answer>")
    assert has_format("<think>a</think> b", answer_tags=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<think>a</think>",
        "<think>a</think>b",
        "<answer>b</answer>",
        "<think> </think><answer>b</answer>",
        "<think>a</think><answer> </answer>",
        "<think>a</think><answer>b</answer>c",
        "x<think>a</think><answer>b</answer>",
        "<think>a</think>c<answer>b</answer>",
        "<think>a</think><answer>b</answer><answer>b</answer>",
        "<think>a<think>b</think><answer>c</answer>",
        "<think>a</think></think><answer>c</answer>",
        "<answer>b</answer><think>a</think>",
        "<think>a</think><answer>",
    ],
)
def test_bad_format(text: str) -> None:
    assert not has_format(text)


def test_reasoning_that_the_engine_took_out_belongs_to_the_format() -> None:
    split = Sample(text="<answer>b</answer>", reasoning="a")
    assert whole_text(split) == "<think>a</think><answer>b</answer>"
    assert ask(plain.Format(), split) == Score(1.0)
    kept = Sample(text="<think>a</think><answer>b</answer>", reasoning="a")
    assert whole_text(kept) == kept.text


def test_length() -> None:
    assert (
        length_penalty(900, target=1000, scale=0.01) == length_penalty(1100, target=1000, scale=0.01) == -1.0
    )
    sample = Sample(text="", usage=Usage(completion_tokens=400))
    assert ask(plain.Length(target=500, scale=0.01), sample) == Score(-1.0)
    assert ask(plain.Length(target=500), "").failed is not None, "no count is not a count of 0"
    assert tokens_of(Sample(text="", token_ids=(1, 2, 3), usage=Usage(completion_tokens=9))) == 3


def test_overlong() -> None:
    at = [overlong_penalty(tokens, longest=1000, buffer=200) for tokens in (0, 800, 850, 900, 1000, 5000)]
    assert at == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    reward = plain.Overlong(longest=1000, buffer=200)
    assert ask(reward, Sample(text="", usage=Usage(completion_tokens=900))) == Score(-0.5)
    for buffer in (0, 1001):
        with pytest.raises(ConfigError):
            plain.Overlong(longest=1000, buffer=buffer)


@given(st.integers(0, 5000), st.integers(1, 1000))
def test_overlong_never_rises(tokens: int, buffer: int) -> None:
    now = overlong_penalty(tokens, longest=1000, buffer=buffer)
    assert -1.0 <= overlong_penalty(tokens + 1, longest=1000, buffer=buffer) <= now <= 0.0
