"""The command as a person runs it: a process, its exit status and what it says."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.chat_server import MODEL, ChatServer, answer_to

ROWS = 150


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"id": {i}, "q": "question {i}"}}\n' for i in range(ROWS)))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "penstock", "generate", *map(str, arguments)]


def generate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, check=False)


def assert_complete(out: Path, rows: int = ROWS) -> None:
    written = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert sorted(row["id"] for row in written) == list(range(rows))
    assert all(row["generations"] == [answer_to(row["q"])] for row in written)


def test_killed_at_random_moments_and_run_again_every_row_is_there_once(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    generator = random.Random(11)
    with ChatServer(latency=0.05) as server:
        job = command(
            *(source, "--out", out, "--prompt-column", "q", "--base-url", server.url),
            *("--max-concurrent", 4, "--no-preflight"),
        )
        kills = 0
        for _ in range(6):
            process = subprocess.Popen(job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 20
            served = server.asked.total()
            # From the first request on: start-up takes longer than the job's interesting part.
            while server.asked.total() == served and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(generator.uniform(0.0, 0.4))
            if process.poll() is None:
                kills += 1
            process.kill()
            process.wait(10)
        assert kills >= 4
        done = subprocess.run(job, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert_complete(out)
        # Lost work is what was in flight or unflushed at a kill, not what was finished.
        assert server.asked.total() < ROWS + kills * 24


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_job_within_two_seconds_and_it_says_how_to_go_on(
    source: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out.jsonl"
    with ChatServer(latency=0.2) as server:
        job = command(
            source, "--out", out, "--prompt-column", "q", "--base-url", server.url, "--max-concurrent", 8
        )
        process = subprocess.Popen(job, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 20
        while server.asked.total() < 21 and time.monotonic() < deadline:  # the preflight among them
            time.sleep(0.01)
        pressed = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=10)
        assert time.monotonic() - pressed < 2
        assert process.returncode == 130
        assert "run the same command again to go on" in said
        assert "Traceback" not in said
        finished = len(out.read_bytes().splitlines())
        assert finished >= 12
        assert generate(*job[4:]).returncode == 0
    assert_complete(out)


def test_failed_rows_make_the_exit_status_and_are_listed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    def refuse_two(message: str, asked: int) -> tuple[int, str] | None:
        return (400, "prompt too long") if message in ("question 3", "question 90") else None

    with ChatServer(refuse_two) as server:
        done = generate(
            source, "--out", out, "--prompt-column", "q", "--id-column", "id", "--base-url", server.url
        )
    assert done.returncode == 1
    assert "--retry-failed" in done.stderr
    failures = [json.loads(line) for line in (tmp_path / "out.jsonl.failures").read_bytes().splitlines()]
    assert sorted(failure["key"] for failure in failures) == ["3", "90"]
    assert "prompt too long" in failures[0]["message"]
    assert len(out.read_bytes().splitlines()) == ROWS - 2


def test_a_write_that_fails_stops_the_job_and_the_accounting_is_what_was_written(
    source: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for a full disk."""
    out = tmp_path / "out.jsonl"
    with ChatServer(latency=0.02) as server:
        job = command(
            source, "--out", out, "--prompt-column", "q", "--base-url", server.url, "--max-concurrent", 8
        )
        limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "limited", *job]
        stopped = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
        assert stopped.returncode == 1
        assert "could not be written (File too large)" in stopped.stderr
        assert server.asked.total() < ROWS
        assert int(stopped.stderr.split()[1]) <= len(out.read_bytes().splitlines())
        assert generate(*job[4:]).returncode == 0
    assert_complete(out)


def test_open_r1_names_and_templates_and_api_addr(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with ChatServer() as server:
        done = generate(
            *(source, "--output-file", out, "--prompt-column", "q", "--uuid-column", "id"),
            *("--api-addr", f"127.0.0.1:{server.port}", "--model", MODEL, "--num-generations", 1),
            *("--prompt-template", r"Solve in \boxed{}: {prompt}", "--temperature", 0.6, "--top-p", 0.95),
        )
        assert done.returncode == 0, done.stderr
        preflight, request = server.requests[:2]
        assert preflight["max_tokens"] == 1
        assert request["messages"][0]["content"].startswith(r"Solve in \boxed{}: question ")
        assert (request["temperature"], request["top_p"], request["model"]) == (0.6, 0.95, MODEL)


ROLLOUT = """
async def rollout(row, client):
    messages, said = client.messages, []
    for turn in range(4):
        sample = await client.chat(messages)
        said.append(sample.text)
        messages += [
            {"role": "assistant", "content": sample.text},
            {"role": "user", "content": f"turn {turn + 1} of {row['q']}"},
        ]
    return {"text": said[-1], "turns": said}

def validate(result, row):
    return len(result["turns"]) == 4 or "not four turns"
"""


def journalled_turns(out: Path) -> list[tuple[bytes, str]]:
    """(sample, question) of each turn in the journal of a job with `ROLLOUT`."""
    found = []
    for line in out.with_name(f"{out.name}.journal").read_bytes().splitlines():
        if len(words := line.split(b" ", 5)) == 6 and words[1] == b"p":
            text = json.loads(words[5])["result"]["sample"]["text"].removeprefix("<think>hm</think>")
            found.append((b" ".join(words[2:5]), text[: len(text) // 2]))
    return found


def test_a_rollout_of_several_turns_that_is_killed_goes_on_between_its_turns(
    source: Path, tmp_path: Path
) -> None:
    out, code = tmp_path / "out.jsonl", tmp_path / "turns.py"
    code.write_text(ROLLOUT)
    dice = random.Random(5)
    with ChatServer(latency=0.05) as server:
        job = command(
            *(source, "--limit", 40, "--out", out, "--prompt-column", "q", "--base-url", server.url),
            *("--rollout", f"{code}:rollout", "--validate", f"{code}:validate", "--max-concurrent", 6),
            "--no-preflight",
        )
        asked: dict[str, int] = {}
        begun = 0
        for _ in range(3):
            process = subprocess.Popen(job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 20
            before = server.asked.total()
            while (
                server.asked.total() < before + 18 and process.poll() is None and time.monotonic() < deadline
            ):
                time.sleep(0.005)
            time.sleep(dice.uniform(0.2, 0.5))
            process.kill()
            process.wait(10)
            turns = journalled_turns(out)
            begun += sum(count < 4 for count in Counter(sample for sample, _ in turns).values())
            asked |= {question: server.asked[question] for _, question in turns}
        assert begun >= 3  # samples were killed between their turns
        done = subprocess.run(job, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        written = [json.loads(line) for line in out.read_bytes().splitlines()]
        assert sorted(row["id"] for row in written) == list(range(40))
        for row in written:
            expected = [row["q"], *(f"turn {turn} of {row['q']}" for turn in (1, 2, 3))]
            assert row["turns"] == [[answer_to(message) for message in expected]]
            assert row["generations"] == [answer_to(expected[-1])]
        # What was in the journal at a kill has not been asked again; the rest was in flight, or not written.
        assert {question: server.asked[question] for question in asked} == asked


def test_open_r1s_own_command_line_reads_a_dataset_by_its_name(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"uuid": "u{i}", "problem": "p {i}"}}\n' for i in range(6)))
    out = tmp_path / "out.jsonl"
    with ChatServer() as server:
        done = generate(
            *("--dataset-name", data, "--output-file", out, "--prompt-column", "problem"),
            *("--uuid-column", "uuid", "--api-addr", f"127.0.0.1:{server.port}", "--num-generations", 2),
            *("--temperature", 0.6, "--top-p", 0.95, "--max-tokens", 16384, "--max-concurrent", 200),
        )
        assert done.returncode == 0, done.stderr
        underscores = generate(
            *("--dataset_name", data, "--output_file", out, "--prompt_column", "problem"),
            *("--uuid_column", "uuid", "--api_addr", f"127.0.0.1:{server.port}", "--num_generations", 3),
            *("--temperature", 0.6, "--top_p", 0.95, "--max_tokens", 16384, "--max_concurrent", 200),
        )
        assert underscores.returncode == 0, underscores.stderr
        assert "6 in this run, 12 from before" in underscores.stderr
    rows = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert sorted(row["uuid"] for row in rows) == [f"u{i}" for i in range(6)]
    assert all(len(row["generations"]) == len(row["api_metadata"]) == 3 for row in rows)


def test_several_inputs_stdin_and_a_template_in_a_file(source: Path, tmp_path: Path) -> None:
    other, template = tmp_path / "other.csv", tmp_path / "template.jinja"
    other.write_text("q,id\nfrom csv,900\n")
    template.write_text("{% if id|int > 800 %}Say {{ q }}{% else %}{{ q }}{% endif %}")
    with ChatServer() as server:
        common = ["--prompt-column", "q", "--base-url", server.url, "--prompt-template-file", template]
        done = generate(source, other, "--out", tmp_path / "a.jsonl", *common)
        assert done.returncode == 0, done.stderr
        assert server.asked["Say from csv"] == 1
        piped = subprocess.run(
            command("-", "--out", tmp_path / "b.jsonl", *common),
            input='{"q": "piped", "id": 1}\n', capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert piped.returncode == 0, piped.stderr
    assert len((tmp_path / "a.jsonl").read_bytes().splitlines()) == ROWS + 1
    assert "1 of 1 done" in piped.stderr


def test_a_shard_writes_its_own_file(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with ChatServer() as server:
        done = generate(
            *(source, "--shard", "1/3", "--out", out, "--prompt-column", "q", "--base-url", server.url)
        )
        assert done.returncode == 0, done.stderr
    file = tmp_path / "out.jsonl.shards" / "00001-of-00003.jsonl"
    assert sorted(json.loads(line)["id"] for line in file.read_bytes().splitlines()) == list(
        range(1, ROWS, 3)
    )


def test_a_job_that_goes_wrong_is_stopped(source: Path, tmp_path: Path) -> None:
    def refuse(message: str, asked: int) -> tuple[int, str] | None:
        return None if message == "Hi" else (400, "nothing suits")

    with ChatServer(refuse) as server:
        done = generate(
            *(source, "--out", tmp_path / "out.jsonl", "--prompt-column", "q", "--base-url", server.url),
            *("--max-failures", 5, "--max-concurrent", 2),
        )
        assert done.returncode == 1
        assert server.asked.total() < 15
    assert "6 of 6 samples failed in this run, and no more than 5 may" in done.stderr
    assert re.search("[67] RequestRejected", done.stderr), "one may be on its way when the sixth has failed"


def test_a_missing_key_is_known_before_a_million_failures(source: Path, tmp_path: Path) -> None:
    with ChatServer(lambda message, asked: (401, "no key given")) as server:
        done = generate(
            source, "--out", tmp_path / "out.jsonl", "--prompt-column", "q", "--base-url", server.url
        )
        assert server.asked.total() == 1
    assert done.returncode == 2
    assert "refuse the job's requests before it has begun: 401: no key given" in done.stderr


BAD = {
    "no input": (["none.jsonl", "--base-url", "URL"], "There is no input file none.jsonl."),
    "no engine named": (["in.jsonl"], "--engine vllm, sglang or embedded, or --base-url"),
    "not JSON": (["torn.jsonl", "--base-url", "URL"], "torn.jsonl line 2 is not JSON"),
    "no such column": (["in.jsonl", "--prompt-column", "Q", "--base-url", "URL"], "did you mean 'q'"),
    "output": (["in.jsonl", "--out", "missing/out.jsonl", "--base-url", "URL"], "missing/out.jsonl"),
    "engine not up": (
        ["in.jsonl", "--base-url", "http://127.0.0.1:9"],
        "No engine answers at http://127.0.0.1:9",
    ),
    "wrong model": (["in.jsonl", "--base-url", "URL", "--model", "gpt"], f"give --model one of {MODEL}"),
    "no samples": (["in.jsonl", "--base-url", "URL", "-n", "0"], "must be 1 to"),
    "templates": (
        ["in.jsonl", "--base-url", "URL", "--prompt-template", "{q}", "--prompt-template-file", "t"],
        "not both",
    ),
    "checkpoint": (["in.jsonl", "--engine", "embedded", "--model", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_before_anything_is_generated(
    case: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("torn.jsonl").write_text('{"q": "x"}\n{"q": "x\n')
    arguments, says = BAD[case]
    with ChatServer() as server:
        words = [server.url if word == "URL" else word for word in arguments]
        if "--prompt-column" not in words:
            words += ["--prompt-column", "q"]
        if "--out" not in words:
            words += ["--out", "out.jsonl"]
        done = generate(*words)
        assert server.asked.total() == 0
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= (1 if case != "checkpoint" else 8)


def test_an_unknown_flag_or_command_names_the_nearest(source: Path) -> None:
    done = generate(source, "--out", "x", "--temprature", "1")
    assert done.returncode == 2
    assert "--temperature" in done.stderr
    unknown = subprocess.run(
        [sys.executable, "-m", "penstock", "genrate"], capture_output=True, text=True, timeout=30, check=False
    )
    assert unknown.returncode == 2
    assert "did you mean 'generate'" in unknown.stderr
