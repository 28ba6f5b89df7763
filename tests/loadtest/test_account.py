"""Lost, duplicated and orphaned generations are found, and nothing else is taken for one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.loadtest.account import Account, Record, account

STATES = ["completed", "in_flight", "aborted", "stopped", "refused", "faulted"]


def test_each_kind_is_found_and_named() -> None:
    records = [
        Record("bench.a.1", "completed"),
        Record("bench.a.2", "completed"),  # its answer never came
        Record("bench.a.3", "faulted", "503"),
        Record("bench.a.3-2", "completed"),  # tried again, once: fine
        Record("bench.a.4", "completed"),
        Record("bench.a.4-2", "completed"),
        Record("bench.a.4", "completed"),
        Record("bench.a.5", "in_flight"),
        Record("bench.a.6", "faulted", "reset"),
        Record("bench.a.6-2", "faulted", "503"),
        Record("bench.a.7", "aborted"),
        Record("bench.a.8", "completed", "slow"),
        Record("bench.b.2", "completed"),  # another run's
        Record("someone", "in_flight"),
    ]
    assert account("bench.a", {2, 3, 6, 7, 9}, records) == Account(
        generated=7,
        lost=2,
        duplicated=2,
        orphaned=1,
        examples={
            "lost": ["bench.a.2", "bench.a.3"],
            "duplicated": ["bench.a.4"],
            "orphaned": ["bench.a.5"],
        },
        faults={"503": 2, "reset": 1, "slow": 1},
        recovered=1,
        unanswered={"completed": 2, "503": 1, "aborted": 1, "unseen": 1},
    )


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3), st.sampled_from(STATES))),
    st.sets(st.integers(0, 9)),
)
def test_counts_agree_with_a_plain_count(seen: list[tuple[int, int, str]], unanswered: set[int]) -> None:
    records = [Record(f"x.{n}" if k == 1 else f"x.{n}-{k}", state) for n, k, state in seen]
    found = account("x", unanswered, records)
    completed = [number for number, _, state in seen if state == "completed"]
    assert found.generated == len(completed)
    assert found.duplicated == len(completed) - len(set(completed))
    assert found.lost == len(set(completed) & unanswered)
    assert found.orphaned == sum(state == "in_flight" for _, _, state in seen)
