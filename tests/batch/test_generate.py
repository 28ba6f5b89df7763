"""`penstock.generate` as a program calls it, against a server over real sockets."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import orjson
import pytest
import uvloop

import penstock
from penstock.batch.generate import generate
from penstock.batch.metrics import served
from penstock.batch.progress import Progress
from penstock.batch.report import print_report
from penstock.errors import ConfigError, RequestRejected, ResumeRefused, TooManyFailures
from tests.chat_server import MODEL, ChatServer, answer_to
from tests.scripted import until

T = TypeVar("T")
Row = dict[str, Any]


def run(main: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(60):
            return await main

    return uvloop.run(bounded())


def rows(count: int) -> list[Row]:
    return [{"id": number, "prompt": f"question {number}"} for number in range(count)]


def written(out: Path) -> list[Row]:
    return sorted((json.loads(line) for line in out.read_bytes().splitlines()), key=lambda row: row["id"])


def test_rows_of_a_list_become_rows_of_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ChatServer() as server:
        report = run(penstock.generate(rows(20), tmp_path / "out.jsonl", base_url=server.url))
        assert report.complete
        assert (report.samples, report.resumed_samples, report.completion_tokens) == (20, 0, 40)
        again = run(penstock.generate(rows(20), tmp_path / "out.jsonl", base_url=server.url))
        assert (again.samples, again.resumed_samples) == (0, 20)
        assert server.asked.total() == 21  # one of them the preflight
    assert [row["generations"][0] for row in written(tmp_path / "out.jsonl")] == [
        answer_to(f"question {number}") for number in range(20)
    ]
    assert all(row["reasonings"] == ["hm"] for row in written(tmp_path / "out.jsonl"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert capfd.readouterr() == ("", "")


def test_any_iterable_will_do_and_several_jobs_at_once(tmp_path: Path) -> None:
    async def arriving() -> AsyncIterator[Row]:
        for row in rows(5):
            await asyncio.sleep(0)
            yield row

    async def scenario(url: str) -> None:
        source = tmp_path / "in.jsonl"
        source.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows(5)))
        async with penstock.Client(url, model=MODEL) as client:
            kinds: list[Any] = [arriving(), iter(rows(5)), source, [str(source)], (row for row in rows(5))]
            reports = await asyncio.gather(
                *(
                    generate(given, tmp_path / f"{number}.jsonl", client=client)
                    for number, given in enumerate(kinds)
                )
            )
            assert client.is_open
        assert all(report.complete and report.samples == 5 for report in reports)
        closed = await generate(
            source, tmp_path / "own.jsonl", client=penstock.Client(url), num_generations=2
        )
        assert closed.samples == 10
        async with penstock.Client(url, model="another") as client:
            named = await generate(source, tmp_path / "named.jsonl", client=client, model=MODEL)
        assert named.complete

    with ChatServer() as server:
        run(scenario(server.url))
        assert {request["model"] for request in server.requests} == {MODEL}


def test_a_shard_has_its_own_rows_and_progress_is_told_live(tmp_path: Path) -> None:
    told: list[Progress] = []
    with ChatServer() as server:
        for index in range(2):
            out = tmp_path / f"{index}.jsonl"
            report = run(
                generate(rows(9), out, base_url=server.url, shard=(index, 2), on_progress=told.append)
            )
            assert [row["id"] for row in written(out)] == list(range(index, 9, 2))
            assert told[index].samples_done == report.samples
    assert [progress.rows for progress in told] == [5, 4]


def test_a_failed_sample_is_data_and_too_many_stop_the_run(tmp_path: Path) -> None:
    def refuse(message: str, asked: int) -> tuple[int, str] | None:
        return (400, "no") if message.endswith(("3", "7")) else None

    with ChatServer(refuse) as server:
        report = run(generate(rows(10), tmp_path / "a.jsonl", base_url=server.url))
        assert (report.complete, report.accounting.failed, report.failures) == (
            False,
            2,
            {"RequestRejected": 2},
        )
        assert len(report.failures_path.read_bytes().splitlines()) == 2
        with pytest.raises(TooManyFailures):
            run(
                generate(
                    rows(10), tmp_path / "b.jsonl", base_url=server.url, max_failures=1, max_concurrent=1
                )
            )


async def two_turns(row: Row, client: penstock.RolloutClient) -> Row:
    first = await client.chat(client.messages)
    if row["id"] == 4:
        raise ValueError("four")
    second = await client.chat([{"role": "user", "content": f"again {row['prompt']}"}])
    return {"text": second.text, "first": first.text}


def test_a_rollout_makes_columns_and_its_exceptions_are_failures(tmp_path: Path) -> None:
    with ChatServer() as server:
        report = run(generate(rows(6), tmp_path / "out.jsonl", base_url=server.url, rollout=two_turns))
        assert report.failures == {"ValueError": 1}
        line = json.loads(report.failures_path.read_bytes())
        assert line["error"] == "ValueError"
        assert re.fullmatch(r"four \(test_generate\.py:\d+\)", line["message"])
        assert written(tmp_path / "out.jsonl")[1]["first"] == [answer_to("question 1")]
        with pytest.raises(ResumeRefused, match="rollout was"):
            run(generate(rows(6), tmp_path / "out.jsonl", base_url=server.url))


def test_the_functions_of_the_documentation_work_as_they_stand(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "batch.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    found: Row = {}
    for block in blocks:
        if "def " in block:
            exec(block, found)
    given = [{"prompt": "why", "text": "x" * 9000, "answer": "why", "id": 0}]
    with ChatServer() as server:
        for name in ("solve", "rewrite", "boxed"):
            kind = "validate" if name == "boxed" else "rollout"
            options: Any = {kind: found[name], "base_url": server.url}
            report = run(generate(given, tmp_path / f"{name}.jsonl", **options))
            assert report.complete, report.failures
    assert written(tmp_path / "rewrite.jsonl")[0]["pieces"] == [3]
    assert written(tmp_path / "solve.jsonl")[0]["draft"] == [answer_to("why")]


def test_parquet_parts_come_besides(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    with ChatServer() as server:
        report = run(generate(rows(4), tmp_path / "t.jsonl", base_url=server.url, format="parquet"))
    assert report.parquet == tmp_path / "t.parquet"
    assert pq.read_table(report.parquet).num_rows == 4


async def without_a_prompt(row: Row, client: penstock.RolloutClient) -> str:
    assert client.messages == []
    return (await client.chat([{"role": "user", "content": f"{row['a']}+{row['b']}"}])).answer


def test_rows_of_a_rollout_need_no_prompt(tmp_path: Path) -> None:
    given = [{"id": 0, "a": 1, "b": 2}]
    with ChatServer() as server:
        for column, complete in ((None, True), ("prompt", False)):
            call = generate(
                given,
                tmp_path / f"{column}.jsonl",
                base_url=server.url,
                rollout=without_a_prompt,
                prompt_column=column,
            )
            if complete:
                assert run(call).complete
            else:
                with pytest.raises(ConfigError, match="there must be a column 'prompt'"):
                    run(call)
    assert written(tmp_path / "None.jsonl")[0]["generations"] == ["1+2 1+2"]


def test_a_call_that_is_cancelled_is_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    async def cancelled(url: str) -> None:
        task = asyncio.create_task(generate(rows(40), out, base_url=url, rollout=two_turns, max_concurrent=4))
        await until(lambda: server.asked.total() >= 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with ChatServer(latency=0.03) as server:
        run(cancelled(server.url))
        before = server.asked.total()
        report = run(generate(rows(40), out, base_url=server.url, rollout=two_turns, preflight=False))
        assert report.resumed_samples > 5
        assert server.asked.total() - before <= 79 - before + 4 + 1  # what was in flight, and the preflight
        assert [row["id"] for row in written(out)] == [number for number in range(40) if number != 4]


def test_what_no_request_survives_is_known_before_anything_is_generated(tmp_path: Path) -> None:
    def locked(message: str, asked: int) -> tuple[int, str] | None:
        return 401, "give a key"

    def picky(message: str, asked: int) -> tuple[int, str] | None:
        return 400, "temperature must be in [0, 2]"

    for behaviour, says in ((locked, "give a key"), (picky, "must be in")):
        with ChatServer(behaviour) as server:
            with pytest.raises(ConfigError, match=says):
                run(generate(rows(50), tmp_path / "out.jsonl", base_url=server.url))
            assert server.asked.total() == 1
    with ChatServer(
        picky
    ) as server:  # of a rollout function that cannot be said: it may ask for something else
        report = run(generate(rows(5), tmp_path / "r.jsonl", base_url=server.url, rollout=two_turns))
        assert report.failures == {"RequestRejected": 5}
        with pytest.raises(RequestRejected):
            client = penstock.Client(server.url, model="x")
            run(generate(rows(5), tmp_path / "s.jsonl", client=client, preflight=False, rollout=forbidden))


async def forbidden(row: Row, client: penstock.RolloutClient) -> str:
    raise RequestRejected(403, "not yours")


def test_where_nothing_is_owed_no_engine_is_asked(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with ChatServer() as server:
        run(generate(rows(5), out, base_url=server.url))
    lines = out.read_bytes()
    torn = lines[: len(lines) // 2]
    out.write_bytes(torn)
    # The server is gone, and what is missing of the output is written from the journal.
    report = run(generate(rows(5), out, client=penstock.Client(server.url, model=MODEL)))
    assert report.complete
    assert report.samples == 0
    assert len(written(out)) == 5


def test_what_cannot_be_done_is_one_sentence(tmp_path: Path) -> None:
    cases: list[tuple[Row, str]] = [
        ({}, "Say where to generate"),
        ({"base_url": "127.0.0.1:9"}, "No engine answers"),
        ({"base_url": "x", "temperature": 1}, "no option 'temperature'"),
        ({"client": penstock.Client("x", model="m"), "api_key": "k"}, "its own key"),
        ({"client": penstock.Client("x", model="m"), "rollout": "nowhere:f"}, "cannot be imported"),
        ({"client": penstock.Client("x", model="m"), "max_failures": "some"}, "no limit of failures"),
        ({"client": penstock.Client("x", model="m"), "max_concurrent": 0}, "at least 1"),
        ({"client": penstock.Client("x", model="m"), "num_generations": 0}, "must be 1 to"),
    ]
    for options, says in cases:
        with pytest.raises(ConfigError, match=says):
            run(generate(rows(2), tmp_path / "out.jsonl", **options))
    assert not list(tmp_path.iterdir())


def test_metrics_are_served_while_a_job_runs(tmp_path: Path) -> None:
    async def scenario(url: str) -> str:
        shown: list[Progress] = []
        await generate(rows(7), tmp_path / "out.jsonl", base_url=url, on_progress=shown.append)
        async with served(shown[0], "a job", 0) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            text = (await reader.read()).decode()
            writer.close()
            with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
                async with served(shown[0], "a job", port):
                    pass
        return text

    with ChatServer() as server:
        text = run(scenario(server.url))
    for line in (
        'penstock_batch_samples{state="done"} 7.0',
        'penstock_batch_rows{state="owed"} 0.0',
        "penstock_batch_generation_tokens_total 14.0",
        'penstock_batch_sample_latency_seconds_bucket{le="+Inf"} 7.0',
        'job="a job"',
    ):
        assert line in text


def test_the_report_says_what_was_left_out(tmp_path: Path) -> None:
    from io import StringIO

    from rich.console import Console

    with ChatServer() as server:
        report = run(generate(rows(3), tmp_path / "out.jsonl", base_url=server.url))
    said = StringIO()
    print_report(Console(file=said, width=100), report)
    assert "3 of 3 done, 0 failed, 0 owed" in said.getvalue()
    assert "3 in this run, 0 from before" in said.getvalue()
