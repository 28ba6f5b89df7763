"""A job in shards on a real Ray: nodes and workers that die or hang, and the account that stays exact."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from penstock.batch.generation import GenerationSettings
from penstock.batch.job import JobSettings
from penstock.cluster.account import read_shards, total
from penstock.cluster.lease import FENCE, TERM
from penstock.cluster.sharded import ShardedJob, ShardedReport
from penstock.cluster.shards import Shards
from penstock.cluster.worker import Engines, ShardedTask
from penstock.errors import ConfigError, PenstockError
from penstock.inputs.opened import open_source
from penstock.inputs.source import Source
from penstock.prompt import PromptFormat
from tests.chat_server import MODEL, ChatServer, answer_to
from tests.cluster.ray_cluster import children, local_cluster, until_gone

pytestmark = pytest.mark.slow

ROWS = 600
SHARDS = 8
BOUND = 150.0
"""Seconds a run may take."""


def rows_of(path: Path, index: int, count: int) -> Source:
    return open_source([path], shard=(index, count))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with local_cluster(nodes=3, cpus=2) as cluster:
        yield cluster


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"id": {number}, "prompt": "question {number}"}}\n' for number in range(ROWS)))
    return path


def task_of(source: Path, out: Path, url: str, *, fence: float = FENCE, **settings: Any) -> ShardedTask:
    return ShardedTask(
        settings=JobSettings(out=out, form=PromptFormat(id_column="id"), max_concurrent=8, **settings),
        generation=GenerationSettings(),
        engines=Engines(urls=(url,), model=MODEL),
        shards=Shards(out, SHARDS),
        source=partial(rows_of, source),
        fence=fence,
    )


def run(task: ShardedTask, *, workers: int = 3, term: float = TERM) -> ShardedReport:
    async def bounded() -> ShardedReport:
        async with asyncio.timeout(BOUND):
            return await ShardedJob(task, workers=workers, term=term).run()

    return asyncio.run(bounded())


def assert_exact(out: Path, failed: int = 0) -> None:
    written = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert len(written) == ROWS - failed
    assert len({row["id"] for row in written}) == ROWS - failed
    assert all(row["generations"] == [answer_to(row["prompt"])] for row in written)
    counted = total(read_shards(Shards(out, SHARDS)))
    assert (counted.rows, counted.done, counted.failed, counted.owed) == (ROWS, ROWS - failed, failed, 0)


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Does it, in a thread, as soon as the condition holds."""

    def wait() -> None:
        deadline = time.monotonic() + BOUND
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def worker_pids() -> list[int]:
    return sorted(int(line.split()[0]) for line in children("ray::ShardWorker"))


def test_every_row_is_there_once_and_done_again_nothing_is_asked(
    cluster: Any, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    with ChatServer(latency=0.02) as server:
        report = run(task_of(source, out, server.url))
        assert report.merged and report.total.complete and report.lost_workers == 0
        assert_exact(out)
        asked, joined = server.asked.total(), out.stat()
        assert run(task_of(source, out, server.url)).total.complete
        assert server.asked.total() == asked
        assert out.stat().st_ino == joined.st_ino, "what is joined already stays as it is"
    assert until_gone(worker_pids) == []


def test_a_worker_that_is_killed_loses_its_shards_to_the_others(
    cluster: Any, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    with ChatServer(latency=0.1) as server:
        killed = when(
            lambda: server.asked.total() > ROWS / 3, lambda: os.kill(worker_pids()[0], signal.SIGKILL)
        )
        report = run(task_of(source, out, server.url))
        killed.join(10)
        assert report.lost_workers == 1 and report.total.complete
        # What is asked again is what was in flight or not yet on disk.
        assert server.asked.total() < ROWS + 3 + 60
    assert_exact(out)


def test_a_worker_that_hangs_is_fenced_off_and_comes_back_in_vain(
    cluster: Any, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    stopped: list[int] = []

    def freeze() -> None:
        stopped.append(worker_pids()[0])
        os.kill(stopped[0], signal.SIGSTOP)
        when(lambda: server.asked.total() >= ROWS, lambda: os.kill(stopped[0], signal.SIGCONT))

    with ChatServer(latency=0.1) as server:
        frozen = when(lambda: server.asked.total() > ROWS / 3, freeze)
        report = run(task_of(source, out, server.url, fence=2.0), term=4.0)
        frozen.join(10)
        assert report.total.complete
    assert_exact(out)
    assert any(".e0" in path.name for path in (tmp_path / "out.jsonl.shards").iterdir())


def test_a_node_that_dies_takes_nothing_with_it(cluster: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    node = cluster.add_node(num_cpus=4, object_store_memory=80 << 20)
    with ChatServer(latency=0.1) as server:
        gone = when(
            lambda: server.asked.total() > ROWS / 3,
            lambda: cluster.remove_node(node, allow_graceful=False),
        )
        report = run(task_of(source, out, server.url), workers=5)
        gone.join(30)
        assert report.lost_workers >= 1 and report.total.complete
    assert_exact(out)


def test_a_driver_that_is_stopped_is_gone_on_with(cluster: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    async def stopped(task: ShardedTask) -> None:
        async with asyncio.timeout(BOUND):
            running = asyncio.create_task(ShardedJob(task, workers=3).run())
            while server.asked.total() < ROWS / 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            running.cancel()
            await asyncio.wait([running])
            assert running.cancelled()

    with ChatServer(latency=0.05) as server:
        task = task_of(source, out, server.url)
        asyncio.run(stopped(task))
        assert not out.exists() and until_gone(worker_pids) == []
        found = total(read_shards(task.shards))
        assert 0 < found.done < ROWS
        assert run(task).total.complete
        assert server.asked.total() < ROWS + 60
    assert_exact(out)


def test_rows_that_fail_are_counted_and_taken_up_again(cluster: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    refused = {"question 7", "question 300"}
    with ChatServer(lambda message, asked: (400, "no") if message in refused else None) as server:
        report = run(task_of(source, out, server.url))
        assert report.merged and report.total.failed == 2
        assert_exact(out, failed=2)
        failures = (tmp_path / "out.jsonl.failures").read_text().splitlines()
        assert sorted(json.loads(line)["key"] for line in failures) == ["300", "7"]
        refused.clear()
        assert run(task_of(source, out, server.url, retry_failed=True)).total.complete
    assert_exact(out)
    assert not (tmp_path / "out.jsonl.failures").exists()


def test_what_no_worker_would_survive_stops_the_job_with_its_words(
    cluster: Any, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    strict = ChatServer(lambda message, asked: (401, "who are you?"))
    with strict as server, pytest.raises(PenstockError, match="who are you"):
        run(task_of(source, out, server.url))
    with ChatServer() as server:
        assert run(task_of(source, out, server.url)).total.complete
        other = replace(task_of(source, out, server.url), shards=Shards(out, 4))
        with pytest.raises(ConfigError, match="begun in 8 shards"):
            run(other)
    assert until_gone(worker_pids) == []
