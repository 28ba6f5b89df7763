"""Nodes of a Ray cluster: started, joined, watched, ended; a script stands for Ray."""

from __future__ import annotations

import asyncio
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ConfigError, EngineError
from penstock.servers import ray
from penstock.servers.launched import LifeCycle
from penstock.servers.nodes import Nodes
from penstock.servers.ray import RayNode
from tests.scripted import run
from tests.servers.fakes import TAG, nothing_left, processes

FAKE = Path(__file__).with_name("fake_ray.py")


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FAKE_RAY", str(tmp_path))
    monkeypatch.setattr(ray, "LOOK", 0.05)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {FAKE} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def node(rank: int, python: str, tag: str, **settings: Any) -> RayNode:
    life = LifeCycle(**{"start_timeout": 20.0, **settings})
    return RayNode(Nodes(hosts=("a", "b"), rank=rank), python, env={TAG: tag}, life=life)


def test_the_head_waits_for_all_nodes_and_nothing_is_left(python: str) -> None:
    stages: list[str] = []

    async def scenario(tag: str) -> None:
        head = node(0, python, tag, on_stage=stages.append)
        entering = asyncio.create_task(head.__aenter__())
        await asyncio.sleep(0.5)
        assert not entering.done() and head.joined == 1
        async with node(1, python, tag):
            await entering
            assert head.joined == 2
        await head.__aexit__(None, None, None)
        assert processes(tag) == []

    with nothing_left() as tag:
        run(scenario(tag))
    assert stages[:2] == ["starting Ray", "waiting for nodes (1 of 2 are there)"]


def test_a_head_that_ends_is_told_with_its_last_words(python: str, tmp_path: Path) -> None:
    async def scenario(tag: str) -> None:
        (tmp_path / "refuse").touch()
        with pytest.raises(EngineError, match=r"exit 1\)[^$]*the address is taken"):
            async with node(0, python, tag):
                raise AssertionError("it has not started")

    with nothing_left() as tag:
        run(scenario(tag))


def test_nodes_that_never_join_are_counted(python: str) -> None:
    async def scenario(tag: str) -> None:
        with pytest.raises(EngineError, match="had 1 of 2 nodes after 1 s"):
            async with node(0, python, tag, start_timeout=1.0):
                raise AssertionError("one is missing")

    with nothing_left() as tag:
        run(scenario(tag))


def test_a_worker_learns_that_the_cluster_has_ended(python: str, tmp_path: Path) -> None:
    async def scenario(tag: str) -> None:
        async with node(1, python, tag) as worker:
            (tmp_path / "end").touch()
            async with asyncio.timeout(5):
                assert (await worker.ended()).status == 3

    with nothing_left() as tag:
        run(scenario(tag))


def test_a_running_cluster_is_only_waited_for(python: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        nodes = Nodes(hosts=("a", "b"), rank=0, ray_address="auto")
        (tmp_path / "node-a").touch()
        (tmp_path / "node-b").touch()
        async with RayNode(nodes, python) as head:
            assert head.joined == 2

    run(scenario())
    with pytest.raises(ConfigError, match="only the first"):
        RayNode(Nodes(hosts=("a", "b"), rank=1, ray_address="auto"), python)
