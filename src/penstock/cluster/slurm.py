"""Scripts for Slurm: an array job of shards, or one job with a Ray cluster inside its allocation.

Pure: what is wanted in, the text of a script out. The script guarantees:
1. SIGUSR1, which Slurm sends `warn_before` seconds before the time limit, stops the command as Ctrl-C does,
   and the job is queued again; it goes on from its journals. A command that does not stop in time is killed:
   the journals bear that.
2. SIGTERM stops the command and queues nothing: after a preemption or a lost node Slurm itself queues the job
   again (`--requeue`), after `scancel` nobody does.
3. A job is queued again `max_requeues` times at most.
4. Every word of the command reaches it as it was given.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from penstock.cluster.shards import MAX_SHARDS
from penstock.errors import ConfigError

STOP_MARGIN: Final = 20
"""Seconds before the time limit at which a command that was asked to stop is killed, so that there is time to
queue the job again."""

RAY_PORT: Final = 6379
"""Port of Ray's head on its node. Where it may be taken, another one."""

RAY_START_LIMIT: Final = 120
"""Seconds Ray's head may take until it answers."""

_TIME: Final = re.compile(r"(\d+-\d+(:\d\d){0,2}|\d+(:\d\d){0,2})\Z")
_OPTION: Final = re.compile(r"[a-z][a-z0-9-]*\Z")
_PLAIN: Final = re.compile(r"[A-Za-z0-9_.,:/@%+=\[\]-]*\Z")

OWN_OPTIONS: Final = {
    "array": "--shards", "nodes": "--nodes", "time": "--time", "signal": "--warn-before",
    "job-name": "--name", "output": "--folder", "error": "--folder", "requeue": "", "no-requeue": "",
    "open-mode": "", "chdir": "", "ntasks-per-node": "", "dependency": "", "parsable": "",
}  # fmt: skip
"""Options of sbatch that the script sets itself, and the flag that says them."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What is asked of Slurm. Raises ConfigError for what sbatch would refuse or misunderstand."""

    time: str
    """Limit of a run, as sbatch takes it: minutes, hours:minutes:seconds or days-hours."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus: int = 0
    """A node."""
    cpus: int | None = None
    """A task."""
    mem: str | None = None
    """A node's: 64G."""
    more: Mapping[str, str | None] = field(default_factory=dict)
    """Further options of sbatch by their long names; None: the option alone."""

    def __post_init__(self) -> None:
        if not _TIME.match(self.time):
            raise ConfigError(
                f"--time {self.time!r} is no time limit: minutes, hours:minutes:seconds or days-hours."
            )
        if self.gpus < 0 or (self.cpus is not None and self.cpus < 1):
            raise ConfigError("--gpus must be at least 0 and --cpus at least 1.")
        for name in self.more:
            if not _OPTION.match(name):
                raise ConfigError(
                    f"{name!r} is no option of sbatch: give NAME=VALUE without dashes in front."
                )
            if name in OWN_OPTIONS:
                flag = OWN_OPTIONS[name]
                instead = f"give it as {flag}" if flag else "the script sets it itself"
                raise ConfigError(f"--sbatch {name}: {instead}.")

    def options(self) -> dict[str, str | None]:
        named = {
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "gpus-per-node": str(self.gpus) if self.gpus else None,
            "cpus-per-task": None if self.cpus is None else str(self.cpus),
            "mem": self.mem,
        }
        return {name: value for name, value in named.items() if value is not None} | dict(self.more)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What every script has."""

    name: str
    resources: Resources
    folder: Path
    """Where the logs go; absolute."""
    directory: Path
    """Where the command runs; absolute."""
    setup: tuple[str, ...] = ()
    """Lines of shell that come before the command, such as `module load cuda`."""
    warn_before: int = 90
    """Seconds before the time limit at which the command is stopped. Slurm is up to a minute early."""
    max_requeues: int = 100

    def __post_init__(self) -> None:
        if self.warn_before <= STOP_MARGIN:
            raise ConfigError(
                f"--warn-before must be more than {STOP_MARGIN} seconds, not {self.warn_before}."
            )
        if self.max_requeues < 0:
            raise ConfigError(f"--max-requeues must be at least 0, not {self.max_requeues}.")


def array_script(
    batch: Batch, command: Sequence[str], shards: int, *, indices: str = "", max_running: int | None = None
) -> str:
    """An array job: task I runs `command --shard I/shards`.

    indices: those of the shards that are still to be done, as Slurm writes them; "": all. max_running: tasks
    at once. Raises ConfigError.
    """
    if not 1 <= shards <= MAX_SHARDS:
        raise ConfigError(f"--shards must be between 1 and {MAX_SHARDS:,}, not {shards}.")
    if max_running is not None and max_running < 1:
        raise ConfigError(f"--max-running must be at least 1, not {max_running}.")
    tasks = (indices or f"0-{shards - 1}") + (f"%{max_running}" if max_running else "")
    options = {"array": tasks, **_requeued(batch, "%A_%a")}
    run = f'{shlex.join(command)} --shard "$SLURM_ARRAY_TASK_ID/{shards}" &'
    return _script(
        batch, options, ['job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"', _WATCH, run, _await(batch)]
    )


def ray_script(batch: Batch, command: Sequence[str], nodes: int, *, ray: Sequence[str], port: int) -> str:
    """One job on `nodes` machines: Ray's head on the first, the others join it, and `command` runs beside the
    head with RAY_ADDRESS set. ray: the words that run Ray's command line. Raises ConfigError."""
    if nodes < 1:
        raise ConfigError(f"--nodes must be at least 1, not {nodes}.")
    if not 0 < port < 65536:
        raise ConfigError(f"--ray-port must be between 1 and 65535, not {port}.")
    options = {"nodes": str(nodes), "ntasks-per-node": "1", **_requeued(batch, "%j")}
    cluster = _fill(_RAY, RAY=shlex.join(ray), PORT=str(port), LIMIT=str(RAY_START_LIMIT))
    run = f"{shlex.join(command)} &"
    return _script(batch, options, ["job=$SLURM_JOB_ID", _WATCH, cluster, run, _await(batch)])


def merge_script(batch: Batch, command: Sequence[str]) -> str:
    """A small job that runs `command`, after an array."""
    small = Resources(
        time="4:00:00",
        partition=batch.resources.partition,
        account=batch.resources.account,
        qos=batch.resources.qos,
    )
    whole = Batch(
        name=f"{batch.name}-merge",
        resources=small,
        folder=batch.folder,
        directory=batch.directory,
        setup=batch.setup,
    )
    return _script(whole, {"requeue": None, **_logged(whole, "%j")}, [f"exec {shlex.join(command)}"])


def _script(batch: Batch, options: Mapping[str, str | None], body: Sequence[str]) -> str:
    wanted = {"job-name": batch.name, "chdir": str(batch.directory), **batch.resources.options(), **options}
    if overlap := [line for line in batch.setup if "\0" in line]:
        raise ConfigError(f"--setup {overlap[0]!r} is no line of shell.")
    lines = ["#!/bin/bash", *(directive(name, value) for name, value in wanted.items()), ""]
    if batch.setup:
        lines += [*batch.setup, ""]
    return "\n".join([*lines, *body]) + "\n"


def _fill(template: str, **values: str) -> str:
    return re.sub(r"@(\w+)@", lambda place: values[place[1]], template)


def _await(batch: Batch) -> str:
    return _fill(_AWAIT, REQUEUES=str(batch.max_requeues), GRACE=str(batch.warn_before - STOP_MARGIN))


def _requeued(batch: Batch, log: str) -> dict[str, str | None]:
    return {"requeue": None, "signal": f"B:USR1@{batch.warn_before}", **_logged(batch, log)}


def _logged(batch: Batch, log: str) -> dict[str, str | None]:
    # Slurm replaces %x in the pattern of a log's name; a percent sign of the folder's own is doubled.
    folder = str(batch.folder).replace("%", "%%")
    return {"output": f"{folder}/{log}.log", "open-mode": "append"}


def directive(name: str, value: str | None) -> str:
    """One `#SBATCH` line, quoted as sbatch reads it. Raises ConfigError for what cannot stand in one."""
    if value is None:
        return f"#SBATCH --{name}"
    if any(ord(letter) < 32 or letter == "\x7f" for letter in value):
        raise ConfigError(f"--{name} {value!r} cannot stand in a #SBATCH line.")
    if _PLAIN.match(value):
        return f"#SBATCH --{name}={value}"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{name}="{quoted}"'


def ranges(indices: Sequence[int]) -> str:
    """Numbers in order as Slurm writes them: 0-3,7,9-10."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1][1:] = [index]
        else:
            parts.append([index])
    return ",".join("-".join(map(str, part)) for part in parts)


_WATCH: Final = """\
child=
asked=
interrupted=
stop() {
    asked=$1
    interrupted=yes
    echo "$(date '+%F %T') SIG$1: stopping" >&2
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM
echo "$(date '+%F %T') job $job on $(hostname), restart ${SLURM_RESTART_COUNT:-0}" >&2
"""
"""Before the command: what signals do, in bash. Traps run between commands and while `wait` waits."""

_AWAIT: Final = """\
child=$!
if [ -n "$asked" ]; then kill -TERM "$child" 2>/dev/null; fi
status=0
killer=
while :; do
    interrupted=
    wait "$child"
    code=$?
    if [ "$code" -ne 127 ]; then status=$code; fi
    if [ -z "$interrupted" ]; then break; fi
    if [ "$asked" = USR1 ] && [ -z "$killer" ]; then
        (
            sleep @GRACE@ &
            nap=$!
            trap 'kill "$nap"' TERM
            wait "$nap" && kill -KILL "$child"
        ) 2>/dev/null &
        killer=$!
    fi
done
if [ -n "$killer" ]; then kill "$killer" 2>/dev/null; fi
trap '' USR1 TERM
if [ "$asked" = USR1 ] && [ "$status" -ne 0 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge @REQUEUES@ ]; then
        echo "Queued again @REQUEUES@ times already: not once more. Submit it again to go on." >&2
        exit 1
    fi
    echo "$(date '+%F %T') queued again" >&2
    scontrol requeue "$job"
fi
exit "$status\""""
"""After the command was begun: it is waited for, through signals, and its job is queued again if it must be.
`wait` says 127 of a child whose status it has told already."""

_RAY: Final = """\
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RAY_ADDRESS="$head:@PORT@"
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
export RAY_AUTH_TOKEN
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
nodes=()
leave() {
    kill "${nodes[@]}" 2>/dev/null
    wait "${nodes[@]}" 2>/dev/null
}
trap leave EXIT
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \\
    @RAY@ start --head --port=@PORT@ --include-dashboard=false --disable-usage-stats --block &
nodes+=("$!")
ready=
for ((second = 0; second < @LIMIT@ && ${#asked} == 0; second++)); do
    if @RAY@ health-check --address "$RAY_ADDRESS" >/dev/null 2>&1; then
        ready=yes
        break
    fi
    sleep 1
done
if [ -z "$ready" ] && [ -z "$asked" ]; then
    echo "Ray's head did not answer at $RAY_ADDRESS within @LIMIT@ s; its log is above." >&2
    exit 1
fi
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    others=$((SLURM_JOB_NUM_NODES - 1))
    srun --overlap --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --exclude="$head" \\
        --kill-on-bad-exit=0 @RAY@ start --address="$RAY_ADDRESS" --disable-usage-stats --block &
    nodes+=("$!")
fi"""
"""Ray inside the allocation, with a token of its own: other users of the machines cannot speak to it. A node
that is ended has nothing left to wait for, which Ray would do for 30 s. Where the hosts have several
addresses Ray finds its own by the name."""
