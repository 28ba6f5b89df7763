"""The event loop of our own processes."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal

import pytest
import uvloop

from penstock.wire.loop import GC_THRESHOLD, Stop, raise_open_files, run


def test_the_collector_is_quiet_inside_and_as_before_outside() -> None:
    before = gc.get_threshold()
    gc.unfreeze()

    async def main() -> str:
        assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
        assert gc.get_threshold()[0] == GC_THRESHOLD
        assert gc.get_freeze_count() > 1000
        return "done"

    assert run(main()) == "done"
    assert gc.get_threshold() == before and gc.get_freeze_count() == 0


def test_what_main_raises_comes_out() -> None:
    async def main() -> None:
        raise KeyError("x")

    before = gc.get_threshold()
    with pytest.raises(KeyError):
        run(main())
    assert gc.get_threshold() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_answered_as_before_afterwards(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    async def main() -> None:
        stop = Stop()
        signal.raise_signal(number)
        await asyncio.wait_for(stop.wished, 5)

    run(main())
    assert signal.getsignal(number) is before


def test_the_limit_of_open_files_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        assert raise_open_files() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
