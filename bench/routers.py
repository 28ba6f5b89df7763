"""CPU of a router per request and per streamed chunk, beside nginx and HAProxy where they are installed.

    python bench/routers.py [--seconds 3] [--rounds 3] [--connections 64 1000]

The router has one core, the engines (bench/stub.c) and the load generator (wrk) share another. CPU is user
and system time of the router's processes. The best of several rounds is shown: the machine is never quite
idle.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import stub

SUBJECT_CORE = 0
OTHER_CORE = 1
ENGINES = 2
CHUNKS = 50
"""Chunks of a stream."""
CHUNK_MS = 2
"""Milliseconds between two chunks of a stream, so that each is relayed by itself."""

MESSAGE = "How much is seven times eight? Explain each step. " * 16
BODY = json.dumps({"model": "stub", "messages": [{"role": "user", "content": MESSAGE}], "max_tokens": 256})

NGINX = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log crit;
worker_rlimit_nofile 65536;
events {{ worker_connections 30000; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  keepalive_requests 100000000;
  upstream engines {{ least_conn; {servers} keepalive 8192; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096; client_max_body_size 0; client_body_buffer_size 1m;
    location / {{
      proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering {buffering};
    }}
  }}
}}
"""

HAPROXY = """
global
  nbthread 1
  maxconn 8000
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  http-reuse always
frontend f
  bind 127.0.0.1:{port}
  default_backend b
backend b
  balance leastconn
{servers}
"""


@dataclass(frozen=True)
class Subject:
    name: str
    port: int
    pids: list[int]

    def cpu(self) -> float:
        """Seconds of CPU its processes have used."""
        ticks = 0
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def subject(name: str, engines: list[int]) -> Iterator[Subject]:
    """A router in front of the engines, on a core of its own."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command(name, port, engines, Path(folder)), stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            wait_for(port)
            pids = [process.pid, *children(process.pid)]
            for pid in pids:
                os.sched_setaffinity(pid, {SUBJECT_CORE})
            time.sleep(0.3)
            yield Subject(name, port, pids)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def command(name: str, port: int, engines: list[int], folder: Path) -> list[str]:
    if name == "nginx":
        servers = " ".join(f"server 127.0.0.1:{engine};" for engine in engines)
        text = NGINX.format(folder=folder, port=port, servers=servers, buffering="off")
        (folder / "nginx.conf").write_text(text)
        return ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    if name == "haproxy":
        servers = "\n".join(f"  server e{number} 127.0.0.1:{engine}" for number, engine in enumerate(engines))
        (folder / "haproxy.cfg").write_text(HAPROXY.format(port=port, servers=servers))
        return ["haproxy", "-f", str(folder / "haproxy.cfg"), "-db"]
    urls = [f"127.0.0.1:{engine}" for engine in engines]
    flags = {
        "penstock": [],
        "penstock, everything on": [
            "--max-concurrent-requests", "20000", "--worker-max-in-flight", "10000", "--api-key", "k",
            "--worker-api-key", "w", "--policy", "session",
        ],
        "penstock, prefix_aware": ["--policy", "prefix_aware"],
    }[name]  # fmt: skip
    return [sys.executable, "-m", "penstock", "route", "--port", str(port), "--prometheus-port", "None",
            *flags, "--worker-urls", *urls]  # fmt: skip


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"nothing listens on port {port}")


def load(port: int, connections: int, seconds: int, *, stream: bool, folder: Path) -> str:
    """wrk for so long; what it says."""
    body = json.dumps({"stream": True, **json.loads(BODY)}, separators=(",", ":")) if stream else BODY
    script = folder / "post.lua"
    script.write_text(
        f"wrk.method='POST'; wrk.path='/v1/chat/completions'; wrk.body=[==[{body}]==]\n"
        "wrk.headers['content-type']='application/json'; wrk.headers['authorization']='Bearer k'\n"
        "wrk.headers['x-session-id']='session-17'; wrk.headers['user-agent']='wrk'\n"
    )
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "60s", "-s", str(script),
         f"http://127.0.0.1:{port}/v1/chat/completions"],
        capture_output=True, text=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, {OTHER_CORE}),
    )  # fmt: skip
    return done.stdout


def counted(stubs: list[stub.Stub], what: str) -> int:
    return sum(one.statistics()[what] for one in stubs)


def complaint(said: str) -> str:
    """What of wrk's output says that requests failed."""
    lines = [line.strip() for line in said.splitlines()]
    return "; ".join(line for line in lines if line.startswith(("Socket errors", "Non-2xx")))


def measure(name: str, connections: int, seconds: int, *, stream: bool) -> tuple[float, str]:
    """Microseconds of CPU a request, or of a stream a chunk; and what went wrong."""
    interval = CHUNK_MS if stream else 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stubs = [
            stack.enter_context(stub.serving(core=OTHER_CORE, chunks=CHUNKS, chunk_ms=interval))
            for _ in range(ENGINES)
        ]
        router = stack.enter_context(subject(name, [one.port for one in stubs]))
        load(router.port, connections, 1, stream=stream, folder=folder)
        what = "chunks" if stream else "answered"
        before, cpu = counted(stubs, what), router.cpu()
        said = load(router.port, connections, seconds, stream=stream, folder=folder)
        return (router.cpu() - cpu) * 1e6 / max(counted(stubs, what) - before, 1), complaint(said)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, nargs="+", default=[64, 1000])
    parser.add_argument("--streams", type=int, nargs="*", default=[64])
    parser.add_argument("--only", nargs="+")
    given = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("the load generator is wrk, which is not installed")
    names = ["penstock", "penstock, everything on", "penstock, prefix_aware"]
    names += [peer for peer in ("nginx", "haproxy") if shutil.which(peer) is not None]
    columns = [(count, False) for count in given.connections] + [(count, True) for count in given.streams]
    heads = [f"{count} {'streams, a chunk' if stream else 'connections'}" for count, stream in columns]
    print("| CPU µs | " + " | ".join(heads) + " |\n|---|" + "---|" * len(heads))
    chosen = given.only or names
    found: dict[tuple[str, int], tuple[float, str]] = {}
    for _ in range(given.rounds):  # all in turn, so that a busy moment hits none alone
        for name in chosen:
            for number, (count, stream) in enumerate(columns):
                one = measure(name, count, given.seconds, stream=stream)
                found[name, number] = min(one, found.get((name, number), one))
    for name in chosen:
        cells = [found[name, number] for number in range(len(columns))]
        shown = [f"{best:.1f}" + (f" ({wrong})" if wrong else "") for best, wrong in cells]
        print(f"| {name} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    try:
        urllib.request.install_opener(urllib.request.build_opener(urllib.request.ProxyHandler({})))
        main()
    except KeyboardInterrupt:
        sys.exit(130)
