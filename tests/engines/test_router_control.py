"""The router in front of one engine of each kind: what steers a fleet reaches each in its own words."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from penstock.models import ARITHMETIC
from penstock.servers.launched import LifeCycle
from tests.engines.conftest import PYTHONS, available
from tests.engines.engines import ENGINES
from tests.engines.live import Live
from tests.engines.test_rollouts import FLOAT32
from tests.rollout.test_embedded import checkpoints
from tests.servers.fakes import nothing_left

pytestmark = pytest.mark.engines

PROMPT = {"prompt": "What is 12 + 30?", "temperature": 0, "max_tokens": 12}
LIMIT = 60.0
"""Seconds one request may take."""
NOISE = 8
"""Tenths of a standard deviation, on every tensor: with that much another answer comes."""


class Router:
    """`penstock route` in front of `lives`, and a client of it."""

    def __init__(self, port: int, lives: dict[str, Live]) -> None:
        self.port = port
        self.lives = lives
        self.urls = {name: live.server.base_url for name, live in lives.items()}

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any = None) -> dict[str, Any]:
        """The outcome of each engine by its kind, of a call that all have to have obeyed."""
        status, said = self.ask("POST", path, body)
        assert status == 200, said
        assert said["success"] and said["failed"] == []
        return self.by_kind(said)

    def by_kind(self, said: Any) -> dict[str, Any]:
        assert said["results"].keys() == set(self.urls.values())
        return {name: said["results"][url] for name, url in self.urls.items()}

    def text(self) -> str:
        status, said = self.ask("POST", "/v1/completions", PROMPT)
        assert status == 200, said
        answer: str = said["choices"][0]["text"]
        return answer

    def texts(self) -> set[str]:
        """Each engine answers several of these."""
        return {self.text() for _ in range(4 * len(self.lives))}

    def directly(self) -> dict[str, str]:
        """What each engine answers itself."""
        found = {}
        for name, live in self.lives.items():
            said = live.complete(**PROMPT)
            found[name] = said["choices"][0]["text"]
        return found


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    names = [name for name in ENGINES if available(name)]
    if not set(names) & set(PYTHONS):
        pytest.skip("neither PENSTOCK_VLLM_PYTHON nor PENSTOCK_SGLANG_PYTHON is set")
    logs = tmp_path_factory.mktemp("router")
    with nothing_left(), ExitStack() as stack:
        lives = {}
        for name in names:  # one after the other: each takes all of a small machine to start
            engine = ENGINES[name]
            life = LifeCycle(log_folder=logs, start_timeout=300.0, quiet_timeout=120.0)
            server = engine.make(life=life, extra_args=FLOAT32.get(name, {}))
            lives[name] = stack.enter_context(Live(engine, server))
        urls = [live.server.base_url for live in lives.values()]
        flags = ["--worker-urls", *urls, "--policy", "round_robin", "--port", "0"]
        child = subprocess.Popen(
            [sys.executable, "-m", "penstock", "route", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        stack.callback(child.communicate, timeout=30)
        stack.callback(child.terminate)
        assert child.stdout is not None
        while "http://" not in (line := child.stdout.readline()):
            assert line, "the router did not start"
        port = int(line.partition("http://")[2].split()[0].rstrip("/.,)").rpartition(":")[2])
        here = Router(port, lives)
        deadline = time.monotonic() + 60
        while here.ask("GET", "/health")[0] != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield here


@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_pause_holds_requests_until_resume(router: Router, mode: str) -> None:
    before = router.texts()
    outcomes = router.post(f"/pause?mode={mode}")
    assert all(one["ok"] and one["status"] == 200 for one in outcomes.values())
    found: list[str] = []
    asking = [threading.Thread(target=lambda: found.append(router.text())) for _ in range(6)]
    for one in asking:
        one.start()
    time.sleep(1.5)
    assert found == [], "a paused engine answers nothing"
    assert all(one["ok"] for one in router.post("/resume").values())
    for one in asking:
        one.join(LIMIT)
    assert len(found) == len(asking) and set(found) == before


def test_what_one_kind_cannot_do_is_its_outcome_alone(router: Router) -> None:
    status, said = router.ask("POST", "/pause?mode=wait")
    outcomes = router.by_kind(said)
    assert {name: one["ok"] for name, one in outcomes.items()} == {
        name: name != "sglang" for name in outcomes
    }
    if "sglang" in outcomes:
        assert status == 502 and "cannot pause in mode 'wait'" in str(outcomes["sglang"]["error"])
    router.post("/resume")
    status, said = router.ask("POST", "/pause?mode=wait&all_or_nothing=1")
    if "sglang" in outcomes:
        assert status == 502 and not said["success"]
    else:
        router.post("/resume")
    assert router.texts(), "everything that was paused has been resumed"


def test_sleep_and_wake(router: Router) -> None:
    """On a CPU vLLM stops and frees nothing; SGLang frees memory only with CUDA: level 0 is all it can."""
    before = router.texts()
    assert all(one["ok"] for one in router.post("/sleep?level=0").values())
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(router.text()))
    asking.start()
    time.sleep(1.0)
    assert found == []
    assert all(one["ok"] for one in router.post("/wake_up").values())
    asking.join(LIMIT)
    assert found and set(found) == before == router.texts()


def test_prefix_caches_are_reset(router: Router) -> None:
    before = router.texts()
    for path in ("/reset_prefix_cache", "/flush_cache"):
        assert all(one["ok"] for one in router.post(path).values())
    assert router.texts() == before


def test_weights_are_reloaded_on_every_kind(router: Router, tmp_path: Path) -> None:
    """By either engine's route; each kind says the fleet's version, and answers as the others do."""
    *_, other = checkpoints(tmp_path, NOISE + 1)
    before = router.directly()
    assert len(set(before.values())) == 1
    for number, (folder, path, body) in enumerate(
        [
            (other, "/update_weights_from_disk", {"model_path": str(other)}),
            (
                ARITHMETIC,
                "/collective_rpc",
                {"method": "reload_weights", "kwargs": {"weights_path": str(ARITHMETIC)}},
            ),
        ],
        start=1,
    ):
        outcomes = router.post(path, body)
        assert all(one["ok"] for one in outcomes.values())
        _, said = router.ask("GET", "/weight_info")
        assert said["weight_version"] == str(number)
        after = router.directly()
        assert len(set(after.values())) == 1, after
        assert (after == before) == (folder == ARITHMETIC)
        assert router.texts() == set(after.values())


def test_a_folder_that_is_not_there_changes_nothing_that_serves(router: Router) -> None:
    """SGLang refuses it. vLLM is left out, as nobody knows what it has, until weights come."""
    before = router.directly()["embedded"]
    status, said = router.ask("POST", "/update_weights_from_disk", {"model_path": "/no/such/folder"})
    assert status != 200 and not said["success"]
    assert router.text() == before
    router.post("/update_weights_from_disk", {"model_path": str(ARITHMETIC)})
    assert router.texts() == {before}
