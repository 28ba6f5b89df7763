"""The rules of policy versions, against a model of engines that says what their weights really are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.errors import ConfigError
from penstock.fleet.versions import Versions

NAMES = ("a", "b", "c")


class Real:
    """An engine: what its weights are, what it says they are."""

    def __init__(self) -> None:
        self.weights: Any = 0
        self.label: int | None = 0

    def restart(self) -> None:
        self.weights, self.label = 0, 0


class VersionRules(RuleBasedStateMachine):
    """Whatever happens in whatever order, an admitted engine has the fleet's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: Versions[str] = Versions()
        self.real: dict[str, Real] = {}
        self.update: int | None = None
        self.committing: set[str] = set()
        self.committed: list[int] = []

    @rule(name=st.sampled_from(NAMES))
    def join(self, name: str) -> None:
        if name not in self.real and name not in self.committing:
            self.real[name] = Real()
            self.versions.join(name)

    @rule(name=st.sampled_from(NAMES))
    def leave(self, name: str) -> None:
        self.versions.leave(name)
        self.real.pop(name, None)

    @rule(name=st.sampled_from(NAMES), restarted=st.booleans())
    def away_and_back(self, name: str, restarted: bool) -> None:
        """Down for a while: the same process, or a new one."""
        if name in self.real and name not in self.committing:
            if restarted:
                self.real[name].restart()
            self.versions.returned(name)

    @rule(name=st.sampled_from(NAMES))
    def ask(self, name: str) -> None:
        if name in self.real and name not in self.committing:
            self.versions.observe(name, self.real[name].label)

    @rule(name=st.sampled_from(NAMES))
    def lose(self, name: str) -> None:
        """Its weights are dropped, but not what it says of them."""
        if name in self.real and name not in self.committing:
            self.real[name].weights = "none"
            self.versions.spoil(name)

    @precondition(lambda self: self.update is None)
    @rule(more=st.sampled_from([None, 1, 3]))
    def begin(self, more: int | None) -> None:
        version = self.versions.following(None if more is None else self.versions.fleet + more)
        self.update = version
        self.committing = set(self.real)
        for name in self.committing:
            self.versions.commit(name)

    @precondition(lambda self: self.committing)
    @rule(
        data=st.data(), how=st.sampled_from(["done", "refused", "unanswered, done", "unanswered, half done"])
    )
    def end(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.committing)))
        self.committing.discard(name)
        assert self.update is not None
        if name in self.real:
            real = self.real[name]
            if how in ("done", "unanswered, done"):
                real.weights = real.label = self.update
            elif how == "unanswered, half done":
                real.weights = "a mixture"
        if how == "done":
            self.versions.committed(name, self.update)
            self.committed.append(self.update)
        elif how == "refused":
            self.versions.kept(name)
        else:
            self.versions.spoil(name)

    @precondition(lambda self: self.update is not None and not self.committing)
    @rule()
    def over(self) -> None:
        self.update = None

    @precondition(lambda self: self.update is None)
    @rule(name=st.sampled_from(NAMES))
    def catch_up(self, name: str) -> None:
        if name in self.real and self.versions.behind(name):
            self.versions.commit(name)
            assert not self.versions.admits(name)
            self.real[name].weights = self.real[name].label = self.versions.fleet
            self.versions.committed(name, self.versions.fleet)
            assert self.versions.admits(name)

    @invariant()
    def admitted_have_the_fleets_weights(self) -> None:
        for name, real in self.real.items():
            if self.versions.admits(name):
                assert real.weights == self.versions.fleet == self.versions.version(name)
                assert name not in self.committing

    @invariant()
    def the_fleet_is_where_the_last_commit_was(self) -> None:
        assert self.versions.fleet == max(self.committed, default=0)

    @invariant()
    def nobody_is_forgotten(self) -> None:
        for name in self.real:
            ways = [self.versions.admits(name), self.versions.behind(name), name in self.committing]
            assert sum(ways) == 1


TestVersionRules = VersionRules.TestCase
TestVersionRules.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_a_version_comes_after_the_one_before() -> None:
    versions: Versions[str] = Versions()
    versions.join("a")
    versions.commit("a")
    versions.committed("a", 7)
    assert versions.following(None) == 8
    assert versions.following(20) == 20
    for wrong in (7, 0, -1):
        with pytest.raises(ConfigError, match="at version 7"):
            versions.following(wrong)


def test_a_tainted_engine_is_not_believed_even_when_it_was_away() -> None:
    versions: Versions[str] = Versions()
    for name in "ab":
        versions.join(name)
        versions.commit(name)
    versions.committed("a", 1)
    versions.spoil("b")
    versions.returned("b")
    versions.observe("b", 1)
    assert versions.behind("b")
    versions.commit("b")
    versions.committed("b", 1)
    assert versions.admits("b")
