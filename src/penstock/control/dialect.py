"""What a control call is at each kind of engine: routes and bodies, as pure functions.

vLLM's names are spoken to everything that is not SGLang: the embedded engine has them, and a server that has
neither answers 404, which says it all. Sources: vLLM 0.32 `entrypoints/rl/online`, `entrypoints/serve/dev`;
SGLang 0.5 `srt/entrypoints/http_server.py`, `srt/managers/io_struct.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, Protocol
from urllib.parse import urlencode

import msgspec
import orjson

from penstock.errors import ConfigError

PauseMode = Literal["abort", "wait", "keep"]
"""What becomes of requests in flight: ended with what they have, finished first, or frozen where they are."""
KV_CACHE: Final = "kv_cache"
WEIGHTS: Final = "weights"


class Ask(msgspec.Struct, frozen=True):
    """One request to an engine."""

    path: str
    fields: dict[str, Any] | None = None
    """The JSON of its body."""
    method: str = "POST"

    @property
    def body(self) -> bytes:
        return b"" if self.fields is None else orjson.dumps(self.fields)


class Meeting(msgspec.Struct, frozen=True):
    """Where and how the ranks of one engine and the trainer's, which is rank 0, form a group."""

    address: str
    """The trainer's."""
    port: int
    world_size: int
    name: str
    backend: str
    """Of torch.distributed, for SGLang; vLLM has NCCL alone."""


class Incoming(msgspec.Struct, frozen=True):
    """A tensor that is going to be broadcast."""

    name: str
    dtype: str
    """As torch names it: float32, bfloat16 …"""
    shape: tuple[int, ...]


RECEIVING: Final = frozenset({"/update_weights", "/update_weights_from_distributed"})
"""Paths of the asks during which an engine waits for a broadcast."""
NOT_YET: Final = frozenset({"/begin_weight_update", "/end_weight_update"})
"""Paths of asks that older versions neither have nor need."""
PACKED: Final = {"packed": True, "packed_buffer_size_bytes": 1 << 30, "packed_num_buffers": 2}
"""How vLLM's tensors are put together on their way; bytes."""


class Dialect(Protocol):
    """Each control call as the requests it takes, in order; the call has succeeded when all have. Raises
    ConfigError for what the engine cannot do."""

    name: str
    world_size_field: str

    def pause(self, mode: PauseMode, clear_cache: bool) -> list[Ask]: ...

    def resume(self) -> list[Ask]: ...

    def sleep(self, level: int) -> list[Ask]: ...

    def wake_up(self, tags: Sequence[str], level: int | None) -> list[Ask]:
        """`level`: that of the sleep it is in, None: not known."""
        ...

    def reset_prefix_cache(self) -> list[Ask]: ...

    def abort(self) -> list[Ask]: ...

    def presence(self) -> list[Ask]:
        """Succeeds, and changes nothing, while the engine is there."""
        ...

    def weight_version(self) -> list[Ask]:
        """Answers an object with `weight_version`."""
        ...

    def world_size(self) -> list[Ask]:
        """Answers an object with the engine's ranks in a group with the trainer, in `world_size_field`."""
        ...

    def weight_digests(self) -> list[Ask]:
        """Answers digests of the weights in place: see `penstock.control.checksums`."""
        ...

    def join(self, meeting: Meeting) -> Ask:
        """Has the engine's ranks meet the trainer's; answered when all have."""
        ...

    def receive(self, tensors: Sequence[Incoming], meeting: Meeting, version: int) -> list[Ask]:
        """Takes tensors that the trainer broadcasts during the ask whose path is in RECEIVING; after the
        last, no cache holds anything that older weights computed, and the engine says its version."""
        ...

    def leave(self, meeting: Meeting) -> list[Ask]:
        """Undoes `join`, and what of `receive` was not ended; each on its own, none has to succeed."""
        ...

    def reload(self, path: str, version: int) -> list[Ask]:
        """Takes the weights in a folder. Refused by the first request, it has changed nothing; after the
        last, no cache holds anything that older weights computed, and the engine says that it is at this
        version."""
        ...


class VLLM:
    """vLLM and the embedded engine."""

    name = "vllm"
    world_size_field = "world_size"

    def pause(self, mode: PauseMode, clear_cache: bool) -> list[Ask]:
        return [Ask(f"/pause?mode={mode}&clear_cache={'true' if clear_cache else 'false'}")]

    def resume(self) -> list[Ask]:
        return [Ask("/resume")]

    def sleep(self, level: int) -> list[Ask]:
        return [Ask(f"/sleep?level={level}")]

    def wake_up(self, tags: Sequence[str], level: int | None) -> list[Ask]:
        query = urlencode([("tags", tag) for tag in tags])
        return [Ask(f"/wake_up?{query}" if query else "/wake_up")]

    def reset_prefix_cache(self) -> list[Ask]:
        return [Ask("/reset_prefix_cache")]

    def abort(self) -> list[Ask]:
        return [Ask("/abort_requests", {})]

    def presence(self) -> list[Ask]:
        return [Ask("/health", method="GET")]

    def weight_version(self) -> list[Ask]:
        return [Ask("/weight_info", method="GET")]

    def world_size(self) -> list[Ask]:
        return [Ask("/get_world_size", method="GET")]

    def weight_digests(self) -> list[Ask]:
        return [Ask("/weight_checker", {"action": "checksum"})]

    def join(self, meeting: Meeting) -> Ask:
        info = {
            "master_address": meeting.address,
            "master_port": meeting.port,
            "rank_offset": 1,
            "world_size": meeting.world_size,
            **PACKED,
        }
        return Ask("/init_weight_transfer_engine", {"init_info": info})

    def receive(self, tensors: Sequence[Incoming], meeting: Meeting, version: int) -> list[Ask]:
        info = {
            "names": [one.name for one in tensors],
            "dtype_names": [one.dtype for one in tensors],
            "shapes": [one.shape for one in tensors],
        }
        return [
            Ask("/start_weight_update"),
            Ask("/update_weights", {"update_info": info}),
            Ask("/finish_weight_update", {"weight_version": str(version)}),
            Ask("/reset_prefix_cache?reset_running_requests=true"),
        ]

    def leave(self, meeting: Meeting) -> list[Ask]:
        return [Ask("/shutdown_weight_transfer_engine")]

    def reload(self, path: str, version: int) -> list[Ask]:
        return [
            Ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}}),
            Ask("/reset_prefix_cache?reset_running_requests=true"),
            Ask("/update_weight_version", {"new_version": str(version)}),
        ]


class SGLang:
    """SGLang. It has no pause that waits, and its memory is given back only with --enable-memory-saver."""

    name = "sglang"
    world_size_field = "tp_size"

    def pause(self, mode: PauseMode, clear_cache: bool) -> list[Ask]:
        if mode == "wait":
            raise ConfigError("SGLang cannot pause in mode 'wait': use 'abort' or 'keep'")
        if mode == "keep":
            mode_there = "retract" if clear_cache else "in_place"  # in place, the cache cannot be flushed
        else:
            mode_there = "abort"
        flush = [Ask("/flush_cache")] if clear_cache else []
        return [Ask("/pause_generation", {"mode": mode_there}), *flush]

    def resume(self) -> list[Ask]:
        return [Ask("/continue_generation", {})]

    def sleep(self, level: int) -> list[Ask]:
        tags = _released(level)
        release = [Ask("/release_memory_occupation", {"tags": tags})] if tags else []
        return [Ask("/pause_generation", {"mode": "abort"}), *release]

    def wake_up(self, tags: Sequence[str], level: int | None) -> list[Ask]:
        if level is None:  # taking back what was not released kills its scheduler
            raise ConfigError("an SGLang engine is woken up only by what has put it to sleep")
        released = [tag for tag in _released(level) if not tags or tag in tags]
        resume = [Ask("/resume_memory_occupation", {"tags": released})] if released else []
        return [*resume, *([] if tags and KV_CACHE not in tags else self.resume())]

    def reset_prefix_cache(self) -> list[Ask]:
        return [Ask("/flush_cache")]

    def abort(self) -> list[Ask]:
        return [Ask("/abort_request", {"rid": "", "abort_all": True})]

    def presence(self) -> list[Ask]:
        return [Ask("/model_info", method="GET")]  # its /health waits a second for a token

    def weight_version(self) -> list[Ask]:
        return [Ask("/model_info", method="GET")]

    def world_size(self) -> list[Ask]:
        return [Ask("/server_info", method="GET")]

    def weight_digests(self) -> list[Ask]:
        return [Ask("/weights_checker", {"action": "checksum"})]

    def join(self, meeting: Meeting) -> Ask:
        fields = {
            "master_address": meeting.address,
            "master_port": meeting.port,
            "rank_offset": 1,
            "world_size": meeting.world_size,
            "group_name": meeting.name,
            "backend": meeting.backend,
        }
        return Ask("/init_weights_update_group", fields)

    def receive(self, tensors: Sequence[Incoming], meeting: Meeting, version: int) -> list[Ask]:
        fields = {
            "names": [one.name for one in tensors],
            "dtypes": [one.dtype for one in tensors],
            "shapes": [one.shape for one in tensors],
            "group_name": meeting.name,
            "weight_version": str(version),
            "flush_cache": True,
        }
        return [
            Ask("/begin_weight_update", {}),
            Ask("/update_weights_from_distributed", fields),
            Ask("/end_weight_update", {}),
        ]

    def leave(self, meeting: Meeting) -> list[Ask]:
        destroy = Ask("/destroy_weights_update_group", {"group_name": meeting.name})
        return [Ask("/end_weight_update", {}), destroy]

    def reload(self, path: str, version: int) -> list[Ask]:
        fields = {"model_path": path, "weight_version": str(version), "flush_cache": True}
        return [Ask("/update_weights_from_disk", fields)]


def _released(level: int) -> list[str]:
    """What an SGLang engine gives back. vLLM moves its weights to the host at level 1; here they stay."""
    return [[], [KV_CACHE], [KV_CACHE, WEIGHTS]][level]
