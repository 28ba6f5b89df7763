"""What the command line says: distributions and chaos specs, and the faults that are drawn from them."""

from __future__ import annotations

from random import Random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.scripted.chaos import Chaos, Draws, Fault, Kill
from penstock.scripted.config import ScriptedArgs
from penstock.scripted.distribution import Distribution, seconds


@pytest.mark.parametrize(
    ("text", "value"), [("10ms", 0.01), ("1.5s", 1.5), ("2min", 120.0), ("250us", 0.00025), ("0", 0.0)]
)
def test_a_time_has_a_unit(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["10", "ms", "-1s", "10 ms", "10h", "1e999", "", "nan"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no time"):
        seconds(text)


@pytest.mark.parametrize(
    ("text", "mean"),
    [
        ("200", 200.0),
        ("fixed:value=200", 200.0),
        ("uniform:low=100,high=300", 200.0),
        ("exponential:mean=200", 200.0),
        ("normal:mean=200,std=20", 200.0),
        ("lognormal:mean=200,sigma=0.8", 200.0),
        ("lognormal:sigma=0.8,mean=200", 200.0),
    ],
)
def test_the_mean_is_that_of_the_values(text: str, mean: float) -> None:
    distribution = Distribution.of_numbers(text)
    assert distribution.mean == mean
    random = Random(1)
    values = [distribution.sample(random) for _ in range(20_000)]
    assert min(values) >= 0
    assert fmean(values) == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gamma:mean=2", "no distribution 'gamma'"),
        ("lognormal:mean=200", "lognormal:mean=…,sigma=…"),
        ("uniform:low=5,high=1", "low is above its high"),
        ("lognormal:mean=0,sigma=1", "mean must be above 0"),
        ("fixed:value=2,value=3", "fixed:value=…"),
        ("fixed:value=x", "'x' is not a number"),
    ],
)
def test_what_is_no_distribution_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Distribution.of_numbers(text)


def test_a_chaos_spec() -> None:
    spec = "reset:0.01,stall:0.001:for=5s,503:0.05:retry_after=2,slow:1:by=200ms:seed=7,kill:every=20s"
    assert Chaos.parse(spec) == Chaos(
        faults=(
            Fault("reset", 0.01),
            Fault("stall", 0.001, duration=5.0),
            Fault("503", 0.05, status=503, retry_after=2.0),
            Fault("slow", 1.0, duration=0.2, seed=7),
        ),
        kill=Kill(every=20.0, down=1.0),
    )
    assert Chaos.parse("") == Chaos()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("rest:0.1", "no fault 'rest'; did you mean reset"),
        ("reset", "give its probability first"),
        ("reset:1.5", "above 1"),
        ("reset:-1", "not a number"),
        ("reset:nan", "not a number"),
        ("reset:0.1,reset:0.2", "given twice"),
        ("200:0.1", "from 400 to 599"),
        ("503:0.1:after=2", "'after=2' is none of its settings: retry_after, seed"),
        ("slow:0.1", "say how late"),
        ("reset:0.1:for=2s", "none of its settings"),
        ("kill:0.1", "none of its settings"),
        ("kill:down=1s", "say how often"),
        ("kill:every=9s:first=1", "no time"),
        ("kill:every=1s:down=2s", "down for less"),
        ("kill:every=0s", "down for less"),
    ],
)
def test_what_is_no_chaos_spec_is_refused_by_name(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Chaos.parse(spec)


@given(st.text(alphabet="reststall5037:,=.killevry_half 1s", max_size=40))
def test_any_spec_is_read_or_refused(spec: str) -> None:
    try:
        chaos = Chaos.parse(spec)
    except ConfigError:
        return
    assert all(0 <= fault.probability <= 1 for fault in chaos.faults)


def test_a_fault_added_does_not_change_when_the_others_strike() -> None:
    def struck(spec: str, name: str) -> list[int]:
        draws = Draws(Chaos.parse(spec).faults, seed=5)
        drawn = [draws.draw() for _ in range(5000)]
        return [number for number, fault in enumerate(drawn) if fault is not None and fault.name == name]

    alone = struck("reset:0.05", "reset")
    assert len(alone) == pytest.approx(250, abs=50)
    assert struck("reset:0.05,503:0.2", "reset") == alone
    assert set(struck("503:0.2,reset:0.05", "reset")) < set(alone)
    assert struck("reset:0.05:seed=6", "reset") != alone


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"itl": "10"}, "--itl: '10' is no time"),
        ({"ttft": "lognormal:mean=1"}, "--ttft"),
        ({"length": "x"}, "--length"),
        ({"chaos": "boom:1"}, "--chaos 'boom:1'"),
        ({"max_model_len": 1000, "kv_tokens": 512}, "512 tokens the KV cache holds"),
        ({"served_model_name": ()}, "needs a name"),
        ({"itl": "0"}, "must be above 0"),
    ],
)
def test_a_bad_flag_is_refused_in_one_sentence(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        ScriptedArgs(**change).config()  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
