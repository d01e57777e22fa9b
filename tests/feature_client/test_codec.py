from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_client.codec import RowState, decode_rows, decode_sequence, encode_rows, encode_sequence
from tests import tiny

IDS = np.array([1, 2, 3], np.uint64)


def test_rows_survive_the_store_bit_for_bit():
    rows = tiny.pin_rows(IDS)
    decoded = decode_rows(tiny.PINS, encode_rows(tiny.PINS, rows))
    assert decoded.rows.tobytes() == rows.tobytes()
    assert decoded.states.tolist() == [RowState.PRESENT] * 3


def test_no_keys_decode_to_no_rows():
    assert len(decode_rows(tiny.PINS, []).rows) == 0


def test_missing_and_foreign_values_become_the_default_row_and_are_told_apart():
    good, other = encode_rows(tiny.PINS, tiny.pin_rows(IDS))[0], encode_rows(tiny.USERS, tiny.user_rows(IDS))[0]
    same_size_other_print = b"\x00" * 8 + good[8:]
    values = [good, None, other, same_size_other_print, good[:-1], b""]
    decoded = decode_rows(tiny.PINS, values)
    foreign = RowState.FOREIGN
    assert decoded.states.tolist() == [RowState.PRESENT, RowState.MISSING, foreign, foreign, foreign, foreign]
    assert decoded.count(RowState.FOREIGN) == 4
    assert decoded.rows[0] == tiny.pin_rows(IDS)[0]
    assert all(row == tiny.PINS.default_row for row in decoded.rows[1:])


def test_rows_of_another_layout_are_refused():
    with pytest.raises(TypeError, match="pin_core@1 stores rows of"):
        encode_rows(tiny.PINS, tiny.user_rows(IDS))


@pytest.mark.parametrize("damage", [("topic", 8), ("popularity", np.nan), ("embedding", np.inf)])
def test_rows_that_cannot_be_the_groups_are_refused_when_written_and_foreign_when_read(damage):
    field, value = damage
    rows = tiny.pin_rows(IDS)
    values = encode_rows(tiny.PINS, rows)
    rows[field][1] = value
    with pytest.raises(ValueError, match="pin_core@1: 1 rows hold a code outside its vocabulary or a number"):
        encode_rows(tiny.PINS, rows)
    values[1] = tiny.PINS.fingerprint + rows[1].tobytes()
    decoded = decode_rows(tiny.PINS, values)
    assert decoded.states.tolist() == [RowState.PRESENT, RowState.FOREIGN, RowState.PRESENT]
    assert decoded.rows[1] == tiny.PINS.default_row


@pytest.mark.parametrize("damage", ["action", "surface"])
def test_sequence_with_a_code_outside_its_vocabulary_is_foreign(damage):
    events = tiny.events([1, 2], [0, 1])
    events[damage][0] = 200
    decoded, state = decode_sequence(tiny.ACTIONS, encode_sequence(tiny.ACTIONS, events))
    assert (len(decoded), state) == (0, RowState.FOREIGN)


def test_sequence_keeps_the_newest_events_up_to_its_limit():
    events = tiny.events(list(range(1, 13)), [0] * 12)
    decoded, state = decode_sequence(tiny.ACTIONS, encode_sequence(tiny.ACTIONS, events))
    assert state == RowState.PRESENT
    assert decoded["pin_id"].tolist() == list(range(5, 13))


@pytest.mark.parametrize(
    ("value", "state"),
    [
        (None, RowState.MISSING),
        (b"", RowState.FOREIGN),
        (b"\x00" * 26, RowState.FOREIGN),
        (tiny.ACTIONS.fingerprint + b"\x00" * 17, RowState.FOREIGN),
        (tiny.ACTIONS.fingerprint, RowState.PRESENT),
    ],
)
def test_unusable_sequence_is_empty_and_says_why(value, state):
    decoded, found = decode_sequence(tiny.ACTIONS, value)
    assert (len(decoded), found) == (0, state)


@given(st.lists(st.none() | st.binary(max_size=60), max_size=8))
def test_arbitrary_stored_bytes_never_reach_a_model(values):
    decoded = decode_rows(tiny.PINS, values)
    assert len(decoded.rows) == len(values)
    unusable = decoded.states != RowState.PRESENT
    assert all(row == tiny.PINS.default_row for row in decoded.rows[unusable])
    assert all(
        values[i][:8] == tiny.PINS.fingerprint and len(values[i]) == 8 + tiny.PINS.dtype.itemsize
        for i in np.flatnonzero(~unusable)
    )
