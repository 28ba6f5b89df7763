"""Whole load tests: processes, layers, the account of generations, the command."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import orjson
import pytest

from penstock.cli.bench import main
from penstock.errors import ConfigError
from penstock.loadtest.bench import Bench, measure
from penstock.loadtest.files import load
from penstock.loadtest.findings import findings
from penstock.loadtest.metrics import Point
from penstock.loadtest.plan import Beat, Extent, Job, Load, Target
from penstock.loadtest.processes import GeneratorDied, Generators, parent_gone
from penstock.loadtest.stand import StandSpec, standing
from penstock.loadtest.workload import Item, Workload
from tests.loadtest.test_sending import streamed
from tests.scripted import Call, ScriptedEngine, Step, aside, http, raw, reset, run, stall

WORKLOAD = Workload([Item(({"role": "user", "content": "hello"},), 5)])
MODELS = raw(http(200, orjson.dumps({"data": [{"id": "m"}]})))


def accounting(engine: ScriptedEngine, states: dict[int, Sequence[str]]) -> dict[str, Step]:
    """The scripted engine's account of what `engine` was asked: requests by number, `completed` once unless
    `states` says otherwise."""

    async def requests(call: Call) -> None:
        ids = [other.headers["x-request-id"] for other in engine.calls]
        records = [
            {"id": id, "base": id, "state": state}
            for id in ids
            for state in states.get(int(id.rpartition(".")[2]), ["completed"])
        ]
        await call.write(http(200, orjson.dumps({"requests": records})))

    async def counts(call: Call) -> None:
        left = sum(found.count("in_flight") for found in map(list, states.values()))
        await call.write(http(200, orjson.dumps({"in_flight": left, "forgotten": 0})))

    return aside() | {"/scripted/requests": requests, "/scripted/counts": counts, "/v1/models": MODELS}


def test_lost_duplicated_and_leaked_generations_are_found() -> None:
    async def scenario() -> Point:
        async with ScriptedEngine([reset()], default=streamed()) as engine:
            engine.side = accounting(
                engine, {3: ["completed", "completed"], 4: ["aborted"], 5: ["in_flight"]}
            )
            bench = Bench(workload=WORKLOAD, loads=[Load(concurrency=1)], extent=Extent(count=8), processes=1)
            async with standing(StandSpec(urls=[engine.url])) as stand:
                (point,) = await measure(bench, stand)
            return point

    account = run(scenario()).account
    assert account is not None
    # Number 0 was completed, as its engine says, and its answer was lost on the way.
    assert (account.generated, account.lost, account.duplicated, account.orphaned) == (7, 1, 1, 1)
    assert {kind: [int(id.rpartition(".")[2]) for id in ids] for kind, ids in account.examples.items()} == {
        "lost": [0], "duplicated": [3], "orphaned": [5],
    }  # fmt: skip


def test_a_trace_is_replayed_at_its_times_to_its_end(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    trace.write_text(
        "\n".join(f'{{"timestamp": {1000 + 100 * n}, "prompt": "p{n}", "max_tokens": 2}}' for n in range(8))
    )
    calls: list[tuple[float, str]] = []

    async def step(call: Call) -> None:
        calls.append((monotonic(), call.json["messages"][0]["content"]))
        await streamed()(call)

    async def scenario() -> int:
        side = aside() | {"/v1/models": MODELS}
        async with ScriptedEngine(default=step, side=side) as engine:
            words = ["--base-url", engine.url, "--trace", str(trace), "--processes", "1", "--out", str(out)]
            return await asyncio.to_thread(main, [*words, "--speed", "2"])

    assert run(scenario()) == 0
    assert [text for _, text in calls] == [f"p{n}" for n in range(8)]
    gaps = [later - earlier for (earlier, _), (later, _) in zip(calls, calls[1:], strict=False)]
    assert sum(gaps) == pytest.approx(0.35, abs=0.15)
    assert load(out).points[0].completed == 8


def job(engine: ScriptedEngine, **extent: Any) -> Job:
    target = Target(urls=[engine.url], asker="raw", model="m")
    load = Load(concurrency=6)
    return Job(run="bench.t", target=target, load=load, extent=Extent(**extent), seed=1, start=0.0)


def test_processes_share_the_load_and_end_with_the_block() -> None:
    async def scenario() -> None:
        async with ScriptedEngine(default=streamed(0.02)) as engine:
            async with Generators(WORKLOAD, 2) as generators:
                beats: list[Sequence[Beat | None]] = []
                for _ in range(2):
                    tallies = await generators.measure(
                        job(engine, duration=0.6), lambda b: beats.append([*b])
                    )
                    assert [tally.sent > 0 for tally in tallies] == [True, True]
                    assert not any(tally.errors for tally in tallies)
                assert beats
                pids = generators.pids
            assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]  # noqa: ASYNC240
            numbers = [int(call.headers["x-request-id"].rpartition(".")[2]) for call in engine.calls]
            assert engine.most_in_flight == 6
            assert {number % 2 for number in numbers} == {0, 1}

    run(scenario())


def test_a_process_does_not_take_its_own_job_for_the_end_of_its_parent() -> None:
    async def scenario() -> None:
        ours, theirs = multiprocessing.Pipe()
        told = asyncio.Event()
        told.set()  # once more for the job, which has been taken already
        asyncio.get_running_loop().add_reader(theirs.fileno(), told.set)
        gone = asyncio.create_task(parent_gone(theirs, told))
        await asyncio.sleep(0.05)
        assert not gone.done()
        ours.close()
        await asyncio.wait_for(gone, 30)
        asyncio.get_running_loop().remove_reader(theirs.fileno())
        theirs.close()

    run(scenario())


def test_a_process_that_dies_is_an_error() -> None:
    async def scenario() -> None:
        async with ScriptedEngine(default=stall()) as engine, Generators(WORKLOAD, 1) as generators:
            work = asyncio.ensure_future(generators.measure(job(engine, duration=20)))
            await engine.arrived(6)
            os.kill(generators.pids[0], signal.SIGKILL)
            with pytest.raises(GeneratorDied):
                await work

    run(scenario())


def test_the_command_measures_layers_saves_reports_and_fails_where_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, html = tmp_path / "result.json", tmp_path / "result.html"
    words = ["--layers", "engine,router,client", "--concurrency", "4", "--num-prompts", "40", "--warmup", "0"]
    words += ["--output-len", "8", "--engine-args", "itl=5ms", "--processes", "1", "--num-engines", "1"]
    words += ["--out", str(out), "--html", str(html), "--fail-if", "errors>0", "p50_e2el>5s", "lost>0"]
    assert main(words) == 0
    printed = capfd.readouterr().out
    assert printed.startswith(("valid: ", "INVALID: "))
    assert "what each layer adds" in printed
    result = load(out)
    assert [(point.layer, point.completed, point.failed) for point in result.points] == [
        (layer, 40, 0) for layer in ("engine", "router", "client")
    ]
    for point in result.points:
        assert point.account is not None and point.account.generated == 40
        assert point.output_tokens == 320
        assert point.engines[0].requests == 40
        assert 30 <= point.latency["e2el"].percentiles["p50"] <= 5000
        assert 0 < point.latency["itl"].mean <= 1000, "pieces may come together on a busy machine"
    assert "<svg" in html.read_text()
    assert main(["compare", str(out), str(out)]) == 0
    assert "router at 4 in flight" in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_measured_survives_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    out, html = tmp_path / "result.json", tmp_path / "result.html"
    # The first load takes a second, the second one sixteen.
    words = ["--concurrency", "20,1", "--num-prompts", "20", "--processes", "1", "--output-len", "8"]
    words += ["--engine-args", "itl=100ms", "--out", str(out), "--html", str(html)]
    child = subprocess.Popen(
        [sys.executable, "-m", "penstock", "bench", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stderr is not None
        assert child.stderr.readline().startswith("1/2 engine at 20 in flight")
        child.send_signal(number)
        printed, errors = child.communicate(timeout=60)
    finally:
        child.kill()
        child.communicate()
    assert (child.returncode, errors) == (130, "")
    assert "stopped before the last one" in printed.partition("\n")[0]
    result = load(out)
    assert result.interrupted and [point.completed for point in result.points] == [20]
    assert "<svg" in html.read_text()


@pytest.mark.slow
def test_chaos_is_recovered_from_by_the_client_and_attributed(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["--layers", "engine,client-engine", "--concurrency", "10", "--num-prompts", "80"]
    words += ["--output-len", "8", "--engine-args", "itl=5ms", "--processes", "1", "--timeout", "1"]
    words += ["--chaos", "reset:0.1,stall:0.02,503:0.1,half:0.05,kill:every=2s:first=1s:down=200ms"]
    assert main([*words, "--resume-streams", "--drain", "20", "--out", str(out)]) == 0
    engine, client = load(out).points
    assert engine.failed and client.failed == 0
    assert client.retries and client.account is not None and client.account.recovered
    assert client.account.lost == client.account.duplicated == 0
    assert engine.account is not None and {"reset", "503"} <= set(engine.account.unanswered)
    assert {finding.part for finding in findings([engine])} == {"engine, on purpose"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "one of --concurrency"),
        (["--concurrency", "4", "--request-rate", "3"], "one of --concurrency"),
        (["--concurrency", "1.5"], "whole numbers"),
        (["--request-rate", "inf"], "number of prompts"),
        (["--request-rate", "inf", "--num-prompts", "9", "--warmup", "1"], "no warm-up"),
        (["--trace", "TRACE", "--group-size", "2"], "not replayed in groups"),
        (["--concurrency", "4", "--layers", "engines"], "no layer"),
        (["--concurrency", "4", "--fail-if", "p99_foo>1"], "did you mean"),
        (["--concurrency", "4", "--goodput", "ttft"], "ttft:200"),
        (["--concurrency", "4", "--goodput", "ttft:3", "--no-stream"], "without streaming"),
        (["--concurrency", "4", "--pause", "3"], "--pause-every"),
        (["--concurrency", "4", "--engine", "vllm"], "Which model"),
        (["--concurrency", "4", "--chaos", "reset"], "probability"),
        (["--concurrency", "4", "--chaos", "reset:0.1", "--engine", "embedded"], "only scripted engines"),
        (["--concurrency", "600000", "--layers", "router", "--processes", "100"], "local ports"),
        (["--concurrency", "4", "--timeout", "0"], "timeout must be positive"),
        (["--concurrency", "4", "--max-in-flight", "1"], "2 processes"),
        (["--concurrency", "4", "--input-len", "many"], "length"),
        (["--concurrency", "4", "--duration", "3", "--num-prompts", "3"], "one of them"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_sentence(words: list[str], named: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text('{"timestamp": 0, "prompt": "a", "max_tokens": 1}')
    words = [str(trace) if word == "TRACE" else word for word in words]
    with pytest.raises(ConfigError, match=named):
        main(words)
