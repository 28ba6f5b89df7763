"""Streams of the embedded engine, cut again and again: greedy output is that of the uninterrupted run."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

pytest.importorskip("torch")

from penstock.client import Client
from penstock.fleet.retry import Retry
from penstock.models import ARITHMETIC
from penstock.sample import Sample, SamplingParams
from penstock.servers.embedded import command
from penstock.servers.spec import ServerSpec, Value
from tests.engine_server.running import Running, engine_of, running
from tests.scripted import run

MODEL = "tiny"
CONTEXT = 256
QUICK = Retry(attempts=60, base=0.0)
QUESTION = [{"role": "user", "content": "12+34=?"}]


@pytest.fixture(scope="module")
def engine() -> Iterator[Running]:
    with running(engine_of(ARITHMETIC, max_model_len=CONTEXT)) as server:
        yield server


class CuttingProxy:
    """Forwards TCP to an engine; each POST that streams is cut after the next number of bytes in `cuts`."""

    def __init__(self, port: int, cuts: list[int]) -> None:
        self._target = port
        self.cuts = cuts
        self.cut = 0
        """Connections that have been cut."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    async def __aenter__(self) -> CuttingProxy:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0.01)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)

        def end(_: object) -> None:  # a task that is cancelled before its first step runs no `finally`
            self._tasks.discard(task)
            writer.transport.abort()

        task.add_done_callback(end)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up, down = await asyncio.open_connection("127.0.0.1", self._target)
        left: list[int | None] = [None]

        async def there() -> None:
            while data := await reader.read(1 << 16):
                if b'"stream":true' in data and self.cuts:
                    left[0] = self.cuts.pop(0)
                down.write(data)

        async def back() -> None:
            while data := await up.read(1 << 16):
                if left[0] is not None:
                    writer.write(data[: left[0]])
                    left[0] -= len(data)
                    if left[0] <= 0:
                        self.cut += 1
                        return
                else:
                    writer.write(data)

        work = [asyncio.ensure_future(there()), asyncio.ensure_future(back())]
        try:
            await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0.001)  # what has been written is on its way
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            down.transport.abort()


@asynccontextmanager
async def client_of(*urls: str) -> AsyncIterator[Client]:
    async with Client(list(urls), model=MODEL, resume_streams=True, retry=QUICK) as client:
        yield client
        assert set(client.statistics().in_flight.values()) == {0}
    await asyncio.sleep(0.05)  # the engine, in this process, has to notice that its connections are closed


async def read(client: Client, prompt: Any, params: SamplingParams, **options: Any) -> Sample:
    async with client.stream(prompt, params, **options) as answer:
        deltas = [delta async for delta in answer]
    sample = answer.sample
    assert "".join(delta.text for delta in deltas) == sample.text
    assert sum((delta.token_ids for delta in deltas), ()) == (sample.token_ids or ())
    assert sum((delta.logprobs for delta in deltas), ()) == (sample.logprobs or ())
    return sample


def same(sample: Sample, expected: Sample) -> None:
    for name in ("text", "token_ids", "prompt_token_ids", "finish_reason", "stop_reason", "reasoning"):
        assert getattr(sample, name) == getattr(expected, name), name
    assert sample.usage.prompt_tokens == expected.usage.prompt_tokens
    assert sample.usage.completion_tokens == expected.usage.completion_tokens
    assert (sample.logprobs is None) == (expected.logprobs is None)
    if sample.logprobs is not None and expected.logprobs is not None:
        assert sample.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


CASES: list[tuple[str, Any, SamplingParams]] = [
    ("chat", QUESTION, SamplingParams(temperature=0, max_tokens=48, logprobs=0, ignore_eos=True)),
    ("chat without a bound", QUESTION, SamplingParams(temperature=0, logprobs=0)),
    ("text", "7+5=", SamplingParams(temperature=0, max_tokens=40, logprobs=1, ignore_eos=True)),
    ("token ids", [5, 9, 6, 8], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)),
]


def stops_of(text: str) -> list[str]:
    """Stop strings that are in the second half of the text, of several lengths."""
    places = range(len(text) // 2, len(text) - 6, 3)
    return [text[place : place + size] for place, size in zip(places, (2, 3, 5, 4, 6), strict=False)]


@pytest.mark.parametrize(("name", "prompt", "params"), CASES, ids=[case[0] for case in CASES])
def test_cut_anywhere_it_is_the_uninterrupted_run(
    engine: Running, name: str, prompt: Any, params: SamplingParams
) -> None:
    dice = random.Random(name)

    async def main() -> None:
        cuts: list[int] = []
        proxies = CuttingProxy(engine.port, cuts), CuttingProxy(engine.port, cuts)
        async with proxies[0], proxies[1]:
            urls = proxies[0].url, proxies[1].url
            async with client_of(f"http://127.0.0.1:{engine.port}") as direct, client_of(*urls) as client:
                plain = await read(direct, prompt, params)
                assert plain.attempts == 1 and plain.token_ids
                wanted = [()] + [(stop,) for stop in stops_of(plain.text)]
                for stop in wanted:
                    # past the end of text come special tokens, which /detokenize shows and the text does not
                    ends = {"stop": stop, "ignore_eos": None} if stop else {}
                    asked = SamplingParams(**{**params.as_dict(), **ends})
                    expected = await read(direct, prompt, asked)
                    for _ in range(3):
                        before = proxies[0].cut + proxies[1].cut
                        cuts[:] = [dice.randrange(1, 6000) for _ in range(dice.randint(1, 5))]
                        sample = await read(client, prompt, asked)
                        same(sample, expected)
                        deaths = proxies[0].cut + proxies[1].cut - before
                        assert 1 <= sample.attempts <= deaths + 1
        assert proxies[0].cut + proxies[1].cut >= 10

    run(main())


def test_cut_behind_every_chunk_with_a_stop_string_that_overlaps_itself(engine: Running) -> None:
    async def main() -> None:
        params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
        cuts: list[int] = []
        async with CuttingProxy(engine.port, cuts) as proxy, client_of(proxy.url) as client:
            plain = await read(client, QUESTION, params)
            stop = next(
                (plain.text[i : i + 2] for i in range(9, 40) if plain.text[i] == plain.text[i + 1]), None
            )
            asked = SamplingParams(**{**params.as_dict(), "stop": (stop or plain.text[20:24],)})
            expected = await read(client, QUESTION, asked)
            for cut in range(300, 10_000, 170):
                cuts[:] = [cut]
                same(await read(client, QUESTION, asked), expected)
            assert proxy.cut > 10

    run(main())


def test_whole_samples_with_resume_streams(engine: Running) -> None:
    async def main() -> None:
        cuts = [2000, 1000, 700] * 6
        async with CuttingProxy(engine.port, cuts) as proxy, client_of(proxy.url) as client:
            params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
            samples = await asyncio.gather(*(client.chat(QUESTION, params) for _ in range(8)))
            cuts.clear()
            expected = await client.chat(QUESTION, params, resume_streams=False, return_token_ids=True)
            for sample in samples:
                same(sample, expected)
            assert sum(sample.attempts for sample in samples) == 8 + proxy.cut >= 20

    run(main())


def test_n_tokens_and_logprobs_of_the_embedded_engine(engine: Running) -> None:
    async def main() -> None:
        async with client_of(f"http://127.0.0.1:{engine.port}") as client:
            ids = await client.tokenize("12+34=46")
            assert ids and await client.detokenize(ids) == "12+34=46"
            assert await client.tokenize(QUESTION) != ids
            assert await client.models() == [MODEL]
            params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
            alike = await client.chat(QUESTION, params, return_token_ids=True)
            again = await client.complete(alike.prompt_token_ids or (), params, return_token_ids=True)
            assert (again.token_ids, again.prompt_token_ids) == (alike.token_ids, alike.prompt_token_ids)
            assert alike.logprobs is not None and max(alike.logprobs) <= 0
            assert again.logprobs == pytest.approx(alike.logprobs, abs=1e-4)
            drawn = SamplingParams(temperature=2.0, seed=3, max_tokens=8, ignore_eos=True)
            four = await client.chat(QUESTION, drawn, n=4, return_token_ids=True)
            assert [sample.index for sample in four] == [0, 1, 2, 3]
            assert len({sample.token_ids for sample in four}) > 1
            assert {sample.usage.completion_tokens for sample in four} == {8}
            assert {sample.prompt_token_ids for sample in four} == {alike.prompt_token_ids}
            (one,) = await client.complete("1+1=", params, n=1)
            assert one.usage.completion_tokens == 8

    run(main())


@asynccontextmanager
async def engine_process() -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The embedded engine in a process that a test may kill."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    extra: dict[str, Value] = {"threads": 1, "kv_cache_memory_bytes": "64M"}
    spec = ServerSpec(
        model=str(ARITHMETIC),
        name=MODEL,
        host="127.0.0.1",
        port=port,
        max_model_len=CONTEXT,
        extra_args=extra,
        env={},
    )
    process = await asyncio.create_subprocess_exec(
        *command(spec), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        while b"ready on" not in (line := await process.stdout.readline()):
            assert line, "it has ended"
        yield process, f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_killed_engine_process_loses_no_stream() -> None:
    async def main() -> None:
        async with (
            engine_process() as (first, url),
            engine_process() as (_, other),
            client_of(url, other) as client,
        ):
            params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
            questions = [[{"role": "user", "content": f"{n}+{n * 7}=?"}] for n in range(20)]
            expected = [await client.chat(one, params) for one in questions]
            begun = 0

            async def follow(question: Any) -> Sample:
                nonlocal begun
                async with client.stream(question, params) as answer:
                    async for delta in answer:
                        begun += bool(delta.text)
                return answer.sample

            tasks = [asyncio.ensure_future(follow(one)) for one in questions]
            while begun < 200:  # noqa: ASYNC110 -- an event would say no more
                await asyncio.sleep(0.005)
            first.kill()
            samples = await asyncio.gather(*tasks)
            for sample, right in zip(samples, expected, strict=True):
                same(sample, right)
            moved = [sample for sample in samples if sample.attempts > 1]
            assert len(moved) >= 5, "about half of them were at the engine that was killed"
            assert all(sample.endpoint == other for sample in moved)

    run(main())
