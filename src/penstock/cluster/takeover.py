"""A shard's files pass from one holder to the next, who may write while the last one still does.

Nobody can take a file away from a process that was cut off and does not know it: locks on shared file systems
are not known to be kept (NFS), nor to end with their holder. So the next holder gets files of its own. It
copies the journal, whose lines bear checksums, and the job writes the output again from that (see
`penstock.batch.journal`): whatever the last holder writes from then on nobody reads. Guarantees:
1. Numbers of epochs are given out once, over all runs: they are on disk before they are used.
2. Of a shard the highest epoch counts; its journal is there as a whole or not at all.
3. What was finished and on disk when the journal was copied is not generated again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from penstock.cluster.shards import Shards, journal_of
from penstock.errors import ConfigError, WriteFailed

COUNTER: Final = "epoch"
"""File in the folder of the shards: the next number, locked while a run goes on."""


class Epochs:
    """The numbers of a job's epochs, a context manager that holds their file: a second run is refused.

    Raises ConfigError when the file is in use or cannot be written.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._path = shards.folder / COUNTER
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written ({error.strerror}).") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise ConfigError(f"{shards.out} is being generated already: wait for it.") from None
        found = [epoch for epochs in shards.epochs().values() for epoch in epochs]
        text = os.pread(self._fd, 32, 0).strip()
        self._next = max(int(text) if text.isdigit() else 0, max(found, default=-1) + 1 if not text else 0)
        self.first = self.take()
        """The number of this run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def take(self) -> int:
        """A number that nobody has had. Raises WriteFailed."""
        number, self._next = self._next, self._next + 1
        try:
            os.pwrite(self._fd, b"%-16d" % self._next, 0)
            os.fsync(self._fd)
        except OSError as error:
            raise WriteFailed(f"{self._path} could not be written ({error.strerror}).") from None
        return number


def take_over(shards: Shards, index: int, epoch: int) -> Path:
    """Makes the files of this epoch the shard's: where there are none yet, with a copy of the journal of the
    epoch before. Returns the output. Raises WriteFailed."""
    output = shards.output(index, epoch)
    before = [earlier for earlier in shards.epochs().get(index, []) if earlier < epoch]
    try:
        if not journal_of(output).exists():
            for earlier in reversed(before):
                if _copy(journal_of(shards.output(index, earlier)), journal_of(output)):
                    break
    except OSError as error:
        raise WriteFailed(f"{journal_of(output)} could not be written ({error.strerror}).") from None
    for earlier in before:
        _remove(shards.output(index, earlier))
    return output


def sweep(shards: Shards) -> None:
    """Removes the files of all epochs but the highest of each shard."""
    for index, epochs in shards.epochs().items():
        for earlier in epochs[:-1]:
            _remove(shards.output(index, earlier))


def _copy(journal: Path, target: Path) -> bool:
    """Whether there was a journal. Its last line may be torn: the job cuts it."""
    beside = target.with_name(f"{target.name}.copy")
    try:
        with journal.open("rb") as source, beside.open("wb") as copy:
            shutil.copyfileobj(source, copy, 4 << 20)
            copy.flush()
            os.fsync(copy.fileno())
    except FileNotFoundError:
        return False
    beside.replace(target)
    return True


def _remove(output: Path) -> None:
    """An output and all that lies beside it under its name."""
    for path in sorted(output.parent.glob(f"{output.name}*"), key=lambda path: path == journal_of(output)):
        with contextlib.suppress(OSError):  # a leftover is not looked at
            path.unlink(missing_ok=True)
