"""Which prompts come next, which groups are kept, and scores from functions of any kind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from penstock.errors import ConfigError
from penstock.prompt import Prompt
from penstock.rollout.group import Group, Rollout, VersionSpan, without_tokens_before
from penstock.rollout.ledger import Ledger
from penstock.rollout.sampling import total
from penstock.rollout.score import Score
from penstock.rollout.scoring import Scoring
from penstock.rollout.selection import InOrder, Selection, Verdict, judge
from penstock.rollout.source import Source, as_prompt
from penstock.rollout.trajectory import spans_of
from penstock.rollout.waits import Waits
from penstock.sample import Sample
from penstock.wire.openai_stream import Partial
from tests.scripted import run


def rollout(reward: float | None, *, tokens: int = 2) -> Rollout:
    score = Score.failure("no") if reward is None else Score(reward)
    return Rollout(
        prompt_ids=(1,),
        token_ids=(5,) * tokens,
        logprobs=(-1.0,) * tokens,
        mask=(True,) * tokens,
        versions=(VersionSpan(0, tokens),) if tokens else (),
        finish_reason="stop",
        reward=score,
        text="",
    )


RULES = Selection(drop_zero_spread=True, solved_at=1.0, attempts=2)


@pytest.mark.parametrize(
    ("rewards", "attempt", "verdict"),
    [
        ((0.0, 1.0, 0.5), 1, Verdict("keep")),
        ((0.0, None, 0.5), 1, Verdict("keep")),
        ((0.5, 0.5, None), 1, Verdict("drop", "zero spread")),
        ((1.0, 1.0, 1.0), 1, Verdict("drop", "zero spread", solved=True)),
        ((1.0, 2.0, 1.0), 1, Verdict("keep", solved=True)),
        ((0.5, None, None), 1, Verdict("again", "3 samples failed: lost")),
        ((0.5, None, None), 2, Verdict("drop", "3 samples failed: lost")),
    ],
)
def test_what_becomes_of_a_group(rewards: tuple[float | None, ...], attempt: int, verdict: Verdict) -> None:
    assert judge([rollout(one) for one in rewards], ["lost"], attempt, 4, RULES) == verdict


def test_a_group_without_tokens_cannot_be_trained_on() -> None:
    empty = [rollout(0.0, tokens=0), rollout(1.0, tokens=0)]
    assert judge(empty, [], 1, 2, RULES) == Verdict("drop", "no tokens")


class Hardest:
    """The longest prompt first."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def choose(self, prompts: Sequence[Prompt]) -> int:
        return max(range(len(prompts)), key=lambda at: len(prompts[at].messages[0]["content"]))

    def learned(self, group: Group, verdict: Verdict) -> None:
        self.heard.append(verdict.fate)


async def drawn(source: Source, count: int) -> list[int | None]:
    found = [await source.next() for _ in range(count)]
    return [None if one is None else one.position for one in found]


def test_prompts_come_in_order_or_as_the_curriculum_says_and_what_is_put_back_first() -> None:
    texts = ["a", "bbb", "cc", "dddd", "e"]
    read: list[str] = []

    def reader() -> Iterator[str]:
        for text in texts:
            read.append(text)
            yield text

    async def main() -> None:
        ledger = Ledger(None, {})
        source = Source(reader(), ledger, InOrder())
        first = await source.next()
        assert first is not None and read == ["a"], "lazily"
        assert await drawn(source, 2) == [1, 2]
        source.put_back(first)
        assert await drawn(source, 4) == [0, 3, 4, None]
        ends = [source.exhausted]
        source.put_back(first)
        assert [*ends, source.exhausted] == [True, False]
        chosen = Source(texts, ledger, Hardest(), window=3)
        assert await drawn(chosen, 6) == [1, 3, 2, 0, 4, None]
        retired = Source(texts, ledger, InOrder())
        retired.solved(first.key)
        assert await drawn(retired, 2) == [1, 2] and retired.passed == 1
        assert ledger.reasons() == {"solved before": 1}

    run(main())


def test_prompts_are_texts_rows_conversations_or_prompts() -> None:
    row = as_prompt(3, {"prompt": "x", "answer": 5})
    assert row.messages == [{"role": "user", "content": "x"}] and b'"answer":5' in row.fields
    assert as_prompt(0, row) is row
    assert as_prompt(1, "x").key == as_prompt(2, "x").key != row.key
    assert as_prompt(0, [{"role": "user", "content": "x"}]).messages == row.messages
    for bad, message in (({"text": "x"}, "prompt"), (5, "must hold text"), ({"prompt": object()}, "JSON")):
        with pytest.raises(ConfigError, match=message):
            as_prompt(0, bad)  # type: ignore[arg-type]


class Objected:
    async def __call__(self, prompt: Prompt, sample: Sample) -> Score:
        return Score(0.5)


def test_rewards_of_any_kind_are_scores_within_their_bound() -> None:
    prompt, sample, hung = as_prompt(0, "x"), Sample(text="y"), threading.Event()

    async def slow(prompt: Prompt, sample: Sample) -> float:
        await asyncio.sleep(60.0)
        return 1.0

    def sync(prompt: Prompt, sample: Sample) -> bool:
        return sample.text == "y"

    def hangs(prompt: Prompt, sample: Sample) -> float:
        hung.wait(20.0)
        return 1.0

    def broken(prompt: Prompt, sample: Sample) -> float:
        raise ZeroDivisionError

    async def score(reward: Any, timeout: float = 0.2) -> Score:
        return await Scoring(reward, timeout, Waits())(prompt, sample)

    async def main() -> None:
        assert await score(sync) == Score(1.0) and await score(Objected()) == Score(0.5)
        began = time.monotonic()
        for reward in (slow, hangs):
            assert (await score(reward)).failed == "the reward took longer than 0.2 s"
        assert time.monotonic() - began < 5.0
        assert (await score(broken)).failed == "the reward failed: ZeroDivisionError: "
        assert (await score(lambda prompt, sample: float("nan"))).failed == "the reward is nan"
        with pytest.raises(ConfigError, match="not str"):
            await score(lambda prompt, sample: "good")
        with pytest.raises(ConfigError, match="a function"):
            await score(1.0)
        hung.set()

    run(main())


def test_scores_of_steps_add_up_and_a_failed_one_fails_them_all() -> None:
    steps = [Score(1.0, {"a": 1.0}), Score(0.5, {"a": 0.5})]
    assert total(steps, None) == Score(1.5, {"a": 1.5})
    assert total(steps, Score(2.0)) == Score(3.5, {"a": 1.5, "environment": 1.5})
    assert total(steps, Score.failure("down")).failed == "down"


def test_version_spans_of_samples_and_masks_of_old_tokens() -> None:
    def spans(versions: tuple[tuple[int, int], ...] | None) -> Any:
        return spans_of(Sample(text="", token_ids=(1,) * 6, weight_versions=versions), 7)

    assert spans(((0, 1), (2, 3))) == (((1, 2), (3, 4)), True)
    assert spans(((0, 1), (3, 2), (3, 4))) == (((1, 3), (4, 3)), True), "token 3 was made again"
    assert spans(((2, 8),)) == (((7, 2), (8, 4)), True)
    assert spans(None) == (((7, 6),), False)
    assert spans_of(Sample(text="", token_ids=()), 7) == ((), False)
    partial = Partial()
    for data, tokens in ((b"[[0,1],[2,2]]", b"1,2,3"), (b"[[0,3]]", b"4,5")):
        partial.begin_again(len(partial.token_ids))
        partial.feed(b'{"choices":[{"text":"x","token_ids":[%s],"weight_versions":%s}]}' % (tokens, data))
    assert partial.weight_versions == [(0, 1), (2, 2), (3, 3)], "a continuation counts from its own first"
    mixed = Rollout(
        prompt_ids=(1,),
        token_ids=(2, 3, 4),
        logprobs=(-1.0, 0.0, -3.0),
        mask=(True, False, True),
        versions=(VersionSpan(1, 2), VersionSpan(2, 1)),
        finish_reason="stop",
        reward=Score(0.0),
        text="",
    )
    assert (mixed.oldest, mixed.newest) == (1, 2)
    masked = without_tokens_before(mixed, 2)
    assert masked.mask == (False, False, True) and masked.logprobs == (0.0, 0.0, -3.0)
    assert masked.oldest == 2 and masked.versions == mixed.versions
    assert without_tokens_before(mixed, 3).oldest is None


def test_waits_are_counted_by_name() -> None:
    now = [0.0]
    waits = Waits(lambda: now[0])
    with waits.on("a", "x"):
        now[0] = 1.0
        with waits.on("a", "x"), waits.on("b", "y"):
            now[0] = 3.0
            assert [(one.who, one.what, one.count, one.seconds) for one in waits.now()] == [
                ("a", "x", 2, 3.0),
                ("b", "y", 1, 2.0),
            ]
    now[0] = 9.0
    assert waits.now() == [] and waits.seconds("a") == 3.0 and waits.seconds("b", "y") == 2.0
