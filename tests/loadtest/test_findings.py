"""Each symptom is laid at the lowest layer that shows it, and noise at none."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.loadtest.account import Account
from penstock.loadtest.findings import exceeds, findings
from tests.loadtest.test_values import point

LAYERS = ("engine", "router", "client")
LOST = Account(generated=100, lost=3, duplicated=0, orphaned=0)


def parts(sick: dict[str, dict[str, Any]], layers: tuple[str, ...] = LAYERS) -> list[str]:
    """The parts that are named when these layers have these fields."""
    return [found.part for found in findings([point(layer, **sick.get(layer, {})) for layer in layers])]


@pytest.mark.parametrize(
    ("sick", "layers", "named"),
    [
        (("engine", "router", "client"), LAYERS, ["engine"]),
        (("router", "client"), LAYERS, ["router"]),
        (("client",), LAYERS, ["client"]),
        (("router", "client"), ("router", "client"), ["router or engine"]),
        (("client",), ("client",), ["client, router or engine"]),
        (("client",), ("engine", "client"), ["client or router"]),
        (("client",), ("client-engine", "client"), ["router"]),
        (("client-engine",), ("engine", "client-engine"), ["client"]),
        ((), LAYERS, []),
    ],
)
def test_whose_it_is(sick: tuple[str, ...], layers: tuple[str, ...], named: list[str]) -> None:
    fields: dict[str, Any] = {"account": LOST}
    assert parts(dict.fromkeys(sick, fields), layers) == named
    assert parts(dict.fromkeys(sick, {"errors": {"ConnectFailed": 20}}), layers) == named


def test_a_layer_that_fails_a_little_more_often_by_chance_is_not_named() -> None:
    errors = {layer: {"errors": {"ConnectionLost": n}} for layer, n in zip(LAYERS, (10, 14, 12), strict=True)}
    assert parts(errors) == ["engine"]
    errors["client"] = {"errors": {"ConnectionLost": 40}}
    assert parts(errors) == ["engine", "client"]
    assert exceeds(1, 0) and not exceeds(3, 1) and exceeds(9, 1)


def test_what_failed_on_purpose_is_nobodys_fault() -> None:
    account = Account(5, 0, 0, 0, faults={"kill": 4, "503": 1}, unanswered={"kill": 4, "unseen": 2})
    sick = {"errors": {"ConnectionLost mid-response": 6}}
    assert parts({"router": {**sick, "account": account}}) == ["engine, on purpose"]
    account = Account(5, 0, 0, 0, faults={"503": 1}, unanswered={"503": 1, "unseen": 2})
    assert parts({"router": {**sick, "account": account}}) == ["router"]


def held(*counts: int) -> dict[str, Any]:
    return {"concurrency": 40, "held": [(n / 4, count) for n, count in enumerate(counts)]}


def test_who_holds_requests_back() -> None:
    all_of_them = held(*[40] * 12)
    few = held(*[10] * 12)
    assert parts({"engine": all_of_them, "router": few, "client": few}) == ["router"]
    assert parts({"engine": all_of_them, "router": all_of_them, "client": few}) == ["client"]
    assert parts(dict.fromkeys(LAYERS, few)) == [], "the engines themselves are asked for no more"
    assert parts({"router": few}, ("router",)) == ["router or engine"]
    assert parts({"router": held(10, 10)}, ("router",)) == [], "too few looks"


def test_slots_that_leak_are_told_from_a_load_that_ends() -> None:
    fading = held(40, 40, 38, 35, 30, 20, 10, 5, 1, 0, 0, 0)
    stuck = {"errors": {"Unfinished": 40}}
    (errors, leak) = findings([point(**held(*[40] * 12)), point("router", **{**fading, **stuck})])
    assert (errors.part, leak.part) == ("router", "router") and "slots leak: 40" in leak.what
    assert parts({"engine": held(*[40] * 12), "router": fading}, LAYERS[:2]) == []


def test_a_bottleneck_is_named_with_what_it_used() -> None:
    (found,) = findings([point(), point("router", request_throughput=30.0)])
    assert str(found) == ("router: 40% fewer requests/s than without it (it used 0.20 cores) at 10 in flight")
    assert parts({"router": {"request_throughput": 47.0}}) == []
    assert parts({"router": {"request_throughput": 1.0, "invalid": ["busy"]}}) == []


def test_the_same_at_several_loads_is_one_line() -> None:
    points = [
        point(layer, load, account=LOST if layer == "router" else None)
        for load in (10, 20)
        for layer in LAYERS[:2]
    ]
    (found,) = findings(points)
    assert found.what.count("generations lost") == 2
    assert "at 10 in flight; " in found.what and found.what.endswith("at 20 in flight")
