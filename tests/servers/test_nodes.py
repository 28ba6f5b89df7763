"""Which machines an engine runs on, and the commands for each of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.servers import ray, sglang, vllm
from penstock.servers.nodes import Nodes, expand
from penstock.servers.spec import ServerSpec

LISTS = {
    "gpu1": ("gpu1",),
    "gpu[1-3]": ("gpu1", "gpu2", "gpu3"),
    "gpu[01-03,7],login": ("gpu01", "gpu02", "gpu03", "gpu7", "login"),
    "r[1-2]n[08-10]": ("r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"),
    "a[1,3]-ib, b": ("a1-ib", "a3-ib", "b"),
    "gpu[099-101]": ("gpu099", "gpu100", "gpu101"),
    "10.0.0.1,10.0.0.2": ("10.0.0.1", "10.0.0.2"),
    "[fd00::1],[fd00::2]": ("fd00::1", "fd00::2"),
}


@pytest.mark.parametrize("text", LISTS)
def test_a_list_of_hosts(text: str) -> None:
    assert expand(text) == LISTS[text]


@pytest.mark.parametrize(
    "text",
    ["", "a,,b", "a[1", "a]1", "a[[1]]", "a[x]", "a[3-1]", "a[1-]", "a b", "a[1-9999999]", "-a", "a[]"],
)
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no list of hosts|more than"):
        expand(text)


@given(st.text(alphabet="ab01[],-:. ", max_size=20))
def test_any_text_is_a_list_or_refused(text: str) -> None:
    try:
        assert all(host and "," not in host for host in expand(text))
    except ConfigError:
        pass


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 4))
def test_a_range_keeps_its_zeros(first: int, more: int, width: int) -> None:
    last = first + more
    hosts = expand(f"n[{first:0{width}}-{last}]")
    assert hosts == tuple(f"n{number:0{max(width, len(str(first)))}}" for number in range(first, last + 1))


SLURM = {"SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_NNODES": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}


def test_nodes_of_a_slurm_job() -> None:
    nodes = Nodes.from_slurm(SLURM)
    assert (nodes.hosts, nodes.rank, nodes.is_head, nodes.head) == (("gpu1", "gpu2"), 1, False, "gpu1:20000")
    assert Nodes.from_slurm({"SLURM_JOB_NODELIST": "gpu1"}).is_head


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"SLURM_JOB_NODELIST": ""}, "no Slurm job"),
        ({"SLURM_NNODES": "3"}, "SLURM_NNODES is 3"),
        ({"SLURM_NNODES": "x"}, "must be a number"),
        ({"SLURM_PROCID": None}, "one task a node"),
        ({"SLURM_NTASKS": "16"}, "16 tasks run on 2 nodes"),
        ({"SLURM_PROCID": "2"}, "between 0 and 1"),
    ],
)
def test_what_slurm_cannot_mean(changed: dict[str, str | None], says: str) -> None:
    environment = {name: value for name, value in {**SLURM, **changed}.items() if value is not None}
    with pytest.raises(ConfigError, match=says):
        Nodes.from_slurm(environment)


@pytest.mark.parametrize(
    ("hosts", "here", "rank", "found"),
    [
        (["a", "b"], ["b"], None, 1),
        (["n[1-3]"], ["n3.cluster.local"], None, 2),
        (["n1.x", "n2.x"], ["n2"], None, 1),
        (["a", "b"], [], 0, 0),
    ],
)
def test_place_of_this_machine(hosts: list[str], here: list[str], rank: int | None, found: int) -> None:
    assert Nodes.from_hosts(hosts, here=here, rank=rank).rank == found


@pytest.mark.parametrize(
    ("hosts", "here", "rank", "says"),
    [
        (["a", "b"], ["c"], None, "none of a, b"),
        (["a", "b"], ["a", "b"], None, "several of a, b"),
        (["a", "a"], [], 0, "named twice"),
        (["a"], [], 1, "between 0 and 0"),
    ],
)
def test_no_place_for_this_machine(hosts: list[str], here: list[str], rank: int | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Nodes.from_hosts(hosts, here=here, rank=rank)


def spec(**fields: Any) -> ServerSpec:
    nodes = Nodes(hosts=("a", "b"), rank=1, port=7000)
    return ServerSpec(**{"model": "org/m", "port": 8000, "tp": 16, "nodes": nodes, **fields})


def test_sglang_is_told_its_nodes() -> None:
    words = " ".join(sglang.command(spec(), "py"))
    assert "--tp-size 16" in words
    assert words.endswith("--nnodes 2 --node-rank 1 --dist-init-addr a:7000")


def test_vllm_runs_over_ray() -> None:
    words = vllm.command(spec(), "py")
    assert words[-2:] == ["--distributed-executor-backend", "ray"]
    given = spec(extra_args={"distributed_executor_backend": "mp"})
    with pytest.raises(ConfigError, match="give it as nodes"):
        vllm.command(given, "py")
    assert "ray" not in vllm.command(spec(nodes=None), "py")


def test_commands_of_ray() -> None:
    head, worker = (Nodes(hosts=("10.0.0.1", "b"), rank=rank, port=7000) for rank in (0, 1))
    start = ["py", "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    assert ray.node_command(head, "py") == [
        *(*start, "--node-ip-address", "10.0.0.1", "--head", "--port", "7000"),
        "--include-dashboard=false",
    ]
    assert ray.node_command(worker, "py") == [*start, "--address", "10.0.0.1:7000"]
    assert ray.count_command("a:7000", "py")[-1] == "a:7000"


@pytest.mark.parametrize(
    ("output", "count"),
    [(b"", 0), (b"alive 3\n", 3), (b"noise\nalive 2\nalive x\n", 2), (b"Traceback\n", 0)],
)
def test_how_many_have_joined(output: bytes, count: int) -> None:
    assert ray.counted(output) == count
