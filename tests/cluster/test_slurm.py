"""`penstock slurm`: scripts that bash takes, that bear signals, and that run what was asked word for word."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cli import slurm as command
from penstock.cluster.slurm import Batch, Resources, array_script, directive, merge_script, ranges, ray_script
from penstock.errors import ConfigError
from tests.cluster.slurm_bin import FakeSlurm

PYTHON = [sys.executable, "-I", "-S", "-c"]

WORDS = ["generate", "in.jsonl", "--out", "out.jsonl"]

STEADY = """
import os, pathlib, signal, sys, time
task = os.environ["FAKE_TASK"] or "job"
done = pathlib.Path(f"done-{task}")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
number = len(done.read_text()) if done.exists() else 0
again = bool(os.environ.get("SLURM_RESTART_COUNT"))
while number < 20:
    number += 1
    with done.open("a") as file:
        file.write("x")
    if number == 8 and task == sys.argv[1] and not again:
        pathlib.Path(os.environ["FAKE_SLURM"], f"ready-{task}").touch()
        for _ in range(2000):
            time.sleep(0.01)
            if stop:
                sys.exit(130)
"""
"""Does twenty things; the task it is told waits for a signal after eight. Run again it goes on."""

STUBBORN = STEADY.replace("stop.append(1)", "None").replace("range(2000)", "range(6000)")
"""The same, deaf to SIGTERM."""


def batch(folder: Path, **settings: object) -> Batch:
    given = {"name": "test", "resources": Resources(time="1:00:00"), "folder": folder, "directory": folder}
    return Batch(**{**given, **settings})  # type: ignore[arg-type]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm home")
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(fake.folder))
    return fake


def submit(fake: FakeSlurm, folder: Path, text: str) -> int:
    script = folder / "script.sh"
    script.write_text(text)
    return int(subprocess.check_output([fake.bin / "sbatch", "--parsable", script], text=True))


def shell_checked(text: str, folder: Path) -> None:
    """Asserts that bash takes the text, and that shellcheck, where it is, has no complaint."""
    script = folder / "checked.sh"
    script.write_text(text)
    subprocess.run(["/bin/bash", "-n", str(script)], check=True, timeout=30)
    if shutil.which("shellcheck") is None:
        warnings.warn("shellcheck is not installed: the scripts were only parsed", stacklevel=2)
        return
    found = subprocess.run(
        ["shellcheck", "--severity=warning", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.filterwarnings("default:shellcheck is not installed")
def test_the_scripts_pass_bash_and_shellcheck(tmp_path: Path) -> None:
    odd = [*WORDS, "--prompt-template", 'it\'s `x` $(y) $HOME "z" @GRACE@\n{q}']
    whole = batch(tmp_path, setup=("module() { :; }", "module load cuda"))
    shell_checked(array_script(whole, odd, 64, max_running=8), tmp_path)
    shell_checked(ray_script(whole, odd, 4, ray=["python 3", "-m", "ray"], port=6379), tmp_path)
    shell_checked(merge_script(whole, odd), tmp_path)


@given(words=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4))
@settings(max_examples=12)
def test_every_word_reaches_the_command_as_it_was_given(
    words: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("words")
    shown = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdout.write(ascii(sys.argv[1:-2]))", *words]
    script = folder / "script.sh"
    script.write_text(array_script(batch(folder), shown, 3))
    environment = {**os.environ, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    said = subprocess.run(
        ["/bin/bash", script], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert said.stdout == ascii(words)


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_job_that_is_stopped_is_queued_again_and_goes_on(
    fake: FakeSlurm, tmp_path: Path, name: str
) -> None:
    fake.signal(f"1 {name}")
    job = submit(fake, tmp_path, array_script(batch(tmp_path), [*PYTHON, STEADY, "1"], 3))
    runs = fake.runs(job)
    assert sorted((task, restart) for task, restart, _ in runs) == [("0", 0), ("1", 0), ("1", 1), ("2", 0)]
    assert {status for task, restart, status in runs if (task, restart) != ("1", 0)} == {0}
    assert [(tmp_path / f"done-{task}").read_text() for task in range(3)] == ["x" * 20] * 3
    log = (tmp_path / f"{job}_1.log").read_text()
    assert "restart 0" in log and "restart 1" in log, "the second run's log goes on in the first one's file"
    assert ("queued again" in log) == (name == "USR1"), "after a preemption Slurm itself queues the job again"


def test_a_job_that_is_cancelled_stops_its_command_and_is_not_queued_again(
    fake: FakeSlurm, tmp_path: Path
) -> None:
    fake.signal("0 B:TERM")
    job = submit(fake, tmp_path, array_script(batch(tmp_path), [*PYTHON, STEADY, "0"], 1))
    assert fake.runs(job) == [("0", 0, 130)], "the command ended by itself, as it does after SIGTERM"
    assert (tmp_path / "done-0").read_text() == "x" * 8


def test_a_command_that_is_deaf_is_killed_in_time_and_queued_again(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.signal("0 USR1")
    text = array_script(batch(tmp_path, warn_before=21), [*PYTHON, STUBBORN, "0"], 1)
    runs = fake.runs(submit(fake, tmp_path, text))
    assert runs == [("0", 0, 128 + 9), ("0", 1, 0)]
    assert (tmp_path / "done-0").read_text() == "x" * 20


def test_a_job_is_not_queued_again_for_ever(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.signal("0 USR1")
    always = STEADY.replace("and not again", "or True")
    text = array_script(batch(tmp_path, max_requeues=2), [*PYTHON, always, "0"], 1)
    job = submit(fake, tmp_path, text)
    assert fake.runs(job) == [("0", 0, 130), ("0", 1, 130), ("0", 2, 1)]
    assert "Submit it again" in (tmp_path / f"{job}_0.log").read_text()


def test_a_failure_is_the_job_s_and_not_run_again(fake: FakeSlurm, tmp_path: Path) -> None:
    text = array_script(batch(tmp_path), [sys.executable, "-c", "raise SystemExit(3)"], 2)
    assert sorted(fake.runs(submit(fake, tmp_path, text))) == [("0", 0, 3), ("1", 0, 3)]


def test_the_command_submits_the_shards_and_a_job_that_joins_them(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--time", "2:00:00", "--shards", "8", "--max-running", "2", "--gpus", "1", "--partition", "gpu"]
    more = ["--sbatch", "constraint=h100", "exclusive", "--setup", "module() { :; }", "--name", "night run"]
    monkeypatch.setattr(command, "_penstock", lambda *words: ["true", *words])
    assert command.main([*flags, *more, "--", *WORDS]) == 0
    assert fake.runs(102) == [("", 0, 0)], "the last job"
    options = fake.options(101).splitlines()
    asked = ["--array=0-7%2", "--gpus-per-node=1", "--partition=gpu", "--constraint=h100", "--exclusive"]
    assert {*asked, "--requeue", "--signal=B:USR1@90", '--job-name="night run"'} <= set(options)
    assert "--dependency=afterany:101" in fake.options(102)
    assert "merge out.jsonl" in fake.script(102)
    script = tmp_path / "slurm" / "night run" / "array.sh"
    assert stat.S_IMODE(script.stat().st_mode) == 0o700, "a key may stand in it"
    assert f"Script: {script}" in capsys.readouterr().out


def test_a_dry_run_prints_the_script_and_does_nothing(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(["--time", "60", "--shards", "4", "--dry-run", "--", *WORDS]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#!/bin/bash\n") and '--shard "$SLURM_ARRAY_TASK_ID/4" &' in text
    assert command.main(["--time", "60", "--nodes", "4", "-n", "--", "serve", "--ray", "--model", "m"]) == 0
    assert "serve --ray --model m &" in capsys.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == ["slurm home"]


@pytest.mark.parametrize(
    ("flags", "words", "sentence"),
    [
        (["--shards", "2", "--nodes", "2"], WORDS, "Say how"),
        ([], WORDS, "Say how"),
        (["--shards", "2"], [], "behind two dashes"),
        (["--shards", "2"], ["serve"], "not 'serve'"),
        (["--shards", "2"], [*WORDS, "--shard", "1/2"], "leave --shard"),
        (["--shards", "0"], WORDS, "between 1 and"),
        (["--shards", "2000"], WORDS, "1001 tasks"),
        (["--nodes", "2"], WORDS, "give it --ray"),
        (["--shards", "2", "--time", "soon"], WORDS, "no time limit"),
        (["--shards", "2", "--sbatch", "time=3"], WORDS, "give it as --time"),
        (["--shards", "2", "--sbatch", "Exclusive=user"], WORDS, "without dashes"),
        (["--shards", "2", "--sbatch", "comment=a\nb"], WORDS, "cannot stand"),
        (["--shards", "2", "--warn-before", "20"], WORDS, "more than 20"),
        (["--shards", "2", "--name", "a/b"], WORDS, "no slash"),
    ],
)  # fmt: skip
def test_what_slurm_would_not_take_is_told_before(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], words: list[str],
    sentence: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        command.main(["--time", "60", *flags, "--", *words])
    assert list(fake.folder.glob("job-*")) == []


def test_a_wrong_flag_of_the_command_is_told_before(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([*WORDS, "--temprature", "1"], ["generate", "in.jsonl"]):
        with pytest.raises(SystemExit):
            command.main(["--time", "60", "--shards", "2", "--", *words])
    said = capsys.readouterr().err
    assert "--temprature" in said and "--out" in said
    assert list(fake.folder.glob("job-*")) == []


def test_what_sbatch_says_is_passed_on(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (fake.folder / "refuse").touch()
    with pytest.raises(ConfigError, match="Invalid account"):
        command.main(["--time", "60", "--shards", "2", "--", *WORDS])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch on this machine"):
        command.main(["--time", "60", "--shards", "2", "--", *WORDS])


@given(st.sets(st.integers(0, 300)))
def test_ranges_name_every_number_once(numbers: set[int]) -> None:
    found: list[int] = []
    for part in filter(None, ranges(sorted(numbers)).split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    assert found == sorted(numbers)


def test_a_directive_is_quoted_as_sbatch_reads_it() -> None:
    assert directive("comment", 'two "words" #1') == '#SBATCH --comment="two \\"words\\" #1"'
    assert directive("exclusive", None) == "#SBATCH --exclusive"
    assert directive("output", "/a/%A_%a.log") == "#SBATCH --output=/a/%A_%a.log"
