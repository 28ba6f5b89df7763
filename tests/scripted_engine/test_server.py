"""The scripted engine over real sockets, asked by penstock's own client and by clients that misbehave."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock import SamplingParams
from penstock.fleet.load import parse_load
from penstock.scripted.text import tokens_if_whole
from tests.scripted import run, until
from tests.scripted_engine.serving import QUESTION, Engine, client_of, engine, message

LONG = SamplingParams(max_tokens=100)


def test_samples_are_whole_and_repeatable() -> None:
    async def main() -> None:
        async with engine() as one, client_of(one) as client:
            params = SamplingParams(max_tokens=30)
            texts = set()
            for _ in range(2):
                sample = await client.chat(QUESTION, params, request_id="same")
                assert tokens_if_whole(sample.text) == sample.usage.completion_tokens == 30
                assert (sample.finish_reason, sample.request_id) == ("length", "chatcmpl-same")
                texts.add(sample.text)
            assert len(texts) == 1
            other = await client.complete("Count.", params, request_id="same")
            assert other.text not in texts

    run(main())


def test_n_samples_with_ids_and_logprobs_are_those_of_the_stream() -> None:
    async def main() -> None:
        async with engine() as one, client_of(one) as client:
            params = SamplingParams(max_tokens=12, logprobs=1)
            three = await client.chat(QUESTION, params, n=3, return_token_ids=True, request_id="r")
            assert [sample.index for sample in three] == [0, 1, 2]
            assert len({sample.text for sample in three}) == 3
            for sample in three:
                assert sample.logprobs is not None and len(sample.logprobs) == 12
                assert sample.token_ids is not None
                assert await client.detokenize(sample.token_ids) == sample.text
                assert sample.prompt_token_ids == await client.tokenize(QUESTION)
                assert sample.usage.prompt_tokens == len(sample.prompt_token_ids or ())
            async with client.stream(QUESTION, params, return_token_ids=True, request_id="r") as stream:
                deltas = [delta async for delta in stream]
            assert len(deltas) == 12
            streamed = stream.sample
            for name in ("text", "token_ids", "prompt_token_ids", "logprobs", "finish_reason", "usage"):
                assert getattr(streamed, name) == getattr(three[0], name), name

    run(main())


@pytest.mark.parametrize("params", [{}, {"return_token_ids": True}, {"logprobs": 1}])
def test_plain_and_rich_streams_say_the_same(params: dict[str, Any]) -> None:
    """Chunks from a template, and chunks that are made one by one, past the changes of a number's width."""

    async def main() -> None:
        async with engine(itl="100us") as one, client_of(one) as client:
            for prompt in (QUESTION, "Count."):
                async with client.stream(
                    prompt, SamplingParams(max_tokens=120), extra_body=params, request_id="r"
                ) as stream:
                    deltas = [delta.text async for delta in stream]
                assert deltas[1:] == [f" {number}" for number in range(1, 120)]
                whole = await (client.complete if isinstance(prompt, str) else client.chat)(
                    prompt,  # type: ignore[arg-type]
                    SamplingParams(max_tokens=120),
                    request_id="r",
                )
                assert stream.sample.text == whole.text

    run(main())


def test_several_tokens_come_in_one_chunk_where_the_schedule_makes_them_at_once() -> None:
    async def main() -> None:
        async with engine(tokens_per_step=4) as one, client_of(one) as client:
            async with client.stream(QUESTION, SamplingParams(max_tokens=10)) as stream:
                deltas = [delta.text.count(" ") for delta in [delta async for delta in stream]]
            assert deltas == [3, 4, 2]
            assert tokens_if_whole(stream.sample.text) == 10

    run(main())


def test_lengths_follow_the_distribution_and_the_request() -> None:
    async def main() -> None:
        async with engine(length="uniform:low=10,high=20", itl="100us") as one, client_of(one) as client:
            samples = await asyncio.gather(
                *(client.chat([{"role": "user", "content": f"{k}"}]) for k in range(40))
            )
            lengths = [sample.usage.completion_tokens for sample in samples]
            assert len(set(lengths)) > 5 and min(lengths) >= 10 and max(lengths) <= 20
            assert {sample.finish_reason for sample in samples} == {"stop"}
            short = await client.chat(QUESTION, SamplingParams(max_tokens=5))
            assert (short.usage.completion_tokens, short.finish_reason) == (5, "length")
            long = await client.chat(QUESTION, SamplingParams(max_tokens=50, ignore_eos=True))
            assert (long.usage.completion_tokens, long.finish_reason) == (50, "length")

    run(main())


def test_a_beginning_is_continued_to_where_the_whole_would_have_ended() -> None:
    async def main() -> None:
        async with engine(length="uniform:low=20,high=60", itl="100us") as one, client_of(one) as client:
            for number in range(5):
                whole = await client.complete(f"Count {number}.", LONG, return_token_ids=True)
                assert whole.finish_reason == "stop" and whole.token_ids is not None
                begun = whole.text[: whole.text.index(" 7")]
                rest = await client.complete(f"Count {number}.{begun}", LONG)
                assert (begun + rest.text, rest.finish_reason) == (whole.text, "stop")
                ids = [*(whole.prompt_token_ids or ()), *whole.token_ids[:7]]
                assert (await client.complete(ids, LONG)).text == rest.text

    run(main())


def test_a_stop_string_ends_a_sample() -> None:
    async def main() -> None:
        async with engine() as one, client_of(one) as client:
            params = SamplingParams(max_tokens=30, stop=("7 8", "never"))
            whole = await client.chat(QUESTION, params, request_id="r")
            assert whole.text.endswith(" 5 6 ") and whole.stop_reason == "7 8"
            assert whole.usage.completion_tokens == 9
            async with client.stream(QUESTION, params, request_id="r") as stream:
                async for _ in stream:
                    pass
            assert stream.sample.text == whole.text and stream.sample.stop_reason == "7 8"

    run(main())


def test_latency_is_what_the_flags_say() -> None:
    async def main() -> None:
        settings = {"itl": "10ms", "ttft": "100ms", "prefill_tokens_per_second": 1000.0}
        async with engine(**settings) as one, client_of(one) as client:
            clock = asyncio.get_running_loop().time
            began = clock()
            async with client.stream([1] * 100, SamplingParams(max_tokens=21)) as stream:
                marks = [clock() - began async for _ in stream]
            assert 0.19 <= marks[0] < 1.0
            assert 0.15 <= marks[-1] - marks[0] < 1.0

    run(main())


def test_streams_that_are_reset_or_stall_are_continued_exactly() -> None:
    async def main() -> None:
        chaos = "reset_mid:0.4,half:0.2,503:0.1"
        async with engine(chaos=chaos) as one, engine(seed=2, chaos=chaos) as two:
            async with client_of(one, two, resume_streams=True) as client:
                asked = [client.chat(QUESTION, SamplingParams(max_tokens=60)) for _ in range(30)]
                samples = await asyncio.gather(*asked)
            for sample in samples:
                assert tokens_if_whole(sample.text) == 60, sample.text
                assert sample.finish_reason == "length" and sample.usage.completion_tokens == 60
            faults = one.counts()["faulted"] + two.counts()["faulted"]
            assert sum(sample.attempts for sample in samples) == 30 + faults
            assert faults >= 10
            assert one.counts()["completed"] + two.counts()["completed"] == 30

    run(main())


def test_the_account_of_clients_that_vanish_is_exact() -> None:
    async def main() -> None:
        async with engine(itl="20ms", max_num_seqs=4) as one:
            writers = []
            for number in range(8):
                _, writer = await asyncio.open_connection("127.0.0.1", one.server.port)
                body = {"messages": QUESTION, "max_tokens": 1000, "stream": number % 2 == 0}
                writer.write(message("POST", "/v1/chat/completions", body, id=f"x-{number}"))
                writers.append(writer)
            await until(lambda: len(one.batch.schedule.running) == 4 and len(one.batch.schedule.waiting) == 4)
            assert set(one.states().values()) == {"in_flight"}
            for writer in writers[:6]:
                writer.close()
            await until(lambda: one.counts()["aborted"] == 6)
            assert len(one.batch.schedule.running) == 2 and not one.batch.schedule.waiting
            assert [one.states()[f"x-{number}"] for number in (5, 6, 7)] == [
                "aborted",
                "in_flight",
                "in_flight",
            ]
            status, answer = await one.post("/abort_requests", {"request_ids": ["x-6", "chatcmpl-x-7"]})
            assert (status, answer["aborted"]) == (200, 2)
            counts = await one.get("/scripted/counts")
            assert (counts["seen"], counts["aborted"], counts["stopped"], counts["in_flight"]) == (8, 6, 2, 0)
            for writer in writers[6:]:
                writer.close()

    run(main())


def test_an_aborted_stream_ends_with_its_reason_and_what_it_had() -> None:
    async def main() -> None:
        async with engine(itl="5ms") as one, client_of(one) as client:
            for streamed in (False, True):
                asked = asyncio.ensure_future(
                    client.chat(
                        QUESTION, SamplingParams(max_tokens=5000), resume_streams=streamed, request_id="r-r"
                    )
                )
                await until(lambda: any(seq.generated > 5 for seq in one.batch.schedule.running))
                await one.post("/abort", {"request_id": "r-r"})
                sample = await asked
                assert sample.finish_reason == "abort"
                assert tokens_if_whole(sample.text) == sample.usage.completion_tokens or streamed
                assert (tokens_if_whole(sample.text) or 0) > 5

    run(main())


def test_a_client_that_does_not_read_costs_no_memory_and_misses_nothing() -> None:
    async def main() -> None:
        async with engine(itl="20us", max_model_len=200_000) as one:
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            reader.connect(("127.0.0.1", one.server.port))
            reader.sendall(
                message("POST", "/v1/completions", {"prompt": "a", "max_tokens": 30_000, "stream": True})
            )
            reader.setblocking(False)
            await until(lambda: one.server.app.lines and not next(iter(one.server.app.lines)).writable)
            (line,) = one.server.app.lines
            (answer,) = one.batch.answers
            (sample,) = answer.samples
            stopped = sample.sent
            await until(lambda: sample.state == "ended")
            assert sample.sent == stopped < 30_000
            transport = line._transport
            assert transport is not None and transport.get_write_buffer_size() < 200_000
            loop, content = asyncio.get_running_loop(), b""
            while b"[DONE]" not in content[-100:]:
                content += await asyncio.wait_for(loop.sock_recv(reader, 1 << 20), 5)
            reader.close()
            events = [event for event in content.split(b"\n") if event.startswith(b"data: {")]
            assert len(events) == 30_000
            assert b'"text":" 29999"' in events[-1] and b'"text":" 14999"' in events[15_000 - 1]
            assert one.counts()["completed"] == 1

    run(main())


def test_metrics_are_those_of_an_engine() -> None:
    async def main() -> None:
        settings = {"itl": "10ms", "max_num_seqs": 2, "kv_tokens": 64}
        async with engine(**settings) as one, client_of(one) as client:
            asked = [client.complete([5] * 4, SamplingParams(max_tokens=40)) for _ in range(3)]
            work = asyncio.gather(*asked)
            await until(lambda: one.batch.schedule.waiting)
            load = parse_load(await one.get("/metrics"))
            assert load is not None
            assert (load.running, load.waiting) == (2, 1) and load.kv_usage == pytest.approx(0.5)
            await work
            load = parse_load(await one.get("/metrics"))
            assert load is not None and (load.running, load.kv_usage) == (0, 0)
            assert load.generation_tokens == 120 and (load.preemptions or 0) >= 1
            page = (await one.get("/metrics")).decode()
            families = {family.name: family for family in text_string_to_metric_families(page)}
            first = families["vllm:time_to_first_token_seconds"].samples
            counts = {sample.labels.get("le"): sample.value for sample in first}
            assert counts["+Inf"] == 3 and counts["0.25"] <= 2, "the third waited for a place"

    run(main(), bound=60.0)


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_a_pause_and_a_sleep(mode: str) -> None:
    async def main() -> None:
        async with engine(itl="2ms") as one, client_of(one) as client:
            asked = asyncio.ensure_future(client.chat(QUESTION, SamplingParams(max_tokens=50)))
            await until(lambda: one.batch.schedule.running)
            assert (await one.post(f"/pause?mode={mode}"))[1] == {"status": "paused"}
            assert (await one.get("/is_paused"))["is_paused"] and (await one.get("/is_sleeping"))[
                "is_sleeping"
            ]
            assert asked.done() or mode != "wait" or not one.batch.schedule.running
            later = asyncio.ensure_future(client.chat(QUESTION, SamplingParams(max_tokens=5)))
            await asyncio.sleep(0.05)
            assert not later.done() and len(one.batch.schedule.running) == (mode == "keep")
            assert (await one.post("/sleep?level=1"))[1]["status"] == "sleeping" if mode == "abort" else True
            if mode == "abort":
                assert (await later).finish_reason == "abort"
                assert (await one.post("/wake_up?tags=weights"))[1]["status"] == "sleeping"
                assert (await one.post("/wake_up"))[1]["status"] == "awake"
                assert (await asked).finish_reason == "abort"
            else:
                await one.post("/resume")
                assert (await later).usage.completion_tokens == 5
                assert (await asked).usage.completion_tokens == 50
            assert not (await one.get("/is_sleeping"))["is_sleeping"]
            assert (await client.chat(QUESTION, SamplingParams(max_tokens=3))).text

    run(main())


def test_the_account_is_read_and_reset_over_http() -> None:
    async def main() -> None:
        async with engine() as one, client_of(one) as client:
            for id in ("j-a", "j-a-2", "j-b"):
                await client.chat(QUESTION, SamplingParams(max_tokens=2), request_id=id)
            assert (await one.post("/v1/completions", {"prompt": ""}))[0] == 400
            counts = await one.get("/scripted/counts")
            assert (counts["seen"], counts["completed"], counts["refused"], counts["duplicated"]) == (
                4,
                3,
                1,
                1,
            )
            (entry,) = (await one.get("/scripted/requests?id=j-b"))["requests"]
            names = {"id": "j-b", "base": "j-b", "state": "completed", "fault": None}
            assert entry == names | {"samples": 1, "tokens": 2}
            assert len((await one.get("/scripted/requests?id=j-a"))["requests"]) == 2
            assert len((await one.get("/scripted/requests?state=refused"))["requests"]) == 1
            await one.post("/scripted/reset")
            assert (await one.get("/scripted/counts"))["seen"] == 0

    run(main())


def test_a_thousand_streams_at_once_are_all_whole() -> None:
    async def main() -> None:
        async with engine(itl="100ms", max_num_seqs=2000) as one, client_of(one) as client:

            async def read() -> int | None:
                async with client.stream(QUESTION, SamplingParams(max_tokens=10)) as stream:
                    async for _ in stream:
                        pass
                return tokens_if_whole(stream.sample.text)

            assert set(await asyncio.gather(*(read() for _ in range(1000)))) == {10}
            assert one.counts()["completed"] == 1000

    run(main())


def refused(one: Engine, body: Any) -> Any:
    return one.post("/v1/chat/completions", body)


def test_what_vllm_refuses_is_refused_in_its_form() -> None:
    async def main() -> None:
        async with engine(max_model_len=100) as one:
            for change, status, param in (
                ({"model": "other"}, 404, "model"),
                ({"messages": "x"}, 400, "body.messages"),
                ({"messages": []}, 400, None),
                ({"max_tokens": 0}, 400, "max_tokens"),
                ({"max_tokens": 101}, 400, "max_tokens"),
                ({"n": 0}, 400, None),
                ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
                ({"messages": [{"role": "user", "content": "x" * 400}]}, 400, "input_tokens"),
            ):
                got, answer = await refused(one, {"messages": QUESTION, **change})
                assert (got, answer["error"]["param"]) == (status, param), change
                assert answer["error"]["code"] == status and answer["error"]["type"]
            assert one.counts()["refused"] == one.counts()["seen"] == 8

    run(main())


@pytest.mark.slow
def test_an_adaptive_client_settles_near_the_number_that_runs() -> None:
    async def main() -> None:
        settings = {"adaptive": True, "max_in_flight": 512}
        async with engine(itl="10ms", max_num_seqs=48) as one, client_of(one, **settings) as client:
            clock = asyncio.get_running_loop().time
            end = clock() + 16.0

            async def ask() -> None:
                while clock() < end:
                    await client.chat(QUESTION, SamplingParams(max_tokens=40))

            work = asyncio.gather(*(ask() for _ in range(200)))
            limits = []
            while not work.done():
                await asyncio.sleep(0.25)
                limits.append(next(iter(client.statistics().limits.values())) or 0)
            await work
            settled = limits[40:60]
            assert 44 <= sum(settled) / len(settled) <= 58, limits

    run(main(), bound=40.0)
