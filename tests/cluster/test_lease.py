"""Leases as a state machine: one holder a shard, nothing counted twice, nothing forgotten."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penstock.cluster.lease import Lease, Leases

SHARDS = 5
TERM = 10.0
LOSSES = 3
WORKERS = st.sampled_from(["a", "b", "c"])


class LeaseMachine(RuleBasedStateMachine):
    """Workers come, work, hang, die and answer late; every lease ever granted may still be spoken of."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.numbers = 0
        self.leases = Leases(SHARDS, epoch=self.number, term=TERM, losses=LOSSES)
        self.held: dict[int, Lease] = {}
        self.until: dict[int, float] = {}
        self.granted: list[Lease] = []
        self.returned: set[int] = set()
        """Shards that were last given back, so that their epoch goes on."""
        self.lost = [0] * SHARDS
        self.over: set[int] = set()

    def number(self, shard: int) -> int:
        self.numbers += 1
        return self.numbers

    @rule(worker=WORKERS)
    def grant(self, worker: str) -> None:
        lease = self.leases.grant(worker, self.now)
        if lease is None:
            assert len(self.held) + len(self.over) + self.given_up() == SHARDS
            return
        assert lease.shard not in self.held and lease.shard not in self.over
        earlier = [old.epoch for old in self.granted if old.shard == lease.shard]
        if lease.shard in self.returned:
            assert lease.epoch == max(earlier), "the files go on"
        else:
            assert all(lease.epoch > old for old in earlier), "a holder that was lost may still be writing"
        self.returned.discard(lease.shard)
        self.held[lease.shard], self.until[lease.shard] = lease, self.now + TERM
        self.granted.append(lease)

    @rule(data=st.data(), what=st.sampled_from(["renew", "finish", "give_back"]))
    def speak(self, data: st.DataObject, what: str) -> None:
        if not self.granted:
            return
        lease = data.draw(st.sampled_from(self.granted))
        valid = self.held.get(lease.shard) == lease
        if what == "renew":
            assert self.leases.renew(lease, self.now) == valid
            if valid:
                self.until[lease.shard] = self.now + TERM
            return
        accepted = self.leases.finish(lease) if what == "finish" else self.leases.give_back(lease)
        assert accepted == valid
        if valid:
            del self.held[lease.shard], self.until[lease.shard]
            (self.over if what == "finish" else self.returned).add(lease.shard)

    @rule(worker=WORKERS)
    def die(self, worker: str) -> None:
        mine = {lease for lease in self.held.values() if lease.worker == worker}
        assert set(self.leases.lose(worker)) == mine
        self.forget(mine)

    @rule(seconds=st.floats(0.0, 2 * TERM))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        late = {self.held[shard] for shard, until in self.until.items() if until <= self.now}
        assert set(self.leases.expire(self.now)) == late
        self.forget(late)

    def forget(self, lost: set[Lease]) -> None:
        for lease in lost:
            del self.held[lease.shard], self.until[lease.shard]
            self.lost[lease.shard] += 1

    def given_up(self) -> int:
        return sum(lost >= LOSSES for lost in self.lost)

    @invariant()
    def every_shard_is_in_one_place(self) -> None:
        leases = self.leases
        assert leases.leased == len(self.held)
        assert leases.over == self.over
        assert len(leases.given_up) == self.given_up()
        assert leases.waiting + leases.leased + len(leases.over) + len(leases.given_up) == SHARDS
        assert leases.settled == (len(self.over) + self.given_up() == SHARDS)


TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_lost_shard_is_the_next_one_granted() -> None:
    leases = Leases(3, epoch=lambda shard: 0)
    first = leases.grant("a", 0.0)
    leases.lose("a")
    again = leases.grant("b", 1.0)
    assert first is not None and again is not None and again.shard == first.shard
