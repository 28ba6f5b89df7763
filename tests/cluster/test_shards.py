"""Shards' files: names, numbers of epochs, what a take-over leaves and what it fences off, what is joined."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cluster.shards import Shards, failures_of, journal_of
from penstock.cluster.takeover import Epochs, sweep, take_over
from penstock.errors import ConfigError


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    shards = Shards(tmp_path / "out.jsonl", 64)
    shards.prepare()
    return shards


def test_names_sort_and_tell_their_epoch(shards: Shards) -> None:
    assert shards.output(12) == shards.folder / "00012-of-00064.jsonl"
    assert shards.output(12, 3).name == "00012-of-00064.e0003.jsonl"
    for epoch in (0, 3, 11):
        journal_of(shards.output(12, epoch)).touch()
    shards.output(5, 2).touch()
    (shards.folder / "notes.txt").touch()
    (shards.folder / "00012-of-00064.jsonl.journal.copy").touch()
    assert shards.epochs() == {5: [2], 12: [0, 3, 11]}
    assert shards.newest(12) == shards.output(12, 11)
    assert shards.newest(1) == shards.output(1)


def test_a_job_does_not_go_on_in_another_number_of_shards(shards: Shards) -> None:
    assert Shards.found(shards.out) is None
    shards.output(0).touch()
    assert Shards.found(shards.out) == shards
    with pytest.raises(ConfigError, match="begun in 64 shards"):
        Shards(shards.out, 8).prepare()
    Shards(shards.out, 8).output(0).touch()
    with pytest.raises(ConfigError, match="8 and 64"):
        Shards.found(shards.out)
    with pytest.raises(ConfigError, match="between 1 and"):
        Shards(shards.out, 0)


def test_a_number_is_given_out_once_over_all_runs(shards: Shards) -> None:
    with Epochs(shards) as epochs:
        assert [epochs.first, epochs.take(), epochs.take()] == [0, 1, 2]
        with pytest.raises(ConfigError, match="generated already"):
            Epochs(shards)
    with Epochs(shards) as epochs:
        assert epochs.first == 3


def test_without_its_file_the_numbers_go_on_after_the_files_there_are(shards: Shards) -> None:
    journal_of(shards.output(3, 7)).touch()
    with Epochs(shards) as epochs:
        assert epochs.first == 8


def test_a_number_taken_by_a_run_that_was_killed_is_not_taken_again(shards: Shards) -> None:
    code = (
        "import os, sys; from pathlib import Path; from penstock.cluster.shards import Shards;"
        "from penstock.cluster.takeover import Epochs;"
        "epochs = Epochs(Shards(Path(sys.argv[1]), 64)); epochs.take(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(shards.out)], timeout=60, check=False)
    with Epochs(shards) as epochs:
        assert epochs.first == 2


def test_a_take_over_copies_the_newest_journal_and_leaves_nothing_else(shards: Shards) -> None:
    for epoch, text in ((0, "old\n"), (2, "new\n")):
        journal_of(shards.output(9, epoch)).write_text(text)
        failures_of(shards.output(9, epoch)).touch()
        journal_of(shards.output(9, epoch)).with_suffix(".journal.index").touch()
        shards.output(9, epoch).write_text("rows\n")
    journal_of(shards.output(8, 0)).write_text("another shard's\n")
    with journal_of(shards.output(9, 2)).open("a") as zombie:
        output = take_over(shards, 9, 5)
        zombie.write("too late\n")
    assert output == shards.output(9, 5)
    assert journal_of(output).read_text() == "new\n"
    assert not output.exists(), "the job writes it again from the journal"
    assert shards.epochs() == {8: [0], 9: [5]}
    assert take_over(shards, 9, 5) == output and journal_of(output).read_text() == "new\n"
    assert sorted(entry.name for entry in shards.folder.iterdir()) == [
        "00008-of-00064.jsonl.journal",
        "00009-of-00064.e0005.jsonl.journal",
    ]


def test_what_a_holder_that_was_cut_off_leaves_later_is_swept(shards: Shards) -> None:
    journal_of(take_over(shards, 1, 4)).write_text("mine\n")
    shards.output(1, 2).write_text("of one that did not know\n")
    assert shards.newest(1) == shards.output(1, 4)
    sweep(shards)
    assert [entry.name for entry in shards.folder.iterdir()] == ["00001-of-00064.e0004.jsonl.journal"]
