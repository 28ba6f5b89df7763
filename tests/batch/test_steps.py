"""Rollouts that are killed between any two of their requests, and go on; the engine is a stub on no clock."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.batch.asking import Question
from penstock.batch.rollout import RolloutClient
from penstock.batch.steps import Recorder, Step, Steps, request_hash
from penstock.prompt import Prompt
from penstock.sample import Sample, SamplingParams

Program = list[list[int]]
"""Requests in turn; those of a group side by side."""


class Killed(Exception):
    """The process is gone."""


class StubAsker:
    """Answers each request differently; from the kill on none."""

    model = "m"
    gives_token_ids = True

    def __init__(self, lives: int, order: list[int]) -> None:
        self.asked: list[Any] = []
        self._lives = lives
        self._order = order

    async def ask(self, question: Question, **options: Any) -> tuple[Sample, None]:
        number = len(self.asked)
        self.asked.append(question)
        for _ in range(self._order[number % len(self._order)]):  # so that answers overtake each other
            await asyncio.sleep(0)
        if number >= self._lives:
            raise Killed
        seed = None if question.params is None else question.params.seed
        return Sample(text=f"{question.content[-1]['content']}/{seed}"), None


async def conversation(program: Program, client: RolloutClient) -> list[str]:
    """Each group sees what the ones before it were answered."""
    said: list[str] = []
    for group in program:
        answers = await asyncio.gather(
            *(client.chat([{"role": "user", "content": f"{name} {said}"}]) for name in group)
        )
        said += [answer.text for answer in answers]
    return said


def run(program: Program, steps: Steps, lives: int, order: list[int]) -> tuple[list[str] | None, StubAsker]:
    asker = StubAsker(lives, order)
    prompt = Prompt(0, None, [], b"{}")
    client = RolloutClient(asker, SamplingParams(), prompt, 0, Recorder(steps), seed=7)  # type: ignore[arg-type]

    async def scenario() -> list[str] | None:
        try:
            return await conversation(program, client)
        except Killed:
            return None

    return asyncio.run(scenario()), asker


programs = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(programs, st.lists(st.integers(0, 6), max_size=4), st.lists(st.integers(0, 5), min_size=1, max_size=7))
def test_a_rollout_killed_anywhere_asks_nothing_twice_that_was_answered(
    program: Program, kills: list[int], order: list[int]
) -> None:
    whole, once = run(program, Steps(), 10**6, [0])
    steps = Steps()
    answered = 0
    for lives in kills:
        before = len(steps.done)
        result, asker = run(program, steps, lives, order)
        answered += len(steps.done) - before
        assert len(steps.done) - before <= lives
        assert len(asker.asked) <= len(once.asked) - before
        if result is not None:
            assert result == whole
    result, asker = run(program, steps, 10**6, order)
    assert result == whole  # a seed for each request: what is asked anew is answered the same
    assert len(asker.asked) == len(once.asked) - answered
    assert len(steps.done) == sum(map(len, program))


@given(st.lists(st.integers(0, 3), max_size=12), st.data())
def test_the_nth_request_gets_the_nth_answer_whichever_were_recorded(names: list[int], data: Any) -> None:
    steps = Steps()
    first = Recorder(steps)
    for number, name in enumerate(names):
        first.add(str(name), first.next(str(name)), b"%d" % number)
    kept = [payload for payload in steps.done if data.draw(st.booleans())]
    again = Recorder(Steps(data.draw(st.permutations(kept))))
    found = [again.find(str(name), again.next(str(name))) for name in names]
    assert [answer for answer in found if answer is not None] == [
        b"%d" % number for number, payload in enumerate(steps.done) if payload in kept
    ]


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_steps_that_cannot_be_read_are_as_if_they_were_not_there(garbage: list[bytes]) -> None:
    recorder = Recorder(Steps(list(garbage)))
    assert recorder.find("x", 0) is None


def test_requests_are_known_by_their_content() -> None:
    assert request_hash("chat", [{"a": 1, "b": 2}]) == request_hash("chat", [{"b": 2, "a": 1}])
    hashes = [
        request_hash("chat", 1),
        request_hash("text", 1),
        request_hash("chat", "1"),
        request_hash("chat", [1]),
    ]
    assert max(Counter(hashes).values()) == 1
    assert Step.__struct_fields__ == ("request", "nth", "result")
