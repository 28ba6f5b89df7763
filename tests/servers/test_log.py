"""Logs: lines whole, files bounded, secrets masked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.servers.log import MAX_LINE, EngineLog, LineSplitter, LogFile, Mask, prune


@given(st.lists(st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]))), st.data())
def test_lines_do_not_depend_on_how_they_arrive(lines: list[str], data: st.DataObject) -> None:
    raw = "".join(f"{line}\n" for line in lines).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)))))
    splitter, found = LineSplitter(), []
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        found += splitter.feed(raw[start:end])
    found += splitter.end()
    expected = [part for line in lines for part in [line.encode().decode()] if part.encode().strip()]
    assert found == [line.rstrip() for line in expected]


def test_progress_bars_are_lines() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"0%\r50%\r100%\nnext") == ["0%", "50%", "100%"]
    assert splitter.end() == ["next"]


def test_an_endless_line_is_cut_and_the_next_one_is_whole() -> None:
    splitter = LineSplitter()
    found = []
    for _ in range(10):
        found += splitter.feed(b"x" * MAX_LINE)
    found += splitter.feed(b"end\nnext\n")
    assert found == ["x" * MAX_LINE, "next"]


def test_a_log_is_rotated_and_keeps_its_last_lines(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "logs" / "a.log", max_bytes=100, old_files=2)
    for number in range(100):
        file.write([f"line {number:03}"])
    file.close()
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "logs").iterdir()}
    assert set(sizes) == {"a.log", "a.log.1", "a.log.2"} and max(sizes.values()) <= 100
    kept = "".join((tmp_path / "logs" / name).read_text() for name in ("a.log.2", "a.log.1", "a.log"))
    numbers = [int(line.split()[1]) for line in kept.splitlines()]
    assert numbers == list(range(numbers[0], 100))


def test_a_full_disk_loses_the_log_not_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EngineLog(Mask(), LogFile(Path("/dev/full")), lines=5)
    assert log.feed(b"one\ntwo\n") == ["one", "two"]
    assert log.feed(b"three\n") == ["three"]
    assert list(log.tail) == ["one", "two", "three"]
    log.close()


def test_the_oldest_logs_go(tmp_path: Path) -> None:
    for number in range(6):
        for name in (f"fake-{number}.log", f"fake-{number}.log.1"):
            (tmp_path / name).write_text("")
            os.utime(tmp_path / name, (number, number))
    (tmp_path / "other-1.log").write_text("")
    (tmp_path / "notes.txt").write_text("")
    prune(tmp_path, "fake", keep=2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"fake-4.log", "fake-4.log.1", "fake-5.log", "fake-5.log.1", "other-1.log", "notes.txt"}


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Authorization: Bearer abc.d-ef", "Authorization: Bearer ***"),
        ("token hf_ABCDEFGHIJKLMNOPqrst ok", "token *** ok"),
        ("OPENAI sk-proj-abcdefghijklmnopqrst.", "OPENAI ***."),
        ("args: {'api_key': ['s3cr3t-one'], 'port': 1}", "args: {'api_key': ['***'], 'port': 1}"),
        ("api_key=None, model='x'", "api_key=None, model='x'"),
        ("run --api-key s3cr3t-one --port 1", "run --api-key *** --port 1"),
        ("the value is myvalue123", "the value is ***"),
        ("max tokens 100, sk-small", "max tokens 100, sk-small"),
    ],
)
def test_what_looks_like_a_secret_is_masked(text: str, masked: str) -> None:
    assert Mask(["myvalue123", "1"])(text) == masked


def test_secrets_are_known_by_the_names_of_their_variables() -> None:
    names = ["HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "CLIENT_SECRET"]
    environment = {name: f"value-of-{name.lower()}" for name in names}
    plain = {"TOKENIZERS_PARALLELISM": "falsefalse", "KEYBOARD": "deutsch", "PATH": "/usr/bin:/bin"}
    mask = Mask.of({**environment, **plain}, "given-key", None)
    for value in [*environment.values(), "given-key"]:
        assert mask(f"a {value} b") == "a *** b"
    for value in plain.values():
        assert mask(value) == value
