"""A job over real sockets and real files: every row once, whatever the server does."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from penstock.batch.job import Accounting, Job, JobSettings, sample_seed
from penstock.client import Client
from penstock.errors import ConnectFailed, RequestRejected, ResumeRefused
from penstock.fleet.retry import Retry
from penstock.prompt import JsonlInput, Prompt, PromptFormat
from penstock.sample import SamplingParams
from tests.chat_server import MODEL, ChatServer, answer_to

FORM = PromptFormat(prompt_column="q")
QUICK = Retry(attempts=3, base=0.01, cap=0.05, outage=2.0)


@pytest.fixture
def source(tmp_path: Path) -> JsonlInput:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"n" : {i}, "q": "question {i}"}}\n' for i in range(40)))
    return JsonlInput(path)


def settings_for(source: JsonlInput, **changes: Any) -> JobSettings:
    settings = JobSettings(out=source.path.with_name("out.jsonl"), model=MODEL, form=FORM, max_concurrent=8)
    return msgspec.structs.replace(settings, **changes)


def run(source: JsonlInput, settings: JobSettings, urls: str | Sequence[str]) -> Accounting:
    async def main() -> Accounting:
        with Job(source, source.survey(settings.form), settings) as job:
            async with asyncio.timeout(30), Client(urls, model=settings.model, retry=QUICK) as client:
                return await job.run(client)

    return uvloop.run(main())


def rows_of(settings: JobSettings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in settings.out.read_bytes().splitlines()]


def assert_complete(settings: JobSettings, rows: int = 40) -> None:
    written = rows_of(settings)
    assert sorted(row["n"] for row in written) == list(range(rows))
    for row in written:
        assert row["generations"] == [answer_to(row["q"])] * settings.num_generations


def test_every_row_is_written_once_with_its_own_bytes(source: JsonlInput) -> None:
    settings = settings_for(source, num_generations=3)
    with ChatServer() as server:
        assert run(source, settings, server.url) == Accounting(40, 40, 0)
    assert_complete(settings)
    row = rows_of(settings)[0]
    assert row["finish_reasons"] == ["stop"] * 3
    assert row["reasonings"] == ["hm"] * 3
    usage = row["api_metadata"][0]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert settings.out.read_bytes().startswith(b'{"n" : ')


def test_a_freed_slot_is_filled_at_once(source: JsonlInput) -> None:
    """While one row takes 50 times as long, the other seven slots do all the rest: there is no barrier."""
    settings = settings_for(source)
    answered_before_the_slow_one: list[int] = []

    def note(message: str, asked: int) -> None:
        if message == server.slow:
            answered_before_the_slow_one.append(server.asked.total() - server.in_flight - 1)

    with ChatServer(note, latency=0.02, slow="question 2") as server:
        run(source, settings, server.url)
        assert server.peak == settings.max_concurrent
    assert answered_before_the_slow_one == [39]


def test_samples_survive_their_siblings_failure(source: JsonlInput) -> None:
    settings = settings_for(source, num_generations=2)

    def fail_once_for_row_7(message: str, asked: int) -> tuple[int, str] | None:
        return (400, "too long") if message == "question 7" and asked == 0 else None

    with ChatServer(fail_once_for_row_7) as server:
        assert run(source, settings, server.url) == Accounting(40, 39, 1)
        failure = json.loads(settings.failures_path.read_text())
        assert (failure["row"], failure["error"], failure["status"]) == (7, "RequestRejected", 400)
        assert failure["fields"]["q"] == "question 7"
        # A resume leaves what failed alone ...
        before = server.asked["question 7"]
        assert run(source, settings, server.url) == Accounting(40, 39, 1)
        assert server.asked["question 7"] == before == 2
        # ... until told to try again: then only the sample that failed is generated.
        again = msgspec.structs.replace(settings, retry_failed=True)
        assert run(source, again, server.url) == Accounting(40, 40, 0)
        assert server.asked["question 7"] == 3
    assert_complete(settings)
    assert not settings.failures_path.exists()


def test_overload_and_failures_are_ridden_out(source: JsonlInput) -> None:
    def stumble(message: str, asked: int) -> tuple[int, str] | None:
        return (
            [(503, "busy"), (500, "oops"), None][min(asked, 2)] if int(message.split()[1]) % 4 == 0 else None
        )

    settings = settings_for(source)
    with ChatServer(stumble) as server:
        assert run(source, settings, server.url).complete
    assert_complete(settings)
    attempts = [row["api_metadata"][0].get("attempts", 1) for row in rows_of(settings)]
    assert attempts.count(3) == 10


def test_a_missing_key_stops_the_job_and_fails_no_row(source: JsonlInput) -> None:
    settings = settings_for(source)
    with ChatServer(lambda message, asked: (401, "no key")) as server:
        with pytest.raises(RequestRejected):
            run(source, settings, server.url)
        assert server.asked.total() <= settings.max_concurrent
    with ChatServer() as server:
        assert run(source, settings, server.url) == Accounting(40, 40, 0)
    assert_complete(settings)


def test_without_an_engine_the_job_stops_and_everything_stays_owed(source: JsonlInput) -> None:
    settings = settings_for(source)
    with ChatServer() as server:
        url = server.url
    with pytest.raises(ConnectFailed):
        run(source, settings, url)
    with Job(source, source.survey(FORM), settings) as job:
        assert job.accounting().owed == 40


def test_cancelled_anywhere_it_goes_on_where_it_was(source: JsonlInput) -> None:
    settings = settings_for(source, num_generations=2)
    generator = random.Random(5)

    async def cut_short(url: str, seconds: float) -> None:
        with Job(source, source.survey(FORM), settings) as job:
            async with Client(url, model=MODEL, retry=QUICK) as client:
                task = asyncio.create_task(job.run(client))
                await asyncio.wait([task], timeout=seconds)
                task.cancel()
                await asyncio.wait([task], timeout=5)
                assert task.done()
                assert job.progress.in_flight() == 0

    with ChatServer(latency=0.02) as server:
        for _ in range(6):
            uvloop.run(cut_short(server.url, generator.uniform(0.0, 0.08)))
        assert run(source, settings, server.url).complete
        # Only what was in flight at a cut was asked again.
        assert server.asked.total() <= 80 + 6 * settings.max_concurrent
    assert_complete(settings)


def test_other_parameters_and_another_input_are_refused(source: JsonlInput) -> None:
    settings = settings_for(source)
    with ChatServer() as server:
        run(source, settings, server.url)
        with pytest.raises(ResumeRefused, match=r"temperature was unset and is now 0\.5"):
            run(source, settings_for(source, params=SamplingParams(temperature=0.5)), server.url)
        with source.path.open("a") as file:
            file.write('{"n": 40, "q": "one more"}\n')
        with pytest.raises(ResumeRefused, match="had 40 rows and has now 41"):
            run(source, settings, server.url)
        assert server.asked.total() == 40
    assert_complete(settings)


def test_each_sample_has_its_own_reproducible_seed(source: JsonlInput) -> None:
    settings = settings_for(source, num_generations=2, params=SamplingParams(seed=3, max_tokens=9))
    with ChatServer() as server:
        run(source, settings, server.url)
        seeds = {request["seed"] for request in server.requests}
        assert all(request["max_tokens"] == 9 for request in server.requests)
    assert len(seeds) == 80
    prompt = Prompt(0, "k", [], b"{}")
    assert sample_seed(3, prompt, 0) == sample_seed(3, prompt, 0) != sample_seed(4, prompt, 0)


def test_rows_are_spread_over_several_servers(source: JsonlInput) -> None:
    settings = settings_for(source)
    with ChatServer(latency=0.01) as one, ChatServer(latency=0.01) as two:
        assert run(source, settings, [one.url, two.url]).complete
        assert min(one.asked.total(), two.asked.total()) >= 15
    assert_complete(settings)


def test_a_server_that_goes_away_in_the_middle_costs_no_row(source: JsonlInput) -> None:
    settings = settings_for(source, num_generations=4)

    async def main(urls: list[str], leaving: ChatServer) -> Accounting:
        with Job(source, source.survey(FORM), settings) as job:
            async with asyncio.timeout(30), Client(urls, model=MODEL, retry=QUICK) as client:
                task = asyncio.create_task(job.run(client))
                while leaving.asked.total() < 20:  # noqa: ASYNC110 - it counts in another thread
                    await asyncio.sleep(0.005)
                await asyncio.to_thread(leaving.__exit__, None, None, None)
                return await task

    with ChatServer(latency=0.02) as staying:
        leaving = ChatServer(latency=0.02).__enter__()
        assert uvloop.run(main([leaving.url, staying.url], leaving)).complete
    assert_complete(settings)
    assert leaving.asked.total() < 100


def test_rows_of_equal_content_are_rows_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"q": "question 1"}\n' * 3)
    source = JsonlInput(path)
    settings = settings_for(source)
    with ChatServer() as server:
        assert run(source, settings, server.url) == Accounting(3, 3, 0)
        assert run(source, settings, server.url) == Accounting(3, 3, 0)
        assert server.asked.total() == 3
    assert [row["q"] for row in rows_of(settings)] == ["question 1"] * 3
