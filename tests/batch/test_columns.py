"""Rows that differ survive the way into tables and back."""

from __future__ import annotations

from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.batch import columns as kinds
from penstock.batch.columns import Columns, Shape
from penstock.batch.parquet import batches

names = st.text(max_size=3)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
rows = st.lists(
    st.dictionaries(st.sampled_from(["a", "b", "c", "é"]), values, max_size=4), min_size=1, max_size=8
)


def through_parquet(rows: list[dict[str, Any]], columns: Columns) -> pa.Table:
    """`rows` written and read again, in memory."""
    file = pa.BufferOutputStream()
    sized = ((1, row) for row in rows)
    schema = columns.schema()
    pq.write_table(pa.Table.from_batches(batches(sized, schema, columns.fits()), schema), file)
    return pq.read_table(pa.BufferReader(file.getvalue()))


def restored(shape: Shape, value: Any) -> Any:
    """A value as it was before JSON text was made of it."""
    if value is None:
        return None
    if shape.is_json:
        return msgspec.json.decode(value)
    if shape.items is not None:
        return [restored(shape.items, item) for item in value]
    if shape.fields is not None:
        return {name: restored(each, value[name]) for name, each in shape.fields.items()}
    return value


def without_nulls(value: Any) -> Any:
    """In an object, null and a key that is not there are the same."""
    if isinstance(value, dict):
        return {name: found for name, item in value.items() if (found := without_nulls(item)) is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@given(rows)
def test_rows_of_any_schema_survive(found: list[dict[str, Any]]) -> None:
    columns = Columns().see_all(found)
    if not columns.shapes:
        return
    table = through_parquet(found, columns)
    assert table.schema.equals(columns.schema())
    read = [
        {name: restored(columns.shapes[name], value) for name, value in row.items()}
        for row in table.to_pylist()
    ]
    assert without_nulls(read) == without_nulls(found)
    # What was learnt survives being written down, and being learnt again changes nothing.
    again = Columns.load(columns.dump()).see_all(found)
    assert again.schema() == columns.schema()


@pytest.mark.parametrize(
    ("met", "type", "is_json"),
    [
        ([1, None, 2], "int64", False),
        ([1, 2.5], "double", False),
        ([2**53 + 1, 2.5], "string", True),
        ([2**64 - 1, 1], "uint64", False),
        ([2**64, 1], "string", True),
        ([2**63, -1], "string", True),
        ([True, 1], "string", True),
        ([1, "x"], "string", True),
        ([None], "string", False),
        ([[], [1], [2.5]], "list<item: double>", False),
        ([{"a": 1}, {"b": "x"}], "struct<a: int64, b: string>", False),
        ([{}, {}], "string", True),
        ([[1], ["x"]], "list<item: string>", True),
    ],
)
def test_a_type_is_the_narrowest_that_holds_everything(met: list[Any], type: str, is_json: bool) -> None:
    columns = Columns().see_all([{"x": value} for value in met])
    assert str(columns.schema().field("x").type) == type
    assert columns.as_json() == (["x"] if is_json else [])


def test_an_object_with_ever_new_keys_is_a_map() -> None:
    columns = Columns().see_all([{"x": {f"key {i}": i}} for i in range(kinds.MOST_FIELDS + 1)])
    assert columns.as_json() == ["x"]
    assert len(columns.dump()) < 200


def test_what_is_too_deep_becomes_text() -> None:
    value: Any = 1
    for _ in range(200):
        value = [value]
    assert Columns().see_all([{"x": value}]).as_json() == ["x"]
