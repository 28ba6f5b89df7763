"""A worker of a job in shards, without Ray: what it does with its leases, and when nobody asks any more."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from penstock.batch.generation import GenerationSettings
from penstock.batch.job import JobSettings
from penstock.cluster.lease import Lease
from penstock.cluster.merge import merge
from penstock.cluster.shards import Shards, journal_of
from penstock.cluster.worker import Engines, ShardedTask, ShardReport, ShardWorker
from penstock.errors import ConfigError
from penstock.inputs.opened import open_source
from penstock.inputs.source import Source
from tests.chat_server import MODEL, ChatServer, answer_to

ROWS, SHARDS = 60, 3
BOUND = 20.0
"""Seconds a worker may take for what a test waits for."""


def rows_of(path: Path, index: int, count: int) -> Source:
    return open_source([path], shard=(index, count))


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., ShardedTask]:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"prompt": "question {number}"}}\n' for number in range(ROWS)))

    def made(url: str, fence: float = 60.0) -> ShardedTask:
        shards = Shards(tmp_path / "out.jsonl", SHARDS)
        shards.prepare()
        return ShardedTask(
            settings=JobSettings(out=shards.out),
            generation=GenerationSettings(),
            engines=Engines(urls=(url,), model=MODEL),
            shards=shards,
            source=partial(rows_of, source),
            fence=fence,
        )

    return made


@pytest.fixture
def workers() -> Iterator[Callable[[ShardedTask], ShardWorker]]:
    there: list[ShardWorker] = []

    def made(task: ShardedTask) -> ShardWorker:
        there.append(ShardWorker(task))
        return there[-1]

    yield made
    for worker in there:
        worker.stop()


def until(worker: ShardWorker, condition: Callable[[ShardReport], Any], shard: int) -> ShardReport:
    """The worker's word on a shard, as soon as it is so."""
    deadline = time.monotonic() + BOUND
    while time.monotonic() < deadline:
        for report in worker.look():
            if report.lease.shard == shard and condition(report):
                return report
        time.sleep(0.01)
    raise AssertionError(f"shard {shard}: {worker.look()}")


def is_over(report: ShardReport) -> bool:
    return report.state == "over"


def test_shards_are_done_side_by_side_and_joined(
    task: Callable[..., ShardedTask], workers: Callable[[ShardedTask], ShardWorker]
) -> None:
    with ChatServer() as server:
        job = task(server.url)
        worker = workers(job)
        leases = [Lease(shard, 0, "a") for shard in range(SHARDS)]
        for lease in leases:
            worker.take(lease, 4)
        for lease in leases:
            report = until(worker, is_over, lease.shard)
            assert (report.rows, report.rows_done, report.samples_done) == (20, 20, 20)
        assert worker.look(tuple(leases)) == [], "what the driver knows is forgotten"
        assert server.asked.total() == ROWS + 1, "the engines are tried once, not for each shard"
    assert merge(job.shards).total.complete
    written = [json.loads(line) for line in job.shards.out.read_bytes().splitlines()]
    assert [row["prompt"] for row in written[:2]] != [row["prompt"] for row in written[20:22]]
    assert {row["prompt"] for row in written} == {f"question {number}" for number in range(ROWS)}
    assert all(row["generations"] == [answer_to(row["prompt"])] for row in written)
    whole = job.shards.out.read_bytes()
    with job.shards.output(1).open("ab") as file:
        file.write(b'{"prompt": "of nobody"}\n')
    with pytest.raises(ConfigError, match="hold 61 rows and their journals 60"):
        merge(job.shards)
    assert job.shards.out.read_bytes() == whole, "what was joined stays"
    assert not list(job.shards.out.parent.glob("*.joining"))
    with journal_of(job.shards.out).open("w"), pytest.raises(ConfigError, match="not made from shards"):
        merge(job.shards)


def test_a_taken_over_shard_goes_on_while_its_last_holder_still_writes(
    task: Callable[..., ShardedTask], workers: Callable[[ShardedTask], ShardWorker]
) -> None:
    with ChatServer(latency=0.1) as server:
        job = task(server.url)
        zombie, heir = workers(job), workers(job)
        zombie.take(Lease(1, 0, "a"), 2)
        # The journal is written a few times a second: what is taken over must be in it.
        journal = journal_of(job.shards.output(1))
        until(zombie, lambda report: journal.exists() and journal.read_bytes().count(b" s ") >= 8, 1)
        heir.take(Lease(1, 1, "b"), 2)
        assert until(heir, lambda report: report.resumed_samples >= 8, 1).rows == 20
        assert until(heir, is_over, 1).rows_done == 20
        until(zombie, is_over, 1)  # it has written all 20 too, where nobody looks
    assert job.shards.epochs() == {1: [1]}
    lines = job.shards.newest(1).read_bytes().splitlines()
    assert len(lines) == len({json.loads(line)["prompt"] for line in lines}) == 20


def test_a_worker_that_nobody_asks_stops_and_closes_its_files(
    task: Callable[..., ShardedTask], workers: Callable[[ShardedTask], ShardWorker]
) -> None:
    with ChatServer(latency=0.5) as server:
        job = task(server.url, fence=1.0)
        worker = workers(job)
        worker.take(Lease(0, 0, "a"), 1)
        until(worker, lambda report: report.rows_done >= 1, 0)
        asked = -1
        while asked != server.asked.total():  # until it has stood still for a second
            asked = server.asked.total()
            time.sleep(1.0)
        assert asked < 20
        assert [report.state for report in worker.look()] == ["stopped"]
        worker.take(Lease(0, 0, "b"), 8)
        assert until(worker, is_over, 0).rows_done == 20, "its files are open to the next holder"


def test_an_error_is_told_in_words_and_a_dropped_shard_is_forgotten(
    task: Callable[..., ShardedTask], workers: Callable[[ShardedTask], ShardWorker]
) -> None:
    with ChatServer(lambda message, asked: (401, "who are you?")) as server:
        worker = workers(task(server.url))
        worker.take(Lease(2, 0, "a"), 2)
        report = until(worker, lambda report: report.state == "failed", 2)
        assert report.error is not None and report.error[0] == "ConfigError"
        assert "who are you?" in report.error[1] and "shard 2" in report.error[1]
        worker.drop(report.lease)
        worker.drop(report.lease)
        assert worker.look() == []
