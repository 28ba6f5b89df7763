"""Rewards that run in workers: mathematics, patterns, programs against tests, functions of the user's."""

from __future__ import annotations

import logging

import pytest

from penstock.errors import ConfigError
from penstock.rollout.rewards import code
from penstock.rollout.rewards.code import Code, parse_tests, program_in
from penstock.rollout.rewards.offloaded import InWorker, Matches, Math
from penstock.rollout.rewards.sandbox import Limits
from penstock.rollout.rewards.workers import Workers
from penstock.rollout.score import Score
from penstock.sample import Sample
from tests.rollout import misbehaving
from tests.rollout.test_rewards_text import prompt
from tests.scripted import run

LIMITS = Limits(wall=20.0, cpu=1, memory=1 << 28, files=1 << 20, output=1 << 16)


def fenced(program: str) -> Sample:
    return Sample(text=f"<think>hm</think>Here:\n```python\n{program}\n```\nDone.")


def test_mathematics() -> None:
    async def scenario() -> None:
        async with Workers(1) as workers:
            reward = Math(workers)
            for text, reference, value in [
                (r"so \boxed{\frac12}", "0.5", 1.0),
                (r"\boxed{x^2+2x+1}", "$(x+1)^2$", 1.0),
                (r"\boxed{(2,1)}", "(1,2)", 0.0),
                (r"The answer is $18$.", "work\n#### 18", 1.0),
                (r"\boxed{4}", "5", 0.0),
                (r"<think>\boxed{5}</think>\boxed{4}", "5", 0.0),
                ("no idea", "5", 0.0),
                ("\\boxed{" + "(" * 500, "5", 0.0),
            ]:
                assert await reward(prompt(answer=reference), Sample(text=text)) == Score(value), text
            unreadable = await reward(prompt(answer=""), Sample(text="1"))
            assert unreadable.failed is not None and "cannot be read" in unreadable.failed
            assert (await reward(prompt(), Sample(text="1"))).failed is not None
            hurried = Math(workers, limit=2.5)
            endless = await hurried(prompt(answer="4"), Sample(text=r"\boxed{9^{9^{9^{9}}}}"))
            assert endless.failed == "timeout: the reward took more than 2.5 s"

    run(scenario(), bound=60.0)


def test_patterns() -> None:
    async def scenario() -> None:
        async with Workers(1) as workers:
            reward = Matches(workers, pattern=r"^<think>.*</think>\s*\d+$", limit=20.0)
            assert await reward(prompt(), Sample(text="<think>a\nb</think>\n12")) == Score(1.0)
            assert await reward(prompt(), Sample(text="12", reasoning="a")) == Score(1.0)
            assert await reward(prompt(), Sample(text="12")) == Score(0.0)
            exponential = Matches(workers, pattern="(a+)+$", limit=0.3)
            slow = await exponential(prompt(), Sample(text="a" * 60 + "b"))
            assert slow.failed == "timeout: the reward took more than 0.3 s"
            with pytest.raises(ConfigError, match="no regular expression"):
                Matches(workers, pattern="(")

    run(scenario())


def test_functions_of_the_user() -> None:
    async def scenario() -> None:
        async with Workers(1) as workers:
            for function in (misbehaving.by_length, "tests.rollout.misbehaving:by_length"):
                reward = InWorker(workers, function=function)
                sample = Sample(text="four", token_ids=(1, 2), logprobs=(-0.5, -0.25))
                assert await reward(prompt(), sample) == Score(4.0, {"position": 0.0})
            with pytest.raises(ConfigError, match="module:function"):
                InWorker(workers, function="nothing")
            with pytest.raises(ConfigError, match="positive"):
                InWorker(workers, function=misbehaving.by_length, limit=0.0)

    run(scenario())


# -- programs -----------------------------------------------------------------------------------------

PAIRS = [{"input": "2\n", "output": "4"}, {"input": "3", "output": "6\n"}]


def test_programs_are_run_against_pairs() -> None:
    async def scenario() -> None:
        async with Workers(1) as workers:
            reward = Code(workers, limits=LIMITS)
            row = prompt(tests=PAIRS)
            right, wrong = Score(1.0, {"passed": 1.0}), Score(0.0, {"passed": 0.0})
            assert await reward(row, fenced("print(int(input()) * 2, ' ')")) == right
            assert await reward(row, fenced("print(4)")) == Score(0.0, {"passed": 0.5})
            assert await reward(row, fenced("while True: pass")) == wrong, "its own CPU time is a verdict"
            assert await reward(row, fenced("bytearray(1 << 30)")) == wrong
            assert await reward(row, fenced("while True: print('x' * 999)")) == wrong
            assert await reward(row, fenced("print(4); raise SystemExit(1)")) == wrong
            assert await reward(row, Sample(text="print(int(input()) * 2)")) == wrong, "no block of code"
            partial = Code(workers, limits=LIMITS, partial=True)
            assert await partial(row, fenced("print(6)")) == Score(0.5, {"passed": 0.5})

    run(scenario(), bound=90.0)


def test_a_program_that_waits_has_no_score() -> None:
    async def scenario() -> None:
        async with Workers(1) as workers:
            reward = Code(workers, limits=Limits(wall=1.0))
            score = await reward(prompt(tests=PAIRS), fenced("import time; time.sleep(1000)"))
            assert score.failed == "timeout: the program was not over within 1 s"
            many = Code(workers, limits=Limits(wall=20.0), total=0.1)
            score = await many(
                prompt(tests=PAIRS * 10), fenced("import time; time.sleep(.2); print(input()*2)")
            )
            assert score == Score(0.0, {"passed": 0.0}), "a wrong answer is found before the time is over"
            score = await many(
                prompt(tests=PAIRS * 10), fenced("import time; time.sleep(.2); print(int(input()) * 2)")
            )
            assert score.failed == "timeout: the tests were not over within 0.1 s"

    run(scenario(), bound=60.0)


def test_programs_are_run_against_asserts() -> None:
    async def scenario() -> None:
        async with Workers(1) as workers:
            reward = Code(workers, limits=LIMITS, partial=True)
            row = prompt(tests=["assert double(2) == 4", "assert double(3) == 6"])
            for program, share in [
                ("def double(x): return x * 2", 1.0),
                ("def double(x): return 4", 0.5),
                ("def double(x): raise ValueError", 0.0),
                ("def double(x): raise SystemExit(0)", 0.0),
                ("import os\nos._exit(0)", 0.0),
                ("raise SystemExit(0)", 0.0),
                ("print('0'); print('1')", 0.0),
                ("not python", 0.0),
                (
                    "if __name__ == '__main__': input()\ndef double(x): print('noise', end=''); return 2 * x",
                    1.0,
                ),
            ]:
                assert await reward(row, fenced(program)) == Score(share, {"passed": share}), program

    run(scenario(), bound=60.0)


def test_rows_without_usable_tests() -> None:
    async def scenario() -> None:
        async with Workers(1) as workers:
            reward = Code(workers)
            mixed = ["assert True", {"input": "1", "output": "2"}]
            apart = {"inputs": ["1"], "outputs": []}
            for tests in ([], "not json", 3, [1], [{"input": "1"}], mixed, apart, {"inputs": None}, None):
                assert (await reward(prompt(tests=tests), fenced("1"))).failed is not None, tests

    run(scenario(), bound=60.0)


def test_forms_of_tests() -> None:
    pairs = parse_tests(PAIRS)
    assert parse_tests({"inputs": ["2\n", "3"], "outputs": ["4", "6\n"]}) == pairs
    assert parse_tests('[{"input": "2\\n", "output": "4"}, {"input": "3", "output": "6\\n"}]') == pairs
    assert parse_tests(["assert x"]).asserts == ("assert x",)


def test_the_program_is_the_last_block_of_python() -> None:
    assert program_in("```python\na\n```\n```\nb\n```\n```text\nc\n```") == "b\n"
    assert program_in("```bash\na\n```") is None
    assert program_in("```python\nnever closed") is None


def test_an_open_sandbox_is_said_loudly_and_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Pool:
        async def score(self, function: object, *arguments: object, limit: float) -> Score:
            if function is code.protections:
                return Score(1.0, {"network": 0.0, "processes": 1.0, "files": 0.0, "unprivileged": 1.0})
            return Score(0.0)

    async def scenario() -> None:
        reward = Code(Pool())  # type: ignore[arg-type]
        for _ in range(3):
            await reward(prompt(tests=PAIRS), fenced("1"))

    with caplog.at_level(logging.WARNING):
        run(scenario())
    (record,) = caplog.records
    assert "it can reach the network; it can read your files" in record.getMessage()
