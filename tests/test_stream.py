"""Streams over real sockets: deltas, engines that die anywhere, readers that leave or are slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from penstock.client import Client
from penstock.errors import (
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    MalformedResponse,
    Overloaded,
    PenstockError,
    PhaseTimeout,
    RequestRejected,
    ServerFailed,
)
from penstock.fleet.retry import Retry
from penstock.sample import Delta, SamplingParams
from penstock.stream import SampleStream
from penstock.wire.connection import Timeouts
from tests.scripted import Call, ScriptedEngine, Step, hang_up, raw, refuse, reset, run, stall, until
from tests.streaming import (
    ENDINGS,
    HEAD,
    PROMPT,
    Ending,
    Model,
    closed,
    error_event,
    essence,
    event,
    framed,
    half_event,
    side,
    stalled,
    stream,
)

QUICK = Retry(attempts=4, base=0.0)
HELLO = [{"role": "user", "content": "hello"}]
MODEL = Model((b"one", b" two", b" three", b" \xe2", b"\x82\xac", b" five"))
TEXT = "one two three \u20ac five"
BARE = Model((b"one", b" two", b" three", b" four", b" five"), ids=False)


def serving(model: Model, *script: Step, default: Step | None = None) -> ScriptedEngine:
    return ScriptedEngine(script, default=default or stream(model), side=side(model))


@asynccontextmanager
async def client_of(*engines: ScriptedEngine, **options: Any) -> AsyncIterator[Client]:
    """A client of the engines; afterwards nothing may be in flight."""
    options.setdefault("retry", QUICK)
    async with Client([engine.url for engine in engines], model="m", **options) as client:
        yield client
        statistics = client.statistics()
        assert set(statistics.in_flight.values()) == {0} and statistics.waiting == 0


async def read(client: Client, *arguments: Any, **options: Any) -> tuple[Any, list[Delta]]:
    async with client.stream(*arguments, **options) as answer:
        deltas = [delta async for delta in answer]
    return answer.sample, deltas


async def collect(answer: SampleStream, got: list[str]) -> None:
    """Appends the texts as they come, also those before an error."""
    async for delta in answer:
        got.append(delta.text)  # noqa: PERF401 -- a comprehension would lose them


@pytest.mark.parametrize("prompt", [HELLO, "x|", [1, 2]])
def test_deltas_come_in_order_and_are_the_sample(prompt: Any) -> None:
    async def main() -> None:
        async with serving(MODEL) as engine, client_of(engine) as client:
            params = SamplingParams(max_tokens=20, logprobs=0)
            sample, deltas = await read(client, prompt, params, return_token_ids=True)
            assert [delta.text for delta in deltas] == ["one", " two", " three", " \u20ac", " five", ""]
            assert [delta.token_ids for delta in deltas] == [(0,), (1,), (2,), (3, 4), (5,), (999,)]
            assert (sample.text, sample.finish_reason, sample.attempts) == (TEXT, "stop", 1)
            assert sample.token_ids == (0, 1, 2, 3, 4, 5, 999)
            assert sample.logprobs == tuple(MODEL.logprob(id) for id in sample.token_ids)
            assert sample.prompt_token_ids == PROMPT or prompt == [1, 2]
            assert sample.usage.completion_tokens == 7
            assert sample.endpoint == engine.url and 0 < sample.latency < 5
            sent = engine.calls[0]
            assert sent.path == ("/v1/chat/completions" if prompt is HELLO else "/v1/completions")
            assert sent.json["stream"] is True and sent.json["stream_options"] == {"include_usage": True}
            assert sent.json["return_token_ids"] is True
            await read(client, prompt)
            assert "return_token_ids" not in engine.calls[1].json, "nobody asked for them"
            assert engine.accepted == 1, "a stream that was read to its end leaves its connection for others"

    run(main())


# -- engines that die -----------------------------------------------------------------------------

ERRORS: dict[str, type[PenstockError]] = {
    "garbage": MalformedResponse,
    "error event": ServerFailed,
    "stalled": PhaseTimeout,
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_stream_that_dies_anywhere_is_continued_elsewhere(name: str) -> None:
    async def main() -> None:
        params = SamplingParams(max_tokens=20, logprobs=0)
        timeouts = Timeouts(idle=0.05)
        async with serving(MODEL) as engine, client_of(engine, resume_streams=True) as client:
            expected, _ = await read(client, HELLO, params)
        for cut in range(9):
            dying = stream(MODEL, cut=cut, ending=ENDINGS[name])
            async with serving(MODEL, default=dying) as first, serving(MODEL) as second:
                async with client_of(first, second, resume_streams=True, timeouts=timeouts) as client:
                    for _ in range(6):  # some begin at the engine that dies
                        sample, deltas = await read(client, HELLO, params)
                        assert essence(sample) == essence(expected)
                        assert "".join(delta.text for delta in deltas) == TEXT
                        assert sample.attempts == 1 or (sample.attempts, sample.endpoint) == (2, second.url)
                    retries = client.statistics().retries
                assert len(first.calls) > 0
                assert retries == (len(first.calls) if cut < 8 else 0)
                assert len(second.calls) == 6 - len(first.calls) + retries

    run(main())


@pytest.mark.parametrize("name", ENDINGS)
def test_without_resume_what_has_begun_is_not_passed_off_as_whole(name: str) -> None:
    async def main() -> None:
        timeouts = Timeouts(idle=0.05)
        for cut in range(9):
            dying = stream(MODEL, cut=cut, ending=ENDINGS[name])
            async with serving(MODEL, dying) as engine, client_of(engine, timeouts=timeouts) as client:
                got: list[str] = []
                async with client.stream(HELLO, SamplingParams(max_tokens=20)) as answer:
                    if 2 <= cut < 8:
                        with pytest.raises(ERRORS.get(name, ConnectionLost)):
                            await collect(answer, got)
                        with pytest.raises(ConfigError):
                            _ = answer.sample
                        assert TEXT.startswith("".join(got)) and got
                        assert len(engine.calls) == 1 and client.statistics().retries == 0
                    else:
                        got = [delta.text async for delta in answer]
                        assert "".join(got) == TEXT
                        # nothing had been given out, or all of it
                        assert len(engine.calls) == answer.sample.attempts == (2 if cut < 2 else 1)

    run(main())


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (refuse(429), Overloaded),
        (refuse(500), ServerFailed),
        (hang_up(), ConnectionLost),
        (reset(), ConnectionLost),
        (raw(b"garbage\r\n\r\n"), MalformedResponse),
        (stall(), PhaseTimeout),
    ],
)
def test_failures_before_the_first_delta_are_retried(step: Step, kind: type[PenstockError]) -> None:
    async def main() -> None:
        async with serving(MODEL, step, default=stream(MODEL)) as engine:
            timeouts = Timeouts(first_byte=0.1, idle=0.1)
            async with client_of(engine, timeouts=timeouts, retry=Retry(attempts=2, base=0.0)) as client:
                sample, _ = await read(client, HELLO)
                assert (sample.text, sample.attempts) == (TEXT, 2)
                engine.default = step
                with pytest.raises(kind):
                    await read(client, HELLO)

    run(main())


def test_a_rejected_request_is_not_retried() -> None:
    async def main() -> None:
        async with serving(MODEL, default=refuse(400, "too long")) as engine:
            async with client_of(engine, resume_streams=True) as client:
                with pytest.raises(RequestRejected, match="too long"):
                    await read(client, HELLO)
                assert len(engine.calls) == 2  # the second without the token ids, which nobody had asked for
            bad = event({"error": {"message": "bad", "code": 400}})
            engine.default = raw(HEAD + framed(bad) + b"0\r\n\r\n")
            async with client_of(engine, resume_streams=True) as client:
                with pytest.raises(RequestRejected, match="bad"):
                    await read(client, HELLO)
                assert len(engine.calls) == 3

    run(main())


def test_several_engines_die_one_after_the_other() -> None:
    async def main() -> None:
        script = [stream(MODEL, cut=cut) for cut in (3, 1, 1)]
        async with serving(MODEL, *script) as engine, client_of(engine, resume_streams=True) as client:
            sample, deltas = await read(client, HELLO, SamplingParams(max_tokens=20))
            assert (sample.text, sample.attempts, len(engine.calls)) == (TEXT, 4, 4)
            assert [call.headers["x-request-id"].rpartition("-")[2] for call in engine.calls[1:]] == [
                "2",
                "3",
                "4",
            ]
            assert engine.calls[0].path == "/v1/chat/completions"
            assert [call.path for call in engine.calls[1:]] == ["/v1/completions"] * 3
            assert engine.calls[3].json["prompt"] == [*PROMPT, 0, 1, 2]
            assert "".join(delta.text for delta in deltas) == TEXT

    run(main())


def test_half_a_character_in_a_chunk_of_several_tokens_is_generated_again() -> None:
    async def main() -> None:
        opening = MODEL.generate({"max_tokens": 9}, True)[0]
        choice = {"index": 0, "delta": {"content": "one two three"}, "token_ids": [0, 1, 2, 3]}
        body = framed(event(opening)) + framed(event({"choices": [choice]}))
        dying = raw(HEAD + body, close=True)
        async with serving(MODEL, dying) as engine, client_of(engine, resume_streams=True) as client:
            sample, _ = await read(client, HELLO, SamplingParams(max_tokens=20))
            assert engine.calls[1].json["prompt"] == [*PROMPT, 0, 1, 2]
            assert (sample.text, sample.token_ids) == (TEXT, (0, 1, 2, 3, 4, 5, 999))

    run(main())


def test_the_attempts_are_bounded() -> None:
    async def main() -> None:
        async with (
            serving(MODEL, default=stream(MODEL, cut=1)) as engine,
            client_of(engine, resume_streams=True) as client,
        ):
            with pytest.raises(ConnectionLost):
                await read(client, HELLO)
            assert len(engine.calls) == QUICK.attempts

    run(main())


@pytest.mark.parametrize("prompt", [HELLO, "x|"])
def test_without_token_ids_the_text_is_continued(prompt: Any) -> None:
    async def main() -> None:
        for cut in range(2, 8):
            dying = stream(BARE, cut=cut)
            async with serving(BARE, dying) as engine, client_of(engine, resume_streams=True) as client:
                sample, deltas = await read(client, prompt, SamplingParams(max_tokens=20))
                assert sample.text == "one two three four five" == "".join(delta.text for delta in deltas)
                assert (sample.finish_reason, sample.token_ids) == ("stop", None)
                if sample.attempts == 1:
                    continue
                assert sample.usage.completion_tokens == 6
                second = engine.calls[1].json
                if prompt is HELLO:
                    assert second["messages"][-1] == {
                        "role": "assistant",
                        "content": "".join(piece.decode() for piece in BARE.pieces[: cut - 1]),
                    }
                    assert second["continue_final_message"] is True
                    assert sample.usage.prompt_tokens == len(PROMPT)
                else:
                    assert second["prompt"].startswith("x|one")

    run(main())


def test_an_engine_without_detokenize_continues_the_text_where_a_stop_string_may_be_pending() -> None:
    async def main() -> None:
        hasty = Model(MODEL.pieces, hold=False)
        async with serving(hasty, stream(hasty, cut=3)) as engine:
            engine.side["/detokenize"] = refuse(404)
            async with client_of(engine, resume_streams=True) as client:
                params = SamplingParams(max_tokens=20, stop=("five",))
                sample, _ = await read(client, HELLO, params)
                assert engine.calls[1].path == "/v1/chat/completions"
                assert sample.text == "one two three \u20ac "
                assert (sample.stop_reason, sample.token_ids) == ("five", None)

    run(main())


def test_what_cannot_be_continued_is_an_error_for_a_stream_and_begun_anew_for_a_whole() -> None:
    async def main() -> None:
        options = {"tools": [{"type": "function"}]}
        async with (
            serving(MODEL, stream(MODEL, cut=3), stream(MODEL, cut=3)) as engine,
            client_of(engine, resume_streams=True) as client,
        ):
            with pytest.raises(ConnectionLost):
                await read(client, HELLO, extra_body=options)
            sample = await client.chat(HELLO, extra_body=options)
            assert (sample.text, sample.attempts, len(engine.calls)) == (TEXT, 2, 3)
            assert engine.calls[1].json["messages"] == engine.calls[2].json["messages"] == HELLO

    run(main())


def test_where_there_is_no_way_the_endpoint_that_was_to_continue_is_not_blamed() -> None:
    async def main() -> None:
        thinking = Model((b"hm", b"m", b"</think>", b"4"), think="hmm</think>")
        dying = stream(thinking, cut=3)
        async with serving(thinking, dying) as engine, client_of(engine, resume_streams=True) as client:
            engine.side["/v1/models"] = refuse(404)  # how long it may be is not known
            with pytest.raises(ConnectionLost):
                await read(client, HELLO)
            assert len(engine.calls) == 1 and client.statistics().retries == 1
            assert client.fleet.endpoints[0].health.outcomes.bit_count() <= 1
            engine.script.append(dying)
            sample = await client.chat(HELLO)
            assert (sample.text, sample.reasoning, sample.attempts) == ("4", "hmm", 2)

    run(main())


@pytest.mark.parametrize("cut", [0, 3, 5])
def test_chat_and_complete_with_resume_streams(cut: int) -> None:
    async def main() -> None:
        async with serving(MODEL) as engine, client_of(engine, resume_streams=True) as client:
            for call in (client.chat(HELLO, SamplingParams(max_tokens=20)), client.complete("x|")):
                engine.script.append(stream(MODEL, cut=cut))
                sample = await call
                assert (sample.text, sample.attempts, sample.finish_reason) == (TEXT, 2, "stop")
            assert all(call.json["stream"] for call in engine.calls)

    run(main())


def test_dying_with_the_last_token_asked_for() -> None:
    async def main() -> None:
        # an engine that says that it is over in a chunk of its own
        chunks = MODEL.generate({"max_tokens": 9, "return_token_ids": True}, True)
        body = b"".join(framed(event(chunk)) for chunk in chunks[:4])
        async with serving(MODEL, default=raw(HEAD + body, close=True)) as engine:
            for resume in (False, True):
                async with client_of(engine, resume_streams=resume) as client:
                    sample, _ = await read(client, HELLO, SamplingParams(max_tokens=3))
                    assert (sample.text, sample.finish_reason) == ("one two three", "length")
                    assert (sample.attempts, sample.usage.completion_tokens) == (1, 3)
            assert len(engine.calls) == 2

    run(main())


# -- readers --------------------------------------------------------------------------------------


def test_leaving_early_closes_the_connection_and_frees_the_slot() -> None:
    async def main() -> None:
        async with (
            serving(MODEL, default=stream(MODEL, cut=4, ending=stalled)) as engine,
            client_of(engine, max_in_flight=1) as client,
        ):
            for _ in range(3):
                async with client.stream(HELLO) as answer:
                    async for delta in answer:
                        assert delta.text == "one"
                        break
                    assert client.statistics().in_flight[engine.url] == 1
                assert client.statistics().in_flight[engine.url] == 0
                left = time.monotonic()
                await engine.drained()
                assert time.monotonic() - left < 0.5
            with pytest.raises(ConfigError):
                _ = answer.sample

    run(main())


def test_leaving_with_an_error_and_without_reading() -> None:
    async def main() -> None:
        async with serving(MODEL) as engine, client_of(engine) as client:
            with pytest.raises(ZeroDivisionError):
                async with client.stream(HELLO) as answer:
                    await anext(answer)
                    raise ZeroDivisionError
            async with client.stream(HELLO):
                pass
            client.stream(HELLO)  # never entered
            assert len(engine.calls) == 1

    run(main())


def test_cancelling_the_reader() -> None:
    async def main() -> None:
        async with (
            serving(MODEL, default=stream(MODEL, cut=3, ending=stalled)) as engine,
            client_of(engine, resume_streams=True) as client,
        ):
            for wait_in_read in (True, False):
                seen = asyncio.Event()

                async def work(wait_in_read: bool = wait_in_read, seen: asyncio.Event = seen) -> None:
                    async with client.stream(HELLO) as answer:
                        async for _ in answer:
                            seen.set()
                            if not wait_in_read:
                                await asyncio.Event().wait()

                task = asyncio.create_task(work())
                await seen.wait()
                await asyncio.sleep(0.02)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert client.statistics().in_flight == {engine.url: 0}
                await asyncio.wait_for(engine.drained(), 1)

    run(main())


def test_a_deadline_in_the_middle() -> None:
    async def main() -> None:
        async with serving(MODEL, default=stream(MODEL, cut=3, ending=stalled)) as engine:
            async with client_of(engine, resume_streams=True) as client:
                got: list[str] = []
                started = time.monotonic()
                async with client.stream(HELLO, timeout=0.15) as answer:
                    with pytest.raises(DeadlineExceeded, match="in flight at"):
                        await collect(answer, got)
                assert 0.1 < time.monotonic() - started < 1
                assert got == ["one", " two"]
                await asyncio.wait_for(engine.drained(), 1)
                with pytest.raises(DeadlineExceeded):
                    await client.chat(HELLO, timeout=0.1)
            assert 0 < float(engine.calls[0].headers["x-request-timeout"]) <= 0.15

    run(main())


def test_closing_the_client_in_the_middle() -> None:
    async def main() -> None:
        async with serving(MODEL, default=stream(MODEL, cut=3, ending=stalled)) as engine:
            client = Client(engine.url, resume_streams=True)
            seen = asyncio.Event()

            async def work() -> None:
                async with client.stream(HELLO) as answer:
                    async for _ in answer:
                        seen.set()

            async with client:
                task = asyncio.create_task(work())
                await seen.wait()
            with pytest.raises((ConnectionLost, ConfigError)):
                await asyncio.wait_for(task, 1)
            await asyncio.wait_for(engine.drained(), 1)

    run(main())


def test_a_slow_reader_holds_the_engine_back_and_meets_no_timeout() -> None:
    async def main() -> None:
        wide = Model(tuple(b"x" * 8000 for _ in range(60)))
        written = 0
        done = asyncio.Event()

        async def step(call: Call) -> None:
            nonlocal written
            call.writer.transport.set_write_buffer_limits(high=1 << 16)
            await call.write(HEAD)
            for _ in range(40):
                for chunk in wide.generate({"max_tokens": 60}, True)[1:-1]:
                    data = framed(
                        event({**chunk, "choices": [{**chunk["choices"][0], "finish_reason": None}]})
                    )
                    await call.write(data)
                    written += len(data)
            await call.write(framed(event(wide.generate({"max_tokens": 60}, True)[-2])) + b"0\r\n\r\n")
            done.set()

        async with (
            ScriptedEngine(default=step, side=side(wide)) as engine,
            client_of(engine, timeouts=Timeouts(idle=0.2)) as client,
        ):
            async with client.stream(HELLO) as answer:
                await anext(answer)
                await asyncio.sleep(0.5)
                held_at = written
                await asyncio.sleep(0.2)
                assert written == held_at < 40 * 60 * 8000 and not done.is_set()
                size = 8000
                async for delta in answer:
                    size += len(delta.text)
            assert size == 8000 * (40 * 60 + 1)
            assert answer.sample.attempts == 1

    run(main())


def test_how_a_stream_is_not_used() -> None:
    async def main() -> None:
        async with serving(MODEL) as engine, client_of(engine) as client:
            answer = client.stream(HELLO)
            with pytest.raises(ConfigError, match="async with"):
                await anext(answer)
            with pytest.raises(ConfigError):
                _ = answer.sample
            async with answer:
                await anext(answer)
                with pytest.raises(ConfigError, match="all of its deltas"):
                    _ = answer.sample
            with pytest.raises(ConfigError, match="async with"):
                await anext(answer)
            with pytest.raises(ConfigError):
                client.stream("")
            with pytest.raises(ConfigError, match="n as an argument"):
                client.stream(HELLO, extra_body={"n": 2})
        with pytest.raises(ConfigError, match="not open"):
            client.stream(HELLO)

    run(main())


def test_many_streams_at_once_while_connections_die() -> None:
    async def main() -> None:
        dice = iter(range(10_000))

        async def default(call: Call) -> None:
            number = next(dice)
            ending: Ending = (closed, half_event, error_event)[number % 3]
            await stream(MODEL, cut=number % 6 if number % 2 else None, ending=ending)(call)

        async with serving(MODEL, default=default) as first, serving(MODEL, default=default) as second:
            retry = Retry(attempts=50, base=0.01, cap=0.02)
            async with client_of(first, second, resume_streams=True, max_in_flight=8, retry=retry) as client:
                asked = [client.chat(HELLO, SamplingParams(max_tokens=20)) for _ in range(60)]
                samples = await asyncio.gather(*asked)
                assert {essence(sample) for sample in samples} == {essence(samples[0])}
                assert {sample.text for sample in samples} == {TEXT}
                assert sum(sample.attempts for sample in samples) >= 90
                await until(lambda: client.statistics().in_flight == {first.url: 0, second.url: 0})

    run(main())
