"""An engine that takes broadcasts as vLLM or SGLang does: `tests.transports.receiver vllm|sglang PORT FILE`.

Its weights are those of a safetensors file. It refuses what the real ones refuse, and is in a real group of
torch.distributed with the trainer, over gloo. It generates nothing.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file
from torch import distributed

PACKED = {"packed": True, "packed_buffer_size_bytes": 1 << 30, "packed_num_buffers": 2}
c10d: Any = import_module("torch.distributed.distributed_c10d")
LIMIT = timedelta(seconds=20)


class Refused(Exception):
    """Answered with a status of 400."""


def digests_of(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    def digest(tensor: torch.Tensor) -> str:
        array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        return sha256(memoryview(array)).hexdigest()

    return {name: digest(tensor) for name, tensor in tensors.items()}


class Receiver:
    """The engine behind the routes."""

    def __init__(self, dialect: str, weights: dict[str, torch.Tensor]) -> None:
        self.dialect = dialect
        self.weights = weights
        self.label = "default"
        self.group: Any = None
        self.session = False

    def answer(self, path: str, body: Any) -> Any:
        name = "do_" + path.strip("/")
        work = getattr(self, f"{name}_{self.dialect}", None) or getattr(self, name, None)
        return None if work is None else work(body)

    def do_health(self, body: Any) -> Any:
        return {}

    # -- vLLM -------------------------------------------------------------------------------------

    def do_version_vllm(self, body: Any) -> Any:
        return {"version": "0.32.0"}

    def do_pause_vllm(self, body: Any) -> Any:
        return {"status": "paused"}

    def do_resume_vllm(self, body: Any) -> Any:
        return {"status": "resumed"}

    def do_get_world_size_vllm(self, body: Any) -> Any:
        return {"world_size": 1}

    def do_weight_info_vllm(self, body: Any) -> Any:
        return {"weight_version": self.label}

    def do_reset_prefix_cache_vllm(self, body: Any) -> Any:
        return {"success": True}

    def do_init_weight_transfer_engine_vllm(self, body: Any) -> Any:
        info = dict(body["init_info"])
        address, port = info.pop("master_address"), info.pop("master_port")
        assert info == {"rank_offset": 1, "world_size": 2, **PACKED}, info
        self.join(address, port, f"port {port}")
        return {"message": "Weight transfer initialized"}

    def do_start_weight_update_vllm(self, body: Any) -> Any:
        assert not self.session, "a weight update is already active"
        self.session = True
        return {"message": "Weight update started"}

    def do_update_weights_vllm(self, body: Any) -> Any:
        info = dict(body["update_info"])
        assert self.session and self.group is not None
        self.receive(info.pop("names"), info.pop("dtype_names"), info.pop("shapes"))
        assert info == {}
        return {"message": "Weights updated"}

    def do_finish_weight_update_vllm(self, body: Any) -> Any:
        assert self.session
        self.session, self.label = False, body["weight_version"]
        return {"message": "Weight update finished"}

    def do_weight_checker_vllm(self, body: Any) -> Any:
        assert body == {"action": "checksum"}
        digests = digests_of(self.weights)
        return {"checksums": {f"dp0:pp0:pcp0:tp0:{name}": one for name, one in digests.items()}}

    def do_shutdown_weight_transfer_engine_vllm(self, body: Any) -> Any:
        assert not self.session, "Cannot release a trainer connection during a weight update"
        self.leave()
        return {"message": "Weight transfer shut down"}

    # -- SGLang -----------------------------------------------------------------------------------

    def do_model_info_sglang(self, body: Any) -> Any:
        return {"weight_version": self.label}

    def do_server_info_sglang(self, body: Any) -> Any:
        return {"tp_size": 1}

    def do_pause_generation_sglang(self, body: Any) -> Any:
        return {"status": "ok"}

    do_continue_generation_sglang = do_flush_cache_sglang = do_pause_generation_sglang

    def do_init_weights_update_group_sglang(self, body: Any) -> Any:
        assert body.keys() == {
            "master_address", "master_port", "rank_offset", "world_size", "group_name", "backend"
        }  # fmt: skip
        assert (body["rank_offset"], body["world_size"], body["backend"]) == (1, 2, "gloo")
        self.join(body["master_address"], body["master_port"], body["group_name"])
        return {"success": True, "message": "joined"}

    def do_begin_weight_update_sglang(self, body: Any) -> Any:
        if self.session:
            raise Refused("a weight-update session is already open")
        self.session = True
        return {"success": True, "message": "Success"}

    def do_update_weights_from_distributed_sglang(self, body: Any) -> Any:
        if not self.session:
            raise Refused("must run between begin_weight_update() and end_weight_update()")
        assert body["flush_cache"] is True and body["group_name"]
        self.receive(body["names"], body["dtypes"], body["shapes"])
        self.label = body["weight_version"]
        return {"success": True, "message": "Succeeded"}

    def do_end_weight_update_sglang(self, body: Any) -> Any:
        if not self.session:
            raise Refused("no weight-update session is open")
        self.session = False
        return {"success": True, "message": "Success"}

    def do_destroy_weights_update_group_sglang(self, body: Any) -> Any:
        if self.group is None:
            raise Refused("The group to be destroyed does not exist.")
        self.leave()
        return {"success": True, "message": "destroyed"}

    def do_weights_checker_sglang(self, body: Any) -> Any:
        digests = digests_of(self.weights)
        whole = sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        return {"success": True, "per_engine_checksum": whole, "ranks": [{"checksums": digests}]}

    # -- the group --------------------------------------------------------------------------------

    def join(self, address: str, port: int, name: str) -> None:
        assert self.group is None, "it is in a group already"
        store, rank, size = next(c10d.rendezvous(f"tcp://{address}:{port}", 1, 2, timeout=LIMIT))
        store.set_timeout(LIMIT)
        self.group, _ = c10d._new_process_group_helper(
            size, rank, [], c10d.Backend("gloo"), c10d.PrefixStore(name, store),
            group_name=name, timeout=LIMIT,
        )  # fmt: skip
        c10d._world.pg_group_ranks[self.group] = {0: 0, 1: 1}

    def receive(self, names: list[str], dtypes: list[str], shapes: list[list[int]]) -> None:
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            distributed.broadcast(tensor, src=0, group=self.group)
            assert self.weights[name].shape == tensor.shape
            self.weights[name] = tensor

    def leave(self) -> None:
        group, self.group = self.group, None
        if group is not None:
            distributed.destroy_process_group(group)


def main() -> None:
    dialect, port, file = sys.argv[1:]
    engine = Receiver(dialect, load_file(Path(file)))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            content = self.rfile.read(length)
            try:
                answer = engine.answer(urlsplit(self.path).path, json.loads(content or b"null"))
                status = 404 if answer is None else 200
            except Refused as error:
                status, answer = 400, {"success": False, "message": str(error)}
            except Exception as error:
                status, answer = 500, {"error": {"message": repr(error)}}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer  # noqa: N815 - their names

        def log_message(self, format: str, *args: Any) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
