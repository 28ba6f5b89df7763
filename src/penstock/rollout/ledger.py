"""The ledger: what became of each prompt, on disk, so that a run that was killed goes on where it was.

A SQLite database in WAL mode. A prompt is known by its position in the stream of prompts. It guarantees:
- each position is in one state: leased (being generated), generated (the group is here as a whole), trained,
  or dropped, with the reason; a position without a row has never been begun;
- `trained` moves all groups of a step in one transaction together with the step's number, and is on disk when
  it returns: a group is trained on in one step at most;
- leases belong to the process that took them: whoever opens the ledger next owes those prompts;
- one process has a ledger open: a second is refused;
- a write that fails is WriteFailed: nothing goes on without it.

A resume at step s (the step of the trainer's checkpoint; without one, the last step here) undoes what came
later: groups trained in a step after s are owed again, and so is what was dropped after s. A group that was
generated is kept unless a token of it is of a policy version that was published after s, for the weights of
such a version are no more. Call `trained` before the checkpoint of its step is saved: then a crash between
the two makes the step's groups owed, and never trained twice.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from penstock.errors import ConfigError, ResumeRefused, WriteFailed
from penstock.rollout.group import Rollout

FORMAT: Final = 1
"""Of the database."""
BUSY: Final = 30.0
"""Seconds to wait for a reader of the database, who may look at it at any time."""

State = Literal["leased", "generated", "trained", "dropped"]

_TABLES: Final = """
CREATE TABLE job (format INTEGER NOT NULL, settings BLOB NOT NULL);
CREATE TABLE groups (
    position INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    step INTEGER,
    reason TEXT,
    solved INTEGER NOT NULL DEFAULT 0,
    newest INTEGER,
    payload BLOB
) WITHOUT ROWID;
CREATE INDEX groups_state ON groups (state, step);
CREATE TABLE steps (step INTEGER PRIMARY KEY, version INTEGER NOT NULL);
CREATE TABLE updates (version INTEGER PRIMARY KEY, step INTEGER NOT NULL, undone INTEGER NOT NULL DEFAULT 0);
"""


class Kept(msgspec.Struct, frozen=True):
    """A group that was generated in an earlier run."""

    position: int
    key: str
    attempt: int
    rollouts: tuple[Rollout, ...]
    seconds: float


class Counts(msgspec.Struct, frozen=True):
    """Positions in each state."""

    leased: int = 0
    generated: int = 0
    trained: int = 0
    dropped: int = 0


class Resumed(msgspec.Struct, frozen=True):
    """Where a run goes on."""

    step: int
    """The last step that counts; 0: none."""
    version: int
    """The policy version of the weights the trainer goes on with."""
    owed: int
    """Positions that were begun and have to be generated anew."""


class _Payload(msgspec.Struct, array_like=True):
    rollouts: tuple[Rollout, ...]
    seconds: float


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(_Payload).decode


class Ledger:
    """An open ledger, new or an earlier run's.

    path: None keeps it in memory, for runs that are never resumed. settings: a resume with others is refused.
    step: see above. Raises ConfigError, ResumeRefused, WriteFailed.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any], *, step: int | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._lock = -1 if self.path is None else _locked(self.path)
        try:
            with self._writing("opened"):
                self._db = self._connected()
            self._check_job(settings)
            self.resumed = self._resume(step)
        except BaseException:
            self._unlock()
            raise
        self.step = self.resumed.step
        """The last step that was trained."""

    def __repr__(self) -> str:
        return f"<Ledger {self.path or 'in memory'} {self.counts()}>"

    def close(self) -> None:
        self._db.close()
        self._unlock()

    # -- what happens to a prompt -----------------------------------------------------------------

    def lease(self, position: int, key: str) -> int:
        """It is begun to be generated; for the how-manieth time. Raises WriteFailed."""
        with self._transaction() as db:
            (attempts,) = db.execute(
                "INSERT INTO groups (position, key, state, attempts) VALUES (?, ?, 'leased', 1) "
                "ON CONFLICT (position) DO UPDATE SET state='leased', attempts=attempts+1, step=NULL, "
                "reason=NULL, solved=0, newest=NULL, payload=NULL RETURNING attempts",
                (position, key),
            ).fetchone()
        return int(attempts)

    def generated(
        self, position: int, rollouts: tuple[Rollout, ...], seconds: float, newest: int | None
    ) -> None:
        """The group is there. Raises WriteFailed."""
        payload = _encode(_Payload(rollouts, seconds))
        self._move(position, "leased", "state='generated', payload=?, newest=?", payload, newest)

    def dropped(self, position: int, reason: str, *, solved: bool = False) -> None:
        """It will not be trained on. solved: nor will the prompt in later epochs. Raises WriteFailed."""
        self._move(
            position,
            "leased",
            "state='dropped', reason=?, solved=?, step=?, payload=NULL",
            *(reason, solved, self.step),
        )

    def passed_over(self, position: int, key: str, reason: str) -> None:
        """It is dropped before it is begun. Raises WriteFailed."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO groups (position, key, state, attempts, step, reason) "
                "VALUES (?, ?, 'dropped', 0, ?, ?)",
                (position, key, self.step, reason),
            )

    def owed_again(self, position: int, reason: str) -> None:
        """What was generated, or is being, is not used: the same prompt is owed. Raises WriteFailed."""
        with self._transaction() as db:
            db.execute(
                "UPDATE groups SET state='leased', reason=?, payload=NULL, newest=NULL WHERE position=?",
                (reason, position),
            )

    def trained(self, positions: Sequence[tuple[int, bool]], step: int, version: int) -> None:
        """Step `step` of the trainer, at policy version `version`, has used these groups, each with whether
        its prompt is solved. On disk when it returns. Raises ConfigError, WriteFailed."""
        if step < self.step:
            raise ConfigError(f"step {step} cannot be trained after step {self.step}")
        with self._writing("written"):
            self._db.execute("PRAGMA synchronous=FULL")
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO steps VALUES (?, ?)", (step, version))
            for position, solved in positions:
                self._moved(
                    db,
                    position,
                    "generated",
                    "state='trained', step=?, solved=?, payload=NULL",
                    *(step, solved),
                )
        with self._writing("written"):
            self._db.execute("PRAGMA synchronous=NORMAL")
        self.step = step

    def published(self, version: int) -> None:
        """Weights of this version, those after the last step, are about to go to the engines. Raises
        WriteFailed."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO updates VALUES (?, ?, 0)", (version, self.step))

    # -- what there is ----------------------------------------------------------------------------

    def state(self, position: int) -> tuple[State, str] | None:
        """(state, key) of a position, None where it has never been begun."""
        row = self._db.execute("SELECT state, key FROM groups WHERE position=?", (position,)).fetchone()
        return None if row is None else (row[0], row[1])

    def last_position(self) -> int:
        """The last one that was ever begun or passed over; -1: none."""
        (last,) = self._db.execute("SELECT coalesce(max(position), -1) FROM groups").fetchone()
        return int(last)

    def kept(self) -> Iterator[Kept]:
        """Groups that were generated and not trained on, in the order of their positions."""
        rows = self._db.execute(
            "SELECT position, key, attempts, payload FROM groups WHERE state='generated' ORDER BY position"
        )
        for position, key, attempts, payload in rows:
            found = _decode(payload)
            yield Kept(position, key, attempts, found.rollouts, found.seconds)

    def solved(self) -> set[str]:
        """Keys of prompts that are solved."""
        return {key for (key,) in self._db.execute("SELECT DISTINCT key FROM groups WHERE solved")}

    def counts(self) -> Counts:
        found = self._db.execute("SELECT state, count(*) FROM groups GROUP BY state")
        return Counts(**dict(found.fetchall()))

    def reasons(self) -> dict[str, int]:
        """How many were dropped for which reason."""
        found = self._db.execute("SELECT reason, count(*) FROM groups WHERE state='dropped' GROUP BY reason")
        return dict(found.fetchall())

    def steps(self) -> dict[int, list[int]]:
        """The positions trained on, by step."""
        found: dict[int, list[int]] = {}
        rows = self._db.execute("SELECT step, position FROM groups WHERE state='trained' ORDER BY position")
        for step, position in rows:
            found.setdefault(step, []).append(position)
        return found

    # -- inside -----------------------------------------------------------------------------------

    def _connected(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            ":memory:" if self.path is None else self.path,
            timeout=BUSY,
            isolation_level=None,
        )
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
        except BaseException:
            db.close()
            raise
        return db

    def _check_job(self, settings: dict[str, Any]) -> None:
        if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name='job'").fetchone():
            with self._transaction() as db:
                for statement in filter(str.strip, _TABLES.split(";")):
                    db.execute(statement)
                db.execute("INSERT INTO job VALUES (?, ?)", (FORMAT, msgspec.json.encode(settings)))
            return
        format_, found = self._db.execute("SELECT format, settings FROM job").fetchone()
        before = msgspec.json.decode(found)
        now = msgspec.json.decode(msgspec.json.encode(settings))
        differences = [
            f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if format_ != FORMAT:
            differences.append(f"the ledger's format was {format_} and is now {FORMAT}")
        if differences:
            raise ResumeRefused(
                f"{self.path} belongs to another run: {'; '.join(differences)}. "
                "Use another ledger, or the settings it was begun with.",
                differences,
            )

    def _resume(self, step: int | None) -> Resumed:
        (last,) = self._db.execute("SELECT coalesce(max(step), 0) FROM steps").fetchone()
        step = last if step is None else step
        if step > last:
            raise ResumeRefused(
                f"the trainer is at step {step}, {self.path or 'the ledger'} at step {last}: "
                "a step has to be in the ledger before its checkpoint is saved",
                [f"step was {last} and is now {step}"],
            )
        with self._transaction() as db:
            db.execute("DELETE FROM steps WHERE step > ?", (step,))
            db.execute("UPDATE updates SET undone=1 WHERE step > ?", (step,))
            (ever,) = db.execute("SELECT count(*) FROM updates").fetchone()
            published, at = db.execute(
                "SELECT version, step FROM updates WHERE NOT undone ORDER BY version DESC LIMIT 1"
            ).fetchone() or (0, None)
            # Engines may have outlived the run, with weights that are undone.
            version = published if at == step or not ever else published + 1
            owed = (
                "(state='leased' OR (state IN ('trained', 'dropped') AND step > :step) "
                "OR (state='generated' AND newest > :version))"
            )
            given = {"step": step, "version": published}
            (count,) = db.execute(f"SELECT count(*) FROM groups WHERE {owed}", given).fetchone()
            db.execute(
                "UPDATE groups SET state='leased', step=NULL, reason=NULL, solved=0, newest=NULL, "
                f"payload=NULL WHERE {owed}",
                given,
            )
        return Resumed(step, version, count)

    def _move(self, position: int, source: State, change: str, *values: object) -> None:
        with self._transaction() as db:
            self._moved(db, position, source, change, *values)

    def _moved(
        self, db: sqlite3.Connection, position: int, source: State, change: str, *values: object
    ) -> None:
        done = db.execute(
            f"UPDATE groups SET {change} WHERE position=? AND state=?", (*values, position, source)
        )
        if done.rowcount != 1:
            raise ConfigError(f"group {position} is {self.state(position)}, it cannot go on from {source!r}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing."""
        with self._writing("written"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise WriteFailed(f"the ledger {self.path} could not be {what}: {error}") from error

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _locked(path: Path) -> int:
    """A lock beside the database, which goes with the process that holds it."""
    try:
        fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"the ledger {path} cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise ConfigError(f"the ledger {path} is in use by another process") from None
    return fd
