"""Ways for weights into real vLLM and SGLang: they have them, and vLLM reads what it would be sent."""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from penstock.control.broadcast import Broadcast
from penstock.control.control import Control
from penstock.control.dialect import VLLM, Incoming, Meeting
from penstock.control.files import TensorFiles
from penstock.errors import ControlFailed
from penstock.fleet.fleet import Fleet
from penstock.models import ARITHMETIC
from penstock.servers.launched import LifeCycle
from tests.engines.conftest import PYTHONS, available
from tests.engines.engines import ENGINES
from tests.engines.live import Live
from tests.engines.test_rollouts import FLOAT32
from tests.scripted import run
from tests.transports.site import Weights, digest, left_behind, noisy

pytestmark = pytest.mark.engines

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What both engines keep as one matrix."""
PADDED = ("embed_tokens", "lm_head")
"""Rows are added to these up to a multiple of 64."""
CHECK_SHAPES = """
import inspect, json, sys
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, trainer_init
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer
init, update = json.load(sys.stdin)
NCCLWeightTransferInitInfo(**init)
NCCLWeightTransferUpdateInfo(**update)
inspect.signature(trainer_init).bind({})
inspect.signature(packed_nccl_broadcast_producer).bind(
    iterator=None, group=None, src=0, post_iter_func=None, buffer_size_bytes=1, num_buffers=2
)
print("read")
"""


def fused(weights: Weights, name: str) -> torch.Tensor:
    """The tensor an engine keeps under a name."""
    before, _, after = name.rpartition(".weight")[0].rpartition(".")
    if after in FUSED:
        return torch.cat([weights[f"{before}.{part}.weight"] for part in FUSED[after]])
    return weights[name]


@pytest.mark.parametrize("name", sorted(PYTHONS))
def test_a_real_engine_has_what_it_was_given(name: str, tmp_path: Path) -> None:
    if not available(name):
        pytest.skip(f"{PYTHONS[name]} is not set")
    engine = ENGINES[name]
    life = LifeCycle(log_folder=tmp_path / "logs", start_timeout=300.0, quiet_timeout=120.0)
    folder = tmp_path / "weights"
    first = load_file(ARITHMETIC / "model.safetensors")
    ways: list[Any] = [partial(TensorFiles, folder=folder, model=ARITHMETIC)]
    if name == "sglang":
        ways.append(partial(Broadcast, address="127.0.0.1", backend="gloo"))

    async def update(url: str) -> None:
        checksums: dict[int, str | None] = {}
        async with Fleet([url]) as fleet, Control(fleet, update_timeout=60.0) as control:
            for number, way in enumerate([*ways, *ways]):
                weights = noisy(first, number // len(ways))
                done = await control.update_weights(way(weights))
                assert {"prepare", "transfer", "commit"} <= done.seconds.keys()
                (said,) = done.checksums.values()
                # Whichever way the same weights have come, the engine says the same of them.
                assert checksums.setdefault(number // len(ways), said) == said
                compare(await control.call("POST", *route(name)), name, weights)
            assert len(set(checksums.values())) == 2 and None not in checksums.values()
            (folder / "penstock-weights-broken").mkdir()
            with pytest.raises(ControlFailed, match="has no weights"):
                await control.reload_weights(folder / "penstock-weights-broken")
            (folder / "penstock-weights-broken").rmdir()
            assert [end.current for end in fleet.endpoints] == [True]
        assert left_behind(folder) == []

    with Live(engine, engine.make(life=life, extra_args=FLOAT32.get(name, {}))) as live:
        run(update(live.server.base_url), bound=120.0)


def route(name: str) -> tuple[str, dict[str, str]]:
    return ("/weights_checker" if name == "sglang" else "/weight_checker"), {"action": "checksum"}


def compare(outcomes: Any, name: str, weights: Weights) -> None:
    """Bit by bit: all of SGLang, by 64 bits of SHA-256; of vLLM on a CPU, which packs matrices, the rest."""
    (outcome,) = outcomes.values()
    said = outcome.value["ranks"][0]["checksums"] if name == "sglang" else outcome.value["checksums"]
    same, packed = 0, 0
    for key, one in said.items():
        tensor = fused(weights, key.rpartition(":")[2])
        if name == "vllm" and tensor.dim() > 1:
            packed += 1
            continue
        if any(padded in key for padded in PADDED):
            continue
        assert digest(tensor).startswith(one), key
        same += 1
    assert same > 10 and (packed == 0) == (name == "sglang")


def test_vllm_reads_what_it_would_be_sent() -> None:
    """Its NCCL needs two GPUs; the classes that read the messages do not."""
    if not available("vllm"):
        pytest.skip(f"{PYTHONS['vllm']} is not set")
    meeting = Meeting("127.0.0.1", 29_500, 3, "g", "nccl")
    tensors = [Incoming("a", "bfloat16", (2, 3)), Incoming("b", "float32", (4,))]
    dialect = VLLM()
    init = dialect.join(meeting).fields
    update = next(ask.fields for ask in dialect.receive(tensors, meeting, 7) if ask.path == "/update_weights")
    assert init is not None and update is not None
    done = subprocess.run(
        [os.environ[PYTHONS["vllm"]], "-c", CHECK_SHAPES],
        input=json.dumps([init["init_info"], update["update_info"]]),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.stdout.strip().endswith("read"), done.stderr[-2000:]
