"""/metrics: complete, valid and true; the access log: complete, and nothing secret in it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from penstock.router.server import RouterServer
from tests.router.front import Peer, endpoints, engine, scenario, sse
from tests.router.test_resume import ASKED, BODY, DONE, event, stream
from tests.scripted import Call, answer, refuse, reset, stall, until

PREFIX = "penstock_router_"
COUNTERS = {
    "requests",
    "retries",
    "queue_full",
    "queue_timeouts",
    "given_up",
    "refused",
    "client_gone",
    "broken",
    "resumed",
    "worker_responses",
    "worker_transport_errors",
    "worker_retries",
    "worker_breaker_openings",
    "worker_bytes_sent",
    "worker_bytes_received",
}
GAUGES = {
    "info",
    "start_time_seconds",
    "requests_in_flight",
    "slots_taken",
    "slots",
    "queue_depth",
    "worker_in_flight",
    "worker_limit",
    "worker_state",
}
HISTOGRAMS = {"queue_seconds", "worker_seconds", "worker_first_byte_seconds"}


def test_every_metric_has_its_type_its_help_and_a_conventional_name() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        await peer.ask()
        status, headers, said = await peer.get("/metrics")
        assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
        families = list(text_string_to_metric_families(said.decode()))
        kinds = {family.name.removeprefix(PREFIX): family.type for family in families}
        expected = dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(GAUGES, "gauge")
        assert kinds == expected | dict.fromkeys(HISTOGRAMS, "histogram")
        assert all(family.documentation and family.name.startswith(PREFIX) for family in families)
        for family in families:
            names = {sample.name for sample in family.samples}
            if family.type == "counter":
                assert names == {f"{family.name}_total"}
            if family.type == "histogram":
                _check_histogram(family)
        declared = re.findall(rb"# TYPE (\S+)", said)
        assert len(declared) == len(set(declared)) == len(families), "each is declared once"

    scenario(body, engine(), engine())


def _check_histogram(family: Metric) -> None:
    by_worker: dict[str, list[float]] = {}
    counts = {}
    for sample in family.samples:
        worker = sample.labels.get("worker", "")
        if sample.name.endswith("_bucket"):
            by_worker.setdefault(worker, []).append(sample.value)
        elif sample.name.endswith("_count"):
            counts[worker] = sample.value
    for worker, buckets in by_worker.items():
        assert buckets == sorted(buckets) and buckets[-1] == counts[worker]


def test_the_numbers_are_true() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        sizes = []
        while one.script:  # a 500 and a reset, each answered by the second worker
            status, _, said = await peer.ask(b"x" * 100)
            assert status == 200
            sizes.append(len(said))
        count = len(sizes)
        first, second = (f"http://127.0.0.1:{worker.port}" for worker in (one, two))
        shown = await _metrics(peer)
        assert shown("requests_total") == count and shown("retries_total") == 2
        assert shown("worker_retries_total", worker=first) == 2
        assert shown("worker_transport_errors_total", worker=first) == 1
        assert shown("worker_responses_total", worker=first, code="5xx") == 1
        assert shown("worker_responses_total", worker=second, code="2xx") == count
        assert shown("worker_bytes_sent_total", worker=first) == 200
        assert shown("worker_bytes_sent_total", worker=second) == 100 * count
        assert shown("worker_bytes_received_total", worker=second) == sum(sizes)
        assert shown("worker_seconds_count", worker=second) == count
        assert shown("worker_first_byte_seconds_count", worker=first) == 1
        assert shown("worker_limit", worker=first) == 1
        assert shown("worker_breaker_openings_total", worker=first) == 1
        assert shown("worker_state", worker=first, state="open") == 1
        assert shown("worker_state", worker=first, state="up") == 0
        await _busy(server, peer)

    async def _busy(server: RouterServer, peer: Peer) -> None:
        """One in flight, one that waits, one that is turned away."""
        others = [await Peer.to(server) for _ in range(3)]
        dispatch = server.router.fleet.dispatch
        two.script.append(stall())
        others[0].post()
        await until(lambda: dispatch.in_flight == 1)
        others[1].post()
        await until(lambda: dispatch.waiting == 1)
        assert (await others[2].ask())[0] == 429
        shown = await _metrics(peer)
        assert shown("worker_in_flight", worker=two.url) == 1
        assert shown("slots_taken") == shown("queue_depth") == shown("queue_full_total") == 1
        assert shown("requests_in_flight") == 3  # this one too
        others[0].close()
        assert (await others[1].response())[0] == 200
        shown = await _metrics(peer)
        assert shown("queue_seconds_count") >= 1 and shown("client_gone_total") == 1
        for other in others[1:]:
            other.close()

    one, two = engine(reset(), refuse(500)), engine()
    scenario(
        body, one, two,
        policy="round_robin", worker_max_in_flight=1, queue_size=1, cb_failure_threshold=2,
        cb_timeout_duration_secs=60.0,
    )  # fmt: skip


def test_bytes_are_counted_as_they_arrive() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        leaver = await Peer.to(server)
        leaver.post()
        await leaver.head()
        assert await leaver.chunk() == b"data: 1\n\n"
        assert (await _metrics(peer))("worker_bytes_received_total", worker=one.url) == 9
        leaver.close()
        await until(lambda: server.router.statistics.cancelled)
        assert (await _metrics(peer))("worker_bytes_received_total", worker=one.url) == 9

    one = engine(sse(b"data: 1\n\n", then=stall()))
    scenario(body, one)


def test_a_stream_that_is_continued_counts_at_both_workers() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        found, whole = await stream(peer, BODY, ASKED)
        assert whole and found[-1] == "DONE"
        shown = await _metrics(peer)
        assert shown("resumed_total") == shown("retries_total") == 1
        for worker, failed in ((one.url, 1), (two.url, 0)):
            assert shown("worker_transport_errors_total", worker=worker) == failed
            assert shown("worker_retries_total", worker=worker) == failed
            assert shown("worker_responses_total", worker=worker, code="2xx") == 1 - failed
            assert shown("worker_seconds_count", worker=worker) == 1 - failed
            assert shown("worker_first_byte_seconds_count", worker=worker) == 1
            assert shown("worker_bytes_received_total", worker=worker) > 50

    async def hang_up(call: Call) -> None:
        call.close()

    one = engine(sse(event("one"), then=hang_up))
    two = engine(sse(event("two", finish="stop"), DONE))
    scenario(body, one, two, policy="round_robin")


def test_a_request_no_worker_answers_is_counted() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        assert (await peer.ask())[0] == 502
        assert (await _metrics(peer))("given_up_total") == 1

    scenario(body, engine(default=reset()), retry_max_retries=0)


async def _metrics(peer: Peer) -> Any:
    """Looks up a sample by its name and labels."""
    said = (await peer.get("/metrics"))[2].decode()
    samples = [
        sample for family in text_string_to_metric_families(said) for sample in _samples(family.samples)
    ]

    def look(name: str, **labels: str) -> float:
        (found,) = [value for (n, given, value) in samples if n == PREFIX + name and given == labels]
        return found

    return look


def _samples(samples: Iterable[Any]) -> Iterable[tuple[str, dict[str, str], float]]:
    return [(sample.name, sample.labels, sample.value) for sample in samples if "le" not in sample.labels]


def test_the_access_log_tells_the_whole_way_and_no_secret(tmp_path: Path) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        key = b"authorization: Bearer s3cret\r\n"
        await peer.ask(b'{"prompt":"s3cret"}', "/v1/completions?token=s3cret", key + b"x-request-id: r1\r\n")
        await peer.ask(fields=b"authorization: Bearer wr0ng-s3cret\r\n")
        holder, waiter = await Peer.to(server), await Peer.to(server)
        holder.post(fields=key)
        await until(lambda: server.router.fleet.dispatch.in_flight == 1)
        waiter.post(fields=key)
        await until(lambda: server.router.fleet.dispatch.waiting == 1)
        await asyncio.sleep(0.05)
        assert (await holder.response())[0] == (await waiter.response())[0] == 200
        names.extend(
            "{}:{}".format(*one.writer.get_extra_info("sockname")) for one in (peer, peer, holder, waiter)
        )
        holder.close()
        waiter.close()
        assert endpoints(server)[0].in_flight == 0

    path, names = tmp_path / "access.jsonl", list[str]()
    one = engine(refuse(503), answer(), answer(delay=0.2), answer())
    scenario(body, one, access_log=str(path), api_key="s3cret", worker_max_in_flight=1)
    text = path.read_text()
    assert "s3cret" not in text
    first, denied, held, waited = [orjson.loads(line) for line in text.splitlines()]
    assert list(first) == [
        "time", "id", "client", "method", "path", "status", "worker", "attempts",
        "bytes_in", "bytes_out", "queue_seconds", "first_byte_seconds", "seconds",
    ]  # fmt: skip
    assert [line["client"] for line in (first, denied, held, waited)] == names
    assert (first["id"], first["path"], first["attempts"], first["bytes_in"]) == (
        "r1",
        "/v1/completions",
        2,
        19,
    )
    assert first["bytes_out"] > 50 and first["worker"] == one.url
    assert (denied["status"], denied["worker"], denied["attempts"]) == (401, None, 0)
    assert denied["first_byte_seconds"] is None
    assert held["queue_seconds"] == 0 and 0.2 <= held["first_byte_seconds"] <= held["seconds"]
    assert 0.05 <= waited["queue_seconds"] <= waited["first_byte_seconds"] <= waited["seconds"]
