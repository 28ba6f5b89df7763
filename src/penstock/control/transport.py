"""How new weights get into an engine: one small protocol, and what reads them from a folder.

Until `commit` is called an engine computes with the weights it had; a `commit` that has returned means that
it has the new ones, as a whole, and that no cache holds what the old ones computed. A transport brings an
engine of any version, also one that has just started, to its weights, and may be used for one engine after
the other: it serves an update and, later, whoever missed it. It keeps all it needs for that to itself, and
leaves no file and no memory behind when it is let go of.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from penstock.control.checksums import differing, read_said, vectors_in
from penstock.control.engine import Engine, lacks_route
from penstock.errors import EngineError, PenstockError


class WeightTransport(Protocol):
    """Raises PenstockError where an engine fails; RequestRejected from `commit` only when the engine still
    has the weights it had."""

    async def prepare(self, engine: Engine, version: int) -> None:
        """Makes ready. What an earlier update has left unfinished there is given up."""
        ...

    async def transfer(self, engine: Engine, version: int) -> None:
        """Brings the weights to the engine, which goes on with those it has."""
        ...

    async def commit(self, engine: Engine, version: int) -> str | None:
        """Puts them in place, and has the engine say that it is at this version. The checksum it gives of
        what it has now; None where it gives none."""
        ...

    async def abort(self, engine: Engine) -> None:
        """Gives up before `commit`."""
        ...


class DiskReload:
    """A checkpoint folder that every engine can read under the same path.

    vLLM and the embedded engine: /collective_rpc reload_weights; SGLang: /update_weights_from_disk. A folder
    that changes while it is used is not noticed: give each version its own.

    verify: engines that can are asked for the digests of what they have afterwards, which takes about a
    second for each GB of a rank; see `penstock.control.checksums`. vectors: what they are compared with, by
    default those of the folder where it can be read here, too: it is looked through before anything is sent.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        verify: bool = True,
        vectors: Mapping[str, frozenset[str]] | None = None,
    ) -> None:
        self.path = str(path)
        self.verify = verify
        self._vectors = vectors

    def __repr__(self) -> str:
        return f"DiskReload({self.path!r})"

    async def prepare(self, engine: Engine, version: int) -> None:
        """Asks whether it is there: the folder is read no earlier than at the commit. Raises ConfigError for
        one that is broken."""
        if self.verify and self._vectors is None:
            folder = Path(self.path)
            there = await asyncio.to_thread(folder.is_dir)
            self._vectors = await asyncio.to_thread(vectors_in, folder) if there else {}
        await engine.ask(*(await engine.dialect()).presence())

    async def transfer(self, engine: Engine, version: int) -> None:
        """Nothing: the engines read their weights while they replace them."""

    async def commit(self, engine: Engine, version: int) -> str | None:
        first, *rest = (await engine.dialect()).reload(self.path, version)
        await engine.ask(first, timeout=engine.update_timeout)
        said = await checked(engine, self._vectors or {}) if self.verify else None
        for one in rest:
            try:
                await engine.ask(one, timeout=engine.update_timeout)
            except PenstockError as error:
                if not (lacks_route(error) and one.path == "/update_weight_version"):
                    raise EngineError(
                        f"{engine.name} has new weights, but {one.path} failed: {error}"
                    ) from error
        return said

    async def abort(self, engine: Engine) -> None:
        """Nothing has been done."""


async def checked(engine: Engine, vectors: Mapping[str, frozenset[str]]) -> str | None:
    """The checksum of the weights an engine has now, None where it gives none.

    vectors: see `penstock.control.checksums`. Raises EngineError when it has others, or does not answer.
    """
    asks = (await engine.dialect()).weight_digests()
    try:
        said = read_said(await engine.ask(*asks, timeout=engine.update_timeout))
    except PenstockError as error:
        if lacks_route(error):
            return None
        raise EngineError(f"{engine.name} has new weights, but does not say which: {error}") from error
    if said is None:
        return None
    if wrong := differing(said, vectors):
        raise EngineError(f"{engine.name} has other weights than it was given: {wrong[0]}, of {len(wrong)}")
    return said.checksum
