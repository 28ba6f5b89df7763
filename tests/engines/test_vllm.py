"""The same requests to the embedded engine and to real vLLM, on the same checkpoint: the same answers.

Set PENSTOCK_VLLM_PYTHON to the interpreter of a virtual environment with vLLM's CPU build to run this. With
PENSTOCK_RECORD=1 vLLM's answers are written down for the fast suite, which has no vLLM.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from penstock.servers.launched import LifeCycle
from tests.engine_server.cases import CASES, CONTEXT, MODEL
from tests.engine_server.checkpoint import make_checkpoint
from tests.engine_server.conformity import differences, observe
from tests.engine_server.running import engine_of, running
from tests.engine_server.test_answers import RECORDING
from tests.engines.engines import ENGINES
from tests.engines.live import Live

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("PENSTOCK_VLLM_PYTHON"),
        reason="PENSTOCK_VLLM_PYTHON does not point to a Python with vLLM",
    ),
]


def test_answers_are_vllms(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    seen = {}
    vllm = ENGINES["vllm"]
    # One thread in the server's own process: what comes in one event of a stream is then steadier.
    settings = {"distributed_executor_backend": "uni"}
    server = vllm.make(
        folder, name=MODEL, max_model_len=CONTEXT, extra_args=settings, life=LifeCycle(log_folder=tmp_path)
    )
    with Live(vllm, server) as live, running(engine_of(folder)) as ours:
        port = int(live.server.base_url.rpartition(":")[2])
        differing = {}
        for case in CASES:
            seen[case.name] = observe("127.0.0.1", port, case)
            found = differences(case, seen[case.name], observe(ours.host, ours.port, case))
            if found:
                differing[case.name] = found
    if os.environ.get("PENSTOCK_RECORD"):
        lines = [f"{json.dumps(name)}: {json.dumps(answer)}" for name, answer in seen.items()]
        RECORDING.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    assert differing == {}
