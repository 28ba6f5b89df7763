"""The tools of bench/ measure what they say: the stub answers each request once, in order, in time."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
import pytest

BENCH = Path(__file__).parents[1] / "bench"
BODY = b'{"model":"stub","messages":[{"role":"user","content":"What is 7 * 8?"}]}'
REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: stub\r\nContent-Length: %d\r\n\r\n%s" % (
    len(BODY),
    BODY,
)

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None, reason="the stub needs a C compiler"
)


@contextmanager
def stub(*options: str) -> Iterator[int]:
    """A stub; its port. It has to end with its standard input."""
    command = [sys.executable, str(BENCH / "stub.py"), *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield int(process.stdout.readline())
            process.stdin.close()
            assert process.wait(10) == 0
        finally:
            process.kill()


@contextmanager
def connection(port: int) -> Iterator[tuple[socket.socket, BinaryIO]]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock, sock.makefile("rb") as file:
        yield sock, file


def read_answer(file: BinaryIO) -> dict[str, Any]:
    assert file.readline() == b"HTTP/1.1 200 OK\r\n"
    length = -1
    while (line := file.readline()) != b"\r\n":
        name, value = line.split(b": ")
        length = int(value) if name == b"content-length" else length
    return cast(dict[str, Any], orjson.loads(file.read(length)))


def statistics(port: int) -> dict[str, int]:
    with connection(port) as (sock, file):
        sock.sendall(b"GET /stats HTTP/1.1\r\nConnection: close\r\n\r\n")
        counts = read_answer(file)
        assert file.read() == b""  # closed, as asked
        return counts


def test_a_request_in_pieces_and_requests_in_one_piece() -> None:
    with stub() as port, connection(port) as (sock, file):
        for piece in (REQUEST[:7], REQUEST[7:60], REQUEST[60:-1]):
            sock.sendall(piece)
            time.sleep(0.02)
        assert statistics(port)["requests"] == 0
        sock.sendall(REQUEST[-1:] + REQUEST * 40 + REQUEST[:90])
        answers = [read_answer(file) for _ in range(41)]
        sock.sendall(REQUEST[90:])
        answers.append(read_answer(file))
        assert [answer["id"] for answer in answers] == [f"chatcmpl-{number:016}" for number in range(1, 43)]
        assert {answer["choices"][0]["message"]["content"][:31] for answer in answers} == {
            "Seven times eight is fifty-six."
        }
        counts = statistics(port)
        assert (counts["requests"], counts["answered"], counts["in_flight"]) == (42, 42, 0)


def test_answers_that_are_not_read_are_kept() -> None:
    """More than the sockets hold: the rest is sent once there is room, nothing is lost or out of order."""
    with stub() as port, connection(port) as (sock, file):
        sock.settimeout(0.2)
        sent = 0
        while sent < 200 << 20:
            try:
                sent += sock.send(REQUEST * 100)
            except TimeoutError:
                break
        sock.settimeout(10)
        whole = sent // len(REQUEST)
        assert whole > 1_000 and statistics(port)["answered"] < whole  # the stub has stopped to serve
        for number in range(1, whole + 1):
            assert int(read_answer(file)["id"][-16:]) == number


def test_the_latency_is_that_of_each_request() -> None:
    with stub("--latency-ms", "200") as port, ExitStack() as stack:
        connections = [stack.enter_context(connection(port)) for _ in range(50)]
        started = time.perf_counter()
        for sock, _ in connections:
            sock.sendall(REQUEST)
        first = [(read_answer(file), time.perf_counter() - started)[1] for _, file in connections]
        assert first[0] >= 0.2 and first[-1] < 2  # together, not one after the other
        assert statistics(port)["peak_in_flight"] == 50
        sock, file = connections[0]
        started = time.perf_counter()
        sock.sendall(REQUEST * 2)
        read_answer(file), read_answer(file)
        assert 0.4 <= time.perf_counter() - started < 4  # of pipelined requests one at a time
        connections[1][0].sendall(REQUEST)
        connections[1][0].shutdown(socket.SHUT_RDWR)  # leaves before its answer
        assert statistics(port)["in_flight"] == 0


def test_a_client_is_measured_over_its_requests() -> None:
    with stub() as port:
        command = [sys.executable, str(BENCH / "asking.py"), "penstock", str(port), "8", "--seconds", "0.3"]
        done = subprocess.run(command, capture_output=True, timeout=30, check=True)
        cost = orjson.loads(done.stdout)
        counts = statistics(port)
    assert cost["finished"] and cost["errors"] == {} and 0.3 <= cost["seconds"] < 3
    assert not cost["first_pass"] and counts["answered"] == cost["answers"] + 8 + 1
    assert 0 < cost["cpu"] <= cost["seconds"] * 2
