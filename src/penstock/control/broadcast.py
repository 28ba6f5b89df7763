"""Tensors broadcast to vLLM and SGLang from rank to rank, as they do it themselves: NCCL between GPUs.

It guarantees:
- each engine has a group of its own with the trainer, opened for an update and closed after it: an engine
  that fails, is killed or comes anew is no matter of the others, and is caught up in the same way;
- every wait is bounded by the engine's update timeout; a call of NCCL that does not return is left to its
  thread.

The weights are replaced where they are used, so nothing is sent before the commit, and an engine that fails
in it is left out until an update succeeds on it.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from penstock.control.checksums import vectors_of
from penstock.control.dialect import NOT_YET, RECEIVING, Ask, Incoming, Meeting, SGLang
from penstock.control.engine import Engine, lacks_route, outcome
from penstock.control.tensors import check_some, copied
from penstock.control.transport import checked
from penstock.errors import ConfigError, EngineError, PenstockError, PhaseTimeout, ResponseError

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.control.groups import Group, OpenGroup

LEAVING: Final = 10.0
"""Seconds to wait for an engine to leave a group: it may wait in it for what does not come."""


class Broadcast:
    """All tensors of a checkpoint, by name, sent from where they lie. They are copied there.

    address: the trainer's, as the engines reach it. backend: of torch.distributed, for SGLang; `gloo` on a
    CPU. verify: engines are asked for the digests of what they have afterwards. open_group: by default
    NcclGroup for vLLM, TorchGroup for SGLang. vLLM has to be started with
    `--weight-transfer-config '{"backend": "nccl"}'`. Raises ConfigError.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        address: str,
        *,
        backend: str = "nccl",
        verify: bool = True,
        open_group: OpenGroup | None = None,
    ) -> None:
        check_some(tensors)
        self._tensors = {name: one.detach().clone().contiguous() for name, one in tensors.items()}
        self._incoming = [
            Incoming(name, str(one.dtype).removeprefix("torch."), tuple(one.shape))
            for name, one in self._tensors.items()
        ]
        self._address = address
        self._backend = backend
        self._verify = verify
        self._open_group = open_group
        self._meetings: dict[Engine, Meeting] = {}
        self._groups: dict[Engine, Group] = {}

    def __repr__(self) -> str:
        return f"<Broadcast {len(self._tensors)} tensors from {self._address}>"

    async def prepare(self, engine: Engine, version: int) -> None:
        """See WeightTransport. Raises EngineError when the ranks do not meet."""
        await self._leave(engine)
        dialect = await engine.dialect()
        meeting = Meeting(
            self._address,
            free_port(self._address),
            1 + await engine.world_size(),
            f"penstock-{uuid4().hex[:12]}",
            self._backend,
        )
        self._meetings[engine] = meeting
        opening = on_thread(lambda: self._open(isinstance(dialect, SGLang), meeting, engine.update_timeout))
        joining = asyncio.ensure_future(engine.ask(dialect.join(meeting), timeout=engine.update_timeout))
        self._groups[engine] = await both(engine, opening, joining)

    async def transfer(self, engine: Engine, version: int) -> None:
        """Nothing: what is sent is put in place as it comes."""

    async def commit(self, engine: Engine, version: int) -> str | None:
        """See WeightTransport. Raises EngineError, PhaseTimeout."""
        dialect, group, meeting = await engine.dialect(), self._groups[engine], self._meetings[engine]
        try:
            for ask in dialect.receive(self._incoming, meeting, version):
                if ask.path not in RECEIVING:
                    await _ask(engine, ask)
                    continue
                asking = asyncio.ensure_future(engine.ask(ask, timeout=engine.update_timeout))
                await both(engine, on_thread(lambda: group.broadcast(self._tensors)), asking)
            return await checked(engine, await self._vectors()) if self._verify else None
        except ResponseError as error:  # it may have taken some
            raise EngineError(f"{engine.name} did not take the weights over: {error}") from error
        finally:
            await self._leave(engine)

    async def abort(self, engine: Engine) -> None:
        await self._leave(engine)

    def _open(self, is_sglang: bool, meeting: Meeting, timeout: float) -> Group:
        from penstock.control.groups import NcclGroup, TorchGroup

        open_group = self._open_group or (TorchGroup if is_sglang else NcclGroup)
        device = next(iter(self._tensors.values())).device
        return open_group(meeting, device, timeout)

    async def _vectors(self) -> dict[str, frozenset[str]]:
        def digests() -> dict[str, frozenset[str]]:
            vectors = {name: one for name, one in self._tensors.items() if one.dim() == 1}
            return vectors_of(copied(vectors)) if vectors else {}

        return await asyncio.to_thread(digests)

    async def _leave(self, engine: Engine) -> None:
        """Closes both ends of a group, where there is one."""
        meeting, group = self._meetings.pop(engine, None), self._groups.pop(engine, None)
        if group is not None:
            on_thread(group.close).add_done_callback(_noticed)
        if meeting is not None:
            for ask in (await engine.dialect()).leave(meeting):
                await outcome(engine.ask(ask, timeout=min(LEAVING, engine.update_timeout)))


async def _ask(engine: Engine, ask: Ask) -> None:
    try:
        await engine.ask(ask, timeout=engine.update_timeout)
    except ResponseError as error:
        if not (lacks_route(error) and ask.path in NOT_YET):
            raise


async def both(engine: Engine, ours: asyncio.Future[Any], theirs: asyncio.Future[Any]) -> Any:
    """What our end gives once the engine has answered, too. The first that fails ends the wait for the other.

    Raises EngineError for ours, what `Engine.ask` raises for theirs, PhaseTimeout.
    """
    try:
        await asyncio.wait({ours, theirs}, timeout=engine.update_timeout, return_when=asyncio.FIRST_EXCEPTION)
        if theirs.done() and (error := theirs.exception()) is not None:
            raise error
        if ours.done() and (error := ours.exception()) is not None:
            if isinstance(error, PenstockError):
                raise error
            raise EngineError(f"the group with {engine.name} failed: {error}") from error
        if not (ours.done() and theirs.done()):
            raise PhaseTimeout(
                f"the ranks of {engine.name} did not do their part within {engine.update_timeout:g} s", "idle"
            )
        return ours.result()
    finally:
        for one in (ours, theirs):
            one.add_done_callback(_noticed)
        theirs.cancel()


def on_thread(work: Callable[[], Any]) -> asyncio.Future[Any]:
    """Work on a thread of its own that nobody has to wait for, not even the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        try:
            loop.call_soon_threadsafe(settle, result, failure)
        except RuntimeError:  # the loop is closed: nobody waits any longer
            return

    threading.Thread(target=run, name="penstock weights", daemon=True).start()
    return future


def free_port(address: str) -> int:
    """Raises ConfigError where the address is not this machine's."""
    try:
        with socket.create_server((address, 0)) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        raise ConfigError(f"no group can be opened at {address}: {error}") from None


def _noticed(future: asyncio.Future[Any]) -> None:
    """Its error has been told, or is of no matter."""
    if not future.cancelled():
        future.exception()
