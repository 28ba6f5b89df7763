"""`penstock engine --scripted` as a process: how it starts, says so, stops, and refuses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from http.client import HTTPConnection

import pytest

READY = re.compile(r"^penstock engine ready on http://127\.0\.0\.1:(\d+)\n$")
TIMEOUT = 60
"""Seconds anything here may take."""

COMMAND = (sys.executable, "-m", "penstock", "engine", "--scripted")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_that_it_is_ready_answers_and_stops(number: signal.Signals) -> None:
    flags = ["--port", "0", "--itl", "1ms", "--ttft", "lognormal:mean=5ms,sigma=0.3", "--kv-tokens", "5000"]
    child = subprocess.Popen([*COMMAND, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        match = READY.match(child.stdout.readline())
        assert match is not None
        connection = HTTPConnection("127.0.0.1", int(match[1]), timeout=TIMEOUT)
        body = json.dumps({"prompt": "a", "max_tokens": 3})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = json.load(connection.getresponse())
        assert answer["choices"][0]["text"].endswith(" 1 2") and answer["model"] == "scripted"
        connection.close()
        child.send_signal(number)
        rest, errors = child.communicate(timeout=TIMEOUT)
        assert (child.returncode, rest, errors) == (0, "", "")
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--chaos", "rest:0.1"], "there is no fault 'rest'; did you mean reset?"),
        (["--itl", "10"], "--itl: '10' is no time"),
    ],
)
def test_a_bad_flag_is_one_sentence_and_status_two(flags: list[str], says: str) -> None:
    done = subprocess.run([*COMMAND, *flags], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("penstock: ") and says in done.stderr and done.stderr.count("\n") == 1


def test_it_needs_the_core_only() -> None:
    heavy = ["torch", "numpy", "tokenizers", "transformers", "jinja2"]
    code = "import sys, penstock.cli.engine, penstock.scripted.server\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT, check=True
    )
    assert done.stdout.strip() == "[]"
