"""The trainer's end of a group with the ranks of one engine: it is rank 0 and sends, the engine receives.

What is here blocks, and belongs on a thread. Sources: vLLM 0.32 `distributed/weight_transfer/nccl_engine.py`;
SGLang 0.5 `srt/utils/common.py` (`init_custom_process_group`), `model_runner_components/weight_updater.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib import import_module
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from penstock.control.dialect import PACKED, Meeting
from penstock.errors import ConfigError


class Group(Protocol):
    """Made when all ranks have met. Raises RuntimeError, or what else torch and NCCL do."""

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        """Sends them in their order; returns when they may be changed."""
        ...

    def close(self) -> None: ...


OpenGroup = Callable[[Meeting, torch.device, float], Group]
"""Meets the engine's ranks within so many seconds."""


class NcclGroup:
    """vLLM's: NCCL without torch.distributed, several tensors packed into one broadcast.

    It is vLLM's own code on this side, too: raises ConfigError where the trainer's environment has no vLLM.
    """

    def __init__(self, meeting: Meeting, device: torch.device, timeout: float) -> None:
        try:
            from vllm.distributed.weight_transfer.nccl_common import (  # type: ignore[import-not-found]
                trainer_init,
            )
        except ImportError as error:
            raise ConfigError(
                f"to send weights to vLLM by NCCL the trainer's environment has to have vLLM: {error}"
            ) from None
        self._device = device
        torch.cuda.set_device(device)
        self._communicator = trainer_init(
            {
                "master_address": meeting.address,
                "master_port": meeting.port,
                "world_size": meeting.world_size,
            }
        )

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import (  # type: ignore[import-not-found]
            packed_nccl_broadcast_producer,
        )

        torch.cuda.set_device(self._device)  # each thread has its own
        packed_nccl_broadcast_producer(
            iterator=iter(tensors.items()),
            group=self._communicator,
            src=0,
            post_iter_func=itemgetter(1),
            buffer_size_bytes=PACKED["packed_buffer_size_bytes"],
            num_buffers=PACKED["packed_num_buffers"],
        )
        torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        self._communicator.destroy()


class TorchGroup:
    """SGLang's: a group of torch.distributed beside the trainer's own, one broadcast a tensor."""

    def __init__(self, meeting: Meeting, device: torch.device, timeout: float) -> None:
        # torch.distributed has no public way to a group that is no part of the default one.
        c10d: Any = import_module("torch.distributed.distributed_c10d")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._device = device
        limit = timedelta(seconds=timeout)
        store, rank, size = next(
            c10d.rendezvous(f"tcp://{meeting.address}:{meeting.port}", 0, meeting.world_size, timeout=limit)
        )
        store.set_timeout(limit)
        self._group, _ = c10d._new_process_group_helper(
            size,
            rank,
            [],
            c10d.Backend(meeting.backend),
            c10d.PrefixStore(meeting.name, store),
            group_name=meeting.name,
            timeout=limit,
        )
        c10d._world.pg_group_ranks[self._group] = {one: one for one in range(size)}

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        for tensor in tensors.values():
            distributed.broadcast(tensor, src=0, group=self._group)
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        group, self._group = self._group, None  # its connections end with the last reference
        distributed.destroy_process_group(group)
