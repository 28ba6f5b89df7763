"""The task of `penstock train --demo`: hard arithmetic problems, what a solution earns, and the accuracy.

It guarantees:
- no held-out problem is trained on: training has the training split of `penstock.demo.arithmetic`;
- the accuracy is the share of held-out problems whose answer is right, and nothing else;
- the credit of a token rests on the lines that the reward found right, and on nothing besides.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import orjson
import torch

from penstock.client import Client
from penstock.demo.arithmetic import Problem, problems, verify
from penstock.learner.grpo import step_advantages
from penstock.prompt import Prompt
from penstock.rollout.group import Group, Rollout
from penstock.rollout.score import Score
from penstock.sample import Sample, SamplingParams

MOST_NEW_TOKENS: Final = 160
"""Longer than the longest worked solution."""
HELD_OUT_SEED: Final = 3003
"""Of the problems the accuracy is measured on; not the seed of any that decided when pretraining stopped."""
NEWLINE: Final = ord("\n")
"""A token of the shipped model is a byte."""
FIRST: Final = -1
"""Priority of the measurement: it does not queue behind the next batch."""


def prompts(seed: int) -> Iterator[Mapping[str, str]]:
    """Hard problems of the training split, without end."""
    for problem in problems(seed, split="train", level="hard"):
        yield {"prompt": problem.question, "answer": problem.answer, "solution": problem.completion}


def held_out(count: int) -> list[Problem]:
    """The hard problems the accuracy is measured on."""
    return list(itertools.islice(problems(HELD_OUT_SEED, split="held_out", level="hard"), count))


async def reward(prompt: Prompt, sample: Sample) -> Score:
    """Half for the right answer, half for the share of the solution's lines before the first wrong one.

    The shaping tells completions apart also where all of a group fail: few groups of hard problems have
    both right and wrong answers.
    """
    row = orjson.loads(prompt.fields)
    right = float(sample.finish_reason == "stop" and verify(sample.text, row["answer"]))
    written, expected = sample.text.split("\n"), row["solution"].split("\n")
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(written, expected, strict=False))
    lines = sum(1 for _ in pairs) / len(expected)
    return Score((right + lines) / 2, {"answer": right, "lines": lines})


def credit(group: Group) -> list[list[float]]:
    """The advantage of each token: that of its line, see `penstock.learner.grpo.step_advantages`.

    Lines that were found right have some; a line that is wrong, and what comes behind it, has none.
    """
    lines = orjson.loads(group.prompt.fields)["solution"].count("\n") + 1
    ends = [_right_lines(one, lines) for one in group.scored]
    right = torch.tensor([[line < len(one) for line in range(lines)] for one in ends])
    found = []
    for rollout, advantages, places in zip(group.scored, step_advantages(right).tolist(), ends, strict=True):
        tokens = [0.0] * len(rollout.token_ids)
        for line, (start, end) in enumerate(itertools.pairwise((0, *places))):
            tokens[start:end] = [advantages[line]] * (end - start)
        found.append(tokens)
    return found


def _right_lines(rollout: Rollout, lines: int) -> list[int]:
    """Where each line ends that was found right, in tokens; the last line ends with the completion."""
    parts, ids = rollout.reward.parts, rollout.token_ids
    ends = [place + 1 for place, token in enumerate(ids) if token == NEWLINE]
    right = round(parts["lines"] * lines)
    if right < lines:
        return ends[:right]
    whole = [len(ids)] if parts["answer"] == 1.0 else []  # else more came behind the last line
    return ends[: lines - 1] + whole


async def measure(client: Client, asked: Sequence[Problem]) -> dict[str, float | None]:
    """The share of problems that is solved, greedily and in one try at temperature 1.

    Raises TransportError, ResponseError.
    """
    return {
        "accuracy": await accuracy(client, asked, 0.0),
        "accuracy_sampled": await accuracy(client, asked, 1.0),
    }


async def accuracy(client: Client, asked: Sequence[Problem], temperature: float) -> float:
    """See measure."""
    params = SamplingParams(temperature=temperature, max_tokens=MOST_NEW_TOKENS)

    async def solves(problem: Problem) -> bool:
        messages = [{"role": "user", "content": problem.question}]
        return verify((await client.chat(messages, params, priority=FIRST)).text, problem.answer)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(solves(problem)) for problem in asked]
    return sum(task.result() for task in tasks) / len(tasks)
