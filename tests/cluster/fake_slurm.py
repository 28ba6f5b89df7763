"""Stands for Slurm: `sbatch`, `scontrol` and `srun` as far as penstock's scripts use them, on this machine.

A job's script really runs, each task of an array as a process of its own, queued again after `scontrol
requeue` or a preemption. Its folder (the variable FAKE_SLURM) has for each job its script and options, and:

    signal              `TASK SIGNAL` a line: sent to the batch shell once, as soon as a file `ready-TASK` is
                        there, made by what runs. TERM stands for a preemption: to all processes of the task,
                        which is then queued again by Slurm itself. B:TERM goes to the shell alone, as
                        `scancel --batch` sends it, and queues nothing.
    runs                `TASK RESTART STATUS` a line, for each run that has ended
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ.get("FAKE_SLURM", "."))
LIMIT = 120.0
"""Seconds a wait may take."""
MAX_ARRAY = 1001


def main(words: list[str]) -> int:
    match words:
        case ["sbatch", *rest]:
            return sbatch(rest)
        case ["scontrol", "show", "config"]:
            sys.stdout.write(f"Configuration data\nMaxArraySize            = {MAX_ARRAY}\n")
        case ["scontrol", "show", "hostnames", hosts]:
            sys.stdout.write(hosts.replace(",", "\n") + "\n")
        case ["scontrol", "requeue", job]:
            (FOLDER / f"requeue-{job}").touch()
        case ["srun", *rest]:
            return srun(rest)
        case ["control", job]:
            return control(job)
        case _:
            sys.stderr.write(f"fake slurm: {words}\n")
            return 1
    return 0


def sbatch(words: list[str]) -> int:
    if (FOLDER / "refuse").exists():
        sys.stderr.write("sbatch: error: Batch job submission failed: Invalid account\n")
        return 1
    script, options = Path(words[-1]), words[:-1]
    number = len(list(FOLDER.glob("job-*"))) + 101
    folder = FOLDER / f"job-{number}"
    folder.mkdir()
    text = script.read_text()
    (folder / "script").write_text(text)
    directives = [line[8:] for line in text.splitlines() if line.startswith("#SBATCH ")]
    (folder / "options").write_text("\n".join([*directives, *options]))
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, "control", str(number)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(folder / "errors").open("w"),
        start_new_session=True,
    )  # fmt: skip
    sys.stdout.write(f"{number}\n" if "--parsable" in options else f"Submitted batch job {number}\n")
    return 0


def options_of(job: str) -> dict[str, str]:
    found = {}
    for line in (FOLDER / f"job-{job}" / "options").read_text().splitlines():
        for word in shlex.split(line, comments=True):
            name, _, value = word.lstrip("-").partition("=")
            found[name] = value
    return found


def control(job: str) -> int:
    """Runs a job to its end, as slurmctld and slurmd do."""
    folder, options = FOLDER / f"job-{job}", options_of(job)
    if dependency := options.get("dependency"):
        until(FOLDER / f"job-{dependency.partition(':')[2]}" / "done")
    tasks, most = numbers(options.get("array", ""))
    runs: dict[str, Run] = {}
    while tasks or runs:
        while tasks and len(runs) < most:
            task, restart = tasks.pop(0)
            runs[task] = Run(job, task, restart, options)
        for task, run in list(runs.items()):
            if run.ended():
                del runs[task]
                with (folder / "runs").open("a") as file:
                    file.write(f"{task} {run.restart} {run.process.returncode}\n")
                if run.again:
                    tasks.append((task, run.restart + 1))
        time.sleep(0.02)
    (folder / "done").touch()
    return 0


def numbers(array: str) -> tuple[list[tuple[str, int]], int]:
    """The tasks of an array, none run yet, and how many may run at once."""
    if not array:
        return [("", 0)], 1
    indices, _, most = array.partition("%")
    tasks = []
    for part in indices.split(","):
        first, _, last = part.partition("-")
        tasks += [(str(index), 0) for index in range(int(first), int(last or first) + 1)]
    return tasks, int(most or 1000)


class Run:
    """One run of a task."""

    def __init__(self, job: str, task: str, restart: int, options: dict[str, str]) -> None:
        self.job, self.task, self.restart, self.options = job, task, restart, options
        self.name = f"{job}_{task}" if task else job
        self.again = False
        folder = FOLDER / f"job-{job}"
        log = options["output"].replace("%A", job).replace("%a", task).replace("%j", job).replace("%%", "%")
        environment = {
            **os.environ,
            "SLURM_JOB_ID": job, "SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": task,
            "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_JOB_NUM_NODES": options.get("nodes", "1"),
            "FAKE_TASK": task,
        }  # fmt: skip
        if restart:
            environment["SLURM_RESTART_COUNT"] = str(restart)
        mode = "ab" if options["open-mode"] == "append" else "wb"
        with Path(log).open(mode) as out:
            self.process = subprocess.Popen(
                ["/bin/bash", str(folder / "script")],
                cwd=options.get("chdir"), env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def ended(self) -> bool:
        if self.process.poll() is not None:
            requeue = FOLDER / f"requeue-{self.name}"
            if requeue.exists():
                requeue.unlink()
                self.again = True
            return True
        ready = FOLDER / f"ready-{self.task or 'job'}"
        signals = FOLDER / "signal"
        if signals.exists() and ready.exists():
            for line in signals.read_text().splitlines():
                task, name = line.split()
                if task == (self.task or "job"):
                    ready.unlink()
                    self.send(name)
        return False

    def send(self, name: str) -> None:
        if name == "TERM":
            os.killpg(self.process.pid, signal.SIGTERM)
            self.again = "requeue" in self.options
        else:
            os.kill(self.process.pid, getattr(signal, f"SIG{name.removeprefix('B:')}"))


def srun(words: list[str]) -> int:
    """The command, in as many processes as tasks are asked for. A signal ends them, as srun's own does."""
    flags = []
    while words and words[0].startswith("--"):
        flags.append(words.pop(0))
    count = next((int(found[1]) for flag in flags if (found := re.match(r"--ntasks=(\d+)", flag))), 1)
    children = [subprocess.Popen(words, start_new_session=True) for _ in range(count)]

    def end(number: int, frame: object) -> None:
        for child in children:
            os.killpg(child.pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    return max(child.wait() for child in children)


def until(path: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
