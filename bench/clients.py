"""Client CPU per request beside aiohttp, httpx, the openai package and wrk, in one run, against a stub in C.

    python bench/clients.py [--quick] [--rounds 3] [--json FILE] [--plot FILE.svg]
    python bench/clients.py --replay FILE [--plot FILE.svg]         tables and plot of an earlier run

256 to 10,000 connections, answers at once and after 200 ms. Each case is a process of its own with a fresh
stub; where there are two cores the stub has one and the client the other. The clients take turns within a
round; the table shows the round with the least CPU. Starting the process and opening the connections is not
counted, but for wrk, where it is next to nothing.

Bounded: a case that has not finished in time is given up, and so is that client at more connections; a case
slower than SLOW is not repeated.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
import tyro

import plot
from asking import KEY, payload
from penstock.wire.loop import raise_open_files
from stub import Stub, serving

HERE = Path(__file__).parent
CONNECTIONS = (256, 1_000, 4_000, 10_000)
LATENCIES = (0, 200)
"""Milliseconds from a request to its answer."""
SPARE_FILES = 100
"""Files a process has open besides its connections."""
SLOW = 10.0
"""Seconds of a case from which it is not repeated."""
GRACE = 15.0
"""Seconds a client may take beyond its limit before it is killed: slow ones also look at the clock slowly."""


class Client(msgspec.Struct, frozen=True):
    """A line of the table."""

    name: str
    module: str
    """What asking.py calls it; wrk is a program of its own."""
    quiet_gc: bool = False
    plotted: bool = True


CLIENTS = (
    Client("penstock", "penstock", quiet_gc=True),
    Client("wrk", "wrk"),
    Client("aiohttp", "aiohttp"),
    Client("openai", "openai"),
    Client("httpx", "httpx"),
    Client("penstock, collector as Python sets it", "penstock", plotted=False),
    Client("aiohttp, collector as penstock sets it", "aiohttp", quiet_gc=True, plotted=False),
)


class Cost(msgspec.Struct):
    """What asking.py prints, see there; of wrk the whole process."""

    cpu: float = 0.0
    seconds: float = 0.0
    answers: int = 0
    errors: dict[str, int] = {}
    finished: bool = False
    first_pass: bool = False
    peak_mb: float = 0.0


class Run(msgspec.Struct):
    """One client at one case, once."""

    client: str
    connections: int
    latency: int
    cost: Cost
    stub_cpu: float
    """Seconds of CPU of the stub, connections included."""
    stub_answers: int
    stub_connections: int
    """Connections open at a time, at most; one of them is the bench's own."""

    @property
    def cpu(self) -> float:
        """Microseconds of CPU per answer."""
        return self.cost.cpu / max(1, self.cost.answers) * 1e6

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.cost.answers / max(self.cost.seconds, 1e-9)

    @property
    def good(self) -> bool:
        return self.cost.finished and not self.cost.errors


class Args(msgspec.Struct):
    """What a chat request costs its client, side by side."""

    rounds: int = 3
    seconds: float = 1.5
    """How long a client sends new requests in a case."""
    limit: float = 25.0
    """Seconds after which a case is given up."""
    quick: bool = False
    """One short round of the smallest and the largest case."""
    json: Path | None = None
    """Where to write every run."""
    replay: Path | None = None
    """Shows the runs of this file instead of measuring."""
    plot: Path | None = None
    """Where to draw the table, as SVG or PNG."""


def main() -> None:
    args = tyro.cli(Args)
    if args.replay is not None:
        runs = msgspec.json.decode(args.replay.read_bytes(), type=list[Run])
    else:
        runs = measure_all(args)
    if args.json is not None:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(runs)))
    print(report(runs))
    if args.plot is not None:
        plot.draw(plotted(runs), args.plot)


# -- measuring ------------------------------------------------------------------------------------


def cases(args: Args) -> list[tuple[int, int]]:
    """(latency, connections), in the order they are run."""
    if args.quick:
        return [(0, min(CONNECTIONS)), (max(LATENCIES), max(CONNECTIONS))]
    return [(latency, connections) for latency in LATENCIES for connections in CONNECTIONS]


def measure_all(args: Args) -> list[Run]:
    if (files := raise_open_files()) < max(CONNECTIONS) + SPARE_FILES:
        sys.exit(f"{max(CONNECTIONS):,} connections need more open files than the {files:,} of `ulimit -Hn`")
    clients = [client for client in CLIENTS if client.module != "wrk" or shutil.which("wrk")]
    runs: list[Run] = []
    slow: set[tuple[str, int, int]] = set()
    failed: set[tuple[str, int]] = set()
    rounds, seconds, limit = (1, 1.0, 10.0) if args.quick else (args.rounds, args.seconds, args.limit)
    for turn in range(rounds):
        for latency, connections in cases(args):
            for client in clients:
                case = (client.name, latency, connections)
                if case in slow or (client.name, latency) in failed:
                    continue
                started = time.perf_counter()
                run = measure(client, latency, connections, seconds, limit)
                runs.append(run)
                if time.perf_counter() - started > SLOW:
                    slow.add(case)
                if not run.cost.finished:
                    failed.add((client.name, latency))
                told = f"{run.cpu:,.1f} µs" if run.cost.finished else "did not finish"
                errors = f" {run.cost.errors}" if run.cost.errors else ""
                where = f"round {turn + 1}, {latency} ms, {connections:,} connections"
                print(f"{where}, {client.name}: {told}{errors}", file=sys.stderr, flush=True)
    return runs


def measure(client: Client, latency: int, connections: int, seconds: float, limit: float) -> Run:
    """One case with a stub of its own: no port of an earlier one is in the way."""
    cores = sorted(os.sched_getaffinity(0))
    apart = len(cores) > 1
    with serving(latency_ms=latency, core=cores[0] if apart else None) as stub:
        core = cores[1] if apart else None
        if client.module == "wrk":
            cost = run_wrk(stub, connections, seconds, core)
        else:
            cost = run_python(client, stub, connections, seconds, limit, core)
        counts = stub.statistics()
    return Run(
        client.name,
        connections,
        latency,
        cost,
        stub_cpu=counts["cpu_us"] / 1e6,
        stub_answers=counts["answered"],
        stub_connections=counts["peak_open"],
    )


def start(command: Sequence[str], core: int | None) -> subprocess.Popen[str]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if core is not None:
        os.sched_setaffinity(process.pid, {core})
    return process


def run_python(
    client: Client, stub: Stub, connections: int, seconds: float, limit: float, core: int | None
) -> Cost:
    command = [sys.executable, str(HERE / "asking.py"), client.module, str(stub.port), str(connections)]
    command += [f"--seconds={seconds}", f"--limit={limit}", *(["--quiet-gc"] if client.quiet_gc else [])]
    with start(command, core) as process:
        try:
            printed = process.communicate(timeout=limit + GRACE)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return Cost(seconds=limit + GRACE, answers=stub.statistics()["answered"])
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    return msgspec.json.decode(printed, type=Cost)


def run_wrk(stub: Stub, connections: int, seconds: float, core: int | None) -> Cost:
    """wrk cannot leave out its start and what is in flight at its end: it runs twice as long."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        body = msgspec.json.encode(payload(0)).decode()
        headers = f'{{["Content-Type"] = "application/json", ["Authorization"] = "Bearer {KEY}"}}'
        script.write(f'wrk.method = "POST"\nwrk.headers = {headers}\nwrk.body = [[{body}]]\n')
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(2, round(2 * seconds))}s", "--timeout=30s"]
        command += ["-s", script.name, f"http://127.0.0.1:{stub.port}/v1/chat/completions"]
        process = start(command, core)
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    found = re.search(r"(\d+) requests in ([\d.]+)(m?s)", printed)
    if process.returncode or found is None:
        sys.exit(f"wrk ended with status {process.returncode}: {printed}")
    wrong = re.search(r"(?:Non-2xx or 3xx responses|Socket errors): (.*)", printed)
    return Cost(
        cpu=used.ru_utime + used.ru_stime,
        seconds=float(found[2]) / (1000 if found[3] == "ms" else 1),
        answers=int(found[1]),
        errors={wrong[0]: 1} if wrong else {},
        finished=True,
        peak_mb=used.ru_maxrss / 1024,
    )


# -- showing --------------------------------------------------------------------------------------


def best(runs: list[Run]) -> dict[tuple[str, int, int], Run]:
    """The cheapest good run of each client, latency and number of connections; one that failed if all did."""
    found: dict[tuple[str, int, int], Run] = {}
    for run in sorted(runs, key=lambda run: (run.good, -run.cpu)):
        found[run.client, run.latency, run.connections] = run
    return found


def plotted(runs: list[Run]) -> plot.Lines:
    lines: plot.Lines = {}
    names = {client.name for client in CLIENTS if client.plotted}
    for (name, latency, connections), run in sorted(best(runs).items(), key=lambda item: item[0][2]):
        if run.good and name in names:
            lines.setdefault(latency, {}).setdefault(name, {})[connections] = run.cpu
    return lines


def report(runs: list[Run]) -> str:
    """The tables, in Markdown, and what has to be said about them."""
    found = best(runs)
    names = [client.name for client in CLIENTS if any(run.client == client.name for run in runs)]
    parts = []
    for latency in sorted({run.latency for run in runs}):
        heading = "answers at once" if latency == 0 else f"answers after {latency} ms"
        levels = sorted({run.connections for run in runs if run.latency == latency})
        rows = [[f"CPU µs / request, {heading}", *(f"{level:,} connections" for level in levels)]]
        rows += [[name, *(cell(found, name, latency, level) for level in levels)] for name in names]
        parts.append(markdown(rows))
    last = max((run.latency, run.connections) for run in runs)
    rows = [[f"{last[1]:,} connections, {last[0]} ms", "requests/s", "peak memory, MB"]]
    for name in names:
        run = found.get((name, *last))
        if run is not None and run.good:
            rows.append([name, f"{run.rate:,.0f}", f"{run.cost.peak_mb:,.0f}"])
    parts.append(markdown(rows))
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in notes(runs, names))])


def cell(found: dict[tuple[str, int, int], Run], name: str, latency: int, level: int) -> str:
    """CPU, and how many times ours that is."""
    run, ours = found.get((name, latency, level)), found.get((CLIENTS[0].name, latency, level))
    if run is None or not run.good:
        return "—"
    digits = 1 if run.cpu < 100 else 0
    ratio = f" ({run.cpu / ours.cpu:,.1f} ×)" if ours is not None and ours.good and run is not ours else ""
    return f"{run.cpu:,.{digits}f}{ratio}"


def markdown(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *body])


def notes(runs: list[Run], names: list[str]) -> list[str]:
    lines = []
    told: set[tuple[str, int, int]] = set()
    for run in runs:
        case = (run.client, run.latency, run.connections)
        where = f"{run.client}, {run.connections:,} connections, {run.latency} ms"
        if case in told:
            continue
        told.add(case)
        if not run.good:
            why = f"errors {run.cost.errors}" if run.cost.finished else "not finished, nor tried with more"
            lines.append(f"{where}: {why}; {run.cost.answers:,} answered in {run.cost.seconds:.0f} s.")
        elif run.stub_connections < run.connections:
            lines.append(f"{where}: it opened {run.stub_connections:,}, for those were free again in time.")
    if "wrk" not in names:
        lines.append("wrk is not there, so its rows are missing: apt-get install wrk, and run it again.")
    busiest = max((run for run in runs if run.good), key=lambda run: run.rate, default=None)
    if busiest is not None:
        micros = busiest.stub_cpu / busiest.stub_answers * 1e6
        lines.append(f"At the highest rate the stub took {micros:.1f} µs of its own core per answer.")
    versions = [f"{name} {version(name)}" for name in ("aiohttp", "openai", "httpx", "uvloop")]
    cores = len(os.sched_getaffinity(0))
    lines.append(f"{cores} cores, Python {platform.python_version()}, {', '.join(versions)}.")
    return lines


if __name__ == "__main__":
    main()
