"""Which engines there are, as routers and clients see them: rules only, the clock is handed in.

An entry is one life of one replica: an engine that is started again is another entry. It guarantees:
- each change has a higher revision; a registry that has lost its memory (its process was restarted) has
  another epoch, and is not `settled` before every living engine has had time to say that it is there: who
  follows it adds what is new until then, and takes nothing out;
- an entry that is not heard of for `expiry` seconds is out; heard of again, it is in again;
- an entry that was taken out by name does not come back, whatever is still on its way;
- the policy version is the highest that an engine has: the first one that commits an update moves it.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

BEAT: Final = 1.0
"""Seconds between two times an engine says that it is there."""
EXPIRY: Final = 6.0
"""Seconds without a word of an engine after which it is out: five lost beats."""
REMEMBERED: Final = 120.0
"""Seconds for which a name that was taken out is refused. Names are used once; this bounds the memory."""

State = Literal["ready", "draining"]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that serves."""

    replica: str
    """Of this life of a replica; also the name of its actor."""
    index: int
    """Which of the replicas."""
    url: str
    engine: str
    model: str
    """What requests call it."""
    node: str
    """Ray's id of the node."""
    policy_version: int | None = 0
    """Of its weights; None: not known."""
    state: State = "ready"


class Snapshot(msgspec.Struct, frozen=True):
    """All entries at one revision, by replica."""

    epoch: str
    revision: int
    settled: bool
    policy_version: int
    """The highest of an entry, 0 where none is known."""
    entries: tuple[Entry, ...]

    def current(self) -> tuple[Entry, ...]:
        """Those that are ready and have the weights of the policy version."""
        return tuple(
            one for one in self.entries if one.state == "ready" and one.policy_version == self.policy_version
        )


class Registry:
    """The entries. epoch: unlike that of any registry before. now: seconds of a clock that never goes back,
    as everywhere here."""

    def __init__(self, epoch: str, now: float, *, expiry: float = EXPIRY) -> None:
        self.epoch = epoch
        self.revision = 0
        self._expiry = expiry
        self._settled_at = now + expiry
        self._settled = False
        self._entries: dict[str, Entry] = {}
        self._heard: dict[str, float] = {}
        self._gone: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Registry {self.epoch}:{self.revision} {len(self._entries)} engines>"

    # -- what is said -----------------------------------------------------------------------------

    def announce(self, entry: Entry, now: float) -> bool:
        """An engine is there, and how it is. Whether it is wanted: False, it was taken out by name."""
        if entry.replica in self._gone:
            return False
        self._heard[entry.replica] = now
        if self._entries.get(entry.replica) != entry:
            self._entries[entry.replica] = entry
            self.revision += 1
        return True

    def leave(self, replica: str, now: float) -> None:
        """A life is over."""
        self._gone[replica] = now
        self._drop(replica)

    # -- the clock --------------------------------------------------------------------------------

    def expire(self, now: float) -> None:
        """What has not been heard of for too long is out."""
        for replica in [name for name, heard in self._heard.items() if now - heard >= self._expiry]:
            self._drop(replica)
        for replica in [name for name, since in self._gone.items() if now - since >= REMEMBERED]:
            del self._gone[replica]
        if not self._settled and now >= self._settled_at:
            self._settled = True
            self.revision += 1

    def next_look(self, now: float) -> float:
        """Seconds until `expire` may change something."""
        due = [heard + self._expiry for heard in self._heard.values()]
        if not self._settled:
            due.append(self._settled_at)
        return max(0.0, min(due, default=now + self._expiry) - now)

    # -- what there is ----------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        entries = tuple(self._entries[name] for name in sorted(self._entries))
        version = max((one.policy_version or 0 for one in entries), default=0)
        return Snapshot(self.epoch, self.revision, self._settled, version, entries)

    def _drop(self, replica: str) -> None:
        self._heard.pop(replica, None)
        if self._entries.pop(replica, None) is not None:
            self.revision += 1


class Changes(msgspec.Struct, frozen=True):
    """What a follower has to do, in this order."""

    leave: tuple[str, ...]
    """URLs whose engines are gone."""
    drain: tuple[str, ...]
    """URLs that get no more requests: their engines are to go, or have missed a weight update."""
    join: tuple[str, ...]


class Followed:
    """What a follower of a registry has taken over from it.

    all_versions: also engines that have missed a weight update, for whoever brings them up to date.
    """

    def __init__(self, *, all_versions: bool = False) -> None:
        self._all = all_versions
        self._members: dict[str, str] = {}
        """URLs by replica."""

    def take(self, snapshot: Snapshot) -> Changes:
        """The follower is to be as the registry is."""
        ready = [one for one in snapshot.entries if one.state == "ready"] if self._all else snapshot.current()
        wanted = {one.replica: one.url for one in ready}
        named = {one.replica for one in snapshot.entries}
        leave: list[str] = []
        drain: list[str] = []
        for replica, url in list(self._members.items()):
            if replica in wanted:
                continue
            if replica not in named and not snapshot.settled and url not in wanted.values():
                continue  # it may only not have been heard of yet
            del self._members[replica]
            (drain if replica in named else leave).append(url)
        join = tuple(url for replica, url in wanted.items() if replica not in self._members)
        self._members.update(wanted)
        return Changes(tuple(leave), tuple(drain), join)

    @property
    def urls(self) -> list[str]:
        return list(self._members.values())
