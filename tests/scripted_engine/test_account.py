"""What became of each request."""

from __future__ import annotations

from penstock.scripted.account import Account


def test_a_request_ends_once() -> None:
    account = Account()
    entry = account.arrived("a")
    assert account.counts()["in_flight"] == 1
    account.ended(entry, "completed", 5)
    account.ended(entry, "aborted", 7)
    counts = account.counts()
    assert (counts["in_flight"], counts["completed"], counts["aborted"]) == (0, 1, 0)
    assert [seen["tokens"] for seen in account.requests()] == [5]


def test_attempts_belong_to_the_request_that_was_seen_here() -> None:
    account = Account()
    for id in ("x-a", "x-a-2", "x-a-3", "row-2", "row-3", "x-2"):
        account.ended(account.arrived(id), "completed")
    bases = {seen["id"]: seen["base"] for seen in account.requests()}
    assert bases["x-a-2"] == bases["x-a-3"] == "x-a"
    assert (bases["row-2"], bases["row-3"], bases["x-2"]) == ("row-2", "row-3", "x-2")
    assert account.counts()["duplicated"] == 2
    assert len(list(account.requests(id="x-a"))) == 3


def test_the_same_id_twice_is_a_duplicate() -> None:
    account = Account()
    for _ in range(2):
        account.ended(account.arrived("a"), "completed")
    assert account.counts()["duplicated"] == 1


def test_memory_is_bounded_and_counts_are_not_touched_by_it() -> None:
    account = Account(max_requests=10)
    held = account.arrived("held")
    for number in range(100):
        account.ended(account.arrived(f"r{number}"), "completed")
    counts = account.counts()
    assert (counts["seen"], counts["completed"], counts["remembered"]) == (101, 100, 10)
    assert counts["forgotten"] == 91
    ids = [seen["id"] for seen in account.requests()]
    assert ids[0] == "held" and ids[-1] == "r99"
    account.ended(held, "aborted")
    assert [seen["id"] for seen in account.requests(state="aborted")] == ["held"]


def test_a_reset_keeps_what_is_in_flight() -> None:
    account = Account()
    account.ended(account.arrived("a"), "completed")
    held = account.arrived("b")
    account.reset()
    assert account.counts()["seen"] == 1 and account.counts()["completed"] == 0
    account.ended(held, "completed")
    assert account.counts()["completed"] == 1
