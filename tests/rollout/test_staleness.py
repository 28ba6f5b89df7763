"""The rules of staleness: nothing too old is ever trained on, and nothing waits for ever."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.rollout.staleness import Staleness


def fill(rules: Staleness[int], first: int = 0) -> list[int]:
    """Begins as many groups as may be."""
    begun: list[int] = []
    while rules.capacity:
        rules.admit(first + len(begun))
        begun.append(first + len(begun))
    return begun


def update(rules: Staleness[int]) -> None:
    rules.trainer_at(rules.trainer_version + 1)
    rules.engines_at(rules.trainer_version)


@pytest.mark.parametrize("async_steps", [0, 1, 3])
def test_the_capacity_is_that_of_queue_and_flight_together(async_steps: int) -> None:
    rules: Staleness[int] = Staleness(async_steps, 4)
    begun = fill(rules)
    assert len(begun) == (async_steps + 1) * 4
    for key in begun[:4]:
        rules.finished(key, None)
    assert rules.capacity == 0, "ready and not trained on still counts"
    for key in begun[:4]:
        assert rules.taken(key) == 0
    assert rules.capacity == 0, "what is begun now would be trained on after the update"
    update(rules)
    assert len(fill(rules, 100)) == 4


def test_what_is_due_is_waited_for_and_newer_groups_are_not_taken_in_its_place() -> None:
    rules: Staleness[int] = Staleness(1, 2)
    assert fill(rules) == [0, 1, 2, 3]
    for key in (0, 1):
        rules.finished(key, 0)
        rules.taken(key)
    update(rules)
    assert fill(rules, 4) == [4, 5]  # due at 2; groups 2 and 3 are due now
    rules.finished(4, 1)
    rules.finished(2, 0)
    assert rules.pick(2) is None, "group 3 would be too old in the next batch"
    assert rules.pick(1) == [2] and rules.taken(2) == 1
    assert rules.pick(1) is None, "the other place of this batch is group 3's"
    rules.finished(3, None)
    assert rules.pick(1) == [3]
    rules.taken(3)
    rules.wanted(1)  # one more before the update: then the next is as good as any
    assert rules.pick(1) == [4]


def test_a_group_that_was_made_later_than_it_was_begun_is_due_later() -> None:
    rules: Staleness[int] = Staleness(1, 1)
    fill(rules)
    rules.finished(0, 0)
    rules.taken(0)
    update(rules)
    rules.finished(1, 1)
    update(rules)
    assert rules.age(1) == 1 and not rules.overdue()
    update(rules)
    assert rules.overdue() == [1]


def test_nothing_is_begun_while_the_engines_weights_are_too_old() -> None:
    rules: Staleness[int] = Staleness(0, 2)
    rules.trainer_at(1)
    assert rules.capacity == 0
    rules.engines_at(1)
    assert rules.capacity == 2


def test_a_trainer_that_takes_more_than_a_batch_gets_it() -> None:
    rules: Staleness[int] = Staleness(0, 2)
    for key in fill(rules):
        rules.finished(key, 0)
        rules.taken(key)
    assert rules.capacity == 0
    rules.wanted(5)
    assert rules.capacity == 6, "whole batches"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="async_steps"):
        Staleness(-1, 1)
    with pytest.raises(ConfigError, match="batch_groups"):
        Staleness(0, 0)


@settings(max_examples=400, deadline=None)
@given(
    async_steps=st.integers(0, 3),
    batch_groups=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    drops=st.sampled_from([0.0, 0.2]),
    split=st.booleans(),
    whole=st.booleans(),
)
def test_no_token_is_too_old_and_there_is_always_a_way_on(
    async_steps: int, batch_groups: int, seed: int, drops: float, split: bool, whole: bool
) -> None:
    """Groups finish in any order, some fail, updates take their time while groups go on; the trainer takes
    whole batches. At every moment something can happen that leads on."""
    dice = random.Random(seed)
    rules: Staleness[int] = Staleness(async_steps, batch_groups)
    begun, updating, trained = 0, False, 0
    made_by: dict[int, int] = {}
    while rules.trainer_version < 12:
        ways = []
        if rules.capacity:
            ways.append("begin")
        if flying := [key for key, held in rules.groups.items() if not held.ready]:
            ways.append("finish")
        count = batch_groups if whole else 1
        picked = rules.pick(count) if rules.handed + count <= batch_groups else None
        if picked:
            ways.append("take")
        if updating:
            ways.append("commit")
        elif rules.handed == batch_groups:
            ways.append("update")
        assert ways, rules
        match dice.choice(ways):
            case "begin":
                made_by[begun] = rules.engine_version
                rules.admit(begun)
                begun += 1
            case "finish":
                key = dice.choice(flying)
                if dice.random() < drops:
                    rules.dropped(key)
                    continue
                if dice.random() < 0.5:  # it had waited for a slot through an update
                    made_by[key] = rules.engine_version
                rules.finished(key, made_by[key] if dice.random() < 0.5 else None)
            case "take":
                assert picked
                for key in picked:
                    assert rules.taken(key) <= async_steps
                    assert rules.trainer_version - made_by[key] <= async_steps
                trained += len(picked)
            case "update":
                rules.trainer_at(rules.trainer_version + 1)
                assert not rules.overdue()
                updating = True
                if not split:
                    rules.engines_at(rules.trainer_version)
                    updating = False
            case "commit":
                rules.engines_at(rules.trainer_version)
                updating = False
    assert trained == 12 * batch_groups
