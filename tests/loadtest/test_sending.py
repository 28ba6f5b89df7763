"""What is sent, when, and how it is counted: in this process, against scripted servers or none at all."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from time import monotonic
from typing import Any, Self

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.loadtest.arrivals import Shape
from penstock.loadtest.asking import ASKERS, Answered, Askers, Connections, is_foreign
from penstock.loadtest.metrics import Point, merged
from penstock.loadtest.plan import UNFINISHED, Asker, Extent, Job, Load, Tally, Target
from penstock.loadtest.sending import Sending
from penstock.loadtest.workload import Item, Workload
from tests.scripted import Call, ScriptedEngine, Step, half_body, refuse, reset, run, stall

WORKLOAD = Workload([Item(({"role": "user", "content": f"prompt {n}"},), 5) for n in range(3)])


def event(**fields: Any) -> bytes:
    data = b"data: %s\n\n" % orjson.dumps({"id": "c", "object": "chat.completion.chunk"} | fields)
    return b"%x\r\n%s\r\n" % (len(data), data)


def said(text: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish}])


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ROLE = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 5})
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def streamed(first: float = 0.0, gap: float = 0.0, *, done: bytes = DONE, role: bytes = ROLE) -> Step:
    """Five tokens: a role at once, the first token after `first` seconds, the others `gap` apart."""

    async def step(call: Call) -> None:
        await call.write(HEAD + role)
        await asyncio.sleep(first)
        await call.write(said("one"))
        for text in ("two", "three", "four"):
            await asyncio.sleep(gap)
            await call.write(said(text))
        await asyncio.sleep(gap)
        await call.write(said("five", "stop"))
        await call.write(USAGE + done)

    return step


def job(target: Target, load: Load, extent: Extent, **more: Any) -> Job:
    return Job(run="bench.t", target=target, load=load, extent=extent, seed=1, start=monotonic(), **more)


async def tally_of(engine: ScriptedEngine, asker: Asker, load: Load, extent: Extent, **more: Any) -> Tally:
    own = {name: more.pop(name) for name in ("stream", "api", "timeout") if name in more}
    target = Target(urls=[engine.url], asker=asker, model="m", **own)
    async with ASKERS[asker](target, WORKLOAD, "bench.t") as askers:
        return await Sending(job(target, load, extent, **more), WORKLOAD, askers).run()


def point_of(*tallies: Tally, load: Load | None = None, goodput: bool = False) -> Point:
    return merged("engine", load or Load(concurrency=1), tallies, goodput=goodput)


@pytest.mark.parametrize("asker", ["raw", "client"])
def test_known_latencies_are_found(asker: Asker) -> None:
    async def scenario() -> Tally:
        async with ScriptedEngine(default=streamed(0.1, 0.03)) as engine:
            bounds = (("ttft", 0.09), ("e2el", 10.0))
            return await tally_of(engine, asker, Load(concurrency=2), Extent(count=6), goodput=bounds)

    tally = run(scenario())
    point = point_of(tally, goodput=True)
    found = {name: latency.percentiles["p50"] for name, latency in point.latency.items()}
    assert found == pytest.approx({"ttft": 100, "itl": 30, "tpot": 30, "e2el": 220}, rel=0.35)
    assert (point.sent, point.completed, point.failed) == (6, 6, 0)
    assert (point.input_tokens, point.output_tokens, point.chunks) == (42, 30, 30)
    assert point.goodput == 0.0, "no first token came within 90 ms"
    assert point.connections_opened in (2, 3), "the client looks at health on one more"
    assert sum(moment.done for moment in point.timeline) == 6


@pytest.mark.parametrize(
    ("stream", "api"), [(True, "chat"), (False, "chat"), (True, "completions"), (False, "completions")]
)
def test_both_askers_send_the_same_bytes(stream: bool, api: str) -> None:
    async def scenario(asker: Asker) -> list[tuple[str, bytes]]:
        default = streamed() if stream else None
        async with ScriptedEngine(default=default) as engine:
            await tally_of(engine, asker, Load(concurrency=1), Extent(count=4), stream=stream, api=api)
            return [(call.path, call.body) for call in engine.calls]

    raw, client = run(scenario("raw")), run(scenario("client"))
    assert raw == client
    assert len(raw) == 4 and len(set(raw)) == 3
    assert {path for path, _ in raw} == {"/v1/chat/completions" if api == "chat" else "/v1/completions"}
    prompt = [{"role": "user", "content": "prompt 0"}] if api == "chat" else "prompt 0"
    assert orjson.loads(raw[0][1])["messages" if api == "chat" else "prompt"] == prompt


def test_silence_ends_with_the_timeout() -> None:
    async def scenario(asker: Asker) -> Tally:
        async with ScriptedEngine([stall()], default=streamed()) as engine:
            return await tally_of(engine, asker, Load(concurrency=1), Extent(count=2), timeout=0.3)

    raw, client = run(scenario("raw")), run(scenario("client"))
    assert (raw.errors, raw.done, raw.retries) == (Counter({"PhaseTimeout": 1}), 1, 0)
    assert (client.errors, client.done, client.retries) == (Counter(), 2, 1)


def test_an_answer_to_another_request_is_an_error() -> None:
    assert is_foreign(b'{"id":"chatcmpl-bench.t.12","x":1}', b"bench.t.", 1)
    assert is_foreign(b"bench.t.1", b"bench.t.", 12)
    assert not is_foreign(b"bench.t.1-2", b"bench.t.", 1)
    assert not is_foreign(b'{"id":"chatcmpl-of another"}', b"bench.t.", 1)

    async def scenario() -> Tally:
        async def step(call: Call) -> None:
            wrong = b"9" if call.headers["x-request-id"] == "bench.t.1" else b""
            mine = call.headers["x-request-id"].encode() + wrong
            await call.write(
                HEAD + event(id=mine.decode(), choices=[{"index": 0, "delta": {"content": "a"}}])
            )
            await call.write(DONE)

        async with ScriptedEngine(default=step) as engine:
            return await tally_of(engine, "raw", Load(concurrency=1), Extent(count=4))

    tally = run(scenario())
    assert (tally.done, tally.errors, tally.unanswered) == (3, Counter({"WrongAnswer": 1}), [1])


def test_an_engine_that_is_down_is_not_asked_as_fast_as_can_be() -> None:
    async def scenario() -> Tally:
        async with ScriptedEngine(default=refuse(500)) as engine:
            return await tally_of(engine, "raw", Load(concurrency=4), Extent(duration=0.5))

    assert 4 <= run(scenario()).sent <= 4 * 6


ERROR = b"data: %s\n\n" % orjson.dumps({"error": {"message": "dead", "code": 500}})
FAULTS: dict[str, tuple[Step, str]] = {
    "429": (refuse(429), "Overloaded 429"),
    "500": (refuse(500), "ServerFailed 500"),
    "reset": (reset(), "ConnectionLost before a response"),
    "reset in the middle": (reset(HEAD + said("one")), "ConnectionLost mid-response"),
    "half a body": (half_body(), "ConnectionLost mid-response"),
    "no [DONE]": (streamed(done=b"0\r\n\r\n"), "MalformedResponse"),
    "an error event": (
        streamed(done=b"%x\r\n%s\r\n" % (len(ERROR), ERROR) + DONE),
        "ServerFailed 500",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_error_is_counted_by_its_kind_and_its_number_kept(fault: str) -> None:
    step, kind = FAULTS[fault]

    async def scenario() -> Tally:
        async with ScriptedEngine([step], default=streamed()) as engine:
            return await tally_of(engine, "raw", Load(concurrency=1), Extent(count=3))

    tally = run(scenario())
    assert dict(tally.errors) == {kind: 1}
    assert tally.unanswered == [0]
    assert (tally.sent, tally.done) == (3, 2)


def test_a_kept_connection_that_dies_is_a_reset_and_a_retry() -> None:
    async def scenario() -> Tally:
        async with ScriptedEngine([streamed(), reset()], default=streamed()) as engine:
            return await tally_of(engine, "raw", Load(concurrency=1), Extent(count=3))

    tally = run(scenario())
    assert (tally.done, tally.resets, tally.retries, tally.opened) == (3, 1, 1, 2)


def test_what_does_not_end_is_cut_off_and_counted() -> None:
    async def scenario() -> Tally:
        async with ScriptedEngine(default=stall(HEAD)) as engine:
            return await tally_of(engine, "raw", Load(concurrency=3), Extent(duration=0.1, drain=0.1))

    tally = run(scenario())
    assert dict(tally.errors) == {UNFINISHED: 3}
    assert sorted(tally.unanswered) == [0, 1, 2]


class FakeAskers:
    """Answers without a server, `after` seconds later; keeps what it was asked and when."""

    def __init__(self, after: Callable[[int], float] = lambda number: 0.0) -> None:
        self.after = after
        self.asked: list[tuple[int, float]] = []
        self.in_flight = 0
        self.most = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *ended: object) -> None: ...

    async def ask(self, number: int) -> Answered:
        self.asked.append((number, monotonic()))
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(self.after(number))
        self.in_flight -= 1
        return Answered(monotonic(), output_tokens=1)

    def connections(self) -> Connections:
        return Connections()


TARGET = Target(urls=["http://127.0.0.1:1"], asker="raw")


async def shares(
    load: Load, extent: Extent, askers: Askers, *, processes: int = 1, group: int = 1
) -> list[Tally]:
    workload = Workload(WORKLOAD.items, group=group)
    sendings = [
        Sending(job(TARGET, load, extent, index=index, processes=processes), workload, askers)
        for index in range(processes)
    ]
    return list(await asyncio.gather(*(sending.run() for sending in sendings)))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 4),
    st.integers(1, 5),
    st.one_of(st.integers(1, 20).map(lambda n: Load(concurrency=n)), st.just(Load(rate=float("inf")))),
)
def test_exactly_as_many_are_sent_as_were_asked_for_each_number_once(
    count: int, processes: int, group: int, load: Load
) -> None:
    askers = FakeAskers()
    tallies = run(shares(load, Extent(count=count), askers, processes=processes, group=group))
    assert sum(tally.sent for tally in tallies) == sum(tally.done for tally in tallies) == count
    numbers = Counter(number for number, _ in askers.asked)
    assert len(numbers) == count == numbers.total()
    if load.concurrency is not None:
        assert askers.most <= load.concurrency


def test_a_closed_loop_keeps_as_many_in_flight_and_an_open_one_does_not_wait() -> None:
    closed, opened = FakeAskers(lambda _: 0.05), FakeAskers(lambda _: 10.0)
    run(shares(Load(concurrency=8), Extent(duration=0.4), closed, processes=2))
    assert closed.most == 8
    assert 30 <= len(closed.asked) <= 72
    tallies = run(shares(Load(rate=200), Extent(duration=0.5, drain=0.0), opened, processes=2))
    assert 60 <= len(opened.asked) <= 150
    assert sum(tally.errors[UNFINISHED] for tally in tallies) == len(opened.asked)


def test_throughput_is_that_of_the_window_though_requests_take_as_long() -> None:
    """Ten in flight that take half a second each are 20 a second, in half a second too."""
    load = Load(concurrency=10, shape=Shape(ramp=0.5))
    timed = run(shares(load, Extent(duration=0.5, warmup=0.5), FakeAskers(lambda _: 0.5)))
    assert point_of(*timed).request_throughput == pytest.approx(20, abs=5)
    counted = run(shares(Load(concurrency=10), Extent(count=30), FakeAskers(lambda _: 0.2)))
    assert point_of(*counted).request_throughput == pytest.approx(50, rel=0.2)


def test_warm_up_is_not_measured_and_pauses_are_silent() -> None:
    async def scenario() -> tuple[Tally, FakeAskers, float]:
        askers = FakeAskers(lambda _: 0.01)
        load = Load(concurrency=2, shape=Shape(work=0.2, pause=0.4))
        begin = monotonic()
        (tally,) = await shares(load, Extent(duration=0.8, warmup=0.1), askers)
        return tally, askers, begin

    tally, askers, begin = run(scenario())
    assert 0 < tally.sent < tally.asked == len(askers.asked)
    phases = [(at - begin) % 0.6 for _, at in askers.asked]
    assert not [phase for phase in phases if 0.35 < phase < 0.59]


def test_a_late_send_counts_against_the_latency_and_makes_the_point_invalid() -> None:
    """The generator stands still for 0.4 s: what was to be sent then is late, and both show."""

    async def scenario() -> Tally:
        askers = FakeAskers(lambda _: 0.005)
        work = asyncio.ensure_future(shares(Load(rate=200), Extent(duration=1.0), askers))
        await asyncio.sleep(0.3)
        time.sleep(0.4)  # noqa: ASYNC251 - that is the fault
        return (await work)[0]

    tally = run(scenario())
    point = point_of(tally, load=Load(rate=200))
    assert point.latency["e2el"].percentiles["p99"] > 250
    assert point.send_delay_p99_ms > 250
    assert any("later than intended" in reason for reason in point.invalid)


def test_a_generator_that_keeps_up_is_valid_and_a_busy_one_is_not() -> None:
    async def scenario() -> Tally:
        (tally,) = await shares(Load(concurrency=2), Extent(count=50), FakeAskers(lambda _: 0.001))
        return tally

    tally = run(scenario())
    tally.cpu, tally.wall = 0.5, 1.0
    busy = [reason for reason in point_of(tally).invalid if "of a core" in reason]
    assert busy == []
    tally.cpu = 0.97
    busy = [reason for reason in point_of(tally).invalid if "of a core" in reason]
    assert busy == ["a process of the generator used 97% of a core"]
