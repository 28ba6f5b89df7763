"""What a person is told who asks for Ray where it cannot be had, or for what it cannot do."""

from __future__ import annotations

import sys

import pytest

from penstock.cli import serve
from penstock.cluster import session
from penstock.cluster.engines import Engines
from penstock.errors import ConfigError
from penstock.models import ARITHMETIC
from penstock.servers.spec import ServerSpec

EMBEDDED = ServerSpec(engine="embedded", model=str(ARITHMETIC))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ray", "--hosts", "a", "b"], "--ray places the engines itself"),
        (["--ray", "--devices", "0"], "--ray places the engines itself"),
        (["--ray", "--port", "9000"], "--host and --port are for --route"),
        (["--ray-name", "other"], "are for --ray"),
        (["--ray-cpus", "2"], "are for --ray"),
    ],
)
def test_flags_that_would_mean_nothing_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        serve.main(["--engine", "embedded", *words])


def test_without_ray_or_a_cluster_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match="does not answer within"):
        session.connect("127.0.0.1:1")
    with pytest.raises(ConfigError, match="Ray's client is not for this"):
        session.connect("ray://127.0.0.1:1")
    with pytest.raises(ConfigError, match="not connected to Ray"):
        session.require()
    monkeypatch.setitem(sys.modules, "ray", None)
    for ask in (session.connect, session.require):
        with pytest.raises(ConfigError, match=r"pip install 'penstock\[ray\]'"):
            ask()


def test_engines_that_cannot_be_are_refused_before_anything_is_asked_of_the_cluster() -> None:
    with pytest.raises(ConfigError, match="at least 1 replica"):
        Engines(EMBEDDED, replicas=0)
    with pytest.raises(ConfigError, match="0 CPUs or more"):
        Engines(EMBEDDED, cpus=-1)
    with pytest.raises(ConfigError, match="found by themselves"):
        Engines(ServerSpec(engine="embedded", model=str(ARITHMETIC), port=8000))
    vllm = Engines(ServerSpec(engine="vllm", model="owner/model", tp=8, pp=2))
    assert (vllm.need.gpus, vllm.need.splits) == (16, True)
    assert not Engines(ServerSpec(engine="sglang", model="owner/model", tp=8)).need.splits
    assert Engines(EMBEDDED).need.gpus == 0
