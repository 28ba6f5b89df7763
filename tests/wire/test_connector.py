"""The line for connections, over dials that succeed and fail as told: nobody starves, nothing is lost."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError, ConnectFailed, PenstockError
from penstock.wire.address import Address
from penstock.wire.connection import Connection
from penstock.wire.connector import CONNECTING, Connector
from penstock.wire.dial import Dialer
from tests.scripted import run


class FakeConnection:
    def __init__(self, served: int = 0) -> None:
        self.alive = True
        self.served = served

    def abort(self) -> None:
        self.alive = False


class Ephemeral(FakeConnection):
    """Alive at the first look, and not at the next."""

    @property
    def alive(self) -> bool:
        self.looks += 1
        return self.looks == 1

    @alive.setter
    def alive(self, _: bool) -> None:
        self.looks = 0


class FakeDialer:
    """Every dial waits until it is told its end."""

    def __init__(self) -> None:
        self.dials: list[asyncio.Future[FakeConnection]] = []
        self.forgotten = 0

    async def connect(self) -> FakeConnection:
        dial: asyncio.Future[FakeConnection] = asyncio.get_running_loop().create_future()
        self.dials.append(dial)
        try:
            return await dial
        finally:
            self.dials.remove(dial)

    def forget(self) -> None:
        self.forgotten += 1


class Stand:
    """A connector, its dials, and those who ask it."""

    def __init__(self) -> None:
        self.dialer = FakeDialer()
        self.spare: list[FakeConnection] = []
        self.connector = Connector(
            Address.parse("127.0.0.1:9"), cast(Dialer, self.dialer), None, cast(Any, self.spare.append)
        )
        self.asking: list[asyncio.Task[Connection]] = []

    def ask(self, *, fresh: bool = False) -> asyncio.Task[Connection]:
        task = asyncio.get_running_loop().create_task(self.connector.connection(fresh=fresh))
        self.asking.append(task)
        return task

    def offer(self, connection: FakeConnection) -> bool:
        return self.connector.offer(cast(Connection, connection))

    @property
    def waiting(self) -> int:
        return sum(not task.done() for task in self.asking)


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


def test_a_released_connection_goes_to_who_has_waited_longest() -> None:
    async def main() -> None:
        stand = Stand()
        first, fresh, second = stand.ask(), stand.ask(fresh=True), stand.ask()
        await settle()
        used, made = FakeConnection(served=1), FakeConnection()
        assert stand.offer(used)
        stand.dialer.dials[0].set_result(made)
        await settle()
        assert first.result() is cast(Any, used) and fresh.result() is cast(Any, made)
        assert not second.done()
        stand.dialer.dials[0].set_result(FakeConnection())
        stand.dialer.dials[1].set_result(FakeConnection())  # its waiter was served by another
        await settle()
        assert second.done() and len(stand.spare) == 1
        assert not stand.offer(FakeConnection(served=1))

    run(main())


def test_so_many_dials_at_a_time_and_the_rest_share_their_failure() -> None:
    async def main() -> None:
        stand = Stand()
        for _ in range(3 * CONNECTING):
            stand.ask()
        await settle()
        assert len(stand.dialer.dials) == CONNECTING
        stand.dialer.dials[0].set_exception(ConnectionRefusedError(111, "refused"))
        await settle()
        failed = [task for task in stand.asking if task.done()]
        assert len(failed) == 2 * CONNECTING + 1 and not stand.asking[0].done()
        errors = {id(error := task.exception()): error for task in failed}
        assert len(errors) == len(failed) and {type(error) for error in errors.values()} == {ConnectFailed}
        for task in stand.asking:
            task.cancel()
        await asyncio.wait(stand.asking)
        await settle()
        assert stand.dialer.dials == []

    run(main())


def test_a_connection_that_dies_before_its_receiver_wakes() -> None:
    async def main() -> None:
        stand = Stand()
        one, two = stand.ask(), stand.ask()
        await settle()
        used = FakeConnection(served=1)
        assert stand.offer(used)
        used.abort()
        stand.dialer.dials[0].set_result(Ephemeral())
        await settle()
        with pytest.raises(ConnectFailed, match="reset"):
            two.result()
        assert not one.done()  # the server closed a connection it had kept: another is made
        stand.dialer.dials[0].set_result(FakeConnection())
        await settle()
        assert one.done()

    run(main())


def test_closing_ends_all_who_wait_and_all_that_is_made() -> None:
    async def main() -> None:
        stand = Stand()
        stand.ask(), stand.ask(fresh=True)
        await settle()
        stand.connector.close()
        await settle()
        assert {type(task.exception()) for task in stand.asking} == {ConfigError}
        assert stand.dialer.dials == []
        with pytest.raises(ConfigError):
            await stand.connector.connection()

    run(main())


KINDS = ["ask", "fresh", "offer", "made", "fail", "cancel", "turn"]
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 99)),
    max_size=60,
)


@given(STEPS)
def test_nobody_starves_and_no_connection_is_lost(steps: list[tuple[str, int]]) -> None:
    async def main() -> None:
        stand = Stand()
        known: list[FakeConnection] = []
        kept: list[FakeConnection] = []  # the pool keeps what nobody waits for
        for kind, number in steps:
            if kind in ("ask", "fresh"):
                stand.ask(fresh=kind == "fresh")
            elif kind == "offer":
                known.append(FakeConnection(served=1))
                if not stand.offer(known[-1]):
                    kept.append(known[-1])
            elif kind == "cancel" and stand.asking:
                stand.asking[number % len(stand.asking)].cancel()
            elif kind == "turn":
                await settle()
            elif kind in ("made", "fail"):
                dials = [dial for dial in stand.dialer.dials if not dial.done()]
                if dials and kind == "made":
                    known.append(FakeConnection())
                    dials[number % len(dials)].set_result(known[-1])
                elif dials:
                    dials[number % len(dials)].set_exception(OSError(113, "no route"))
        await settle()
        assert len(stand.dialer.dials) >= min(stand.waiting, CONNECTING)
        given_ = [
            cast(Any, task.result())
            for task in stand.asking
            if task.done() and not task.cancelled() and task.exception() is None
        ]
        holders = [*given_, *stand.spare, *kept]
        assert len(set(map(id, holders))) == len(holders)
        # A dial that was cancelled as it ended closes its connection itself.
        assert set(map(id, holders)) <= set(map(id, known))
        lost = set(map(id, known)) - set(map(id, holders))
        assert not any(id(one) in lost for one in known if one.served)
        stand.connector.close()
        for task in stand.asking:
            try:
                await task
            except (asyncio.CancelledError, PenstockError):
                pass

    run(main())
