"""The dashboard: one page at /dashboard, and the numbers it asks for once a second at /dashboard/data.

It guarantees:
- the page holds everything it needs and is allowed nothing else: its content security policy names its own
  script and style by their digests, and no other origin;
- the page itself shows nothing; the numbers need the admin key where there is one, which the page asks for
  and keeps in the tab;
- a request costs nothing here: the numbers are the router's counts, rates and percentiles the page's work.
"""

from __future__ import annotations

import re
import time
from base64 import b64encode
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import orjson

from penstock import __version__
from penstock.router.snapshot import Snapshot, WorkerSnapshot
from penstock.router.statistics import BUCKETS, Histogram
from penstock.wire.exchange import Exchange

PAGE: Final = "/dashboard"
DATA: Final = "/dashboard/data"

_PAGE_FILE: Final = Path(__file__).with_name("dashboard.html")


def show_page(exchange: Exchange) -> None:
    """Answers with the page."""
    body, headers = _page()
    exchange.respond(200, body, "text/html; charset=utf-8", headers)


def show_data(exchange: Exchange, shown: Snapshot) -> None:
    """Answers with the numbers."""
    exchange.respond(200, orjson.dumps(data(shown)), headers={"cache-control": "no-store"})


def data(shown: Snapshot) -> dict[str, Any]:
    """What the page is given: counts since the beginning, seconds, bytes. Times are seconds since 1970."""
    counts, workers = shown.counts, shown.workers
    return {
        "time": time.time(),
        "started": shown.started,
        "version": __version__,
        "policy": shown.policy,
        "slots": shown.slots,
        "cap": shown.cap,
        "waiting": shown.waiting,
        "requests": counts.requests,
        "retries": shown.retries,
        "queue_full": counts.queue_full,
        "queue_timeouts": counts.queue_timeouts,
        "given_up": counts.given_up,
        "bounds": Histogram.bounds(),
        "queued": counts.queued.counts,
        "first_byte": _summed(worker.counts.first_byte for worker in workers),
        "latency": _summed(worker.counts.latency for worker in workers),
        "workers": [_worker(worker) for worker in workers],
    }


def _worker(worker: WorkerSnapshot) -> dict[str, Any]:
    counts = worker.counts
    return {
        "name": worker.name,
        "state": worker.state,
        "error": worker.error,
        "in_flight": worker.in_flight,
        "limit": worker.limit,
        "begun": sum(counts.first_byte.counts),
        "waited": counts.first_byte.total,
        "ended": sum(counts.latency.counts),
        "seconds": counts.latency.total,
        "errors": counts.responses[5] + counts.transport_errors,
        "rejected": counts.responses[4],
        "retries": counts.retries,
        "openings": counts.openings,
        "sent": counts.bytes_sent,
        "received": counts.bytes_received,
    }


def _summed(histograms: Iterable[Histogram]) -> list[int]:
    columns = zip(*(histogram.counts for histogram in histograms), strict=True)
    return [sum(column) for column in columns] or [0] * BUCKETS


@cache
def _page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers."""
    body = _PAGE_FILE.read_bytes()
    policy = [
        "default-src 'none'",
        f"script-src {_digest(body, b'script')}",
        f"style-src {_digest(body, b'style')}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return body, {
        "content-security-policy": "; ".join(policy),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


def _digest(page: bytes, element: bytes) -> str:
    """What names the page's one script or style in its policy."""
    found = re.search(rb"<%s>(.*?)</%s>" % (element, element), page, re.DOTALL)
    assert found is not None
    return f"'sha256-{b64encode(sha256(found[1]).digest()).decode('ascii')}'"
