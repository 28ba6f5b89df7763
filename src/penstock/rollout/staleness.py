"""When a prompt may be begun, and which group may be trained on: rules only, no clock, no tasks.

The staleness of a token is the number of weight updates between the weights that made it and the trainer's at
the moment its group is trained on. It guarantees, as long as the trainer takes `batch_groups` groups between
two updates:
- no token is ever more than `async_steps` updates old, whatever order groups finish in;
- a prompt that may not be begun now may be later: there is always something that is in flight, ready, or to
  be begun;
- with async_steps 0 all groups of a batch are made by the weights that are trained on them.

A group whose oldest weights are of version v is due at version v + async_steps: then at the latest it has to
be trained on. Up to a version d the trainer takes `batch_groups` groups for each version there is until then.
So whatever is due by d, whether it is in flight or ready, must never be more than that (Hall's condition for
a schedule that meets all due dates): it bounds what is begun, and which group may be taken before another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import msgspec

from penstock.errors import ConfigError

K = TypeVar("K", bound=Hashable)


class Held(msgspec.Struct):
    """A group that was begun and not yet handed to the trainer."""

    oldest: int
    """No token of it is, or will be, of an older version."""
    ready: bool = False


class Staleness(Generic[K]):
    """The groups of one trainer, each known by a key.

    async_steps: updates a token may be old. batch_groups: groups the trainer takes between two updates; it
    may take more. Raises ConfigError.
    """

    def __init__(self, async_steps: int, batch_groups: int, *, version: int = 0) -> None:
        if async_steps < 0:
            raise ConfigError(f"async_steps must be at least 0, not {async_steps}")
        if batch_groups < 1:
            raise ConfigError(f"batch_groups must be at least 1, not {batch_groups}")
        self.async_steps = async_steps
        self.batch_groups = batch_groups
        self.trainer_version = version
        """Of the weights that will be trained next."""
        self.engine_version = version
        """What is begun now is made by these weights or newer ones."""
        self.handed = 0
        """Groups handed to the trainer at its version."""
        self.groups: dict[K, Held] = {}
        self._rounds = 1

    def __repr__(self) -> str:
        return (
            f"<Staleness trainer={self.trainer_version} engines={self.engine_version} "
            f"held={len(self.groups)} handed={self.handed}>"
        )

    # -- what may be done -------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Groups that may be begun now. While all have the same weights it is
        (async_steps + 1) * batch_groups less what is in flight, ready, or handed out since the update."""
        due = self.engine_version + self.async_steps
        if due < self.trainer_version:
            return 0
        return max(0, self._room(due) - len(self.groups))

    def pick(self, count: int) -> list[K] | None:
        """The groups the trainer is to get next, so many of those that are ready, the ones due first; None
        while there are fewer, or something that is due earlier than they are would lose its turn."""
        ready = [key for key, held in self.groups.items() if held.ready]
        if len(ready) < count:
            return None
        picked = sorted(ready, key=lambda key: self._due(self.groups[key]))[:count]
        return picked if self._leaves_room(picked) else None

    def age(self, key: K) -> int:
        """Updates between the group's oldest weights and the trainer's."""
        return self.trainer_version - self.groups[key].oldest

    def overdue(self) -> list[K]:
        """Groups with weights that are too old to be trained on."""
        return [key for key in self.groups if self.age(key) > self.async_steps]

    # -- what happens -----------------------------------------------------------------------------

    def admit(self, key: K) -> None:
        """A group is begun. Asserts that it may."""
        assert self.capacity > 0, f"{self} has no room for {key}"
        self.groups[key] = Held(self.engine_version)

    def restore(self, key: K, oldest: int) -> None:
        """A group that was made in an earlier run is ready."""
        self.groups[key] = Held(oldest, ready=True)

    def finished(self, key: K, oldest: int | None) -> None:
        """The group is ready; `oldest`: of its tokens, None where that is not known better than before."""
        held = self.groups[key]
        if oldest is not None:
            held.oldest = max(held.oldest, oldest)
        held.ready = True

    def dropped(self, key: K) -> None:
        """The group will not be trained on."""
        del self.groups[key]

    def wanted(self, count: int) -> bool:
        """The trainer waits for so many groups. With more than are left of those it was to take between two
        updates it has shown that it goes on before it updates: one more batch at this version is meant.
        Whether that is so."""
        rounds = self._rounds
        while self._left < count:
            self._rounds += 1
        return self._rounds > rounds

    def taken(self, key: K) -> int:
        """The group goes to the trainer; its age in updates."""
        age = self.age(key)
        del self.groups[key]
        self.handed += 1
        self.wanted(0)
        return age

    def trainer_at(self, version: int) -> None:
        """The trainer's weights are of this version, and on their way to the engines."""
        assert version >= self.trainer_version, f"{self} cannot go back to {version}"
        if version > self.trainer_version:
            self.trainer_version = version
            self.handed, self._rounds = 0, 1

    def engines_at(self, version: int) -> None:
        """Whatever is begun from now on is made by weights of this version or newer ones."""
        assert version >= self.engine_version, f"{self} cannot go back to {version}"
        self.engine_version = version

    # -- inside -----------------------------------------------------------------------------------

    @property
    def _left(self) -> int:
        """Groups the trainer is still to take at this version."""
        return self._rounds * self.batch_groups - self.handed

    def _room(self, due: int) -> int:
        """Groups the trainer takes up to and at version `due`."""
        return (due - self.trainer_version) * self.batch_groups + self._left

    def _due(self, held: Held) -> int:
        """What is overdue is due now."""
        return max(held.oldest + self.async_steps, self.trainer_version)

    def _leaves_room(self, picked: Sequence[K]) -> bool:
        """Whether all others still get their turn in time when these are taken."""
        latest = max((self._due(self.groups[key]) for key in picked), default=self.trainer_version)
        left = Counter(self._due(held) for held in self.groups.values())
        left.subtract(self._due(self.groups[key]) for key in picked)
        total = 0
        for due in sorted(left):
            total += left[due]
            if due < latest and total > self._room(due) - len(picked):
                return False
        return True
