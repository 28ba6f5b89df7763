"""The queue of rollouts: a request is in one place, and whatever is killed, each is answered once."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.cluster.queue import EXPIRY, Queue, Request, Result
from penstock.prompt import Prompt


def request(number: int, version: int = 0) -> Request:
    return Request(number, number, Prompt(number, None, [], b"{}"), version)


def ids(found: tuple[Request, ...]) -> list[int]:
    return [one.id for one in found]


def test_prompts_are_shared_out_and_none_stands_idle() -> None:
    queue = Queue()
    for worker in "ab":
        queue.take(worker, 0, 8, [], 0.0)
    queue.put(map(request, range(6)))
    assert ids(queue.take("a", 0, 8, [], 0.0).requests) == [0, 1, 2], "its share, though it has room for 8"
    assert ids(queue.take("b", 0, 8, [], 0.0).requests) == [3, 4, 5]


def test_a_worker_with_older_weights_gets_nothing_newer() -> None:
    queue = Queue()
    queue.put([request(0, version=1), request(1, version=0)])
    assert ids(queue.take("old", 0, 8, [], 0.0).requests) == [1]
    assert ids(queue.take("unknown", None, 8, [], 0.0).requests) == []
    assert ids(queue.take("new", 1, 8, [], 0.0).requests) == [0]


def test_what_a_dead_worker_had_comes_first() -> None:
    queue = Queue()
    queue.put([request(0), request(1)])
    assert ids(queue.take("a", 0, 2, [], 0.0).requests) == [0, 1]
    queue.put([request(2)])
    queue.lost("a")
    assert sorted(ids(queue.take("b", 0, 2, [], 0.0).requests)) == [0, 1]
    queue.expire(EXPIRY)
    assert len(queue.take("c", 0, 9, [], EXPIRY).requests) == 3, "b was not heard of"


def test_an_answer_that_was_lost_is_given_again() -> None:
    queue = Queue()
    queue.put([request(0)])
    assert ids(queue.take("a", 0, 1, [], 0.0).requests) == [0]
    assert ids(queue.take("a", 0, 1, [], 1.0).requests) == [0]
    assert ids(queue.take("a", 0, 1, [0], 2.0).requests) == []


def test_what_is_not_wanted_any_longer_is_told_to_who_makes_it() -> None:
    queue = Queue()
    queue.put([request(0), request(1)])
    queue.take("a", 0, 2, [], 0.0)
    queue.cancel([0])
    assert queue.take("a", 0, 0, [0, 1], 0.0).cancelled == (0,)
    queue.done("a", Result(0, b""), 0.0)
    assert queue.fetch(9) == []
    assert queue.take("a", 0, 0, [1], 0.0).cancelled == ()


def test_a_queue_that_has_forgotten_learns_who_makes_what() -> None:
    queue = Queue()
    assert queue.take("a", 0, 0, [5], 0.0) == queue.take("a", 0, 0, [5], 0.0)
    queue.put([request(5), request(6)])
    assert (queue.leased, queue.waiting) == (1, 1)
    queue = Queue()
    queue.put([request(5)])
    queue.take("a", 0, 0, [5], 0.0)
    assert queue.leased == 1
    queue.done("a", Result(5, b"x"), 0.0)
    assert queue.fetch(9) == [Result(5, b"x")]
    assert queue.fetch(9) == [Result(5, b"x")], "until it is known to have arrived"
    queue.fetched([5])
    assert queue.fetch(9) == []


WORKERS = st.sampled_from(["a", "b", "c"])


class Story(RuleBasedStateMachine):
    """Workers that die, answers that are lost, a queue that forgets: whoever asks gets each group once."""

    @initialize()
    def begin(self) -> None:
        self.queue = Queue()
        self.now = 0.0
        self.next = 0
        self.open: set[int] = set()
        self.got: set[int] = set()
        self.hands: dict[str, set[int]] = {}
        self.lives = 0

    @rule(count=st.integers(1, 4))
    def put(self, count: int) -> None:
        fresh = range(self.next, self.next + count)
        self.next += count
        self.open.update(fresh)
        self.queue.put(map(request, fresh))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(sorted(self.open)))
        self.open.discard(one)
        self.queue.cancel([one])

    @rule(worker=WORKERS, room=st.integers(0, 4), lost=st.booleans())
    def take(self, worker: str, room: int, lost: bool) -> None:
        held = self.hands.setdefault(worker, set())
        taken = self.queue.take(worker, 0, room, sorted(held), self.now)
        assert len(taken.requests) <= room
        if not lost:
            held -= set(taken.cancelled)
            assert held.isdisjoint(one.id for one in taken.requests)
            held.update(one.id for one in taken.requests)

    @rule(worker=WORKERS, lost=st.booleans())
    def done(self, worker: str, lost: bool) -> None:
        held = self.hands.get(worker)
        if held:
            one = min(held)
            self.queue.done(worker, Result(one, b""), self.now)
            if not lost:  # else it offers it again
                held.discard(one)

    @rule(lost=st.booleans())
    def fetch(self, lost: bool) -> None:
        results = self.queue.fetch(9)
        if lost:
            return
        for one in results:
            assert one.id in self.open or one.id in self.got, "nobody asked for it any longer"
            self.open.discard(one.id)
            self.got.add(one.id)
        self.queue.fetched([one.id for one in results])

    @rule(worker=WORKERS, told=st.booleans())
    def death(self, worker: str, told: bool) -> None:
        self.hands.pop(worker, None)
        if told:
            self.queue.lost(worker)

    @rule()
    def amnesia(self) -> None:
        self.queue = Queue()
        self.queue.put(map(request, sorted(self.open)))

    @rule(seconds=st.floats(0, EXPIRY))
    def time(self, seconds: float) -> None:
        self.now += seconds
        self.queue.expire(self.now)

    @invariant()
    def what_is_open_is_in_one_place(self) -> None:
        queue = self.queue
        places = [set(queue._waiting), set(queue._leased), set(queue._results)]
        for one in self.open:
            assert sum(one in place for place in places) == 1, one
        held = [one for hand in queue._hands.values() for one in hand.held]
        assert sorted(held) == sorted(queue._leased)

    def teardown(self) -> None:
        """One worker that lives is enough to bring it all to its end."""
        if not hasattr(self, "queue"):
            return
        self.now += 2 * EXPIRY
        self.queue.expire(self.now)
        self.hands = {}
        for _ in range(self.next + 1):
            self.take("z", 4, False)
            while self.hands["z"]:
                self.done("z", False)
            self.fetch(False)
        assert not self.open


TestStory = Story.TestCase
