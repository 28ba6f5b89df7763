"""Limits of the machine: what is refused, and the way out each refusal names."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.wire import limits
from penstock.wire.limits import (
    SPARE_FILES,
    WIDEST_PORT_RANGE,
    check_local_ports,
    check_open_files,
    compare_local_ports,
    compare_open_files,
)


@given(st.integers(0, 100_000), st.integers(1, 100_000))
def test_open_files(connections: int, allowed: int) -> None:
    if connections + SPARE_FILES <= allowed:
        compare_open_files(connections, allowed)
        return
    with pytest.raises(ConfigError) as caught:
        compare_open_files(connections, allowed)
    raised = re.search(r"ulimit -Hn (\d+)", str(caught.value))
    lowered = re.search(r"concurrency to (\d+)", str(caught.value))
    assert raised is not None and lowered is not None
    compare_open_files(connections, int(raised[1]))
    assert int(lowered[1]) == 1 or int(lowered[1]) + SPARE_FILES <= allowed


def test_open_files_of_this_process() -> None:
    check_open_files(1)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        with pytest.raises(ConfigError, match="ulimit"):
            check_open_files(hard)


@given(st.integers(0, 1_000_000), st.integers(1, 30), st.integers(1, 65_535))
def test_local_ports(connections: int, sources: int, ports: int) -> None:
    if connections <= sources * ports:
        compare_local_ports(connections, sources, ports)
        return
    with pytest.raises(ConfigError) as caught:
        compare_local_ports(connections, sources, ports)
    message = str(caught.value)
    advised = re.search(r"connect from (\d+) source addresses", message)
    command = re.search(r"sysctl -w net.ipv4.ip_local_port_range='(\d+) (\d+)'", message)
    assert advised is not None and command is not None and "127.0.0.2" in message
    compare_local_ports(connections, int(advised[1]), ports)
    assert tuple(map(int, command.groups())) == WIDEST_PORT_RANGE
    enough = connections <= sources * (int(command[2]) - int(command[1]) + 1)
    assert ("not enough alone" in message) == (not enough)


def test_the_range_is_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "ip_local_port_range"
    monkeypatch.setattr(limits, "PORT_RANGE", told)
    check_local_ports(10**6)  # nothing is told: nothing is checked
    told.write_text("40000\t40009\n")
    check_local_ports(10)
    check_local_ports(20, sources=2)
    with pytest.raises(ConfigError, match="11 connections .* has 10 for each of 1 source address:"):
        check_local_ports(11)
