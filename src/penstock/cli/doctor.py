"""`penstock doctor`: is this machine fit for many requests in flight and for engines, and what to change.

What judges is pure: facts in, `Check` out. Only `main` and `_facts` look at the machine.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import tyro
from rich.console import Console
from rich.text import Text

from penstock.errors import ConfigError
from penstock.loadtest.forecast import Scale
from penstock.servers.devices import visible
from penstock.servers.engines import INSTALLED
from penstock.servers.installation import find
from penstock.servers.machine import cache_folder, gpu_names
from penstock.wire.limits import PORT_RANGE, SPARE_FILES, WIDEST_PORT_RANGE

GIB: Final = 1 << 30
SHARED_MEMORY: Final = Path("/dev/shm")
CGROUP: Final = Path("/sys/fs/cgroup")
"""Where a container's own limits are."""
MIN_SHARED: Final = 1 * GIB
"""Bytes of free shared memory a single engine with tensor parallelism wants."""
MIN_CACHE: Final = 20 * GIB
"""Bytes free for caches; a model of 8 billion parameters takes 16."""
MIN_PYTHON: Final = (3, 11)
COMPILERS: Final = ("cc", "gcc", "clang")

_AVAILABLE: Final = re.compile(r"^MemAvailable:\s+(\d+) kB$", re.MULTILINE)

State = Literal["ok", "warning", "problem"]
STYLES: Final[dict[State, str]] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class DoctorArgs:
    """Look at this machine, or with --load at what a load test needs of it, and say what to change.

    Exit status 1 when there is a problem."""

    connections: int = 1000
    """Requests that are to be in flight at once."""
    load: int | None = None
    """Say whether this machine can carry `penstock bench` with so many requests in flight: client, router and
    scripted engine, all of them here."""
    load_itl: float = 100.0
    """With --load: milliseconds between two tokens of a stream."""


@dataclass(frozen=True)
class Check:
    """What was found of one thing, and what to do about it; "" when nothing."""

    state: State
    name: str
    found: str
    advice: str = ""


def main(argv: list[str]) -> int:
    """Run the command."""
    args = tyro.cli(DoctorArgs, prog="penstock doctor", args=argv)
    if args.connections < 1:
        raise ConfigError("--connections must be at least 1.")
    console = Console(highlight=False, soft_wrap=True)
    scale = None if args.load is None else Scale(requests=args.load, gap=args.load_itl / 1e3)
    checks = list(_facts(args.connections) if scale is None else _load(scale))
    for check in checks:
        line = Text.assemble((f"{check.state:<8}", STYLES[check.state]), f" {check.name:<14} {check.found}")
        if check.advice:
            line.append(f" {check.advice}", style="italic")
        console.print(line)
    return 1 if any(check.state == "problem" for check in checks) else 0


def _facts(connections: int) -> Iterable[Check]:
    yield check_python(sys.version_info[:2], platform.python_version())
    yield check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE), connections)
    yield check_ports(_read(PORT_RANGE), connections)
    yield check_backlog(_read(Path("/proc/sys/net/core/somaxconn")), connections)
    yield check_shared_memory(_free(SHARED_MEMORY))
    yield check_cache(*_cache(os.environ))
    yield check_gpus(gpu_names(), Path("/proc/driver/nvidia/version").exists(), os.environ)
    torch = importlib.util.find_spec("torch") is not None
    yield check_torch(importlib.metadata.version("torch") if torch else None)
    yield check_compiler(next((path for name in COMPILERS if (path := shutil.which(name))), None))
    for engine in INSTALLED.values():
        try:
            installed = asyncio.run(find(engine.package, None, os.environ))
        except ConfigError as error:
            named = engine.package.variable in os.environ
            yield check_engine(engine.package.title, None, str(error) if named else None)
        else:
            yield check_engine(engine.package.title, f"{installed.version}, {installed.python}", None)


def _load(scale: Scale) -> Iterable[Check]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield check_load_files(hard, scale)
    yield check_ports(_read(PORT_RANGE), scale.ports)
    yield check_backlog(_read(Path("/proc/sys/net/core/somaxconn")), scale.requests)
    yield check_memory(_read(Path("/proc/meminfo")), _read(CGROUP / "memory.max"), scale)
    yield check_cpu(usable_cores(len(os.sched_getaffinity(0)), _read(CGROUP / "cpu.max")), scale)


def check_load_files(hard: int, scale: Scale) -> Check:
    """`hard`: open files a process may have, -1 for no limit; penstock's processes raise theirs to it."""
    needed = max(scale.files.values())
    each = ", ".join(f"{part} {count:,}" for part, count in scale.files.items())
    if hard == -1 or hard >= needed:
        return Check(
            "ok", "open files", f"{each} in a process; allowed: {'any' if hard == -1 else f'{hard:,}'}"
        )
    advice = f"As root: ulimit -Hn {needed}, or nofile in /etc/security/limits.conf."
    if all(count <= hard for part, count in scale.files.items() if part != "router"):
        advice += f" Or: --router-args processes={scale.router_processes_for(hard)}."
    return Check("problem", "open files", f"{each} in a process; allowed: {hard:,}.", advice)


def check_memory(told: str | None, allowed: str | None, scale: Scale) -> Check:
    """`told`: /proc/meminfo. `allowed`: bytes of the control group, or `max`."""
    bounds = [1024 * int(found[1])] if (found := _AVAILABLE.search(told or "")) else []
    bounds += [int(allowed)] if allowed is not None and allowed.strip().isdigit() else []
    if not bounds:
        return Check(
            "ok", "memory", f"{scale.memory / GIB:.1f} GiB needed; this system does not tell what is free"
        )
    free, needed = min(bounds) / GIB, scale.memory / GIB
    found_out = f"{needed:.1f} GiB needed, {free:.1f} GiB to be had"
    if free < needed:
        return Check("problem", "memory", f"{found_out}.", "Take fewer requests, or a larger machine.")
    return Check("ok", "memory", found_out)


def check_cpu(cores: float, scale: Scale) -> Check:
    """`cores`: those that may be used."""
    found = (
        f"{scale.cores:.1f} cores for {scale.requests:,} streams with a token every {scale.gap * 1e3:g} ms, "
        f"{cores:g} to be had"
    )
    if scale.cores > cores:
        slower = f"{scale.shortest_gap(cores) * 1e3:,.0f} ms"
        return Check(
            *("warning", "CPU", f"{found}."),
            f"Take engines with a token every {slower} or more (--engine-args itl=…), or more machines.",
        )
    return Check("ok", "CPU", found)


def usable_cores(cores: int, quota: str | None) -> float:
    """Cores of the affinity, and of the control group's `cpu.max`: quota and period in µs, or `max`."""
    words = (quota or "").split()
    if len(words) != 2 or not all(word.isdigit() for word in words):
        return cores
    return min(cores, int(words[0]) / int(words[1]))


def check_python(version: tuple[int, ...], shown: str) -> Check:
    if version < MIN_PYTHON:
        needed = ".".join(map(str, MIN_PYTHON))
        return Check("problem", "python", f"{shown} is too old.", f"Use {needed} or newer.")
    return Check("ok", "python", shown)


def check_open_files(soft: int, hard: int, connections: int) -> Check:
    """Limits of open files, -1 for none; ours raise the soft one to the hard one."""
    needed = connections + SPARE_FILES
    soft_shown, hard_shown = ("unlimited" if limit == -1 else f"{limit:,}" for limit in (soft, hard))
    found = f"{soft_shown}, at most {hard_shown}"
    if hard != -1 and hard < needed:
        return Check(
            *("problem", "open files", f"{found}: {connections:,} requests in flight need {needed:,}."),
            f"As root: ulimit -Hn {needed}, or nofile in /etc/security/limits.conf.",
        )
    if soft != -1 and soft < needed:
        return Check(
            *("warning", "open files", f"{found}. penstock's commands raise the limit themselves;"),
            f"programs of your own and engines start with it: ulimit -n {needed}.",
        )
    return Check("ok", "open files", found)


def check_ports(told: str | None, connections: int) -> Check:
    """`told`: Linux' range of local ports, first and last."""
    try:
        first, last = map(int, (told or "").split())
    except ValueError:
        return Check("ok", "local ports", "this system does not tell its range")
    count = last - first + 1
    found = f"{count:,} ({first}–{last})"
    if count < connections:
        widest = f"{WIDEST_PORT_RANGE[0]} {WIDEST_PORT_RANGE[1]}"
        return Check(
            *("problem", "local ports", f"{found}: {connections:,} connections to one address need as many."),
            f"As root: sysctl -w net.ipv4.ip_local_port_range='{widest}', or use --source-addresses.",
        )
    return Check("ok", "local ports", found)


def check_backlog(told: str | None, connections: int) -> Check:
    """`told`: how many connections may wait to be accepted."""
    if told is None or not told.strip().isdigit():
        return Check("ok", "backlog", "this system does not tell it")
    backlog = int(told)
    if backlog < min(connections, 1024):
        return Check(
            *("warning", "backlog", f"{backlog}: of more connections at once some are delayed by seconds."),
            "As root: sysctl -w net.core.somaxconn=4096.",
        )
    return Check("ok", "backlog", f"{backlog:,}")


def check_shared_memory(free: int | None) -> Check:
    """`free`: bytes."""
    if free is None:
        return Check(
            *("warning", "shared memory", "there is no /dev/shm:"),
            "engines with tensor parallelism need it.",
        )
    found = f"{free / GIB:.1f} GiB free in /dev/shm"
    if free < MIN_SHARED:
        return Check(
            *("warning", "shared memory", f"{found}: too little for engines with tensor parallelism."),
            "In a container: --shm-size=16g or --ipc=host; else remove what is left over in /dev/shm.",
        )
    return Check("ok", "shared memory", found)


def check_cache(folder: str, free: int | None) -> Check:
    """`free`: bytes; None: it cannot be written."""
    if free is None:
        return Check(
            *("problem", "cache", f"{folder} cannot be written."),
            "Set XDG_CACHE_HOME to a folder that can: logs and what engines compile go there.",
        )
    found = f"{free / GIB:.0f} GiB free in {folder}"
    if free < MIN_CACHE:
        return Check("warning", "cache", f"{found}:", "little for models; HF_HOME may name another disk.")
    return Check("ok", "cache", found)


def check_gpus(names: list[str], driver: bool, environment: Mapping[str, str]) -> Check:
    if not names:
        if driver:
            return Check(
                *("problem", "GPUs", "the driver is loaded, but shows none."),
                "In a container: --gpus all; else look at dmesg.",
            )
        return Check("ok", "GPUs", "none: the embedded engine and CPU builds run without")
    usable = visible(len(names), environment)
    kinds = ", ".join(f"{names.count(kind)} × {kind}" for kind in sorted(set(names)))
    if not usable:
        return Check(
            *("problem", "GPUs", f"{kinds}, all hidden by CUDA_VISIBLE_DEVICES."), "Unset it, or name some."
        )
    if len(usable) < len(names):
        return Check("ok", "GPUs", f"{kinds}; CUDA_VISIBLE_DEVICES leaves {len(usable)}")
    return Check("ok", "GPUs", kinds)


def check_torch(version: str | None) -> Check:
    if version is None:
        return Check(
            *("warning", "torch", "not installed: the embedded engine needs it."),
            "pip install 'penstock[engine]'.",
        )
    return Check("ok", "torch", version)


def check_compiler(path: str | None) -> Check:
    if path is None:
        return Check(
            *("warning", "C compiler", "none: the embedded engine runs slower on CPUs without."),
            "Install gcc or clang.",
        )
    return Check("ok", "C compiler", path)


def check_engine(title: str, found: str | None, error: str | None) -> Check:
    """error: of an interpreter that the user has named."""
    if error is not None:
        return Check("problem", title, error)
    if found is None:
        return Check("ok", title, f"not installed here; needed only for --engine {title.lower()}")
    return Check("ok", title, found)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _cache(environment: Mapping[str, str]) -> tuple[str, int | None]:
    """The cache folder, and the bytes free where it is or would be; None when it cannot be written."""
    folder = cache_folder(environment)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return str(folder), _free(existing) if os.access(existing, os.W_OK) else None
