"""Arithmetic problems with worked solutions: the task of the shipped model.

A problem is one or two steps, each an addition, a subtraction not below zero or a multiplication by a
digit. What this module guarantees:

- the same seed gives the same problems, on every machine;
- a split is decided by a hash of the expression alone: no held-out problem, however worded, is in training;
- a trace is the column method as taught at school, a column a line, right to left, carries and borrows shown;
- `verify` is exact: it accepts the answer and nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypedDict

from penstock.sample import THINK_CLOSE, THINK_OPEN, split_reasoning

Kind = Literal["addition", "subtraction", "multiplication", "two_step"]
Level = Literal["easy", "hard"]
Split = Literal["train", "held_out"]
Operator = Literal["+", "-", "*"]

KINDS: Final[tuple[Kind, ...]] = ("addition", "subtraction", "multiplication", "two_step")

LEVELS: Final[tuple[Level, ...]] = ("easy", "hard")

HELD_OUT_SHARE: Final = 16
"""One expression in this many is held out."""

_WEIGHTS: Final[dict[Level, tuple[int, ...]]] = {"easy": (3, 3, 3, 1), "hard": (1, 1, 1, 3)}
"""How often each of `KINDS` is drawn: the easy half is mostly one step, half of the hard half is two."""

_DIGITS: Final[dict[Level, dict[Kind, tuple[int, int]]]] = {
    "easy": {"addition": (1, 4), "subtraction": (1, 4), "multiplication": (1, 3), "two_step": (1, 2)},
    "hard": {"addition": (5, 8), "subtraction": (5, 8), "multiplication": (4, 7), "two_step": (2, 4)},
}
"""Fewest and most digits of an operand. The one-digit factor of a multiplication is not counted."""

_SHAPES: Final[dict[Kind, tuple[tuple[Operator, ...], ...]]] = {
    "addition": (("+",),),
    "subtraction": (("-",),),
    "multiplication": (("*",),),
    "two_step": (("+", "*"), ("-", "*"), ("+", "-"), ("*", "+"), ("*", "-")),
}
"""The operators of a problem in the order they are applied; each shape of a kind is as likely as another."""

_FIRST: Final[dict[Operator, str]] = {
    "+": "Add {x} and {y}",
    "-": "Subtract {y} from {x}",
    "*": "Multiply {x} by {y}",
}
_THEN: Final[dict[Operator, str]] = {"+": "add {y}", "-": "subtract {y}", "*": "multiply by {y}"}


class Row(TypedDict):
    """A problem as a row of a dataset."""

    id: str
    question: str
    answer: str
    kind: Kind
    level: Level


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on numbers that are not negative; nor is its result, and a factor `y` has one digit."""

    operator: Operator
    x: int
    y: int

    @property
    def result(self) -> int:
        if self.operator == "+":
            return self.x + self.y
        return self.x - self.y if self.operator == "-" else self.x * self.y

    def __str__(self) -> str:
        return f"{self.x} {self.operator} {self.y}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its worked solution. The second step, if any, goes on from the result of the first."""

    kind: Kind
    level: Level
    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> str:
        return str(self.steps[-1].result)

    @property
    def trace(self) -> str:
        """The solution, line by line: for each step its expression, its columns and its result."""
        return "\n".join(
            line for step in self.steps for line in (str(step), *columns(step), f"= {step.result}")
        )

    @property
    def completion(self) -> str:
        """What a model that solves the problem writes."""
        return f"{THINK_OPEN}\n{self.trace}\n{THINK_CLOSE}\n{self.answer}"

    @property
    def expression(self) -> str:
        """The problem in symbols, whatever the wording of the question."""
        return _expression(self.steps)

    @property
    def split(self) -> Split:
        digest = hashlib.blake2b(self.expression.encode(), digest_size=4).digest()
        return "train" if int.from_bytes(digest, "big") % HELD_OUT_SHARE else "held_out"


def problems(seed: int, *, split: Split, level: Level | None = None) -> Iterator[Problem]:
    """Problems of `split` drawn from `seed`, without end and no expression twice.

    Without `level`, easy and hard ones take turns, so an even number of them is half of each.
    """
    rng = random.Random(seed)
    drawn: set[str] = set()
    for wanted in itertools.cycle(LEVELS if level is None else (level,)):
        while (problem := _draw(rng, wanted)).split != split or problem.expression in drawn:
            pass
        drawn.add(problem.expression)
        yield problem


def rows(seed: int, count: int) -> list[Row]:
    """The first `count` held-out problems of `seed` as the rows of a dataset, easy and hard ones in turn."""
    return [
        Row(
            id=f"{problem.kind}-{number:04d}",
            question=problem.question,
            answer=problem.answer,
            kind=problem.kind,
            level=problem.level,
        )
        for number, problem in enumerate(itertools.islice(problems(seed, split="held_out"), count))
    ]


def verify(text: str, answer: str) -> bool:
    """Whether `text`, a whole completion, gives `answer` after its reasoning, and nothing besides.

    A completion that was cut off while thinking has no answer. Blanks around the answer do not count.
    """
    return split_reasoning(text)[1].strip() == answer


def columns(step: Step) -> Iterator[str]:
    """The columns of `step` from the right, such as `7+5=12` and then, with the carry, `4+8+1=13`.

    In a subtraction `2-7+10=5` borrows ten, which the next column pays back: `8-3-1=4`.
    """
    if step.operator == "*":
        return _products(step.x, step.y)
    return _sums(step.x, step.y) if step.operator == "+" else _differences(step.x, step.y)


def _digit_pairs(x: int, y: int) -> Iterator[tuple[int, int]]:
    """The digits of `x` and `y` from the right, the shorter number filled up with zeros."""
    return itertools.zip_longest(map(int, reversed(str(x))), map(int, reversed(str(y))), fillvalue=0)


def _sums(x: int, y: int) -> Iterator[str]:
    carry = 0
    for upper, lower in _digit_pairs(x, y):
        total = upper + lower + carry
        yield f"{upper}+{lower}{'+1' if carry else ''}={total}"
        carry = total // 10


def _differences(x: int, y: int) -> Iterator[str]:
    borrow = 0
    for upper, lower in _digit_pairs(x, y):
        difference = upper - lower - borrow
        paid, borrow = "-1" if borrow else "", int(difference < 0)
        yield f"{upper}-{lower}{paid}{'+10' if borrow else ''}={difference + 10 * borrow}"


def _products(x: int, y: int) -> Iterator[str]:
    carry = 0
    for digit in map(int, reversed(str(x))):
        total = digit * y + carry
        yield f"{digit}*{y}{f'+{carry}' if carry else ''}={total}"
        carry = total // 10


def _expression(steps: tuple[Step, ...]) -> str:
    text = str(steps[0])
    for before, step in itertools.pairwise(steps):
        grouped = f"({text})" if step.operator == "*" and before.operator != "*" else text
        text = f"{grouped} {step.operator} {step.y}"
    return text


def _words(steps: tuple[Step, ...]) -> str:
    first, *others = steps
    clauses = [_FIRST[first.operator].format(x=first.x, y=first.y)]
    clauses += [_THEN[step.operator].format(y=step.y) for step in others]
    return ", then ".join(clauses) + "."


def _draw(rng: random.Random, level: Level) -> Problem:
    kind = rng.choices(KINDS, _WEIGHTS[level])[0]
    digits = _DIGITS[level][kind]
    x, steps = _number(rng, digits), list[Step]()
    for operator in rng.choice(_SHAPES[kind]):
        y = rng.randint(2, 9) if operator == "*" else _number(rng, digits)
        if operator == "-" and y > x:
            y = rng.randint(0, x)
        steps.append(Step(operator, x, y))
        x = steps[-1].result
    solution = tuple(steps)
    in_symbols = f"What is {_expression(solution)}?"
    return Problem(kind, level, in_symbols if rng.random() < 0.5 else _words(solution), solution)


def _number(rng: random.Random, digits: tuple[int, int]) -> int:
    """A number whose count of digits, and then its value, is drawn evenly."""
    length = rng.randint(*digits)
    return rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)
