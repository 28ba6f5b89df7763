"""`penstock slurm`: a command as jobs of Slurm, in shards or on a Ray cluster of their own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

from penstock.cli.generate import GenerateArgs
from penstock.cli.serve import ServeArgs
from penstock.cluster import sbatch, slurm
from penstock.cluster.account import unfinished
from penstock.cluster.shards import Shards
from penstock.errors import ConfigError

COMMANDS = ("generate", "serve")
"""What can run on a Ray cluster; in shards only the first."""


@dataclass(frozen=True)
class SlurmArgs:
    """Submit a command to Slurm: penstock slurm [flags] -- generate INPUT --out OUT [flags].

    With --shards an array job: each task does one shard of the input with its own engines, and a last job
    joins what they wrote. With --nodes one job that starts a Ray cluster in its allocation and runs the
    command on it (give it --ray). Jobs that are preempted or meet their time limit are queued again and go on
    where they were.
    """

    time: str
    """Time limit of a run, as sbatch takes it: 4:00:00, 2-12. A job that meets it is queued again."""
    shards: int | None = None
    """Parts of the input, each a task of an array job."""
    nodes: int | None = None
    """Machines of a Ray cluster."""
    max_running: int | None = None
    """Tasks of the array that run at once. Default: as many as Slurm lets."""
    gpus: int = 0
    """GPUs of a node."""
    cpus: int | None = None
    """CPUs of a task."""
    mem: str | None = None
    """Memory of a node, such as 64G."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch without their dashes: --sbatch constraint=h100 exclusive."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the command: --setup "module load cuda" "source env.sh"."""
    name: str | None = None
    """Name of the job. Default: the command and its output."""
    folder: Path | None = None
    """Where scripts and logs go. Default: slurm/NAME."""
    warn_before: int = 90
    """Seconds before the time limit at which the command is stopped and the job queued again."""
    max_requeues: int = 100
    """How often a job that meets its time limit is queued again."""
    ray_port: int = slurm.RAY_PORT
    """Port of Ray's head."""
    dry_run: Annotated[bool, arg(aliases=("-n",))] = False
    """Print the script and submit nothing."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0 when the jobs are submitted, or nothing is left to do."""
    own, command = _split(argv)
    args = tyro.cli(SlurmArgs, prog="penstock slurm", args=own)
    if (args.shards is None) == (args.nodes is None):
        raise ConfigError("Say how: --shards N for an array job, or --nodes N for a Ray cluster.")
    _check(args, command)
    return _submit_array(args, command) if args.shards is not None else _submit_ray(args, command)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before `--` is for Slurm, what stands behind it is the command."""
    if "--" not in argv:
        return list(argv), []
    place = list(argv).index("--")
    return list(argv[:place]), list(argv[place + 1 :])


def _check(args: SlurmArgs, command: Sequence[str]) -> None:
    """Raises ConfigError for a command that cannot be run this way. A wrong flag in it ends the process with
    what the command itself would say: better than after hours in the queue."""
    if not command:
        raise ConfigError("Say what to run behind two dashes: penstock slurm … -- generate INPUT --out OUT.")
    allowed = COMMANDS if args.nodes is not None else COMMANDS[:1]
    if command[0] not in allowed:
        raise ConfigError(f"penstock slurm runs {' or '.join(allowed)} this way, not {command[0]!r}.")
    if args.nodes is not None and args.max_running is not None:
        raise ConfigError("--max-running is for --shards.")
    if args.shards is not None:
        given = _generate(command)
        if given.source.shard is not None or given.ray.ray:
            raise ConfigError("Each task of the array is given its own --shard: leave --shard and --ray out.")
    elif command[0] == "generate":
        _check_ray(args, _generate(command).ray.ray)
    else:
        _check_ray(args, tyro.cli(ServeArgs, prog="penstock serve", args=command[1:]).ray)


def _check_ray(args: SlurmArgs, ray: bool) -> None:
    if not ray:
        raise ConfigError(f"On {args.nodes} nodes the command runs on Ray: give it --ray.")


def _generate(command: Sequence[str]) -> GenerateArgs:
    return tyro.cli(GenerateArgs, prog="penstock generate", args=command[1:])


def _submit_array(args: SlurmArgs, command: Sequence[str]) -> int:
    assert args.shards is not None
    given = _generate(command)
    out = given.out
    shards = Shards(out, args.shards)
    # With --retry-failed a shard that is done may be owed again: its own journal knows.
    owed = list(range(args.shards)) if given.retry_failed else unfinished(shards)
    batch = _batch(args, f"generate-{out.stem}")
    run = slurm.array_script(
        batch,
        _penstock(*command),
        args.shards,
        indices="" if len(owed) == args.shards else slurm.ranges(owed),
        max_running=args.max_running,
    )
    merge = slurm.merge_script(batch, _penstock("merge", str(out)))
    if args.dry_run:
        sys.stdout.write(run)
        return 0
    if not owed:
        _say(f"Every shard of {out} is done: join them with penstock merge {out}.")
        return 0
    _check_array_size(args.shards)
    shards.prepare()
    first = _written(batch, "array.sh", run)
    job = sbatch.submit(first)
    after = sbatch.submit(_written(batch, "merge.sh", merge), [f"--dependency=afterany:{job}"])
    _say(f"Job {job}: {len(owed)} of {args.shards} shards; job {after} joins them. Script: {first}")
    _say(f"How far it is: penstock status {out}; squeue --job {job}; the logs in {batch.folder}")
    return 0


def _submit_ray(args: SlurmArgs, command: Sequence[str]) -> int:
    assert args.nodes is not None
    batch = _batch(args, command[0])
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    text = slurm.ray_script(batch, _penstock(*command), args.nodes, ray=ray, port=args.ray_port)
    if args.dry_run:
        sys.stdout.write(text)
        return 0
    script = _written(batch, "ray.sh", text)
    _say(f"Job {sbatch.submit(script)} on {args.nodes} nodes. Script: {script}; the logs in {batch.folder}")
    return 0


def _batch(args: SlurmArgs, name: str) -> slurm.Batch:
    name = args.name or name
    if "/" in name:
        raise ConfigError(f"--name {name!r} must have no slash in it: the logs' folder is called so.")
    return slurm.Batch(
        name=name,
        resources=slurm.Resources(
            time=args.time, partition=args.partition, account=args.account, qos=args.qos,
            gpus=args.gpus, cpus=args.cpus, mem=args.mem, more=_options(args.sbatch),
        ),
        folder=(args.folder or Path("slurm") / name).absolute(),
        directory=Path.cwd(),
        setup=args.setup,
        warn_before=args.warn_before,
        max_requeues=args.max_requeues,
    )  # fmt: skip


def _options(words: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name in found:
            raise ConfigError(f"--sbatch: {name} is given twice.")
        found[name] = value if equals else None
    return found


def _penstock(*words: str) -> list[str]:
    """The same installation, which the nodes must see under the same path."""
    return [sys.executable, "-m", "penstock", *words]


def _check_array_size(shards: int) -> None:
    limit = sbatch.max_array_size()
    if limit is not None and shards > limit:
        raise ConfigError(
            f"Slurm takes arrays of {limit} tasks at most here (MaxArraySize): use fewer shards."
        )


def _written(batch: slurm.Batch, name: str, text: str) -> Path:
    path = batch.folder / name
    sbatch.write_script(path, text)
    return path


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
