"""What columns a stream of rows has, when nobody said: types that grow with what they meet.

Guarantees: no value is lost. A type that has met all rows holds every one of them: whole numbers and
fractions become fractions where no digit is lost by it, objects have the keys of all of them; what cannot be
one type (text here, a number there) becomes JSON text, each value as its own JSON. Only null and a key that
is not there are the same. The state is small, and can be written down and taken up again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

if TYPE_CHECKING:
    import pyarrow as pa

MOST_FIELDS: Final = 256
"""Keys of an object: one with more is a map, whose keys are data, and becomes JSON text."""

MOST_LEVELS: Final = 16
"""Lists and objects in each other: what is deeper becomes JSON text."""

EXACT: Final = 1 << 53
"""Whole numbers up to here are fractions without loss (64-bit floats)."""

JSON_METADATA: Final = {"penstock": "json"}
"""Marks a field of a schema whose text is JSON."""

Fit = Callable[[Any], Any]
"""Makes a value what its column holds; None where it already is."""

_encode = msgspec.json.Encoder(order="deterministic").encode


class Shape(msgspec.Struct, omit_defaults=True):
    """All that was met in one place. `see` takes in a value."""

    truth: bool = False
    text: bool = False
    fraction: bool = False
    low: int | None = None
    """Of the whole numbers; None: there were none."""
    high: int = 0
    items: Shape | None = None
    """What the lists held."""
    fields: dict[str, Shape] | None = None
    """What the objects held."""
    free: bool = False
    """JSON text, whatever comes."""

    def see(self, value: Any, level: int = 0) -> None:
        """Take in a value as it is decoded from JSON."""
        if value is None or self.free:
            return
        kind = type(value)
        if kind is str:
            self.text = True
        elif kind is int:
            if self.low is None:
                self.low = self.high = value
            elif value < self.low:
                self.low = value
            elif value > self.high:
                self.high = value
        elif kind is float:
            self.fraction = True
        elif kind is bool:
            self.truth = True
        elif level >= MOST_LEVELS:
            self.free = True
        elif kind is list:
            if self.items is None:
                self.items = Shape()
            for item in value:
                self.items.see(item, level + 1)
        else:
            self._see_object(value, level)

    def _see_object(self, value: Mapping[str, Any], level: int) -> None:
        if self.fields is None:
            self.fields = {}
        fields = self.fields
        for name, item in value.items():
            if (field := fields.get(name)) is None:
                field = fields[name] = Shape()
            field.see(item, level + 1)
        if level and len(fields) > MOST_FIELDS:
            self.free, self.fields = True, None

    @property
    def is_json(self) -> bool:
        """Whether no type but JSON text holds all that was met."""
        number = self.low is not None or self.fraction
        kinds = self.truth + self.text + number + (self.items is not None) + (self.fields is not None)
        return self.free or kinds > 1 or self.fields == {} or (self.low is not None and not self._fits())

    def _fits(self) -> bool:
        """Whether a type of 64 bits holds the numbers."""
        assert self.low is not None
        if self.fraction:
            return self.low >= -EXACT and self.high <= EXACT
        lowest, end = (0, 1 << 64) if self.high >= 1 << 63 else (-(1 << 63), 1 << 63)
        return self.low >= lowest and self.high < end

    def field(self, name: str) -> pa.Field:
        """The column as Arrow has it. Text where all was null."""
        import pyarrow as pa

        if self.is_json:
            return pa.field(name, pa.string(), metadata=JSON_METADATA)
        if self.fields is not None:
            return pa.field(name, pa.struct([each.field(key) for key, each in self.fields.items()]))
        if self.items is not None:
            return pa.field(name, pa.list_(self.items.field("item")))
        return pa.field(name, self._number() or (pa.bool_() if self.truth else pa.string()))

    def _number(self) -> pa.DataType | None:
        import pyarrow as pa

        if self.fraction:
            return pa.float64()
        if self.low is None:
            return None
        return pa.int64() if self.high < 1 << 63 else pa.uint64()

    def fit(self) -> Fit | None:
        """How a value becomes what `field` holds; None: it does not change."""
        if self.is_json:
            return _as_json
        if self.items is not None and (fit := self.items.fit()) is not None:
            return _each(fit)
        if self.fields is not None:
            fits = {name: fit for name, each in self.fields.items() if (fit := each.fit()) is not None}
            return _keys(fits) if fits else None
        return None


class Columns:
    """The columns of a stream of rows, in the order in which they were first met."""

    def __init__(self, shape: Shape | None = None) -> None:
        self._shape = shape or Shape(fields={})

    def see(self, row: Mapping[str, Any]) -> None:
        """Take in a row, as it is decoded from JSON."""
        self._shape.see(row)

    def see_all(self, rows: Iterable[Mapping[str, Any]]) -> Self:
        for row in rows:
            self.see(row)
        return self

    @property
    def shapes(self) -> dict[str, Shape]:
        return self._shape.fields or {}

    def schema(self) -> pa.Schema:
        import pyarrow as pa

        return pa.schema([shape.field(name) for name, shape in self.shapes.items()])

    def as_json(self) -> list[str]:
        """The columns that are JSON text, wholly or somewhere within: several types came together there."""
        return [name for name, shape in self.shapes.items() if shape.fit() is not None]

    def fits(self) -> dict[str, Fit | None]:
        return {name: shape.fit() for name, shape in self.shapes.items()}

    @property
    def shape(self) -> Shape:
        """All that is known: what `Columns` begins with to know it again."""
        return self._shape

    def dump(self) -> bytes:
        return msgspec.json.encode(self._shape)

    @classmethod
    def load(cls, data: bytes) -> Columns:
        """What `dump` wrote. Raises msgspec.MsgspecError for what it did not."""
        return cls(msgspec.json.decode(data, type=Shape))


def _as_json(value: Any) -> str | None:
    return None if value is None else _encode(value).decode()


def _each(fit: Fit) -> Fit:
    return lambda values: None if values is None else [fit(value) for value in values]


def _keys(fits: Mapping[str, Fit]) -> Fit:
    def fit(value: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        if value is None:
            return None
        return {name: fits[name](item) if name in fits else item for name, item in value.items()}

    return fit
