"""Conditions, comparisons and tables say what the points hold."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from penstock.errors import ConfigError, WriteFailed
from penstock.loadtest.account import Account
from penstock.loadtest.bench import Result
from penstock.loadtest.files import load, save
from penstock.loadtest.histogram import Histogram
from penstock.loadtest.metrics import Latency, Moment, Point, Usage, latency_of
from penstock.loadtest.tables import added, change, print_comparison, print_result
from penstock.loadtest.values import Condition, failures, value_of


def latency(*seconds: float) -> Latency:
    histogram = Histogram()
    histogram.extend(seconds)
    return latency_of(histogram)


def point(layer: str = "engine", concurrency: int = 10, delay: float = 0.0, **more: object) -> Point:
    asker = "client" if layer.startswith("client") else "generator"
    usage = {asker: Usage(0.1, 40.0 + 100 * (asker == "client"), 4.0, 50.0, 1.0)}
    if layer in ("router", "client"):
        usage["router"] = Usage(0.2, 80.0, 8.0, 40.0, 1.0)
    fields: dict[str, object] = {
        "layer": layer, "load": f"{concurrency} in flight", "concurrency": concurrency, "request_rate": None,
        "invalid": [], "duration": 2.0, "sent": 100, "completed": 100, "errors": {}, "input_tokens": 1000,
        "output_tokens": 2000, "chunks": 2000, "request_throughput": 50.0, "output_throughput": 1000.0,
        "goodput": None, "send_delay_p99_ms": 0.1, "connections_opened": 10, "resets": 0, "retries": 0,
        "latency": {
            "ttft": latency(0.05 + delay, 0.06 + delay), "tpot": latency(0.01), "itl": latency(0.01, 0.012),
            "e2el": latency(*(0.2 + delay + n / 1000 for n in range(100))),
        },
        "usage": usage, "timeline": [Moment(n, 50, 50, 0, 1000, 240.0, 290.0) for n in range(2)],
        **more,
    }  # fmt: skip
    return Point(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("errors>0", False), ("errors>=0", True), ("sent==100", True), ("completed!=100", False),
        ("error_rate>1%", False), ("p50_e2el>0.24s", True), ("p50_e2e > 260ms", False),
        ("p99_e2el<400", True),
        ("p95.5_ttft>59000us", True), ("mean_itl>=11.1", False), ("request_throughput<51", True),
        ("invalid>0", False),
    ],
)  # fmt: skip
def test_conditions(text: str, met: bool) -> None:
    assert Condition.parse(text).met_by(point()) is met


def test_failures_name_the_point_and_the_value() -> None:
    bad = point(layer="router", errors={"Overloaded 429": 3})
    found = failures([point(), bad], [Condition.parse("errors>0")])
    assert found == ["router at 10 in flight: errors>0 (errors is 3)"]


@pytest.mark.parametrize("text", ["lost>0", "goodput<1"])
def test_what_was_not_measured_does_not_pass_unseen(text: str) -> None:
    with pytest.raises(ConfigError, match="not measured"):
        Condition.parse(text).met_by(point())


@given(st.text(max_size=20))
def test_any_text_is_a_condition_or_a_sentence(text: str) -> None:
    try:
        Condition.parse(text)
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize(
    "text", ["errors", "errors>", "errors>1ms", "p99_e2el>2%", "error>0", "p99_foo>1", "a>.."]
)
def test_wrong_conditions_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Condition.parse(text)


def test_what_each_layer_adds() -> None:
    points = [
        point(),
        point("router", delay=0.01),
        point("client", delay=0.03, errors={"ConnectFailed": 2}),
        point("client-engine", delay=0.02),
        point("engine", 20),
    ]
    steps = {step.part: step for step in added(points)}
    assert {name: step.e2el_p50 for name, step in steps.items()} == pytest.approx(
        {"router": 10, "client": 20, "client alone": 20}, abs=0.5
    )
    assert {name: (step.cpu_us_per_request, step.cpu_us_per_chunk) for name, step in steps.items()} == {
        "router": (80, 8), "client": (100, 0), "client alone": (100, 0),
    }  # fmt: skip
    assert [step.errors for step in steps.values()] == [0, 2, 0]


def printed(result: Result, other: Result | None = None) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    if other is None:
        print_result(result, console)
    else:
        print_comparison(result, other, console)
    return console.export_text()


def test_the_first_line_says_whether_the_result_can_be_trusted() -> None:
    good = Result(points=[point(), point("router")])
    assert printed(good).splitlines()[0].startswith("valid: ")
    bad = Result(points=[point(), point("router", invalid=["it was late"])])
    lines = printed(bad).splitlines()
    assert lines[0] == "INVALID: the load generator was the bottleneck in 1 of 2 points"
    assert "router at 10 in flight: it was late" in lines[1]
    assert "…" not in printed(bad), "the tables fit into a hundred columns"


def test_notes_tell_of_errors_and_of_lost_generations() -> None:
    account = Account(9, 1, 2, 3, {"lost": ["bench.a.1"]})
    text = printed(Result(points=[point(errors={"Overloaded 429": 3, "Unfinished": 5}, account=account)]))
    assert "errors: 5 Unfinished, 3 Overloaded 429" in text
    assert "1 lost, 2 duplicated, 3 orphaned (lost: bench.a.1)" in text


def test_two_results_side_by_side() -> None:
    first = Result(points=[point(), point("router")], settings={"num_engines": 2, "out": "a", "seed": 1})
    second = Result(points=[point(delay=0.1), point("client")], settings={"out": "b", "seed": 1})
    text = printed(first, second)
    assert "num_engines: A 2, B default" in text and "seed" not in text and "out:" not in text
    assert "only in A: router at 10 in flight" in text and "only in B: client at 10 in flight" in text
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("p50_e2el"))
    assert float(row[-1].rstrip("%")) == pytest.approx(40, abs=2)


@pytest.mark.parametrize(
    ("one", "two", "shown"),
    [(1.0, 1.0, "="), (100, 101, "≈"), (100, 150, "+50.0%"), (0, 3, "+3"), (None, 1, "–"), (2, 1, "-50.0%")],
)
def test_changes(one: float | None, two: float | None, shown: str) -> None:
    assert change(one, two) == shown


def test_results_survive_their_file(tmp_path: Path) -> None:
    result = Result(settings={"a": 1}, points=[point(account=Account(1, 0, 0, 0))])
    path = tmp_path / "result.json"
    save(result, path)
    assert load(path) == result
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert value_of(load(path).points[0], "p97_e2el") == pytest.approx(296, abs=1)
    path.write_bytes(msgspec.json.encode({"format": 99, "points": []}))
    with pytest.raises(ConfigError, match="format 99"):
        load(path)
    for text in ("", "[]", '{"points": [1]}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no result"):
            load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "nowhere")
    with pytest.raises(WriteFailed):
        save(result, tmp_path / "no" / "folder.json")
