"""Whatever happens to a job's files: the accounting holds, nothing finished is lost, nothing appears twice.

A job is run again and again over the same files. In each round writes may fail at any byte, the input may
grow and change its order, more samples may be asked for; between two rounds the tails of the files are cut
off or garbled. The slow tests do it with the real command, kill -9 and a full disk.
"""

from __future__ import annotations

import asyncio
import errno
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import penstock.batch.journal as journal_module
from penstock.batch import snapshot
from penstock.batch.job import Accounting, Job, JobSettings
from penstock.batch.records import decode, row_fields
from penstock.batch.status import read_status
from penstock.batch.steps import Steps
from penstock.batch.trace import Metadata, Trace
from penstock.errors import ConfigError, RequestRejected, WriteFailed
from penstock.inputs.jsonl import JsonlInput
from penstock.prompt import Prompt, PromptFormat
from tests.chat_server import MODEL, ChatServer, answer_to

FORM = PromptFormat(prompt_column="q")
ROWS = 24
SEEDS = 24
ROUNDS = 6

KILLS = 300
"""Times the real command is killed."""

Sample = tuple[int, int, int]
"""Hash and occurrence of its row, and its index."""


class Stopped(Exception):
    """The job is cut short."""


class FailingOs:
    """`os`, but writing or syncing fails once `budget` bytes were written, as on a full or broken disk."""

    def __init__(self, budget: int, number: int) -> None:
        self._budget, self._number = budget, number

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, fd: int, data: memoryview) -> int:
        if self._budget <= 0:
            raise OSError(self._number, os.strerror(self._number))
        written = os.write(fd, data[: max(1, self._budget)])
        self._budget -= written
        return written

    def fdatasync(self, fd: int) -> None:
        if self._budget <= 0:
            raise OSError(self._number, os.strerror(self._number))


class Fuzzed:
    """A job's files, and what is known of them."""

    def __init__(self, folder: Path, generator: random.Random) -> None:
        self.random = generator
        self.source = folder / "in.jsonl"
        self.out = folder / "out.jsonl"
        self.journal = folder / "out.jsonl.journal"
        self.samples = 1
        self.spoiled = False
        # A third of the rows are equal to another one.
        self.rows = [f'{{"n": {i - i % 3 // 2}, "q": "question {i - i % 3 // 2}"}}\n' for i in range(ROWS)]
        self.there = 8
        self.stop_after = 0
        """Samples until the job is cancelled; 0: it is not."""
        self.finished: set[Sample] = set()
        """Samples that the journal held when the round began."""
        self.made: Counter[Sample] = Counter()

    def settings(self, **changes: Any) -> JobSettings:
        return JobSettings(out=self.out, form=FORM, num_generations=self.samples, max_concurrent=5, **changes)

    async def __call__(self, prompt: Prompt, index: int, steps: Steps) -> Trace:
        """The generation."""
        sample = (prompt.hash, prompt.occurrence, index)
        assert sample not in self.finished, "a finished sample is made again"
        self.made[sample] += 1
        if self.stop_after and self.made.total() == self.stop_after:
            raise Stopped
        steps.add(b'{"number":%d}' % len(steps.done))
        await asyncio.sleep(self.random.choice([0, 0, 0.001, 0.01]))
        if self.random.random() < 0.05:
            raise RequestRejected(400, "no")
        message = prompt.messages[0]["content"]
        return Trace(
            text=f"{message} sample {index} " + "é" * self.random.choice([0, 9, 99]),
            metadata=Metadata(prompt_tokens=1, completion_tokens=1, total_tokens=2),
        )

    def run(self, *, retry_failed: bool = False) -> Accounting:
        try:
            return self._run(retry_failed)
        except ConfigError as error:
            # Nothing but a header is left of the journal, and of the output not even a first row.
            assert self.spoiled and "knows nothing of it: use another --out, or move" in str(error)
            self.out.unlink()
            return self._run(retry_failed)

    def _run(self, retry_failed: bool) -> Accounting:
        rows = self.rows[: self.there]
        self.random.shuffle(rows)
        self.source.write_text("".join(rows))
        self.finished = set(self.in_journal())
        self.made.clear()

        async def main() -> Accounting:
            with Job(JsonlInput(self.source), self.settings(retry_failed=retry_failed), {}) as job:
                async with asyncio.timeout(60):
                    return await job.run(self)

        return asyncio.run(main())

    def in_journal(self) -> Iterator[Sample]:
        """Every finished sample the journal holds, read as plainly as can be."""
        if self.journal.exists():
            for line in self.journal.read_bytes().split(b"\n")[:-1]:
                record = decode(0, line)
                if record.kind == b"s":
                    yield row_fields(record)

    def spoil(self) -> None:
        """Cut off or garble the end of a file, as a crash of the machine does; never the journal's first
        lines, without which nobody knows whose it is."""
        index = snapshot.path_beside(self.journal)
        path = self.random.choice([self.journal, self.out, index])
        if not path.exists():
            return
        self.spoiled = True
        least = 0
        if path == self.journal:
            least = sum(len(line) + 1 for line in path.read_bytes().split(b"\n")[:3])
        size = path.stat().st_size
        cut = max(least, size - self.random.choice([1, 7, 60, 200, 900, 5000]))
        with path.open("r+b") as file:
            if self.random.random() < 0.5:
                file.truncate(cut)
            elif cut < size:
                file.seek(cut)
                file.write(self.random.randbytes(self.random.randint(1, min(40, size - cut))))

    def command(self, url: str) -> list[str]:
        """Arguments of `penstock generate`."""
        flags = ["--prompt-column", "q", "--base-url", url, "--model", MODEL, "--max-concurrent", "8"]
        return [str(self.source), "--out", str(self.out), "-n", str(self.samples), *flags]

    def size(self) -> int:
        """Of the larger file, in bytes."""
        return max((path.stat().st_size for path in (self.out, self.journal) if path.exists()), default=0)

    def check_kept(self) -> None:
        """Of what is whole in the output, no row stands there more often than in the input. A run that was
        killed before it had looked at the output leaves it as garbled as it was."""
        found: Counter[int] = Counter()
        for line in self.out.read_bytes().split(b"\n")[:-1] if self.out.exists() else ():
            try:
                found[json.loads(line)["n"]] += 1
            except ValueError:
                assert self.spoiled
        assert found <= Counter(json.loads(row)["n"] for row in self.rows[: self.there])

    def check_status(self) -> None:
        if not self.journal.exists():  # the disk was full before anything was done
            assert not self.out.exists() or not self.out.read_bytes()
            return
        status = read_status(self.out)
        rows = status.accounting
        if rows.rows is not None:
            assert rows.owed is not None and rows.owed >= 0
            assert rows.rows == rows.done + rows.failed + rows.owed
            assert status.samples_owed is not None and status.samples_owed >= 0

    def check_output(self) -> None:
        """The output is whole lines, no row more often than in the input, each with all its samples."""
        content = self.out.read_bytes()
        assert not content or content.endswith(b"\n")
        found = [json.loads(line) for line in content.splitlines()]
        wanted = Counter(json.loads(row)["n"] for row in self.rows[: self.there])
        assert Counter(row["n"] for row in found) <= wanted
        for row in found:
            texts = [text.rstrip("é").strip() for text in row["generations"]]
            assert texts == [f"{row['q']} sample {index}" for index in range(self.samples)]


@contextmanager
def failing(budget: int | None, number: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if budget is not None:
            patch.setattr(journal_module, "os", FailingOs(budget, number))
        yield


@pytest.mark.parametrize("seed", range(SEEDS))
def test_files_that_fail_are_cut_off_and_garbled_lose_nothing_finished(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(seed)
    monkeypatch.setattr(snapshot, "LEAST_GROWTH", generator.choice([0, 2000, 1 << 30]))
    monkeypatch.setattr(snapshot, "GROWTH_PER_BYTE", 0)
    files = Fuzzed(tmp_path, generator)
    for _ in range(ROUNDS):
        files.there = max(files.there, generator.randint(1, ROWS))
        files.samples += generator.random() < 0.3
        files.stop_after = generator.choice([0, generator.randint(1, 30)])
        budget = generator.choice([None, generator.randint(0, 9000)])
        with failing(budget, generator.choice([errno.ENOSPC, errno.EIO])):
            try:
                files.run(retry_failed=generator.random() < 0.3)
            except (WriteFailed, Stopped):
                pass
            else:
                files.check_output()
        files.check_status()
        if generator.random() < 0.7:
            files.spoil()
            files.check_status()
    files.there, files.stop_after = ROWS, 0
    for _ in range(100):
        if files.run(retry_failed=True).complete:
            break
    assert len(files.out.read_bytes().splitlines()) == ROWS
    files.check_output()
    assert read_status(files.out).accounting == Accounting(ROWS, ROWS, 0)
    assert files.spoiled or not list(tmp_path.glob("out.jsonl.n*"))


def generate(arguments: list[str], most_bytes: int | None) -> None:
    """`penstock generate`, in a process of its own; it may write no file larger than `most_bytes`."""
    from penstock.cli import generate as command

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    try:
        status = command.main(arguments)
    except WriteFailed:
        status = 1
    os._exit(status)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_command_is_killed_hundreds_of_times(seed: int, tmp_path: Path) -> None:
    """SIGKILL at random moments; between two runs the files' tails are cut off or garbled, the disk is full
    now and then, and the job grows. What the files held before a run is not asked of the server again."""
    generator = random.Random(seed)
    files = Fuzzed(tmp_path, generator)
    files.rows = [f'{{"n": {i - i % 3 // 2}, "q": "question {i - i % 3 // 2}"}}\n' for i in range(400)]
    files.there, killed = 40, 0
    typical = 0.5  # seconds of a run on this machine, found as it goes
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["penstock.cli.generate", "penstock.batch.display"])
    with ChatServer(latency=0.01) as server:
        for _ in range(KILLS // 3):
            files.there = min(400, files.there + generator.choice([0, 0, 10]))
            files.samples += generator.random() < 0.02
            rows = files.rows[: files.there]
            generator.shuffle(rows)
            files.source.write_text("".join(rows))
            finished, asked = len(set(files.in_journal())), server.asked.total()
            most = generator.choice([None, None, None, files.size() + generator.randint(0, 20_000)])
            process = context.Process(target=generate, args=(files.command(server.url), most))
            began = time.monotonic()
            process.start()
            process.join(generator.uniform(0.02, 1.5 * typical))
            if process.is_alive():
                process.kill()
                killed += 1
                typical *= 1.03
            else:
                typical += 0.3 * (time.monotonic() - began - typical)
            process.join(30)
            files.check_kept()
            assert len(set(files.in_journal())) >= finished
            assert server.asked.total() - asked <= files.there * files.samples - finished + 1
            files.check_status()
            if generator.random() < 0.3:
                files.spoil()
                files.check_status()
        files.there = 400
        files.source.write_text("".join(files.rows))
        last = [sys.executable, "-m", "penstock", "generate", *files.command(server.url)]
        assert subprocess.run(last, stderr=subprocess.DEVNULL, timeout=120, check=False).returncode == 0
    assert killed > KILLS // 12, "the moments of the kills are spread over the run"
    found = [json.loads(line) for line in files.out.read_bytes().splitlines()]
    assert Counter(row["n"] for row in found) == Counter(json.loads(row)["n"] for row in files.rows)
    for row in found:
        assert row["generations"] == [answer_to(row["q"])] * files.samples
    assert read_status(files.out).accounting == Accounting(400, 400, 0)


@pytest.mark.slow
def test_a_full_disk_and_then_room_again(tmp_path: Path) -> None:
    """A file system of 200 kB: the job stops, says so, and goes on once there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a file system")
    try:
        files = Fuzzed(disk, random.Random(0))
        rows = [f'{{"n": {i}, "q": "question {i}"}}\n' for i in range(400)]
        files.source = tmp_path / "in.jsonl"
        files.source.write_text("".join(rows))
        with ChatServer() as server:
            command = [sys.executable, "-m", "penstock", "generate", *files.command(server.url)]
            full = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert full.returncode == 1
            assert "No space left on device" in full.stderr
            there = set(files.in_journal())
            assert there
            subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
            asked = server.asked.total()
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0
            assert server.asked.total() - asked <= 400 - len(there) + 1
        assert sorted(json.loads(line)["n"] for line in files.out.read_bytes().splitlines()) == list(
            range(400)
        )
    finally:
        subprocess.run(["umount", str(disk)], check=False)
