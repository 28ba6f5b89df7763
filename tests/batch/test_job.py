"""A job over real sockets and real files: every row once, whatever the server does."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from penstock.batch.failures import FailureLimit
from penstock.batch.generation import GenerationSettings, sample_seed
from penstock.batch.job import Accounting, Job, JobSettings
from penstock.batch.status import read_status
from penstock.batch.steps import Steps
from penstock.batch.trace import Metadata, Trace
from penstock.client import Client
from penstock.errors import ConfigError, ConnectFailed, RequestRejected, ResumeRefused, TooManyFailures
from penstock.fleet.retry import Retry
from penstock.inputs.jsonl import JsonlInput
from penstock.inputs.source import Source, Survey
from penstock.prompt import Prompt, PromptFormat
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
    settings = JobSettings(out=source.path.with_name("out.jsonl"), form=FORM, max_concurrent=8)
    return msgspec.structs.replace(settings, **changes)


PLAIN = SamplingParams()


def opened(source: Source, settings: JobSettings, params: SamplingParams = PLAIN) -> Job:
    return Job(source, settings, GenerationSettings(model=MODEL, params=params).fingerprint)


def run(
    source: Source,
    settings: JobSettings,
    urls: str | Sequence[str],
    params: SamplingParams = PLAIN,
) -> Accounting:
    async def main() -> Accounting:
        with opened(source, settings, params) as job:
            async with asyncio.timeout(30), Client(urls, model=MODEL, retry=QUICK) as client:
                return await job.run(GenerationSettings(params=params).generation(client))

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


def test_a_failure_says_how_often_it_was_tried(source: JsonlInput) -> None:
    settings = settings_for(source)
    with ChatServer(lambda message, asked: (500, "oops") if message == "question 7" else None) as server:
        assert run(source, settings, server.url) == Accounting(40, 39, 1)
    failure = json.loads(settings.failures_path.read_text())
    assert (failure["error"], failure["status"], failure["attempts"]) == ("ServerFailed", 500, 3)
    assert "oops" in failure["message"]


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
    with opened(source, settings) as job:
        assert job.accounting().owed == 40


def test_cancelled_anywhere_it_goes_on_where_it_was(source: JsonlInput) -> None:
    settings = settings_for(source, num_generations=2)
    generator = random.Random(5)

    async def cut_short(url: str, seconds: float) -> None:
        with opened(source, settings) as job:
            async with Client(url, model=MODEL, retry=QUICK) as client:
                task = asyncio.create_task(job.run(GenerationSettings().generation(client)))
                await asyncio.wait([task], timeout=seconds)
                task.cancel()
                await asyncio.wait([task], timeout=5)
                assert task.done()
                assert not any(client.statistics().in_flight.values())

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
        before = settings.out.read_bytes(), settings.journal_path.read_bytes()
        with pytest.raises(ResumeRefused, match=r"temperature was unset and is now 0\.5"):
            run(source, settings, server.url, SamplingParams(temperature=0.5))
        source.path.write_bytes(b"".join(source.path.read_bytes().splitlines(keepends=True)[3:]))
        with pytest.raises(ResumeRefused, match=r"has 3 rows that .*in\.jsonl does not have"):
            run(source, settings, server.url)
        assert server.asked.total() == 40
    assert (settings.out.read_bytes(), settings.journal_path.read_bytes()) == before


def test_an_input_may_grow_and_come_in_another_order(source: JsonlInput) -> None:
    settings = settings_for(source)
    lines = source.path.read_bytes().splitlines(keepends=True)
    with ChatServer() as server:
        source.path.write_bytes(b"".join(lines[:15]))
        assert run(source, settings, server.url) == Accounting(15, 15, 0)
        random.Random(3).shuffle(lines)
        source.path.write_bytes(b"".join(lines))
        assert run(source, settings, server.url) == Accounting(40, 40, 0)
        assert server.asked.total() == 40
    assert_complete(settings)


def test_more_samples_are_added_to_those_that_are_there(source: JsonlInput) -> None:
    """2 → 5: only three more of each row, and the old rows stay on disk until all the new ones are there."""
    two, five = settings_for(source, num_generations=2), settings_for(source, num_generations=5)
    aside = two.out.with_name("out.jsonl.n2")

    def fail_row_9(message: str, asked: int) -> tuple[int, str] | None:
        return (400, "no") if message == "question 9" and asked == 2 else None

    with ChatServer(fail_row_9) as server:
        assert run(source, two, server.url).complete
        old = two.out.read_bytes()
        assert run(source, five, server.url) == Accounting(40, 39, 1)
        assert server.asked.total() == 40 * 5
        assert aside.read_bytes() == old, "not all rows are in the new one"
        assert run(source, msgspec.structs.replace(five, retry_failed=True), server.url).complete
        assert server.asked.total() == 40 * 5 + 1
        with pytest.raises(ResumeRefused, match="up to 5 samples of a row, and 2 are asked for"):
            run(source, two, server.url)
    assert_complete(five)
    assert not aside.exists()


def test_more_samples_are_asked_for_while_the_job_is_killed_again_and_again(source: JsonlInput) -> None:
    generator = random.Random(11)

    async def cut_short(url: str, settings: JobSettings) -> None:
        with opened(source, settings) as job:
            async with Client(url, model=MODEL, retry=QUICK) as client:
                task = asyncio.create_task(job.run(GenerationSettings().generation(client)))
                await asyncio.wait([task], timeout=generator.uniform(0.02, 0.08))
                task.cancel()
                await asyncio.wait([task], timeout=5)

    with ChatServer(latency=0.02) as server:
        for samples in (1, 1, 2, 3, 3, 4):
            uvloop.run(cut_short(server.url, settings_for(source, num_generations=samples)))
        final = settings_for(source, num_generations=4)
        assert run(source, final, server.url).complete
        assert server.asked.total() <= 160 + 6 * final.max_concurrent
    assert_complete(final)
    assert [path.name for path in source.path.parent.glob("out*.n*")] == []


class Once(Source):
    """Rows that can be read once, as from a pipe."""

    name, again = "stdin", False

    def __init__(self, lines: Sequence[bytes], then: BaseException | None = None) -> None:
        self._lines, self._then = lines, then

    def lines(self) -> Iterator[tuple[str, bytes]]:
        for number, line in enumerate(self._lines, 1):
            yield f"stdin line {number}", line.strip()
        if self._then is not None:
            raise self._then

    def survey(self, form: PromptFormat) -> Survey:
        raise AssertionError("it can be read only once")


def test_an_input_that_can_be_read_once_is_counted_at_its_end(source: JsonlInput) -> None:
    settings = settings_for(source)
    lines = source.path.read_bytes().splitlines()
    with ChatServer() as server:
        with pytest.raises(ConfigError, match="torn"):
            run(Once(lines[:10], ConfigError("the pipe is torn")), settings, server.url)
        status = read_status(settings.out)
        assert status.accounting.rows is None
        assert status.accounting.owed is None
        assert run(Once(lines), settings, server.url) == Accounting(40, 40, 0)
        assert_complete(settings)
        asked = server.asked.total()
        # Rows that the input turns out not to have are told, and are not counted.
        with opened(Once(lines[5:]), settings) as job:
            accounting = asyncio.run(finish(job, server.url))
            assert (accounting, job.strays) == (Accounting(35, 35, 0), 5)
        status = read_status(settings.out)
        assert (status.accounting, status.strays) == (Accounting(35, 35, 0), 5)
        assert server.asked.total() == asked


async def finish(job: Job, url: str) -> Accounting:
    async with asyncio.timeout(30), Client(url, model=MODEL, retry=QUICK) as client:
        return await job.run(GenerationSettings().generation(client))


def test_too_many_failures_stop_the_job(source: JsonlInput) -> None:
    settings = settings_for(source, max_failures=FailureLimit.parse("3"), max_concurrent=1)

    def refuse(message: str, asked: int) -> tuple[int, str] | None:
        return (400, "no") if int(message.split()[1]) % 2 else None

    told = "4 of 8 samples failed in this run, and no more than 3"
    with ChatServer(refuse) as server, pytest.raises(TooManyFailures, match=told):
        run(source, settings, server.url)
    status = read_status(settings.out)
    assert status.accounting == Accounting(40, 4, 4)
    assert status.accounting.owed == 32
    with ChatServer() as server:
        assert run(source, settings_for(source, retry_failed=True), server.url).complete
    assert_complete(settings)


@pytest.mark.parametrize(
    ("text", "failed", "done", "exceeded"),
    [("0", 1, 99, True), ("0", 0, 9, False), ("5%", 5, 5, False), ("5%", 5, 95, False), ("5%", 6, 94, True)],
)
def test_a_share_of_failures_is_judged_after_enough_samples(
    text: str, failed: int, done: int, exceeded: bool
) -> None:
    assert FailureLimit.parse(text).is_exceeded(failed, done) is exceeded


@pytest.mark.parametrize("text", ["", "many", "-1", "5.5", "120%", "-5%", "%", "nan%"])
def test_what_is_no_limit_of_failures_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no limit of failures"):
        FailureLimit.parse(text)


def test_a_failed_row_that_left_the_input_is_not_counted(source: JsonlInput) -> None:
    settings = settings_for(source)
    with ChatServer(lambda message, asked: (400, "no") if message == "question 7" else None) as server:
        assert run(source, settings, server.url) == Accounting(40, 39, 1)
        lines = source.path.read_bytes().splitlines(keepends=True)
        source.path.write_bytes(b"".join(lines[:7] + lines[8:]))
        assert run(source, settings, server.url) == Accounting(39, 39, 0)
    assert read_status(settings.out).accounting == Accounting(39, 39, 0)
    assert not settings.failures_path.exists()


def test_steps_of_an_unfinished_sample_are_there_when_it_is_taken_up_again(source: JsonlInput) -> None:
    settings = settings_for(source, num_generations=2)
    seen: dict[tuple[int, int], list[bytes]] = {}

    class Stepping:
        def __init__(self, steps: int) -> None:
            self.steps = steps

        async def __call__(self, prompt: Prompt, index: int, steps: Steps) -> Trace:
            seen[prompt.position, index] = list(steps.done)
            for number in range(len(steps.done), self.steps):
                steps.add(b'{"step":%d}' % number)
            if self.steps < 3:
                await asyncio.sleep(30)
            return Trace(text="t", metadata=Metadata(prompt_tokens=1, completion_tokens=1, total_tokens=2))

    async def cut_short() -> None:
        with opened(source, settings) as job:
            task = asyncio.create_task(job.run(Stepping(2)))
            await asyncio.wait([task], timeout=0.3)
            task.cancel()
            await asyncio.wait([task], timeout=5)

    asyncio.run(cut_short())
    begun = dict(seen)
    assert len(begun) == settings.max_concurrent
    seen.clear()

    async def complete() -> Accounting:
        with opened(source, settings) as job:
            return await job.run(Stepping(3))

    assert asyncio.run(complete()).complete
    for place, steps in seen.items():
        assert steps == ([b'{"step":0}', b'{"step":1}'] if place in begun else [])
    with opened(source, settings) as job:
        assert not job.journal.state.needs_rescan
        assert job.journal.state.kept_samples == 0


def test_each_sample_has_its_own_reproducible_seed(source: JsonlInput) -> None:
    settings = settings_for(source, num_generations=2)
    with ChatServer() as server:
        run(source, settings, server.url, SamplingParams(seed=3, max_tokens=9))
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
        with opened(source, settings) as job:
            async with asyncio.timeout(30), Client(urls, model=MODEL, retry=QUICK) as client:
                task = asyncio.create_task(job.run(GenerationSettings().generation(client)))
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


def test_slots_are_busy_until_the_tail_under_heavy_tailed_latencies(tmp_path: Path) -> None:
    """Latencies of a log-normal distribution with sigma 0.8. A job that waits for chunks has half its slots
    idle."""
    slots, rows, median = 100, 1500, 0.15
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"q": "question {i}"}}\n' for i in range(rows)))
    source = JsonlInput(path)
    generator = random.Random(8)
    spans: list[tuple[float, float]] = []

    async def generation(prompt: Prompt, index: int, steps: Steps) -> Trace:
        began = time.monotonic()
        await asyncio.sleep(generator.lognormvariate(math.log(median), 0.8))
        spans.append((began, time.monotonic()))
        return Trace(text="t", metadata=Metadata(prompt_tokens=1, completion_tokens=1, total_tokens=2))

    async def main() -> Accounting:
        with opened(source, settings_for(source, max_concurrent=slots)) as job:
            async with asyncio.timeout(60):
                return await job.run(generation)

    assert uvloop.run(main()).complete
    start, last = min(began for began, _ in spans), max(began for began, _ in spans)
    busy = sum(min(end, last) - began for began, end in spans)
    assert busy / (slots * (last - start)) >= 0.98
