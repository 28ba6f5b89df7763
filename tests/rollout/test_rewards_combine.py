"""Several rewards as one, and the text that names them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.prompt import Prompt
from penstock.rollout.rewards.combine import Combined, Part
from penstock.rollout.rewards.spec import KINDS, RewardSpec, configured, names, open_rewards, parse
from penstock.rollout.score import Score
from penstock.sample import Sample
from tests.rollout.test_rewards_text import ask, prompt
from tests.scripted import ScriptedEngine, answer, http, raw, run


class Fixed:
    """A reward that says what it was told to, and whether it was asked."""

    def __init__(self, score: float | Score | Exception, delay: float = 0.0) -> None:
        self.score = Score(score) if isinstance(score, float) else score
        self.delay = delay
        self.asked = self.cancelled = 0

    async def __call__(self, prompt: Prompt, sample: Sample) -> Score:
        self.asked += 1
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(self.score, Exception):
            raise self.score
        return self.score


FAILED = Fixed(Score.failure("timeout: 1 s", {"tries": 2.0}))


def test_the_weighted_sum() -> None:
    combined = Combined(
        [
            Part(name="a", reward=Fixed(1.0), weight=0.5),
            Part(name="b", reward=Fixed(Score(2.0, {"c": 3.0})), weight=-0.1),
        ]
    )
    score = ask(combined, "")
    assert score.value == pytest.approx(0.3)
    assert score.parts == {"a": 1.0, "b": 2.0, "b.c": 3.0}
    assert repr(combined) == "<Combined 0.5 a + -0.1 b>"


def test_a_failed_part_fails_the_whole() -> None:
    combined = Combined([Part(name="a", reward=Fixed(1.0)), Part(name="b", reward=FAILED)])
    score = ask(combined, "")
    assert score.failed == "b: timeout: 1 s"
    assert score.parts == {"a": 1.0, "b.tries": 2.0}


def test_unless_it_is_optional() -> None:
    combined = Combined([Part(name="a", reward=Fixed(1.0)), Part(name="b", reward=FAILED, optional=True)])
    assert ask(combined, "") == Score(1.0, {"a": 1.0, "b.tries": 2.0})


def test_gates() -> None:
    behind = Fixed(1.0)
    for value, expected in [(1.0, Score(1.0, {"g": 1.0, "a": 1.0})), (0.0, Score(0.0, {"g": 0.0}))]:
        behind.asked = 0
        combined = Combined(
            [Part(name="a", reward=behind), Part(name="g", reward=Fixed(value), gate=True, weight=9.0)]
        )
        assert ask(combined, "") == expected
        assert behind.asked == value
    shut = Combined([Part(name="a", reward=behind), Part(name="g", reward=FAILED, gate=True)])
    assert ask(shut, "").failed == "g: timeout: 1 s", "not 0: the gate could not tell"


def test_an_error_ends_the_other_parts() -> None:
    slow = Fixed(1.0, delay=100.0)
    combined = Combined(
        [Part(name="a", reward=slow), Part(name="b", reward=Fixed(ConfigError("no such module"), delay=0.01))]
    )
    with pytest.raises(ConfigError, match="no such module"):
        run(combined(prompt(), Sample(text="")))
    assert slow.cancelled == 1


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [Part(name="g", reward=FAILED, gate=True)],
        [Part(name="a", reward=FAILED), Part(name="a", reward=FAILED)],
        [Part(name="a", reward=FAILED, weight=float("nan"))],
        [Part(name="a", reward=FAILED), Part(name="b", reward=FAILED, gate=True, optional=True)],
    ],
)
def test_parts_that_make_no_whole(parts: list[Part]) -> None:
    with pytest.raises(ConfigError):
        Combined(parts)


# -- as a text ----------------------------------------------------------------------------------------


def test_items() -> None:
    assert parse("math:1.0,format:0.2") == (RewardSpec("math"), RewardSpec("format", weight=0.2))
    assert parse(" math ") == (RewardSpec("math"),)
    assert parse("format(answer_tags=false):gate, my.own:grade (limit=3) :-.5e1?") == (
        RewardSpec("format", {"answer_tags": "false"}, gate=True),
        RewardSpec("my.own:grade", {"limit": "3"}, -5.0, optional=True),
    )
    assert parse("""regex(pattern='a,(b)"', limit=2)""")[0].options == {"pattern": 'a,(b)"', "limit": "2"}
    assert parse("service(url=http://a:1/x?y)")[0].options == {"url": "http://a:1/x?y"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "name of a reward at its end"),
        ("math,", "name of a reward at its end"),
        ("math:1,,x", "name of a reward at ',x'"),
        ("math:", "at ':'"),
        ("math:high", "behind the reward 'math' there must be a weight"),
        ("math 1", "at '1'"),
        ("math:1?x", "at 'x'"),
        ("math()", "an option, name=value at ')'"),
        ("math(limit)", "name=value at 'limit)'"),
        ("math(limit=1", "a comma or ) at its end"),
        ("math(limit=1,limit=2)", "'limit' is given twice"),
        ("mth", "did you mean 'math'?"),
        ("math(colum=x)", "did you mean 'column'?; it has column, limit"),
        ("math(limit=soon)", "Expected `float`"),
        ("overlong(longest=5)", "`buffer`"),
        ("overlong(longest=5,buffer=6)", "between 1 and longest"),
        ("code(partial=perhaps)", "Expected `bool`"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        for spec in parse(text):
            configured(spec)
    assert said in str(caught.value)


@given(
    st.lists(
        st.builds(
            RewardSpec,
            st.sampled_from([*KINDS, "my.module:function"]),
            st.dictionaries(
                st.from_regex(r"[a-z_]{1,5}", fullmatch=True), st.text('ab,(=)" .:', max_size=5), max_size=3
            ),
            st.floats(-1e6, 1e6),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=40)
def test_every_item_is_read_as_it_was_written(specs: list[RewardSpec]) -> None:
    def written(spec: RewardSpec) -> str:
        options = ",".join(f"{name}='{value}'" for name, value in spec.options.items())
        given = f"({options})" if options else ""
        return f"{spec.name}{given}:{spec.weight!r}{'?' if spec.optional else ''}"

    assert parse(",".join(map(written, specs))) == tuple(specs)


@given(st.text(alphabet="math:gate,()='?1. ", max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        for spec in parse(text):
            configured(spec)
    except ConfigError:
        pass


def test_parts_have_names_of_their_own() -> None:
    assert names(parse("regex(pattern=a),math,regex(pattern=b)")) == ["regex", "math", "regex-2"]


def test_open_rewards() -> None:
    text = "exact,format(answer_tags=false):gate,tests.rollout.misbehaving:by_length:0.1"

    async def scenario() -> None:
        async with open_rewards(text, workers=1) as reward:
            row = prompt(answer="right")
            function = "tests.rollout.misbehaving:by_length"
            good = await reward(row, Sample(text="<think>a</think>right"))
            assert good.value == pytest.approx(1.0 + 0.1 * 21)
            assert good.parts == {
                "format": 1.0,
                "exact": 1.0,
                function: 21.0,
                f"{function}.position": 0.0,
            }
            assert await reward(row, Sample(text="right")) == Score(0.0, {"format": 0.0})
        with pytest.raises(ConfigError):
            async with open_rewards("regex(pattern=[)"):
                pass

    run(scenario())


def test_open_rewards_over_http(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_text("Is {response} right?")
    scored = raw(http(200, orjson.dumps({"scores": [0.5]})))

    async def scenario() -> None:
        async with (
            ScriptedEngine(default=answer("[[5]]")) as model,
            ScriptedEngine(default=scored) as service,
        ):
            judge = f"judge(url={model.url},template={template},temperature=0)"
            text = f"service(url={service.url},path=/s):2,{judge}"
            async with open_rewards(text, workers=1) as reward:
                score = await reward(prompt(), Sample(text="it"))
                assert score.value == 1.5
            assert model.calls[0].json["messages"][0]["content"] == "Is it right?"
            assert model.calls[0].json["temperature"] == 0
        with pytest.raises(ConfigError, match="cannot be read"):
            async with open_rewards("judge(url=http://127.0.0.1:1,template=/nowhere)"):
                pass

    run(scenario())


def test_open_rewards_with_programs() -> None:
    async def scenario() -> None:
        async with open_rewards("code(cpu=3,partial=true)", workers=1) as reward:
            row = prompt(tests=["assert x == 1", "assert x == 2"])
            assert (await reward(row, Sample(text="```python\nx = 1\n```"))).value == 0.5

    run(scenario())
