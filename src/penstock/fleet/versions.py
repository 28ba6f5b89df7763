"""Which weights each engine of a fleet has, as far as that is known: rules only, no clock, no sockets.

The version of a fleet is the number of the last weight update it has committed, 0 at the start. It
guarantees:
- an engine is admitted only while it is known to have the weights of the fleet's version;
- from the moment its weights may change until it has said that they have, an engine is not admitted;
- what an engine says of itself (its label) is believed of one that came back or joined, but not of one whose
  update ended without an answer: there only another update counts;
- an engine that is held for another reason is not admitted whatever its weights are.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import msgspec

from penstock.errors import ConfigError

K = TypeVar("K", bound=Hashable)


class Weights(msgspec.Struct):
    """Those of one engine."""

    version: int | None
    """None: not known."""
    tainted: bool = False
    """An update may have changed them in part: its label says nothing."""
    changing: bool = False
    """They are being replaced now."""
    held: bool = False
    """It is known to differ from the others in another way: it is paused, and they are not."""


class Versions(Generic[K]):
    """The versions of a fleet's engines, each known by a key."""

    def __init__(self) -> None:
        self.fleet = 0
        """The number of the last update committed."""
        self._engines: dict[K, Weights] = {}

    def __repr__(self) -> str:
        return f"<Versions {self.fleet} {self._engines}>"

    def version(self, key: K) -> int | None:
        return self._of(key).version

    def admits(self, key: K) -> bool:
        """It has the fleet's weights."""
        weights = self._of(key)
        return weights.version == self.fleet and not weights.changing and not weights.held

    def behind(self, key: K) -> bool:
        """It has to be brought to the fleet's version, and that is not under way."""
        weights = self._of(key)
        return weights.version != self.fleet and not weights.changing

    def tainted(self, key: K) -> bool:
        """Only an update tells what it has."""
        return self._of(key).tainted

    # -- engines ----------------------------------------------------------------------------------

    def join(self, key: K) -> None:
        """One more engine; it has its first weights while that is all there are."""
        self._engines[key] = Weights(0 if self.fleet == 0 else None)

    def leave(self, key: K) -> None:
        """What is said of it from now on changes nothing."""
        self._engines.pop(key, None)

    def returned(self, key: K) -> None:
        """It was away: its process may be a new one."""
        if self.fleet > 0:
            self._of(key).version = None

    def spoil(self, key: K) -> None:
        """Its weights are gone, or nobody can say what they are."""
        weights = self._of(key)
        weights.version, weights.tainted, weights.changing = None, True, False

    def observe(self, key: K, label: int | None) -> None:
        """What it says its version is; None when that is not a number."""
        weights = self._of(key)
        if self.fleet > 0 and not weights.tainted and not weights.changing:
            weights.version = label

    def hold(self, key: K, held: bool) -> None:
        """Not admitted, whatever its weights are, until this is called with False."""
        self._of(key).held = held

    def held(self, key: K) -> bool:
        return self._of(key).held

    # -- an update --------------------------------------------------------------------------------

    def following(self, version: int | None) -> int:
        """The version of an update now; `version` if one is given. Raises ConfigError."""
        if version is None:
            return self.fleet + 1
        if version <= self.fleet:
            raise ConfigError(f"the fleet is at version {self.fleet}: {version} does not come after it")
        return version

    def commit(self, key: K) -> None:
        """From now on its weights may change."""
        self._of(key).changing = True

    def committed(self, key: K, version: int) -> None:
        """It has the weights of this version; the first that has takes the fleet with it."""
        weights = self._of(key)
        assert version >= self.fleet, f"{key} committed {version}, the fleet is at {self.fleet}"
        weights.version, weights.tainted, weights.changing = version, False, False
        self.fleet = version

    def kept(self, key: K) -> None:
        """It refused, and has the weights it had."""
        self._of(key).changing = False

    def _of(self, key: K) -> Weights:
        """Those of an engine; of one that has left, some that nobody looks at."""
        return self._engines.get(key) or Weights(None)
