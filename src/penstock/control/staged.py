"""Tensors brought into embedded engines beside the weights in use, compared there, and put in place at once.

It guarantees:
- what was copied when a transport was made is what every engine gets, whatever the trainer does meanwhile;
- the engine's checksum of all that came is compared before anything is committed anywhere, and again by the
  commit: a wrong one leaves the engine with the weights it had;
- an engine gets only what has changed where it has the very content the changes are to; else all.

Source of the routes: docs/engine.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Final

from penstock.control.dialect import Ask, SGLang
from penstock.control.engine import Engine, lacks_route, refused
from penstock.control.tensors import (
    Tensor,
    Tensors,
    changed,
    checksum,
    copied,
    described,
    parts,
    safetensors_file,
)
from penstock.errors import ConfigError, EngineError, ResponseError

if TYPE_CHECKING:
    import torch

CHUNK: Final = 32 << 20
"""Bytes of tensors in a part; a larger tensor is a part of its own. The embedded engine takes 64 MiB."""

GIVE_UP: Final = Ask("/abort_weight_update")
"""The embedded engine's alone: an engine without it has no staged updates."""

Given = Mapping[str, "torch.Tensor | Tensor"]
"""What a transport is made of: all tensors of a checkpoint, by name."""


class Staged(ABC):
    """An update of embedded engines; how the tensors travel is said by who derives from this.

    tensors: all of a checkpoint's, by name; copied. since: the transport whose weights engines may have:
    those that do are sent what has changed. Raises ConfigError.
    """

    backend: ClassVar[str]

    def __init__(self, tensors: Given, *, since: Staged | None = None) -> None:
        self.tensors = self._copied(tensors)
        self.checksum = checksum(self.tensors)
        """Of all tensors: also the name engines give to this content."""
        self.placed = False
        """An engine has it."""
        self._base = None if since is None else since.content
        found = None if since is None else changed(self.tensors, since.tensors)
        self._changed: Tensors | None = found
        """None: there is nothing they could be changes to."""
        self._changed_checksum = None if found is None else checksum(found)
        self._whole: set[Engine] = set()
        """Engines that get all, for the changes did not do."""
        self._changes: set[Engine] = set()
        """Engines that are being sent the changes."""

    def __repr__(self) -> str:
        size = sum(len(one.data) for one in self.tensors.values())
        return f"<{type(self).__name__} {len(self.tensors)} tensors, {size} bytes>"

    @property
    def content(self) -> str:
        """The name engines have for these weights."""
        return self.checksum

    async def prepare(self, engine: Engine, version: int) -> None:
        """See WeightTransport. Raises ConfigError for an engine that takes no tensors."""
        if not await self._stages(engine):
            raise ConfigError(f"{engine.name} is {await _kind(engine)}, which does not take tensors this way")
        await self._begin(engine, version)

    async def _begin(self, engine: Engine, version: int) -> None:
        """An update of an engine on which none is under way."""
        await engine.ask(
            Ask("/init_weight_transfer_engine", {"init_info": {"backend": self.backend}}),
            timeout=engine.update_timeout,
        )
        self._changes.discard(engine)
        if self._changed is not None and engine not in self._whole:
            start = {"version": version, "base": self._base, "tensors": described(self._changed)}
            try:
                await engine.ask(Ask("/start_weight_update", start), timeout=engine.update_timeout)
            except ResponseError as error:
                if not refused(error):
                    raise
            else:
                self._changes.add(engine)
                return
        await engine.ask(Ask("/start_weight_update", {"version": version}), timeout=engine.update_timeout)

    async def transfer(self, engine: Engine, version: int) -> None:
        """See WeightTransport. Raises RequestRejected when the engine's checksum is another."""
        tensors, wanted = self._for(engine)
        try:
            await self._send(engine, tensors)
            ask = Ask("/update_weights", {"update_info": {"checksum": wanted}})
            await engine.ask(ask, timeout=engine.update_timeout)
        except ResponseError:
            self._whole.add(engine)
            raise

    async def commit(self, engine: Engine, version: int) -> str | None:
        _, wanted = self._for(engine)
        fields = {"weight_version": version, "checksum": wanted, "content": self.content}
        try:
            answer = await engine.ask(Ask("/finish_weight_update", fields), timeout=engine.update_timeout)
        except ResponseError:
            self._whole.add(engine)
            raise
        said = (answer.get("weight_version"), answer.get("checksum")) if isinstance(answer, dict) else None
        if said != (str(version), wanted):
            raise EngineError(f"{engine.name} committed {said} instead of {(str(version), wanted)}")
        self.placed = True
        self._whole.discard(engine)
        return self.checksum

    async def abort(self, engine: Engine) -> None:
        await engine.ask(GIVE_UP)

    def bytes_for(self, engine: Engine) -> int:
        """That the engine is sent in the update it was prepared for."""
        return sum(len(one.data) for one in self._for(engine)[0].values())

    @abstractmethod
    async def _send(self, engine: Engine, tensors: Tensors) -> None:
        """Raises as `Engine.ask`."""

    def _copied(self, tensors: Given) -> dict[str, Tensor]:
        return copied(tensors)

    def _for(self, engine: Engine) -> tuple[Tensors, str]:
        """What an engine is sent, and its checksum."""
        if engine in self._changes:
            assert self._changed is not None and self._changed_checksum is not None
            return self._changed, self._changed_checksum
        return self.tensors, self.checksum

    async def _stages(self, engine: Engine) -> bool:
        """Gives up what is unfinished on an engine that can; False for one that has no such updates."""
        if isinstance(await engine.dialect(), SGLang):
            return False
        try:
            await engine.ask(GIVE_UP, timeout=engine.update_timeout)
        except ResponseError as error:
            if not lacks_route(error):
                raise
            return False
        return True


class HttpChunks(Staged):
    """Tensors sent over HTTP, as safetensors in parts of `chunk` bytes. Raises ConfigError."""

    backend = "http"

    def __init__(self, tensors: Given, *, since: Staged | None = None, chunk: int = CHUNK) -> None:
        super().__init__(tensors, since=since)
        self._chunk = chunk

    async def _send(self, engine: Engine, tensors: Tensors) -> None:
        for part in parts(tensors, self._chunk):
            await engine.send("/update_weights", safetensors_file(part))


class ChangedOnly:
    """Makes transports that send what has changed since the last version that an engine has taken over.

    make: HttpChunks, SharedMemory, or a `functools.partial` of TensorFiles. An engine that missed a version,
    or is a new process, gets all. Not for engines behind a router: it answers for all of them at once.
    """

    def __init__(self, make: Callable[..., Staged]) -> None:
        self._make = make
        self._placed: Staged | None = None
        self._last: Staged | None = None

    def __call__(self, tensors: Given) -> Staged:
        """The transport of the next version. Raises ConfigError."""
        if self._last is not None and self._last.placed:
            self._placed = self._last
        self._last = self._make(tensors, since=self._placed)
        return self._last


async def _kind(engine: Engine) -> str:
    return "SGLang" if isinstance(await engine.dialect(), SGLang) else "no embedded engine"
