"""The registry and its followers: rules on a clock of their own, without Ray."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penstock.cluster.registry import EXPIRY, REMEMBERED, Changes, Entry, Followed, Registry, State


def entry(name: str, version: int | None = 0, state: State = "ready") -> Entry:
    return Entry(
        replica=name, index=0, url=f"http://{name}", engine="embedded", model="m", node="n",
        policy_version=version, state=state,
    )  # fmt: skip


def names(registry: Registry) -> list[str]:
    return [one.replica for one in registry.snapshot().entries]


def settled() -> Registry:
    registry = Registry("epoch", 0.0)
    registry.expire(EXPIRY)
    return registry


def test_an_engine_that_says_the_same_again_changes_nothing() -> None:
    registry = settled()
    assert registry.announce(entry("a"), EXPIRY)
    before = registry.revision
    registry.announce(entry("a"), EXPIRY + 1)
    assert registry.revision == before
    registry.announce(entry("a", version=1), EXPIRY + 1)
    assert registry.revision == before + 1


def test_an_engine_that_is_not_heard_of_is_out_and_may_come_back() -> None:
    registry = settled()
    registry.announce(entry("a"), 100.0)
    registry.announce(entry("b"), 100.0)
    registry.announce(entry("b"), 103.0)
    assert registry.next_look(103.0) == EXPIRY - 3
    registry.expire(100.0 + EXPIRY)
    assert names(registry) == ["b"]
    assert registry.announce(entry("a"), 107.0)
    assert names(registry) == ["a", "b"]


def test_what_was_taken_out_by_name_stays_out() -> None:
    registry = settled()
    registry.announce(entry("a"), 10.0)
    registry.leave("a", 11.0)
    assert not registry.announce(entry("a"), 11.1), "its beat was on the way"
    assert names(registry) == []
    registry.expire(11.0 + REMEMBERED)
    assert "a" not in registry._gone, "memory is bounded"


def test_the_first_engine_with_new_weights_moves_the_policy_version() -> None:
    registry = settled()
    for name in "ab":
        registry.announce(entry(name), 10.0)
    registry.announce(entry("a", version=1), 10.0)
    snapshot = registry.snapshot()
    assert snapshot.policy_version == 1
    assert [one.replica for one in snapshot.current()] == ["a"]
    registry.announce(entry("b", version=1), 10.0)
    assert len(registry.snapshot().current()) == 2


def test_a_follower_takes_nothing_out_while_a_restarted_registry_has_not_heard_of_all() -> None:
    old = settled()
    for name in "ab":
        old.announce(entry(name), 10.0)
    followed = Followed()
    assert set(followed.take(old.snapshot()).join) == {"http://a", "http://b"}
    new = Registry("another", 20.0)
    assert followed.take(new.snapshot()) == Changes((), (), ())
    new.announce(entry("a"), 20.5)
    new.announce(entry("c"), 20.5)
    assert followed.take(new.snapshot()) == Changes((), (), ("http://c",))
    for beat in (20.5, 25.0):
        new.announce(entry("a"), beat)
        new.announce(entry("c"), beat)
    new.expire(20.0 + EXPIRY)
    assert followed.take(new.snapshot()) == Changes(("http://b",), (), ())


def test_a_follower_drains_what_is_to_go_and_what_has_missed_an_update() -> None:
    registry, followed, whole = settled(), Followed(), Followed(all_versions=True)
    for name in "abc":
        registry.announce(entry(name), 10.0)
    followed.take(registry.snapshot())
    whole.take(registry.snapshot())
    registry.announce(entry("a", state="draining"), 10.0)
    registry.announce(entry("b", version=1), 10.0)
    changes = followed.take(registry.snapshot())
    assert (changes.leave, set(changes.drain), changes.join) == ((), {"http://a", "http://c"}, ())
    assert whole.take(registry.snapshot()) == Changes((), ("http://a",), ()), "it brings c up to date"
    registry.announce(entry("c", version=1), 10.0)
    assert followed.take(registry.snapshot()).join == ("http://c",)


def test_another_engine_at_the_same_address_is_another_member() -> None:
    registry, followed = settled(), Followed()
    registry.announce(entry("a"), 10.0)
    followed.take(registry.snapshot())
    registry.leave("a", 11.0)
    registry.announce(msgspec.structs.replace(entry("b"), url="http://a"), 11.0)
    assert followed.take(registry.snapshot()) == Changes(("http://a",), (), ("http://a",))


NAMES = st.sampled_from("abcd")


class Story(RuleBasedStateMachine):
    """A registry that may lose its memory, engines that beat while they live, and a follower that polls."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.epochs = 0
        self.registry = Registry("0", 0.0)
        self.followed = Followed()
        self.alive: dict[str, Entry] = {}
        self.dead = 0
        self.revisions: dict[str, tuple[int, object]] = {}

    def beat(self) -> None:
        for one in self.alive.values():
            assert self.registry.announce(one, self.now)

    @rule(name=NAMES)
    def birth(self, name: str) -> None:
        if name not in self.alive:
            self.dead += 1
            self.alive[name] = entry(f"{name}{self.dead}")
            self.beat()

    @rule(name=NAMES, told=st.booleans())
    def death(self, name: str, told: bool) -> None:
        one = self.alive.pop(name, None)
        if one is not None and told:
            self.registry.leave(one.replica, self.now)

    @rule(seconds=st.sampled_from([0.5, 1.0]))
    def time(self, seconds: float) -> None:
        self.now += seconds
        self.beat()
        self.registry.expire(self.now)

    @rule()
    def amnesia(self) -> None:
        self.epochs += 1
        self.registry = Registry(str(self.epochs), self.now)

    @rule()
    def poll(self) -> None:
        self.followed.take(self.registry.snapshot())
        assert len(set(self.followed.urls)) == len(self.followed.urls)

    @rule()
    def calm(self) -> None:
        """After the longest silence everybody knows who lives."""
        for _ in range(int(EXPIRY) + 1):
            self.time(1.0)
        self.poll()
        assert set(self.followed.urls) == {one.url for one in self.alive.values()}

    @invariant()
    def revisions_tell_of_each_change(self) -> None:
        snapshot = self.registry.snapshot()
        seen = self.revisions.get(snapshot.epoch)
        if seen is not None and seen[0] == snapshot.revision:
            assert seen[1] == snapshot
        assert seen is None or snapshot.revision >= seen[0]
        self.revisions[snapshot.epoch] = snapshot.revision, snapshot


TestStory = Story.TestCase
