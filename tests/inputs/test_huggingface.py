"""Hugging Face datasets, without a network: saved folders, local builders, and a hub that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from penstock.errors import ConfigError
from penstock.inputs import huggingface
from penstock.inputs.iterable import from_iterable
from penstock.inputs.opened import DatasetOptions, open_source
from penstock.inputs.source import Source
from penstock.prompt import PromptFormat

ROWS = [{"messages": [{"role": "user", "content": f"q{i}"}], "n": i} for i in range(1300)]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def rows_of(source: Source) -> list[dict[str, Any]]:
    return [json.loads(line) for _, line in source.lines()]


def test_a_saved_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    source = open_source([folder])
    assert rows_of(source) == ROWS
    assert next(iter(source.lines()))[0] == f"{folder} row 1"
    assert source.survey(PromptFormat(prompt_column="messages")).rows == 1300
    assert rows_of(open_source([folder], skip=10, limit=900, shard=(2, 3))) == ROWS[12:910:3]
    shuffled = rows_of(open_source([folder], shuffle=3))
    assert shuffled != ROWS
    assert sorted(shuffled, key=lambda row: int(row["n"])) == ROWS
    with pytest.raises(ConfigError, match="without splits"):
        open_source([folder], dataset=DatasetOptions(split="test"))
    (folder / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ConfigError, match="cannot be read as a dataset"):
        open_source([folder])


def test_a_saved_dataset_with_splits(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    train, test = datasets.Dataset.from_list(ROWS[:10]), datasets.Dataset.from_list(ROWS[10:15])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder)
    assert rows_of(open_source([folder])) == ROWS[:10]
    assert rows_of(open_source([folder], dataset=DatasetOptions(split="test"))) == ROWS[10:15]
    with pytest.raises(ConfigError, match="no split 'tset': it has train, test"):
        open_source([folder], dataset=DatasetOptions(split="tset"))
    datasets.DatasetDict({"test": test}).save_to_disk(tmp_path / "one")
    assert rows_of(open_source([tmp_path / "one"])) == ROWS[10:15]


class LocalHub:
    """`datasets` with a hub whose one dataset is a file here; its own builders do the rest."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        load = datasets.load_dataset

        def load_dataset(name: str, config: str | None, **options: Any) -> Any:
            assert (name, config) == ("owner/name", "main")
            return load("json", data_files={"train": str(path)}, cache_dir=str(path.parent), **options)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    LocalHub(path, monkeypatch)
    options = DatasetOptions(config="main", streaming=streaming)
    source = open_source(["owner/name"], dataset=options)
    assert source.again != streaming
    assert rows_of(source) == ROWS
    shuffled = open_source(["hf:owner/name"], dataset=options, shuffle=1)
    assert sorted(rows_of(shuffled), key=lambda row: int(row["n"])) == ROWS
    with pytest.raises(ConfigError, match=r"cannot be had from the hub: Unknown split \"tset\""):
        rows_of(open_source(["owner/name"], dataset=DatasetOptions(config="main", split="tset")))


def test_a_stream_that_breaks_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnonsense\n')
    LocalHub(path, monkeypatch)
    source = open_source(["owner/name"], dataset=DatasetOptions(config="main", streaming=True))
    with pytest.raises(ConfigError, match="owner/name split train cannot be read after row"):
        rows_of(source)


def test_without_the_hub_there_is_one_sentence(tmp_path: Path) -> None:
    """In a process of its own: the library reads its environment when it is imported."""
    code = (
        "from penstock.inputs.opened import open_source\n"
        "try: open_source(['nobody/nothing'])\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path)}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    ).stdout
    assert printed.startswith(
        "ConfigError There is no file nobody/nothing. The dataset 'nobody/nothing' cannot be had from the hub"
    )
    assert printed.count("\n") == 1


def test_datasets_from_python_are_read_as_tables() -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    source = from_iterable(dataset)
    assert isinstance(source, huggingface.DatasetInput)
    assert rows_of(source) == ROWS
    stream = from_iterable(dataset.to_iterable_dataset())
    assert not stream.again
    assert rows_of(stream) == ROWS
