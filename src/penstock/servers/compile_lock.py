"""Servers that would compile the same thing start one at a time, until one has done it.

It guarantees, on local and on shared file systems (NFS too):
- of the servers with one fingerprint only one starts, until one has become ready; from then on, none waits;
- a holder that died does not block: on the same machine its process is looked for, from another machine its
  heartbeat is missed after STALE seconds by the waiter's own clock (clocks are not compared);
- a folder that cannot be written never keeps a server from starting: the lock only saves work.

The lock is a hard link to a file of the holder's own: link(2) either makes the name or fails, over NFS as
well, and the link count tells the truth when the answer got lost. The holder rewrites its file as heartbeat.
Both live in the folder of the cache they are about, so that they vanish with it.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import msgspec

HEARTBEAT: Final = 5.0
"""Seconds between two rewritings of the holder's file."""

STALE: Final = 60.0
"""Seconds without a heartbeat after which a holder on another machine counts as dead."""

POLL: Final = 0.5
"""Seconds between two tries to get the lock."""


class Holder(msgspec.Struct, frozen=True):
    """Who holds a lock."""

    token: str
    machine: str
    pid: int
    beat: int = 0
    """Counts the heartbeats."""


class Absence:
    """Decides whether a holder seen from afar is dead: its file has not changed for STALE seconds."""

    def __init__(self, stale: float = STALE) -> None:
        self._stale = stale
        self._seen: bytes | None = None
        self._since = 0.0

    def noted(self, content: bytes, now: float) -> bool:
        """Takes note of what the file holds at `now`; True when it has been the same for too long."""
        if content != self._seen:
            self._seen, self._since = content, now
            return False
        return now - self._since > self._stale


def fingerprint(facts: Mapping[str, Any]) -> str:
    """A name for everything that decides what is compiled. Facts are anything that JSON can write."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class CompileLock:
    """`async with CompileLock(folder, fingerprint) as lock: …; lock.compiled()`."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        heartbeat: float = HEARTBEAT,
        stale: float = STALE,
        poll: float = POLL,
    ) -> None:
        self.folder = folder
        self._lock = folder / f"{name}.lock"
        self._done = folder / f"{name}.done"
        self._me = Holder(secrets.token_hex(8), machine(), os.getpid())
        self._own = folder / f"{name}.{self._me.token}"
        self.on_wait: Callable[[], None] = lambda: None
        """Told once when there is somebody to wait for."""
        self._heartbeat = heartbeat
        self._stale = stale
        self._poll = poll
        self._beating: asyncio.Task[None] | None = None

    @property
    def held(self) -> bool:
        """False also when nothing has to be locked, because it is compiled already."""
        return self._beating is not None

    async def __aenter__(self) -> Self:
        absence, waiting = Absence(self._stale), False
        while True:
            # In a thread: a shared file system may take its time.
            trying = asyncio.ensure_future(asyncio.to_thread(self._try, absence))
            try:
                free = await asyncio.shield(trying)
            except asyncio.CancelledError:
                await asyncio.wait([trying])
                self._release()
                raise
            except OSError:
                return self
            if free is not None:
                if free:
                    self._beating = asyncio.create_task(self._beat(), name="penstock compile lock")
                return self
            if not waiting:
                waiting = True
                self.on_wait()
            await asyncio.sleep(self._poll)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        beating, self._beating = self._beating, None
        if beating is not None:
            beating.cancel()
            await asyncio.wait([beating])
            self._release()

    def compiled(self) -> None:
        """Nobody has to wait for this fingerprint any longer."""
        if self.held:
            try:
                self._done.touch()
            except OSError:
                pass

    # -- files ------------------------------------------------------------------------------------

    def _try(self, absence: Absence) -> bool | None:
        """True: the lock is ours. False: nothing has to be locked. None: somebody else has it."""
        if self._done.exists():
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(self._me, "wb")
        try:
            os.link(self._own, self._lock)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.EIO, errno.ETIMEDOUT):
                self._own.unlink(missing_ok=True)
                raise
        if self._own.stat().st_nlink == 2:
            if self._done.exists():  # made between the look and the link
                self._release()
                return False
            return True
        self._own.unlink()
        self._break_if_dead(absence)
        return None

    def _write(self, holder: Holder, mode: Literal["wb", "r+b"]) -> None:
        with self._own.open(mode) as file:
            file.write(msgspec.json.encode(holder))
            file.flush()
            os.fsync(file.fileno())

    def _break_if_dead(self, absence: Absence) -> None:
        content = _content(self._lock)
        if content is None:
            return
        holder = _holder(content)
        here = holder is not None and holder.machine == self._me.machine
        dead = holder is not None and here and not Path(f"/proc/{holder.pid}").exists()
        if not dead and not absence.noted(content, time.monotonic()):
            return
        aside = self._own.with_name(self._own.name + ".broken")
        try:
            self._lock.rename(aside)
        except FileNotFoundError:
            return
        found = _holder(_content(aside) or b"")
        if found is not None and (holder is None or found.token != holder.token):
            try:  # another waiter was faster, and this is the lock it took
                os.link(aside, self._lock)
            except FileExistsError:
                pass
        aside.unlink(missing_ok=True)

    def _release(self) -> None:
        try:
            holder = _holder(_content(self._lock) or b"")
            if holder is not None and holder.token == self._me.token:
                self._lock.unlink(missing_ok=True)
            self._own.unlink(missing_ok=True)
        except OSError:
            pass

    async def _beat(self) -> None:
        beat = 0
        while True:
            await asyncio.sleep(self._heartbeat)
            beat += 1
            try:
                # Not made anew: the lock may have been released while this one was on its way.
                await asyncio.to_thread(self._write, msgspec.structs.replace(self._me, beat=beat), "r+b")
            except OSError:
                pass


def machine() -> str:
    """Names this machine, and the container on it, until the next boot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return socket.gethostname()
    return f"{socket.gethostname()} {boot} {space}"


def _content(path: Path) -> bytes | None:
    # Opened anew each time: NFS then asks the server, while attributes may come from a cache.
    try:
        return path.read_bytes()
    except OSError:
        return None


def _holder(content: bytes) -> Holder | None:
    """None when the file is being written at this moment."""
    try:
        return msgspec.json.decode(content, type=Holder)
    except msgspec.DecodeError:
        return None
