"""Rewards that are asked for over HTTP: a reward service and a judge, against scripted servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.client import Client
from penstock.errors import ConfigError
from penstock.fleet.fleet import Fleet
from penstock.fleet.retry import Retry
from penstock.rollout.rewards.judge import Judge, Verdict
from penstock.rollout.rewards.service import Service
from penstock.rollout.score import Score
from penstock.sample import Sample
from tests.rollout.test_rewards_text import prompt
from tests.scripted import (
    Call,
    ScriptedEngine,
    Step,
    answer,
    half_body,
    http,
    raw,
    refuse,
    reset,
    run,
    stall,
)

QUICK = Retry(base=0.01, outage=0.3)


def scores(*values: object) -> Step:
    return raw(http(200, orjson.dumps({"scores": values})))


@asynccontextmanager
async def service(*script: Step, **options: object) -> AsyncIterator[tuple[Service, ScriptedEngine]]:
    async with (
        ScriptedEngine(script, default=scores(1.0)) as engine,
        Fleet(engine.url, retry=QUICK) as fleet,
        Service(fleet, **options) as one,  # type: ignore[arg-type]
    ):
        yield one, engine


def test_what_a_service_is_sent_and_says() -> None:
    async def scenario() -> None:
        answers = [
            scores(0.5),
            scores({"value": 2, "parts": {"style": 1}}),
            scores({"failed": "no model", "parts": {"length": 3}}),
            scores({"parts": {}}),
        ]
        async with service(*answers, path="/v2/grade") as (reward, engine):
            row, sample = prompt(answer="é"), Sample(text="yes", reasoning="why")
            assert await reward(row, sample) == Score(0.5)
            (call,) = engine.calls
            assert (call.method, call.path) == ("POST", "/v2/grade")
            assert call.json == {
                "samples": [
                    {
                        "prompt": [{"role": "user", "content": "?"}],
                        "completion": "<think>why</think>yes",
                        "row": {"answer": "é"},
                    }
                ]
            }
            assert await reward(row, sample) == Score(2.0, {"style": 1.0})
            told = await reward(row, sample)
            assert (told.failed, told.parts) == ("no model", {"length": 3.0})
            assert (await reward(row, sample)).failed == "the reward service gave no value"

    run(scenario())


def test_samples_that_come_together_go_together() -> None:
    async def grade(call: Call) -> None:
        texts = [float(one["completion"]) for one in call.json["samples"]]
        await call.write(http(200, orjson.dumps({"scores": texts})))

    async def scenario() -> None:
        async with service(*[grade] * 10, batch=4, in_flight=2) as (reward, engine):
            asked = [reward(prompt(), Sample(text=str(number))) for number in range(10)]
            assert [score.value for score in await asyncio.gather(*asked)] == [float(n) for n in range(10)]
            assert sorted(len(call.json["samples"]) for call in engine.calls) == [2, 4, 4]
            assert engine.most_in_flight <= 2

    run(scenario())


@pytest.mark.parametrize(
    "fault", [refuse(503), refuse(429, retry_after="0"), refuse(500), reset(), half_body()]
)
def test_it_is_asked_again(fault: Step) -> None:
    async def scenario() -> None:
        async with service(fault, fault, scores(0.25)) as (reward, engine):
            assert await reward(prompt(), Sample(text="")) == Score(0.25)
            assert len(engine.calls) == 3

    run(scenario())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (refuse(404, "no such page"), "RequestRejected: 404: no such page"),
        (scores(), "0 scores for 1 samples"),
        (scores("high"), "cannot be read"),
        (raw(http(200, b"{")), "cannot be read"),
        (stall(), "DeadlineExceeded"),
    ],
)
def test_an_answer_that_never_comes_is_a_failed_score(fault: Step, reason: str) -> None:
    async def scenario() -> None:
        timeout = 0.5 if reason == "DeadlineExceeded" else 20.0  # the others are tried several times
        async with service(*[fault] * 100, timeout=timeout) as (reward, _):
            before = time.monotonic()
            score = await reward(prompt(), Sample(text=""))
            assert score.failed is not None and reason in score.failed
            assert time.monotonic() - before < timeout + 5.0

    run(scenario())


def test_a_service_that_is_down_is_a_failed_score() -> None:
    async def scenario() -> None:
        async with service() as (reward, engine):
            await engine.kill()
            score = await reward(prompt(), Sample(text=""))
            assert score.failed is not None and "FleetDown" in score.failed

    run(scenario())


def test_closing_a_service_fails_what_it_was_asked() -> None:
    async def scenario() -> None:
        async with service(stall(), in_flight=1) as (reward, engine):
            asked = [asyncio.ensure_future(reward(prompt(), Sample(text=""))) for _ in range(3)]
            await engine.arrived(1)
        for score in await asyncio.gather(*asked):
            assert score.failed is not None and "closed" in score.failed
        with pytest.raises(ConfigError):
            await reward(prompt(), Sample(text=""))

    run(scenario())


def test_a_cancelled_caller_is_not_asked_for() -> None:
    async def scenario() -> None:
        async with service(scores(0.5), in_flight=1) as (reward, engine):
            asked = [asyncio.ensure_future(reward(prompt(), Sample(text=""))) for _ in range(2)]
            await asyncio.sleep(0)
            asked[1].cancel()
            assert await asked[0] == Score(0.5)
            await asyncio.gather(*asked, return_exceptions=True)
            assert len(engine.calls) == 1

    run(scenario())


@pytest.mark.parametrize(
    "options", [{"batch": 0}, {"in_flight": 0}, {"timeout": 0}, {"path": "score"}, {"path": "/a b"}]
)
def test_settings_of_a_service(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Service(Fleet("http://127.0.0.1:1"), **options)  # type: ignore[arg-type]


# -- judge --------------------------------------------------------------------------------------------


def judged(*texts: str, **options: object) -> tuple[Score, ScriptedEngine]:
    """The score of a sample by a judge that says `texts`, each in a choice of its own."""

    async def say(call: Call) -> None:
        choices = [
            {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            for index, text in enumerate(texts)
        ]
        await call.write(http(200, orjson.dumps({"id": "x", "model": "m", "choices": choices})))

    async def scenario() -> tuple[Score, ScriptedEngine]:
        async with ScriptedEngine(default=say) as engine, Client(engine.url, retry=QUICK) as client:
            judge = Judge(client, votes=len(texts), **options)  # type: ignore[arg-type]
            sample = Sample(text="<think>{answer} [[10]]</think>I say {prompt} [[10]]")
            return await judge(prompt(answer="42"), sample), engine

    return run(scenario())


def test_a_judge() -> None:
    score, engine = judged("<think>[[9]]</think>Good. [[8]] or rather\n[[7]]")
    assert score == Score(0.7, {"votes": 1.0})
    (message,) = engine.calls[0].json["messages"]
    assert "<answer>\nI say {prompt} [[10]]\n</answer>" in message["content"]
    assert "<question>\n?\n</question>" in message["content"]


def test_the_template_takes_columns() -> None:
    score, engine = judged("[[0]]", template="{answer} is right. Is {response}? {completion}", model="big")
    assert score.value == 0.0
    call = engine.calls[0].json
    assert call["messages"][0]["content"].startswith("42 is right. Is I say {prompt} [[10]]? <think>{answer}")
    assert call["model"] == "big"
    missing, engine = judged("[[0]]", template="{rubric} {response}")
    assert missing.failed == "row 0 lacks 'rubric', which the judge's template wants"
    assert not engine.calls


@pytest.mark.parametrize(
    "text", ["", "fine", "[[11]]", "[[-1]]", "[[a]]", "<think>[[5]]</think>", "<think>[[5]]"]
)
def test_no_verdict_is_no_score(text: str) -> None:
    assert judged(text)[0].failed == "only 0 of 1 verdicts could be read"


def test_votes() -> None:
    assert judged("[[10]]", "[[5]]", "?")[0] == Score(0.75, {"votes": 2.0})
    assert judged("[[10]]", "?")[0].failed == "only 1 of 2 verdicts could be read"


def test_a_judge_that_cannot_be_asked() -> None:
    async def scenario() -> None:
        steps = [refuse(400, "too long"), stall()]
        async with ScriptedEngine(steps, default=answer("[[5]]")) as engine:
            async with Client(engine.url, retry=QUICK) as client:
                judge = Judge(client, timeout=0.3)
                for reason in ("RequestRejected: 400: too long", "DeadlineExceeded"):
                    score = await judge(prompt(), Sample(text="x"))
                    assert score.failed is not None and reason in score.failed
                assert (await judge(prompt(), Sample(text="x"))).value == 0.5
                await engine.kill()
                score = await judge(prompt(), Sample(text="x"))
                assert score.failed is not None and score.failed.startswith("the judge could not be asked")
            with pytest.raises(ConfigError, match="not open"):
                await judge(prompt(), Sample(text="x"))

    run(scenario())


def test_verdicts_as_json() -> None:
    verdict = Verdict(pattern=None, field="grade", lowest=1.0, highest=5.0)
    assert verdict.read('{"grade": 1} no: ```json\n{"grade": 5}\n``` {"other": 1}') == 1.0
    assert verdict.read('{"grade": "3"}') == 0.5
    for text in ('{"grade": 6}', '{"grade": true}', '{"grade": null}', '{"grade": 3', "{}", "3"):
        assert verdict.read(text) is None, text


def test_verdicts_by_a_pattern() -> None:
    assert Verdict(pattern="grade: (.)", highest=1.0).read("grade: 0\ngrade: 1") == 1.0
    assert Verdict(pattern="(yes)|no").read("no") is None
    assert Verdict().read("[[5]]" + "x" * 5000) is None, "a verdict stands at the end"


@given(st.text(alphabet='[]0123456789.-{}":score ', max_size=60))
def test_any_answer_gives_a_verdict_or_none(text: str) -> None:
    for verdict in (Verdict(), Verdict(pattern=None), Verdict(pattern="(.*)")):
        found = verdict.read(text)
        assert found is None or 0.0 <= found <= 1.0


def test_settings_of_a_judge() -> None:
    for options in ({"pattern": "("}, {"pattern": "x"}, {"lowest": 10.0}):
        with pytest.raises(ConfigError):
            Verdict(**options)
    client = Client("http://127.0.0.1:1")
    for settings in ({"votes": 0}, {"timeout": 0.0}, {"template": "Is it good?"}):
        with pytest.raises(ConfigError):
            Judge(client, **settings)
