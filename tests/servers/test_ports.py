"""Ports: reserved, handed to the server without a gap, known to be its own."""

from __future__ import annotations

import os
import socket

import pytest

from penstock.errors import ConfigError
from penstock.servers.ports import ReservedPort, listens


def bound(port: int) -> socket.socket:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", port))
    return server


def test_a_reserved_port_is_given_to_nobody_and_yet_can_be_bound_by_name() -> None:
    with ReservedPort("127.0.0.1") as reserved:
        others = [ReservedPort("127.0.0.1") for _ in range(200)]
        assert len({reserved.port, *(other.port for other in others)}) == 201
        with bound(reserved.port) as server:
            server.listen()
            assert listens([os.getpid()], reserved.port)
            assert not listens([1], reserved.port) or os.getpid() == 1
            with socket.create_connection(("127.0.0.1", reserved.port), timeout=2):
                pass
        for other in others:
            other.release()


def test_outgoing_connections_do_not_take_it() -> None:
    with ReservedPort("127.0.0.1") as reserved, socket.create_server(("127.0.0.1", 0), backlog=300) as server:
        clients = [socket.create_connection(server.getsockname()) for _ in range(200)]
        assert reserved.port not in {client.getsockname()[1] for client in clients}
        for client in clients:
            client.close()


def test_a_port_somebody_listens_on_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        expected = pytest.raises(ConfigError, match=f"Port {port} of 127.0.0.1 cannot be used by")
        with expected:
            ReservedPort("127.0.0.1", port)


def test_a_port_in_time_wait_can_be_used_again() -> None:
    with ReservedPort("127.0.0.1") as reserved:
        port = reserved.port
    with bound(port) as server:
        server.listen()
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # this side closes first: TIME_WAIT stays here
        client.close()
    with ReservedPort("127.0.0.1", port) as again:
        assert again.port == port


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_a_host_that_is_not_here_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match=host):
        ReservedPort(host)


def test_ipv6() -> None:
    with ReservedPort("::1") as reserved:
        assert reserved.port > 0
