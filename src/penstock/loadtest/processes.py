"""The generator's processes: started by spawn, given jobs over a pipe, ended with their parent.

A process that dies in the middle of a job is GeneratorDied, not a smaller load. A process whose parent goes
away ends itself.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any, Final, Self

from penstock.errors import PenstockError
from penstock.loadtest.asking import ASKERS
from penstock.loadtest.plan import Beat, Job, Tally
from penstock.loadtest.sending import Sending
from penstock.loadtest.workload import Workload
from penstock.wire.loop import run

BEAT: Final = 0.25
"""Seconds between two reports of where a process is."""
LEAD: Final = 0.3
"""Seconds between giving out a job and its start: time for all to have it."""
START_LIMIT: Final = 60.0
"""Seconds in which a process has to come up."""
STOP_LIMIT: Final = 5.0
"""Seconds a process has to end when it is told to."""
READY: Final = "ready"


class GeneratorDied(PenstockError):
    """A process of the load generator has ended in the middle of its work."""


class Generators:
    """So many processes; `async with` starts and ends them."""

    def __init__(self, workload: Workload, processes: int) -> None:
        self._workload = workload
        self._count = processes
        self._children: list[tuple[Any, Connection]] = []

    @property
    def pids(self) -> list[int]:
        return [child.pid for child, _ in self._children]

    async def __aenter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        try:
            for number in range(self._count):
                ours, theirs = context.Pipe()
                child = context.Process(
                    target=_main, args=(theirs, self._workload), name=f"penstock bench {number}", daemon=True
                )
                child.start()
                theirs.close()
                self._children.append((child, ours))
            async with asyncio.timeout(START_LIMIT):
                await asyncio.gather(*(self._receive(pipe) for _, pipe in self._children))
        except TimeoutError:
            await self._stop()
            raise GeneratorDied(
                f"a process of the load generator was not ready within {START_LIMIT:g} s"
            ) from None
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *ended: object) -> None:
        await self._stop()

    async def measure(
        self, job: Job, on_beat: Callable[[Sequence[Beat | None]], None] | None = None
    ) -> list[Tally]:
        """Has the processes do their shares of a job; `start` of the job is set here. Raises GeneratorDied.

        on_beat: told where each process is, None for one that has not said so yet.
        """
        start = monotonic() + LEAD
        beats: list[Beat | None] = [None] * self._count
        for index, (_, pipe) in enumerate(self._children):
            pipe.send(replace(job, index=index, processes=self._count, start=start))

        async def follow(index: int, pipe: Connection) -> Tally:
            while True:
                told = await self._receive(pipe)
                if isinstance(told, Tally):
                    return told
                beats[index] = told
                if on_beat is not None:
                    on_beat(beats)

        return await asyncio.gather(*(follow(index, pipe) for index, (_, pipe) in enumerate(self._children)))

    async def _receive(self, pipe: Connection) -> Any:
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not readable.done():
                readable.set_result(None)

        loop.add_reader(pipe.fileno(), wake)
        try:
            await readable
        finally:
            loop.remove_reader(pipe.fileno())
        try:
            told = pipe.recv()
        except (EOFError, OSError):
            raise GeneratorDied(
                "a process of the load generator has ended in the middle of its work"
            ) from None
        if isinstance(told, BaseException):
            raise told
        return told

    async def _stop(self) -> None:
        for _, pipe in self._children:
            pipe.close()
        for child, _ in self._children:
            await asyncio.to_thread(child.join, STOP_LIMIT)
            if child.is_alive():
                child.kill()
                await asyncio.to_thread(child.join, STOP_LIMIT)
        self._children.clear()


def _main(pipe: Connection, workload: Workload) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    run(_serve(pipe, workload))


async def _serve(pipe: Connection, workload: Workload) -> None:
    """Works off jobs until the parent closes the pipe."""
    pipe.send(READY)
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    loop.add_reader(pipe.fileno(), told.set)
    while True:
        await told.wait()
        told.clear()
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        work = asyncio.create_task(_work(pipe, job, workload))
        gone = asyncio.create_task(parent_gone(pipe, told))
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            await asyncio.wait((work,))
            return
        gone.cancel()
        await asyncio.wait((gone,))
        try:
            pipe.send(work.exception() or work.result())
        except OSError:
            return


async def parent_gone(pipe: Connection, told: asyncio.Event) -> None:
    """Returns when the parent has closed the pipe: it sends nothing while a job is under way."""
    while not pipe.poll():  # the event may have been set once more for the job itself
        told.clear()
        await told.wait()


async def _work(pipe: Connection, job: Job, workload: Workload) -> Tally:
    async with ASKERS[job.target.asker](job.target, workload, job.run) as askers:
        sending = Sending(job, workload, askers)
        beating = asyncio.create_task(_beat(pipe, sending))
        try:
            return await sending.run()
        finally:
            beating.cancel()
            await asyncio.wait((beating,))


async def _beat(pipe: Connection, sending: Sending) -> None:
    while True:
        await asyncio.sleep(BEAT)
        try:
            pipe.send(sending.beat())
        except OSError:
            return  # the parent has gone, which _serve notices
