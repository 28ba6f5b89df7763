"""Each fault as a client sees it, and as the account has it."""

from __future__ import annotations

import asyncio
import time

import pytest

from penstock import SamplingParams
from penstock.errors import ConnectionLost, PhaseTimeout, TransportError
from penstock.fleet.retry import Retry
from penstock.scripted.text import tokens_if_whole
from penstock.wire.connection import Timeouts
from tests.scripted import run, until
from tests.scripted_engine.serving import QUESTION, Engine, client_of, engine, message

ONCE = Retry(attempts=1)
PARAMS = SamplingParams(max_tokens=20)
BODY = {"messages": QUESTION, "max_tokens": 20}


async def received(one: Engine, body: object) -> tuple[bytes, bool]:
    """All that comes in reply to one request, and whether the connection ended by RST."""
    reader, writer = await asyncio.open_connection("127.0.0.1", one.server.port)
    content, reset = b"", False
    try:
        writer.write(message("POST", "/v1/chat/completions", body, id="x-a"))
        async with asyncio.timeout(5):
            while piece := await reader.read(1 << 16):
                content += piece
    except ConnectionResetError:
        reset = True
    finally:
        writer.close()
    return content, reset


@pytest.mark.parametrize("stream", [False, True])
def test_a_reset_comes_instead_of_an_answer(stream: bool) -> None:
    async def main() -> None:
        async with engine(chaos="reset:1") as one:
            assert await received(one, BODY | {"stream": stream}) == (b"", True)
            assert one.states() == {"x-a": "faulted"} and one.counts()["faults"] == {"reset": 1}
            assert (await one.get("/health")) == b""  # chaos is for generations only

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_reset_in_the_middle(stream: bool) -> None:
    async def main() -> None:
        async with engine(chaos="reset_mid:1", seed=3) as one:
            content, reset = await received(one, BODY | {"stream": stream, "n": 3})
            assert reset and content.startswith(b"HTTP/1.1 200") and not content.endswith(b"0\r\n\r\n")
            assert one.states() == {"x-a": "faulted"}

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_half_a_body_ends_with_an_ordinary_close(stream: bool) -> None:
    async def main() -> None:
        async with engine(chaos="half:1") as one:
            content, reset = await received(one, BODY | {"stream": stream})
            assert not reset and content.startswith(b"HTTP/1.1 200")
            assert not content.endswith(b"0\r\n\r\n")
            if not stream:
                assert b'"content":"' in content and b'"usage"' not in content
        async with engine(chaos="half:1") as one, client_of(one, retry=ONCE) as client:
            with pytest.raises(ConnectionLost):
                await client.chat(QUESTION, PARAMS)

    run(main())


def test_a_stall_is_silence_for_ever_and_the_client_may_leave() -> None:
    async def main() -> None:
        async with (
            engine(chaos="stall:1") as one,
            client_of(one, retry=ONCE, timeouts=Timeouts(first_byte=0.2)) as client,
        ):
            with pytest.raises(PhaseTimeout):
                await client.chat(QUESTION, PARAMS)
            assert list(one.states().values()) == ["faulted"]
            assert not one.batch.schedule.running

    run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["stall", "stall_mid", "slow"])
def test_what_comes_late_comes_whole(fault: str, stream: bool) -> None:
    async def main() -> None:
        setting = "by" if fault == "slow" else "for"
        async with engine(chaos=f"{fault}:1:{setting}=300ms") as one, client_of(one, retry=ONCE) as client:
            began = time.monotonic()
            sample = await client.chat(QUESTION, PARAMS, resume_streams=stream)
            assert 0.3 <= time.monotonic() - began < 5.0
            assert tokens_if_whole(sample.text) == 20 and sample.attempts == 1
            assert one.counts()["completed"] == 1 and one.counts()["faults"] == {fault: 1}

    run(main())


def test_a_stall_in_the_middle_is_seen_by_the_time_between_bytes() -> None:
    async def main() -> None:
        async with (
            engine(chaos="stall_mid:1") as one,
            client_of(one, retry=ONCE, timeouts=Timeouts(idle=0.3)) as client,
        ):
            with pytest.raises(PhaseTimeout) as failure:
                async with client.stream(QUESTION, PARAMS) as stream:
                    async for _ in stream:
                        pass
            assert failure.value.phase == "idle"
            assert list(one.states().values()) == ["faulted"]

    run(main())


def test_a_client_that_leaves_during_a_stall_is_aborted() -> None:
    async def main() -> None:
        async with engine(chaos="stall:1:for=200ms") as one:
            _, writer = await asyncio.open_connection("127.0.0.1", one.server.port)
            writer.write(message("POST", "/v1/chat/completions", BODY, id="x-a"))
            await until(one.states)
            writer.close()
            await until(lambda: one.states() == {"x-a": "aborted"})
            await asyncio.sleep(0.25)
            one.assert_empty()

    run(main())


def test_statuses_are_answered_with_retry_after_and_then_obeyed() -> None:
    async def main() -> None:
        async with engine(chaos="503:1:retry_after=2") as one:
            content, _ = await received(one, BODY)
            head = content.partition(b"\r\n\r\n")[0]
            assert head.startswith(b"HTTP/1.1 503") and b"retry-after: 2" in head
        async with engine(chaos="429:0.5") as one, client_of(one) as client:
            samples = await asyncio.gather(*(client.chat(QUESTION, PARAMS) for _ in range(20)))
            refusals = one.counts()["faults"]["429"]
            assert sum(sample.attempts for sample in samples) == 20 + refusals and refusals > 3
            assert one.counts()["completed"] == 20 and one.counts()["duplicated"] == 0

    run(main())


def test_a_killed_engine_is_gone_and_comes_back_with_its_account() -> None:
    async def main() -> None:
        async with engine(itl="20ms") as one:
            port = one.server.port
            work = asyncio.create_task(received(one, BODY | {"max_tokens": 500, "stream": True}))
            await until(lambda: one.batch.schedule.running)
            killing = asyncio.create_task(one.server.kill(0.3))
            assert (await work)[1], "reset"
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
            await killing
            assert one.server.port == port
            assert one.states() == {"x-a": "faulted"} and one.counts()["faults"] == {"kill": 1}
            one.assert_empty()
            assert (await one.post("/v1/chat/completions", BODY))[0] == 200

    run(main())


def test_a_job_survives_kills_and_all_other_faults() -> None:
    async def main() -> None:
        chaos = "reset:0.05,reset_mid:0.05,half:0.05,503:0.05,stall:0.02:for=50ms,kill:every=400ms:down=100ms"
        async with engine(itl="5ms", chaos=chaos) as one, client_of(one) as client:
            asked = [
                client.chat(QUESTION, PARAMS, request_id=f"job-{number}", resume_streams=number % 2 == 0)
                for number in range(150)
            ]
            gate = asyncio.Semaphore(20)

            async def ask(number: int) -> int | None:
                async with gate:
                    return tokens_if_whole((await asked[number]).text)

            assert set(await asyncio.gather(*(ask(number) for number in range(150)))) == {20}
            counts = one.counts()
            assert one.server.kills >= 1 and counts["faulted"] > 10
            ends = ("completed", "aborted", "faulted", "refused", "stopped", "in_flight")
            assert counts["seen"] == sum(counts[name] for name in ends)
            assert counts["completed"] - counts["duplicated"] == 150

    run(main())


def test_a_reset_before_the_answer_is_an_error_of_transport() -> None:
    async def main() -> None:
        async with engine(chaos="reset:1") as one, client_of(one, retry=ONCE) as client:
            with pytest.raises(TransportError):
                await client.chat(QUESTION, PARAMS)

    run(main())
