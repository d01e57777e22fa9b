"""Fuzz `features load` with hostile Parquet files: it must store what a slow reader finds, or refuse the file.

The slow reader is part of this file. It reads one value at a time, as Python objects from Arrow, encodes them with
`struct`, and shares no code with the loader.
"""

from __future__ import annotations

import asyncio
import math
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from bench.harness import Claim, Conclusion, Raw
from feature_client.bulk.load import load
from feature_client.bulk.source import Source, SourceError
from feature_client.groups import Categorical, Embedding, EmbeddingSpace, FeatureGroup, Scalar
from feature_client.stores.memory_store import MemoryStore

CASES = 20_000
SEED = 0
_LETTERS = {
    "float16": "e", "float32": "f", "float64": "d", "int8": "b", "int32": "i", "int64": "q", "uint8": "B",
    "uint16": "H", "uint32": "I",
}  # fmt: skip


#: Parts of error messages, by which refusals are counted.
_REASONS = (
    "no column", "more than one column", "is missing", "needs numbers", "lists of", "write them as integers",
    "is negative", "is already in row", "is not a code", "is not finite", "is not a whole number", "loses digits",
    "does not fit", "is beyond the largest", "cannot hold exactly", "needs one number per row", "of width",
)  # fmt: skip


class WrongValueError(AssertionError):
    """The store differs from the slow reader's result, or the loader refused a valid file."""


@dataclass(slots=True)
class ParquetTally:
    """The outcomes of the cases."""

    cases: int = 0
    rows_stored: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    #: Number of refusals by reason.
    refusals: Counter[str] = field(default_factory=Counter)


# The slow reader.


def slow_read(table: pa.Table, group: FeatureGroup) -> dict[bytes, bytes] | None:
    """Return the values that the store must hold after a load, or None if the table must be refused."""
    if not _has_the_columns(table.schema, group):
        return None
    columns = {name: table.column(name).to_pylist() for name in ["id", *(f.name for f in group.fields)]}
    expected: dict[bytes, bytes] = {}
    for position, entity in enumerate(columns["id"]):
        if type(entity) is not int or not 0 <= entity < 2**64:
            return None
        row = b""
        for one in group.fields:
            value, kind = columns[one.name][position], table.schema.field(one.name).type
            stored = _slow_vector(value, kind, one) if isinstance(one, Embedding) else _slow_number(value, kind, one)
            if stored is None:
                return None
            row += stored
        key = f"{group.name}@{group.version}:".encode() + struct.pack(">Q", entity)
        if key in expected:
            return None
        expected[key] = group.fingerprint + row
    return expected


def _has_the_columns(schema: pa.Schema, group: FeatureGroup) -> bool:
    if any(schema.names.count(name) != 1 for name in ["id", *(f.name for f in group.fields)]):
        return False
    kinds = {one.name: schema.field(one.name).type for one in group.fields}
    return _is_plain(schema.field("id").type, whole=True) and all(
        _is_vector(kinds[one.name]) if isinstance(one, Embedding) else _is_plain(kinds[one.name])
        for one in group.fields
    )


def _is_plain(kind: pa.DataType, *, whole: bool = False) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        return True
    return not whole and (pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_vector(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and _is_plain(kind.value_type)


def _slow_vector(value: Any, kind: pa.DataType, wanted: Embedding) -> bytes | None:
    if value is None or len(value) != wanted.space.dim:
        return None
    parts = [_slow_bytes(one, kind.value_type, wanted.space.dtype) for one in value]
    return None if None in parts else b"".join(part for part in parts if part is not None)


def _slow_number(value: Any, kind: pa.DataType, wanted: Scalar | Categorical) -> bytes | None:
    if isinstance(wanted, Categorical) and (value is None or not 0 <= value < wanted.cardinality):
        return None
    return _slow_bytes(value, kind, wanted.dtype)


def _slow_bytes(value: Any, kind: pa.DataType, dtype: str) -> bytes | None:
    """Encode one number as `dtype`. Return None if that is not possible."""
    if value is None:
        return None
    letter = _LETTERS[dtype]
    try:
        if letter in "efd":
            as_float = float(value)
            if not math.isfinite(as_float):
                return None
            packed = struct.pack(f"<{letter}", as_float)
            # An integer is stored exactly or refused; a fraction is rounded to the nearest value. Python compares a
            # float with an integer exactly.
            whole = pa.types.is_integer(kind.value_type if pa.types.is_dictionary(kind) else kind)
            return None if whole and struct.unpack(f"<{letter}", packed)[0] != value else packed
        if isinstance(value, float):
            # Integers beyond the precision of their type may have been rounded.
            digits = {"halffloat": 11, "float": 24, "double": 53}
            name = str(kind.value_type if pa.types.is_dictionary(kind) else kind)
            if value != int(value) or abs(value) > 2 ** digits[name]:
                return None
        return struct.pack(f"<{letter}", int(value))
    except (OverflowError, struct.error, ValueError):
        return None


# The files.


def _group(vector: EmbeddingSpace, *others: Scalar | Categorical) -> FeatureGroup:
    return FeatureGroup(
        name="pins", version=1, entity="pin", fields=(Embedding(name="embedding", space=vector), *others)
    )


GROUPS = (
    _group(
        EmbeddingSpace(name="s", version=1, dim=2, dtype="float16"),
        Scalar(name="score"),
        Categorical(name="country", cardinality=200),
    ),
    _group(
        EmbeddingSpace(name="s", version=1, dim=3, dtype="float32"),
        Scalar(name="count", dtype="int32"),
        Categorical(name="country", cardinality=256),
    ),
    _group(
        EmbeddingSpace(name="s", version=1, dim=1, dtype="int8"),
        Scalar(name="count", dtype="int64"),
        Scalar(name="score", dtype="float64"),
    ),
    _group(
        EmbeddingSpace(name="s", version=1, dim=2, dtype="float32"),
        Categorical(name="country", cardinality=70_000),
        Categorical(name="kind", cardinality=2),
    ),
)
_INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
_FLOATS = (pa.float16(), pa.float32(), pa.float64())
_EDGES = (
    0, 1, 2, 7, 127, 128, 199, 200, 255, 256, 300, 2_048, 2_049, 65_504, 65_519, 65_520, 70_000, 2**24, 2**24 + 1,
    2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
_REALS = (
    0.5, 10.7, 300.0, 1e10, 65_519.99, 65_520.0, 1e-8, 1e-50, 3.4028234e38, 3.4028236e38, 1e39, 1e308, 2.0**53 + 2,
    float("nan"), float("inf"), -0.0,
)  # fmt: skip
_EXOTIC: tuple[tuple[pa.DataType, Any], ...] = (
    (pa.string(), "DE"), (pa.large_string(), "7"), (pa.binary(), b"\xff"), (pa.null(), None),
    (pa.timestamp("us"), 17), (pa.timestamp("ns", tz="UTC"), 17), (pa.date32(), 17), (pa.time32("ms"), 17),
    (pa.duration("s"), 17), (pa.decimal128(10, 2), None), (pa.struct([("x", pa.int64())]), {"x": 1}),
    (pa.map_(pa.string(), pa.int64()), [("x", 1)]), (pa.dictionary(pa.int32(), pa.string()), "DE"),
    (pa.list_(pa.string()), ["a"]), (pa.list_(pa.list_(pa.float32())), [[1.0]]), (pa.binary(2), b"ab"),
    (pa.list_(pa.timestamp("s")), [1]),
)  # fmt: skip


def _values(kind: pa.DataType) -> st.SearchStrategy[Any]:
    """Values of a plain type, including the limits of all other types."""
    if pa.types.is_dictionary(kind):
        return _values(kind.value_type)
    if pa.types.is_boolean(kind):
        return st.booleans()
    if pa.types.is_integer(kind):
        bits, signed = kind.bit_width, pa.types.is_signed_integer(kind)
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        edges = [edge for edge in (*_EDGES, -1, low) if low <= edge <= high]
        return st.sampled_from(edges)
    widths: dict[pa.DataType, Literal[16, 32, 64]] = {pa.float16(): 16, pa.float32(): 32, pa.float64(): 64}
    width = widths[kind]
    edges = [edge for edge in (*map(float, _EDGES), *_REALS, -1.0) if width == 64 or _fits(edge, width)]
    return st.one_of(st.sampled_from(edges), st.floats(width=width))


def _fits(value: float, width: int) -> bool:
    letter = "e" if width == 16 else "f"
    try:
        return math.isnan(value) or struct.unpack(letter, struct.pack(letter, value))[0] == value
    except OverflowError:
        return False


_NUMBERS = st.sampled_from((*_INTEGERS, *_FLOATS, pa.bool_(), pa.dictionary(pa.int8(), pa.int64())))
#: Changes that make a column differ from its field: mostly one value at the limit of a type.
_TWISTS = st.sampled_from(("edge",) * 12 + ("null", "exotic", "shape"))
_RARELY = st.integers(0, 9).map(lambda drawn: drawn == 0)
_VECTOR_OF = st.sampled_from((pa.float16(), pa.float32(), pa.float64(), pa.int8(), pa.int64()))


def _calm(draw: st.DrawFn, kind: pa.DataType, count: int) -> list[Any]:
    """Values that are valid for every field."""
    found: list[Any] = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    return [float(one) if kind in _FLOATS else bool(one) if kind == pa.bool_() else one for one in found]


def _column(draw: st.DrawFn, rows: int, usual: pa.DataType, twist: str | None) -> pa.Array:
    if twist == "exotic":
        kind, value = draw(st.sampled_from(_EXOTIC))
        return pa.array([value] * rows, kind)
    if twist == "shape":
        return _vectors(draw, rows, 1, None)
    if twist == "edge" and draw(st.booleans()):
        usual = draw(_NUMBERS)
    values = _calm(draw, usual, rows)
    if rows and twist is not None:
        values[draw(st.integers(0, rows - 1))] = draw(_values(usual)) if twist == "edge" else None
    return pa.array(values, usual)


def _vectors(draw: st.DrawFn, rows: int, dim: int, twist: str | None) -> pa.Array:
    if twist == "exotic":
        return _column(draw, rows, pa.float32(), draw(st.sampled_from(("exotic", None))))
    inner = draw(_NUMBERS if twist == "edge" and draw(st.booleans()) else _VECTOR_OF)
    make = draw(st.sampled_from((pa.list_, pa.large_list, lambda kind: pa.list_(kind, dim))))
    values: list[Any] = [_calm(draw, inner, dim) for _ in range(rows)]
    kind = make(inner)
    if rows and twist is not None:
        place = draw(st.integers(0, rows - 1))
        if twist == "edge":
            values[place][draw(st.integers(0, dim - 1))] = draw(_values(inner))
        elif twist == "null" or pa.types.is_fixed_size_list(kind):
            values[place] = draw(st.sampled_from((None, [None] * dim)))
        else:
            values[place] = draw(st.sampled_from(([], values[place][1:], values[place] * 2)))
            if place and draw(st.booleans()):  # wrong widths with the right sum
                values[place - 1] = values[place - 1] * 2
    return pa.array(values, kind)


def _ids(draw: st.DrawFn, rows: int, twist: str | None) -> pa.Array:
    if twist is not None:
        return _column(draw, rows, draw(_NUMBERS), twist)
    start = draw(st.sampled_from((0, 1, 2**31, 2**63 - 4, 2**63 + 5)))
    return pa.array([start + i for i in range(rows)], pa.uint64())


@st.composite
def tables(draw: st.DrawFn) -> tuple[FeatureGroup, pa.Table, int]:
    """A group, a table that may be a valid file for it, and the number of rows in a row group."""
    group = draw(st.sampled_from(GROUPS))
    rows = draw(st.sampled_from((0, 1, 2, 3, 3, 5, 8)))
    twisted = draw(st.sampled_from((None, "id", *2 * [one.name for one in group.fields])))

    def twist_of(name: str) -> str | None:
        twist: str | None = draw(_TWISTS) if name == twisted or (draw(_RARELY) and draw(_RARELY)) else None
        return twist

    made = {"id": _ids(draw, rows, twist_of("id"))}
    for one in group.fields:
        if isinstance(one, Embedding):
            made[one.name] = _vectors(draw, rows, one.space.dim, twist_of(one.name))
        else:
            usual = draw(st.sampled_from((pa.int64(), pa.uint8(), pa.int16(), pa.float32(), pa.float64())))
            made[one.name] = _column(draw, rows, usual, twist_of(one.name))
    table = _renamed(draw, rows, list(made.items()))
    return group, table, draw(st.sampled_from((1, 2, 100)))


def _renamed(draw: st.DrawFn, rows: int, columns: list[tuple[str, pa.Array]]) -> pa.Table:
    """The columns in any order, rarely with one added, missing or repeated."""
    if draw(_RARELY):
        columns.append(("note", pa.array(["x"] * rows, pa.string())))
    if draw(_RARELY) and draw(st.booleans()):
        columns.pop(draw(st.integers(0, len(columns) - 1)))
    if draw(_RARELY) and draw(st.booleans()):
        columns.append(draw(st.sampled_from(columns)))
    columns = draw(st.permutations(columns))
    return pa.Table.from_arrays([array for _, array in columns], names=[name for name, _ in columns])


# The run.


def check(group: FeatureGroup, table: pa.Table, row_group: int, path: Path, tally: ParquetTally) -> None:
    """Load one file and compare. Raises WrongValueError, or any unexpected exception of the loader."""
    tally.cases += 1
    pq.write_table(table, path, row_group_size=row_group)
    store = MemoryStore()
    expected = slow_read(table, group)
    try:
        asyncio.run(load(store, group, Source(path, group), lambda _: None))
    except SourceError as error:
        if expected is not None:
            raise WrongValueError(f"a valid file was refused: {error}") from error
        if any(not key.startswith(b"pinrank:") for key in store.values):
            raise WrongValueError(f"the file was refused, but a part of it was stored: {error}") from error
        if str(path) not in str(error):
            raise WrongValueError(f"the refusal does not name the file: {error}") from error
        tally.outcomes["refused"] += 1
        tally.refusals[next((reason for reason in _REASONS if reason in str(error)), "another")] += 1
        return
    stored = {key: value for key, value in store.values.items() if not key.startswith(b"pinrank:")}
    if stored != expected:
        raise WrongValueError(f"the store holds {stored}, the slow reader found {expected}")
    tally.rows_stored += len(stored)
    tally.outcomes["stored" if stored else "stored, no rows"] += 1


def fuzz(cases: int, tally: ParquetTally, folder: Path) -> None:
    """Check `cases` cases. Raise the error of the smallest failing case."""

    @seed(SEED)
    @settings(
        max_examples=cases, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(tables())
    def one(case: tuple[FeatureGroup, pa.Table, int]) -> None:
        check(*case, folder / "case.parquet", tally)

    one()


def measure(*, quick: bool = False) -> Iterator[Raw]:
    """Run all cases, or find the smallest failing one."""
    tally, wrong = ParquetTally(), []
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pinrank-fuzz-") as folder:
        try:
            fuzz(200 if quick else CASES, tally, Path(folder))
        except Exception as error:  # noqa: BLE001 - any exception is a finding
            wrong.append(f"{type(error).__name__}: {error}")
    yield {
        "seed": SEED,
        "cases": tally.cases,
        "outcomes": dict(tally.outcomes),
        "refusals": dict(tally.refusals),
        "rows_stored": tally.rows_stored,
        "wrong": wrong,
        "seconds": time.perf_counter() - start_s,
    }


def conclude(raw: Raw) -> Conclusion:
    claims = (
        Claim("cases", raw["cases"], CASES, "files", "at_least"),
        Claim(
            "files stored otherwise than the slow reader says",
            len(raw["wrong"]),
            0,
            "files",
            "at_most",
        ),
    )
    summary: dict[str, float] = {f"files {what}": count for what, count in sorted(raw["outcomes"].items())}
    summary |= {"rows stored": raw["rows_stored"], "seconds": raw["seconds"]}
    return Conclusion(summary, claims)
