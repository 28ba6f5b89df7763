"""Reading the load from the metrics pages of vLLM and SGLang."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.fleet.load import EngineLoad, parse_load

VLLM = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="Qwen/Qwen3-8B"} 200.0
vllm:num_requests_running{engine="1",model_name="Qwen/Qwen3-8B"} 100.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="Qwen/Qwen3-8B"} 7.0
vllm:num_requests_waiting{engine="1",model_name="Qwen/Qwen3-8B"} 1e1
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity, or } not"} 99.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="Qwen/Qwen3-8B"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="Qwen/Qwen3-8B"} 0.75
vllm:num_preemptions_total{engine="0",model_name="Qwen/Qwen3-8B"} 3.0
vllm:num_preemptions_created{engine="0",model_name="Qwen/Qwen3-8B"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="Qwen/Qwen3-8B"} 1.5e+06
vllm:generation_tokens_total{engine="1",model_name="Qwen/Qwen3-8B"} 5e+05
"""

SGLANG_LABELS = b'engine_type="unified",model_name="m",moe_ep_rank="0",pp_rank="0",'
SGLANG = b"""\
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{dp_rank="0",tp_rank="0",priority="",%s} 60.0
sglang:num_running_reqs{dp_rank="0",tp_rank="0",priority="5",%s} 40.0
sglang:num_running_reqs{dp_rank="0",tp_rank="1",priority="",%s} 60.0
sglang:num_running_reqs{dp_rank="1",tp_rank="2",priority="",%s} 30.0
sglang:num_running_reqs_offline_batch{dp_rank="0",tp_rank="0",%s} 1000.0
sglang:num_queue_reqs{dp_rank="0",tp_rank="0",priority="",%s} 4.0
sglang:num_queue_reqs{dp_rank="1",tp_rank="2",priority="",%s} 1.0
sglang:token_usage{dp_rank="0",tp_rank="0",%s} 0.5
sglang:token_usage{dp_rank="1",tp_rank="2",%s} 0.3
sglang:num_retracted_reqs{dp_rank="0",tp_rank="0",pid="915",%s} 7.0
sglang:num_retracted_requests_total{dp_rank="0",tp_rank="0",%s} 2.0
""".replace(b"%s", SGLANG_LABELS)


def test_vllm() -> None:
    assert parse_load(VLLM) == EngineLoad(
        running=300.0, waiting=17.0, kv_usage=0.75, preemptions=3.0, generation_tokens=2e6
    )


def test_vllm_before_its_kv_gauge_was_renamed() -> None:
    load = parse_load(VLLM.replace(b"vllm:kv_cache", b"vllm:gpu_cache"))
    assert load is not None and load.kv_usage == 0.75
    load = parse_load(VLLM + VLLM.replace(b"vllm:kv_cache", b"vllm:gpu_cache"))
    assert load is not None and load.kv_usage == 0.75


def test_sglang_counts_a_request_once() -> None:
    """Tensor-parallel ranks and priorities repeat what is in the totals of the data-parallel ranks."""
    assert parse_load(SGLANG) == EngineLoad(
        running=90.0, waiting=5.0, kv_usage=0.5, preemptions=2.0, generation_tokens=None
    )


def test_sglang_tokens_are_those_of_each_step_where_it_counts_them() -> None:
    finished = b'sglang:generation_tokens_total{model_name="m"} 500\n'
    load = parse_load(SGLANG + finished)
    assert load is not None and load.generation_tokens == 500.0
    steps = (
        b'sglang:realtime_tokens_total{mode="prefill_compute",tp_rank="0"} 9000\n'
        b'sglang:realtime_tokens_total{mode="decode",tp_rank="0"} 520\n'
    )
    load = parse_load(SGLANG + finished + steps)
    assert load is not None and load.generation_tokens == 520.0


def test_sglang_without_labels_of_ranks() -> None:
    page = b'sglang:num_running_reqs{model_name="m"} 3.0\nsglang:num_queue_reqs{model_name="m"} 0.0'
    assert parse_load(page) == EngineLoad(running=3.0, waiting=0.0)


@pytest.mark.parametrize(
    "label",
    [
        b"a b",
        b"{a}",
        b"} 77 ",
        b'a \\"b\\" } 5',
        b"back\\\\",
        b'x,engine=\\"9\\"',
        "ü".encode(),
        b"",
        b"a\\nb",
    ],
)
def test_labels_may_hold_anything(label: bytes) -> None:
    page = b'vllm:num_requests_running{model_name="%s",engine="0"} 5.0 1395066363000\n' % label
    page += b'vllm:num_requests_waiting{engine="0",model_name="%s",} 2\n' % label
    assert parse_load(page) == EngineLoad(running=5.0, waiting=2.0)


@pytest.mark.parametrize("value", [b"NaN", b"+Inf", b"-1", b"", b"x", b"1.2.3", b'"'])
def test_a_sample_that_is_no_count_is_skipped(value: bytes) -> None:
    bad = b'vllm:num_requests_running{engine="0"} %s\n' % value
    good = b'vllm:num_requests_running{engine="1"}\t4\nvllm:num_requests_waiting 1\n'
    assert parse_load(bad + good) == EngineLoad(running=4.0, waiting=1.0)
    assert parse_load(bad + b"vllm:num_requests_waiting 1\n") is None


@pytest.mark.parametrize(
    "page", [b"", b"\n", b"not metrics", b"process_open_fds 12\n", b"# vllm:num_requests_running 5\n"]
)
def test_other_pages_are_none(page: bytes) -> None:
    assert parse_load(page) is None


def test_lines_may_end_in_carriage_returns() -> None:
    assert parse_load(b"vllm:num_requests_running 5\r\nvllm:num_requests_waiting 1\r\n") == EngineLoad(
        5.0, 1.0
    )


@given(st.binary(max_size=300))
def test_any_bytes(noise: bytes) -> None:
    parse_load(noise)
    load = parse_load(noise + b"\n" + VLLM)
    assert load is not None and load.running >= 300.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [b"vllm:num_requests_running", b"vllm:num_requests_waiting", b"vllm:kv_cache_usage_perc"]
            ),
            st.text('ab{}\\",= \n', max_size=12).map(str.encode),
            st.text("019.eE+-NaInf \t", max_size=6).map(str.encode),
        ),
        max_size=8,
    )
)
def test_anything_like_metrics(lines: list[tuple[bytes, bytes, bytes]]) -> None:
    load = parse_load(b"\n".join(name + labels + b" " + value for name, labels, value in lines))
    if load is not None:
        assert math.isfinite(load.running) and load.running >= 0 and load.waiting >= 0
        assert load.kv_usage is None or 0.0 <= load.kv_usage <= 1.0


@pytest.mark.parametrize(
    "hostile",
    [
        b'vllm:num_requests_running{a="' + b'\\"' * 100_000,
        b"vllm:num_requests_running{" + b'a="b",' * 30_000,
        b"vllm:num_requests_running{" + b" " * 200_000,
        b"vllm:num_requests_running\n" * 8_000,
        b"vllm:x 1\n" * 20_000,
    ],
)
def test_hostile_pages_take_linear_time(hostile: bytes) -> None:
    began = time.process_time()
    parse_load(hostile)
    assert time.process_time() - began < 0.5
