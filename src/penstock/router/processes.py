"""A router of several processes that listen on one port: started, restarted, and one to the outside.

The parent relays nothing. It reserves the port, starts the processes (new interpreters, not forks: the parent
may have threads and an event loop, and a restart is the same as a start), and keeps what they share: the
workers and their numbers, the ledger of slots, the statistics. It guarantees:
- the limits hold for the sum over all processes (see `penstock.router.ledger`);
- what is changed through one process is changed in all before the change is answered, and a process that
  starts finds things as they are;
- a process that dies is started again, with growing waits; its slots are free, and its row in the shared
  table clear, once the kernel has ended it, and no earlier; no counter that was shown falls;
- if the parent dies, also by SIGKILL, the processes end at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final

from penstock.errors import ConfigError, PenstockError
from penstock.fleet.limit import START
from penstock.router.args import RouterArgs
from penstock.router.counts import COLUMNS, Counts
from penstock.router.ledger import TOTAL, Claim, Ledger
from penstock.router.link import (
    Barrier,
    Configure,
    Drain,
    Failed,
    Forget,
    Join,
    Lead,
    Leave,
    Left,
    Limit,
    Link,
    Message,
    Passed,
    Ready,
    Seen,
)
from penstock.router.server import WorkerFile
from penstock.router.totals import COUNTS, added
from penstock.servers.ports import ReservedPort
from penstock.servers.restart import Restart, Restarts
from penstock.wire.address import Address
from penstock.wire.loop import Stop

RESTART: Final = Restart(limit=sys.maxsize, base=0.1, cap=5.0, forgiven_after=30.0)
"""There is no point in giving up: the others go on, and one may have been killed for its memory."""
REAP: Final = 0.002
"""Seconds between two looks for the end of a process that has been killed."""
COLLECT: Final = 1.0
"""Seconds between two collections of statistics: what a process that is killed counted since is lost."""
ANSWER: Final = 2.0
"""Seconds a process has to answer a barrier; one that does not is left out."""
ENDING: Final = 10.0
"""Seconds a process has to end beyond its grace, and when it is hurried; then it is killed."""
_CODE: Final = (
    "import sys; sys.path[:] = {path!r}; from penstock.router.process import main; main({fd}, {table})"
)

logger = logging.getLogger(__name__)


class Child:
    """One process."""

    def __init__(self, row: int, popen: subprocess.Popen[bytes]) -> None:
        self.row = row
        """Its number, and its row in the shared table."""
        self.popen = popen
        self.ready = False
        self.link: Link | None = None
        self.gone = asyncio.get_running_loop().create_future()
        self.asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        """Barriers it has not answered."""
        self.statistics: dict[str, Any] = {}
        """As it told them last."""

    def say(self, message: Message) -> None:
        if self.link is not None:
            self.link.say(message)


class Parent:
    """Starts the processes and keeps what they share; `async with`."""

    def __init__(self, args: RouterArgs) -> None:
        args.check()
        self.args = args
        self.port = 0
        self.children: dict[int, Child] = {}
        self._started = False
        """All have been ready once."""
        self._failure: PenstockError | None = None
        """Why they could not start."""
        self._ledger = Ledger(args.max_concurrent_requests)
        self._numbers: dict[str, int] = {}
        """Of the workers, by URL."""
        self._limits: dict[int, int | None] = {}
        self._leaving: dict[int, set[int]] = {}
        """Processes that have not left a worker yet."""
        self._seen: dict[int, Seen] = {}
        self._leader: Child | None = None
        self._past: dict[str, Any] = {}
        """Statistics of the processes that have died."""
        self._barriers = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._draining = False
        self._stack = ExitStack()

    async def __aenter__(self) -> Parent:
        """Starts them. Raises ConfigError when they cannot."""
        args = self.args
        try:
            self._port = self._stack.enter_context(ReservedPort(args.host, args.port))
            self.port = self._port.port
            self._fd = Counts.create(args.processes)
            self._stack.callback(os.close, self._fd)
            self._counts = Counts(self._fd, args.processes)
            self._stack.callback(self._counts.close)
            for url in args.worker_urls:
                self.add(url)
            if args.worker_file is not None:
                watch = WorkerFile(args.worker_file, self)
                watch.look()
                self.spawn(watch.run())
            for row in range(args.processes):
                self.spawn(self._keep(row))
            while sum(child.ready for child in self.children.values()) < args.processes:
                await asyncio.sleep(REAP)
                if self._failure is not None:
                    raise self._failure
            self._started = True
            self.spawn(self._collect())
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        """Ends them at once."""
        self._draining = True
        for child in self.children.values():
            child.popen.kill()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        self._stack.close()

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """Runs it in a task that ends with the parent."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self, hurried: asyncio.Future[None]) -> None:
        """Lets them end what is in flight; when hurried, or late, they end at once."""
        self._draining = True
        for child in self.children.values():
            child.say(Drain())
        gone = asyncio.gather(*(child.gone for child in self.children.values()))
        bound = self.args.shutdown_grace_period_secs + ENDING
        await asyncio.wait((gone, hurried), timeout=bound, return_when=asyncio.FIRST_COMPLETED)
        for child in self.children.values():
            child.say(Drain())
        await asyncio.wait([gone], timeout=ENDING)

    def _failed(self, error: PenstockError) -> None:
        if self._started:
            logger.warning("%s", error)
        elif self._failure is None:
            self._failure = error

    # -- processes --------------------------------------------------------------------------------

    async def _keep(self, row: int) -> None:
        """Runs the process of one row, again and again."""
        restarts, clock = Restarts(RESTART), asyncio.get_running_loop().time
        while True:
            child = await self._start(row)
            try:
                restarts.ready(clock())
                await asyncio.shield(child.gone)
            finally:
                child.popen.kill()
                while child.popen.poll() is None:  # noqa: ASYNC110 -- no SIGCHLD handler is needed
                    await asyncio.sleep(REAP)
                self._buried(child)
            if not self._started:
                self._failed(PenstockError("a process of the router could not start"))
                return
            wait = restarts.failed(clock(), None) or 0.0
            if not self._draining:
                logger.warning("process %d of the router died (%s)", row, _how(child.popen.returncode))
                await asyncio.sleep(wait)
            if self._draining:
                return

    async def _start(self, row: int) -> Child:
        ours, theirs = socket.socketpair()
        fds = (theirs.fileno(), self._fd)
        code = _CODE.format(path=sys.path, fd=fds[0], table=fds[1])
        with theirs:
            popen = subprocess.Popen(  # noqa: ASYNC220 -- by vfork: uvloop forks, which threads do not like
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C in the terminal is for the parent, which then drains
            )
        child = self.children[row] = Child(row, popen)
        args = replace(self.args, port=self.port)
        assert popen.stdin is not None
        try:
            popen.stdin.write(pickle.dumps((row, args, logging.getLogger().level)))
            popen.stdin.close()
        except OSError:
            pass  # it is dead already
        child.link = await Link.over(ours, lambda message: self._hear(child, message))
        for url, number in self._numbers.items():
            child.say(Join(url, number, self._limits[number]))
        for seen in self._seen.values():
            child.say(seen)
        self._ledger.join(row)
        self._pass_on()
        if self._draining:
            child.say(Drain())
        return child

    def _buried(self, child: Child) -> None:
        """It is dead: what it had is free, what it counted is kept."""
        del self.children[child.row]
        self._counts.clear(child.row)
        if child.statistics:
            self._past = added(self._past, {COUNTS: child.statistics[COUNTS]})
        self._ledger.leave(child.row)
        self._pass_on()
        for number in list(self._leaving):
            self._left(child.row, number)
        for future in child.asked.values():
            if not future.done():
                future.cancel()
        if self._leader is child:
            self._leader = None
            self._choose_leader()

    def _choose_leader(self) -> None:
        ready = [child for child in self.children.values() if child.ready]
        if self._leader is None and ready:
            self._leader = min(ready, key=lambda child: child.row)
            self._leader.say(Lead())

    # -- what they say ----------------------------------------------------------------------------

    def _hear(self, child: Child, message: Message | None) -> None:
        match message:
            case None:
                child.link = None
                if not child.gone.done():
                    child.gone.set_result(None)
            case Claim():
                self._ledger.claim(child.row, message)
                self._pass_on()
            case Ready():
                child.ready = True
                self._choose_leader()
            case Failed():
                self._failed(ConfigError(message.message))
                child.popen.kill()
            case Join():
                self.add(message.url)
            case Leave():
                self._leave(message, child)
            case Left():
                self._left(child.row, message.worker)
            case Limit():
                self._limit(message, child)
            case Forget():
                self._tell(message, child)
            case Seen():
                if message.models is not None:
                    self._seen[message.worker] = message
                self._tell(message, child)
            case Configure():
                self.args = replace(self.args, **message.changes)
                self._tell(message, child)
            case Barrier():
                self.spawn(self._barrier(message, child))
            case Passed():
                future = child.asked.pop(message.number, None)
                if future is not None and not future.done():
                    future.set_result(message.statistics[0] if message.statistics else {})
            case _:
                raise AssertionError(message)

    def _tell(self, message: Message, but: Child | None = None) -> None:
        for child in self.children.values():
            if child is not but:
                child.say(message)

    def _pass_on(self) -> None:
        for row, word in self._ledger.words:
            if row in self.children:
                self.children[row].say(word)
        self._ledger.words.clear()

    async def _barrier(self, barrier: Barrier, asker: Child) -> None:
        """Tells a process when all others have heard what it said before."""
        await self._all_heard(asker, statistics=barrier.statistics)
        known = [child.statistics for child in self.children.values() if child is not asker]
        asker.say(Passed(barrier.number, [self._past, *known] if barrier.statistics else []))

    async def _collect(self) -> None:
        """Notes what all have counted, so that little is lost with one that dies."""
        while True:
            await asyncio.sleep(COLLECT)
            await self._all_heard(None, statistics=True)

    async def _all_heard(self, asker: Child | None, *, statistics: bool) -> None:
        others = [child for child in self.children.values() if child is not asker and child.ready]
        self._barriers += 1
        number = self._barriers
        for child in others:
            child.asked[number] = asyncio.get_running_loop().create_future()
            child.say(Barrier(number, statistics))
        futures = [child.asked[number] for child in others]
        if futures:
            await asyncio.wait(futures, timeout=ANSWER)
        for child, future in zip(others, futures, strict=True):
            child.asked.pop(number, None)
            if statistics and future.done() and not future.cancelled():
                child.statistics = future.result()

    # -- workers ----------------------------------------------------------------------------------

    def add(self, url: str) -> None:
        """A worker joins, everywhere. Raises ConfigError."""
        url = str(Address.parse(url))
        if url not in self._numbers:
            taken = {*self._numbers.values(), *self._leaving}
            number = next((n for n in range(1, COLUMNS) if n not in taken), None)
            if number is None:
                raise ConfigError(f"a router of several processes has no more than {COLUMNS - 1} workers")
            self._numbers[url] = number
            limit = self.args.worker_max_in_flight
            if self.args.adaptive:
                limit = START if limit is None else min(START, limit)
            self._limits[number] = limit
            self._tell(Join(url, number, limit))
            self._ledger.add(number, limit)
            self._pass_on()
        else:
            self._tell(Join(url, self._numbers[url], self._limits[self._numbers[url]]))

    async def leave(self, url: str, timeout: float | None) -> bool:
        """A worker drains and leaves, everywhere."""
        self._leave(Leave(str(Address.parse(url)), timeout), None)
        return True

    def _leave(self, message: Leave, asker: Child | None) -> None:
        number = self._numbers.pop(message.url, None)
        if number is not None:
            self._seen.pop(number, None)
            self._leaving[number] = set(self.children)
            self._tell(message, asker)
            self._ledger.limit(number, 0)
            self._pass_on()
            self._left(-1, number)

    def _left(self, row: int, number: int) -> None:
        """A process has nothing in flight there; when none has, the number is free."""
        rows = self._leaving.get(number)
        if rows is not None:
            rows.discard(row)
            if not rows:
                del self._leaving[number], self._limits[number]
                self._ledger.drop(number)
                self._pass_on()

    def _limit(self, message: Limit, asker: Child) -> None:
        if message.worker == TOTAL:
            self._ledger.bound(message.limit)
        elif message.worker in self._numbers.values():
            self._limits[message.worker] = message.limit
            self._ledger.limit(message.worker, message.limit)
        self._tell(message, asker)
        self._pass_on()


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


async def run_processes(args: RouterArgs) -> int:
    """Several processes until told to stop; the exit status. Raises ConfigError."""
    stop = Stop()
    async with Parent(args) as parent:
        host = f"[{args.host}]" if ":" in args.host else args.host
        scheme = "https" if args.tls_cert_path is not None else "http"
        print(f"penstock router ready on {scheme}://{host}:{parent.port}", flush=True)  # noqa: T201
        await stop.wished
        await parent.drain(stop.hurried)
    return 0
