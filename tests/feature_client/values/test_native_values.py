"""The native library decodes stored values as NumPy does, to the bit, whatever a store returns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from feature_client.action_times import STORED_AHEAD_MAX_MS
from feature_client.codec import (
    RowState,
    decode_row,
    decode_rows,
    decode_rows_in_numpy,
    encode_rows,
    newest_events,
    newest_events_in_numpy,
)
from feature_client.groups import Categorical, Embedding, EmbeddingSpace, FeatureGroup, Scalar, SequenceGroup
from feature_client.values.native_values import native_values
from feature_client.values.stored_values import StoredValues
from tests import tiny

pytestmark = pytest.mark.skipif(native_values() is None, reason="the native library is not built")

scalars = st.builds(
    lambda number, dtype, default: Scalar(name=f"s{number}", dtype=dtype, default=default),
    st.integers(0, 9), st.sampled_from(["float32", "float64", "int32", "int64"]), st.integers(-9, 9),
)  # fmt: skip
categoricals = st.builds(
    lambda number, cardinality: Categorical(name=f"c{number}", cardinality=cardinality, default=1),
    st.integers(0, 9), st.sampled_from([2, 200, 256, 257, 60_000, 65_537, 2**31]),
)  # fmt: skip
embeddings = st.builds(
    lambda number, dim, dtype: Embedding(
        name=f"e{number}",
        space=EmbeddingSpace(name="space", version=1, dim=dim, dtype=dtype, scale=0.5 if dtype == "int8" else 1.0),
    ),
    st.integers(0, 9), st.integers(1, 40), st.sampled_from(["float32", "float16", "int8"]),
)  # fmt: skip
groups = st.lists(scalars | categoricals | embeddings, min_size=1, max_size=7, unique_by=lambda field: field.name).map(
    lambda fields: FeatureGroup(name="some", version=1, entity="pin", fields=tuple(fields))
)


def possible_rows(group: FeatureGroup, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, group.dtype)
    for field in group.fields:
        column = rows[field.name]
        if isinstance(field, Categorical):
            column[...] = rng.integers(0, field.cardinality, column.shape)
        else:
            column[...] = rng.integers(-100, 100, column.shape)
    return rows


@st.composite
def stored(draw):
    """A group, and values that it wrote, some of them damaged or absent."""
    group = draw(groups)
    values: list[bytes | None] = list(
        encode_rows(group, possible_rows(group, draw(st.integers(0, 8)), draw(st.integers(0, 99))))
    )
    for i, value in enumerate(values):
        match draw(st.sampled_from(["keep", "keep", "absent", "damage", "cut", "other"])):
            case "absent":
                values[i] = None
            case "damage":
                at = draw(st.integers(0, len(value) - 1))
                values[i] = value[:at] + draw(st.binary(min_size=1, max_size=9)) + value[at + 9 :]
            case "cut":
                values[i] = value[: draw(st.integers(0, len(value)))]
            case "other":
                values[i] = draw(st.binary(max_size=40) | st.just(group.fingerprint + b"\xff" * (len(value) - 8)))
    return group, values


@settings(max_examples=300, deadline=None)
@given(stored())
def test_rows_and_states_are_those_of_numpy(case):
    group, values = case
    expected = decode_rows_in_numpy(group, values)
    for given_values in (values, StoredValues.of(values), scattered(values)):
        found = decode_rows(group, given_values)
        assert found.rows.dtype == expected.rows.dtype
        assert found.rows.tobytes() == expected.rows.tobytes()
        assert found.states.tolist() == expected.states.tolist()
    for i, value in enumerate(values):
        one = decode_row(group, value)
        assert (one.rows.dtype, one.rows.tobytes()) == (group.dtype, expected.rows[i : i + 1].tobytes())
        assert one.states.tolist() == [expected.states[i]]
        assert one.address == one.rows.ctypes.data


def scattered(values):
    """The same values, in another order and with bytes between them, as a part of others."""
    buffer, starts = b"?", []
    for value in reversed(values):
        starts.append(len(buffer))
        buffer += (value or b"") + b"?"
    sizes = np.array([0, *(-1 if value is None else len(value) for value in values), 0], np.int64)
    return StoredValues(buffer, np.array([0, *reversed(starts), 0], np.int64), sizes)[1:-1]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 65504.0, -0.0, 6e-8])
def test_every_float_of_a_row_is_checked(value):
    group = FeatureGroup(
        name="some", version=1, entity="pin",
        fields=(tiny.PINS.fields[0], Scalar(name="a"), Scalar(name="b", dtype="float64")),
    )  # fmt: skip
    for field in group.fields:
        rows = possible_rows(group, 2, 1)
        rows[field.name][1, ...] = value
        values = [group.fingerprint + row.tobytes() for row in rows]
        assert decode_rows(group, values).states[1] == (0 if np.isfinite(value) else RowState.FOREIGN)
        assert decode_rows_in_numpy(group, values).states.tolist() == decode_rows(group, values).states.tolist()


events = st.lists(
    st.tuples(
        st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1) | st.integers(0, 10_000_000),
        st.integers(0, 2**64 - 1), st.integers(0, 2), st.integers(0, 2),
    ),
    max_size=12,
)  # fmt: skip
sequences = events.map(
    lambda them: tiny.ACTIONS.fingerprint + np.array(them, SequenceGroup.dtype).tobytes()
) | st.binary(max_size=60).map(lambda content: tiny.ACTIONS.fingerprint + content)


@settings(max_examples=300, deadline=None)
@given(st.none() | st.binary(max_size=70) | sequences, st.integers(0, 9), st.integers(0, 10_000_000))
@example(tiny.ACTIONS.fingerprint, 3, 0)
@example(tiny.ACTIONS.fingerprint + bytes(27), 3, 0)
def test_newest_events_are_those_of_numpy(value, length, now_ms):
    found = newest_events(tiny.ACTIONS, value, length, now_ms)
    expected = newest_events_in_numpy(tiny.ACTIONS, value, length, now_ms)
    assert found.events.tobytes() == expected.events.tobytes()
    assert (found.state, found.future) == (expected.state, expected.future)


def test_events_in_the_future_are_ignored_and_counted():
    them = tiny.events([1, 2, 3, 4], [0, 1, 0, 1])
    them["time_ms"] = [1, STORED_AHEAD_MAX_MS + 8, STORED_AHEAD_MAX_MS + 7, 2]
    found = newest_events(tiny.ACTIONS, tiny.ACTIONS.fingerprint + them.tobytes(), 2, 7)
    assert (found.events["pin_id"].tolist(), found.future, found.state) == ([4, 3], 1, RowState.PRESENT)


values = st.lists(st.none() | st.binary(max_size=5), max_size=9)


@given(values, st.integers(-10, 10), st.integers(-10, 10), st.sampled_from([None, 1, 2, -1]))
def test_values_in_one_buffer_read_like_a_list(them, start, stop, step):
    stored_values = StoredValues.of(them)
    assert stored_values == them
    assert len(stored_values) == len(them)
    assert [stored_values[i] for i in range(-len(them), len(them))] == them + them
    assert stored_values[start:stop:step] == them[start:stop:step]
    assert StoredValues.of(stored_values) is stored_values


@given(st.lists(values, min_size=1, max_size=4))
def test_values_of_several_reads_are_joined_in_order(parts):
    joined = StoredValues.joined([StoredValues.of(part) for part in parts])
    assert joined == [value for part in parts for value in part]
