"""Which worker a request meets: pure parts first, then over sockets."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from functools import partial
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.fleet.endpoint import Endpoint
from penstock.fleet.policy import BOUND, POLICIES
from penstock.router.args import RouterArgs
from penstock.router.dispatch import RouterAttempts, RouterDispatch, serves
from penstock.router.lane import PATIENCE, Lane
from penstock.router.peek import blocks_of, peek
from penstock.router.prefix import BLOCK_BYTES, BLOCK_TOKENS, SLACK, PrefixIndex, text_blocks, token_blocks
from penstock.router.router import RouterFleet
from penstock.router.server import RouterServer
from penstock.router.upstream import EngineTransport
from penstock.wire.address import Address
from tests.router.front import Peer, endpoints, engine, scenario
from tests.scripted import answer, until

TOKENS = st.lists(st.integers(0, 3), max_size=4 * BLOCK_TOKENS)


class Worker:
    def __init__(self, key: int) -> None:
        self.key = key
        self.in_flight = 0


@given(TOKENS, TOKENS, TOKENS)
def test_blocks_are_equal_exactly_where_beginnings_are(
    common: list[int], one: list[int], two: list[int]
) -> None:
    a, b = token_blocks(common + one), token_blocks(common + two)
    equal = 0
    while equal < min(len(a), len(b)) and a[equal] == b[equal]:
        equal += 1
    same = 0
    for left, right in zip(common + one, common + two, strict=False):
        if left != right:
            break
        same += 1
    if len(common + one) >= BLOCK_TOKENS <= len(common + two):
        assert equal == same // BLOCK_TOKENS
        assert not set(a[equal:]) & set(b[equal:])
    assert len(a) == max(len(common + one) // BLOCK_TOKENS, bool(common + one))


@given(st.binary(max_size=4 * BLOCK_BYTES), st.integers(1, 40))
def test_text_is_hashed_by_blocks(text: bytes, more: int) -> None:
    whole = text_blocks(text + b"x" * more)
    if len(text) >= BLOCK_BYTES:
        assert whole[: len(text) // BLOCK_BYTES] == text_blocks(text)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=60), st.integers(2, 5))
def test_prefix_affinity_is_bounded_in_load_and_memory(asked: list[tuple[int, int]], count: int) -> None:
    workers = [Worker(number) for number in range(count)]
    index: PrefixIndex[Worker] = PrefixIndex(max_blocks=40)
    for prompt, length in asked:
        blocks = token_blocks([prompt] * (BLOCK_TOKENS * (length + 1)))
        mean = (sum(worker.in_flight for worker in workers) + 1) / count
        chosen = index.choose(workers, blocks, mean)
        least = min(worker.in_flight for worker in workers)
        assert chosen.in_flight <= max(BOUND * mean + SLACK, least)
        chosen.in_flight += 1
        assert len(index) <= 40
    for worker in workers[1:]:
        index.forget(worker)
    assert index.choose(workers[:1], token_blocks([9] * 99), 1.0) is workers[0]


def test_a_group_lands_together_and_groups_spread() -> None:
    workers = [Worker(number) for number in range(4)]
    index: PrefixIndex[Worker] = PrefixIndex()
    dice = random.Random(3)
    for _ in range(16):
        blocks = token_blocks([dice.randrange(50_000) for _ in range(200)])
        met = set()
        for _ in range(4):
            mean = (sum(worker.in_flight for worker in workers) + 1) / 4
            chosen = index.choose(workers, blocks, mean)
            chosen.in_flight += 1
            met.add(chosen.key)
        assert len(met) == 1
    assert all(worker.in_flight == 16 for worker in workers)


@given(st.binary(max_size=60) | st.just(b'{"model":' + b"[" * 3000))
def test_any_body_can_be_looked_at(body: bytes) -> None:
    for complete in (True, False):
        seen = peek(body, complete=complete)
        assert isinstance(blocks_of(seen), list)


def test_what_is_looked_at() -> None:
    seen = peek(
        b'{"x":{"model":"no"},"model":"m","session_id":"s","priority":-2,"prompt":[1,2,3]}', complete=True
    )
    assert (seen.model, seen.session, seen.priority) == ("m", "s", -2)
    for body in (b'{"session_params":{"session_id":"s","x":1}}', b'{"user":"s"}', b'{"user":"s","model":1}'):
        assert peek(body, complete=True).session == "s"
    odd = b'{"session_params":{"session_id":3},"session_id":null,"user":["s"],"priority":2}'
    assert (peek(odd, complete=True).session, peek(odd, complete=True).priority) == (None, 2)
    assert blocks_of(seen) == token_blocks([1, 2, 3])
    assert blocks_of(peek(b'{"input_ids": [1, 2,3]}', complete=True)) == token_blocks([1, 2, 3])
    assert blocks_of(peek(b'{"prompt":[4294967296]}', complete=True)) != []
    assert peek(b'{"messages": [{"content":"half', complete=False).model is None
    assert peek(b'{"model": "big", "messages": [{"content":"half', complete=False).model == "big"
    messages = [{"role": "user", "content": "x" * 300}]
    first = blocks_of(peek(orjson.dumps({"messages": messages}), complete=True))
    more = blocks_of(
        peek(orjson.dumps({"messages": [*messages, {"role": "a", "content": "b"}]}), complete=True)
    )
    assert more[: len(first)] == first


@settings(max_examples=40)
@given(
    st.sampled_from(["least_in_flight", "round_robin", "random", "power_of_two", "session", "prefix_aware"]),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.booleans()), max_size=40),
    st.integers(1, 5),
)
def test_slots_are_exact_and_capped_under_any_policy(
    policy: Any, steps: list[tuple[int, int, bool]], cap: int
) -> None:
    fleet = RouterFleet(RouterArgs(worker_urls=("a:1",), policy=policy, max_concurrent_requests=cap))
    dispatch: RouterDispatch = fleet.dispatch
    made: list[Endpoint] = []
    for number, models in enumerate([{"a", "b"}, {"b", "c"}]):
        made.append(_endpoint(f"h:{number + 1}", models))
        dispatch.add(made[-1])

    class Ticket(RouterAttempts):
        __slots__ = ("got",)

        def offer(self, endpoint: Endpoint) -> bool:
            self.got = endpoint
            return True

    def blocks(model: int) -> list[int] | None:
        return [model] if policy == "prefix_aware" else None

    running: list[Ticket] = []
    waiting: list[Ticket] = []
    for model, priority, give_back in steps:
        if give_back and running:
            dispatch.give_back(running.pop(0).got)
        else:
            ticket = Ticket(fleet, model="abc"[model], priority=priority, blocks=blocks(model))
            found = dispatch.take(ticket)
            if found is None:
                dispatch.wait(ticket)
                waiting.append(ticket)
            else:
                ticket.got = found
                running.append(ticket)
        for ticket in [ticket for ticket in waiting if hasattr(ticket, "got")]:
            waiting.remove(ticket)
            running.append(ticket)
        assert dispatch.in_flight == len(running) <= cap and dispatch.waiting == len(waiting)
        assert all(serves(ticket.got, str(ticket.model)) for ticket in running)
        assert not waiting or len(running) == cap
    while running or waiting:
        if running:
            dispatch.give_back(running.pop().got)
        else:
            dispatch.withdraw(waiting.pop())
        for ticket in [ticket for ticket in waiting if hasattr(ticket, "got")]:
            waiting.remove(ticket)
            running.append(ticket)
    assert dispatch.waiting == 0 and dispatch.in_flight == 0 and not dispatch.lanes


def _endpoint(address: str, models: set[str]) -> Any:
    transport = EngineTransport.__new__(EngineTransport)
    transport.models = frozenset(models)
    return Endpoint(Address.parse(address), transport)


class Overload:
    """A router's dispatch on virtual time: four workers of eight slots, a request takes a second or so, and
    more arrive than can be served."""

    def __init__(self, policy: Any, *, groups: bool, load: float = 1.2, seed: int = 1) -> None:
        self.now = 0.0
        args = RouterArgs(worker_urls=("a:1",), policy=policy)
        fleet = RouterFleet(args)
        self.dispatch = RouterDispatch(
            policy=POLICIES["least_in_flight"],
            random=random.Random(seed).random,
            cap=None,
            prefix_aware=groups,
            clock=lambda: self.now,
        )
        self.workers = [_endpoint(f"h:{number + 1}", {"m"}) for number in range(4)]
        for worker in self.workers:
            worker.limit = 8
            self.dispatch.add(worker)
        self.ends: list[tuple[float, int, Endpoint]] = []
        self.met: dict[int, Counter[Endpoint]] = {}
        self.waits: list[float] = []
        self._run(fleet, groups, load, random.Random(seed))

    def _run(self, fleet: RouterFleet, groups: bool, load: float, dice: random.Random) -> None:
        world = self

        class Request(RouterAttempts):
            __slots__ = ("arrived", "key", "seconds")

            def offer(self, endpoint: Endpoint) -> bool:
                world.begin(self, endpoint)
                return True

        arrival = 0.0
        for number in range(4000):
            key = number // 8 if groups else dice.randrange(160)
            arrival += dice.expovariate(32 * load) if not groups else (number % 8 == 0) * 8 / (32 * load)
            self._until(arrival)
            self.now = arrival
            blocks = token_blocks([key] * 64) if groups else None
            request: Any = Request(fleet, session=None if groups else key * 7919, blocks=blocks)
            request.key, request.arrived, request.seconds = key, arrival, dice.uniform(0.2, 1.8)
            endpoint = self.dispatch.take(request)
            if endpoint is None:
                self.dispatch.wait(request)
            else:
                self.begin(request, endpoint)
            assert not self.dispatch.waiting or self.dispatch.in_flight == 32  # no slot is kept
        self._until(float("inf"))
        assert self.dispatch.waiting == self.dispatch.in_flight == 0 and not self.dispatch.lanes

    def begin(self, request: Any, endpoint: Endpoint) -> None:
        heapq.heappush(self.ends, (self.now + request.seconds, request.serial, endpoint))
        self.met.setdefault(request.key, Counter())[endpoint] += 1
        self.waits.append(self.now - request.arrived)

    def _until(self, moment: float) -> None:
        while self.ends and self.ends[0][0] <= moment:
            self.now, _, endpoint = heapq.heappop(self.ends)
            self.dispatch.give_back(endpoint)

    @property
    def share(self) -> float:
        """Of the requests at the worker that has most of their session or group."""
        return sum(max(met.values()) for met in self.met.values()) / len(self.waits)


@pytest.mark.parametrize("groups", [False, True])
def test_under_overload_requests_go_home_and_no_slot_is_kept_for_them(
    groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = "prefix_aware" if groups else "session"
    new = Overload(policy, groups=groups)
    monkeypatch.setattr(Lane, "pick", lambda self, free, clock: self.head)
    old = Overload(policy, groups=groups)
    assert new.share > 0.8 > 0.5 > old.share
    assert new.now < 1.01 * old.now  # as much is served in the same time
    assert max(new.waits) < max(old.waits) + PATIENCE


def test_what_had_to_go_somewhere_is_known_there() -> None:
    fleet = RouterFleet(RouterArgs(worker_urls=("a:1",), policy="prefix_aware"))
    one, other = _endpoint("h:1", {"m"}), _endpoint("h:2", {"m"})
    for worker in (one, other):
        worker.limit = 1
        fleet.dispatch.add(worker)
    met = [fleet.dispatch.take(RouterAttempts(fleet, blocks=token_blocks([key] * 64))) for key in (1, 2)]
    index = fleet.dispatch.index
    assert index is not None
    assert [index.owner(token_blocks([key] * 64)) for key in (1, 2, 3)] == [*met, None]


class Place:
    current = True
    up = True


class Waiter:
    def __init__(self, serial: int, home: Place | None, group: int | None) -> None:
        self.serial = self.place = serial
        self.home = home
        self.group = group


@given(
    st.lists(
        st.tuples(st.sampled_from("aaggl"), st.integers(0, 3), st.integers(0, 4), st.floats(0.0, 0.6)),
        max_size=80,
    )
)
def test_nobody_is_overtaken_for_longer_than_the_patience(steps: list[tuple[str, int, int, float]]) -> None:
    homes: list[Place] = [Place(), Place(), Place()]
    lane: Lane[Any, Place] = Lane()
    waiting: list[Waiter] = []
    overtaken: dict[Waiter, float] = {}
    now = 0.0
    for number, (what, home, group, seconds) in enumerate(steps):
        now += seconds
        if what == "a":
            known = homes[home] if home < 3 else None
            waiting.append(Waiter(number, known, None if group == 4 else group))
            lane.add(waiting[-1])
        elif what == "l" and waiting:
            left = waiting.pop(home % len(waiting))
            assert lane.discard(left) and not lane.discard(left)
        elif what == "g" and waiting:
            free = [homes[home % 3]] if group < 3 else homes[:2]
            chosen = lane.pick(free, partial(float, now))
            older = waiting[: waiting.index(chosen)]
            for one in older:
                assert now - overtaken.setdefault(one, now) < PATIENCE
            assert not older or chosen.home in (*free, None)
            waiting.remove(chosen)
            assert lane.discard(chosen)
            if chosen.group is not None:
                lane.settle(chosen.group, free[0])
                assert all(w.home for w in waiting if w.group == chosen.group)
        assert list(lane) == waiting and len(lane) == len(waiting)


@pytest.mark.parametrize("header", [True, False])
def test_a_session_stays_where_it_is(header: bool) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        met: Counter[int] = Counter()
        for session in range(24):
            before = [len(one.calls) for one in engines]
            for _ in range(3):
                if header:
                    await peer.ask(fields=b"X-Session-ID: s%d\r\n" % session)
                else:
                    await peer.ask(b'{"session_id":"s%d"}' % session)
            went = [len(one.calls) - old for one, old in zip(engines, before, strict=True)]
            assert sorted(went) == [0, 0, 3]
            met[went.index(3)] += 1
        assert len(met) == 3
        sent = {call.headers.get("x-session-id") for one in engines for call in one.calls}
        assert sent == ({f"s{number}" for number in range(24)} if header else {None})

    engines = [engine() for _ in range(3)]
    scenario(body, *engines, policy="session")


def test_a_group_of_requests_meets_one_worker() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peers = [await Peer.to(server) for _ in range(8)]
        for group in range(4):
            ids = [group * 1000 + number for number in range(64)]
            before = [len(one.calls) for one in engines]
            for number, one in enumerate(peers[:4]):
                one.post(orjson.dumps({"prompt": ids, "seed": number}), "/v1/completions")
            for one in peers[:4]:
                await one.response()
            went = [len(one.calls) - old for one, old in zip(engines, before, strict=True)]
            assert sorted(went) == [0, 0, 4]
        assert sum(len(one.calls) > 0 for one in engines) > 1
        assert (await peer.ask(path="/flush_cache"))[0] == 404  # these engines have no such route
        index = server.router.fleet.dispatch.index
        assert index is not None and len(index) == 0
        for one in peers:
            one.close()

    engines = [engine(default=answer(delay=0.01)) for _ in range(3)]
    for one in engines:
        one.side["/flush_cache"] = one.side["/reset_prefix_cache"] = one.side["/v1/models"]
    scenario(body, *engines, policy="prefix_aware")


@pytest.mark.parametrize("policy", ["least_in_flight", "round_robin", "random", "power_of_two"])
def test_every_policy_uses_every_worker(policy: str) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        peers = [await Peer.to(server) for _ in range(40)]
        for one in peers:
            one.post()
        for one in peers:
            assert (await one.response())[0] == 200
        assert min(len(one.calls) for one in engines) >= 2
        if policy in ("least_in_flight", "round_robin"):
            assert {len(one.calls) for one in engines} == {10}
        await until(lambda: all(end.in_flight == 0 for end in endpoints(server)))
        for one in peers:
            one.close()

    engines = [engine(default=answer(delay=0.05)) for _ in range(4)]
    scenario(body, *engines, policy=policy)
