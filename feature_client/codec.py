"""Encoding and decoding of stored values: an 8-byte fingerprint, then the bytes of a row or a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from feature_client.action_times import STORED_AHEAD_MAX_MS, without_future
from feature_client.groups import FINGERPRINT_BYTES, FeatureGroup, SequenceGroup
from feature_client.values.native_values import native_values
from feature_client.values.stored_values import StoredValues
from kernels.native.library import address


class RowState(IntEnum):
    """What was found under a key."""

    PRESENT = 0
    MISSING = 1
    #: The value was written for another group, version or embedding space, or it cannot be valid for this group: it
    #: holds a code outside the vocabulary or a number that is not finite. It is counted and never used.
    FOREIGN = 2


# Each comparison of a NumPy number with an enum member costs a microsecond.
_STATES = tuple(RowState)
_PRESENT, _MISSING, _FOREIGN = map(int, _STATES)


@dataclass(slots=True)
class Rows:
    """Decoded rows, in the order of their keys.

    Attributes:
        rows: structured[N] of the group's dtype; the group's default row if no usable value was found.
        states: uint8[N], the `RowState` of each row.
    """

    rows: np.ndarray
    states: np.ndarray
    #: A copy with other rows must not keep it, so it is not an argument.
    _address: int | None = field(init=False, default=None, repr=False, compare=False)

    @classmethod
    def at(cls, address: int, rows: np.ndarray, states: np.ndarray) -> Rows:
        """Return rows of which the first begins at this address."""
        made = cls(rows, states)
        made._address = address
        return made

    @property
    def address(self) -> int:
        """The address of the first row."""
        if self._address is None:
            self._address = address(self.rows)
        return self._address

    def put(self, where: np.ndarray, found: Rows) -> None:
        """Write rows to the places in `where`, bool[N] or int64[M].

        The rows are copied as plain bytes because NumPy copies structured rows field by field.
        """
        _plain(self.rows)[where] = _plain(found.rows)
        self.states[where] = found.states

    def take(self, places: np.ndarray) -> Rows:
        """Return a copy of the rows at these places, int64[M] or bool[N]."""
        plain = _plain(self.rows)[places]
        return Rows(np.ndarray(len(plain), self.rows.dtype, plain), self.states[places])

    def with_inserted(self, at: int, found: Rows) -> Rows:
        """Return a copy with other rows inserted before the row `at`."""
        own, others = _plain(self.rows), _plain(found.rows)
        joined = np.concatenate((own[:at], others, own[at:]))
        return Rows(
            np.ndarray(len(joined), self.rows.dtype, joined),
            np.concatenate((self.states[:at], found.states, self.states[at:])),
        )

    def count(self, state: RowState) -> int:
        return int(np.count_nonzero(self.states == state))


def _plain(rows: np.ndarray) -> np.ndarray:
    """Return a view of rows as plain bytes. Cost: 0.3 us for contiguous rows; `view` takes four times as long."""
    plain = f"V{rows.dtype.itemsize}"
    return np.ndarray(len(rows), plain, rows) if rows.flags.c_contiguous else rows.view(plain)


def encode_rows(group: FeatureGroup, rows: np.ndarray) -> list[bytes]:
    """Encode structured rows of `group.dtype` as stored values.

    Raises:
        TypeError: the rows have another dtype.
        ValueError: a row holds a code outside its vocabulary or a number that is not finite.
    """
    if rows.dtype != group.dtype:
        raise TypeError(f"group {group.ref} stores rows of {group.dtype}, got {rows.dtype}")
    impossible = np.flatnonzero(~_possible(group, rows))
    if len(impossible):
        raise ValueError(
            f"group {group.ref}: {len(impossible)} rows hold a code outside its vocabulary or a number that is not "
            f"finite; the first is row {impossible[0]}: {rows[impossible[0]]}"
        )
    stored = np.empty(len(rows), group.stored_dtype)
    stored["fingerprint"] = group.fingerprint_word
    stored["row"] = rows
    cut: list[bytes] = stored.view(f"V{stored.dtype.itemsize}").tolist()
    return cut


def decode_rows(group: FeatureGroup, values: Sequence[bytes | None]) -> Rows:
    """Decode stored values; a missing or foreign value becomes the group's default row.

    Cost: one native call, about 5 us and 20 ns a value; without the native library that of `decode_rows_in_numpy`.
    """
    native = native_values()
    if native is None:
        return decode_rows_in_numpy(group, values)
    return Rows(*native.decode_rows(group.row_layout, StoredValues.of(values)))


def decode_row(group: FeatureGroup, value: bytes | None) -> Rows:
    """Decode one stored value. Cost: one native call, about 2 us."""
    native = native_values()
    if native is None:
        return decode_rows_in_numpy(group, [value])
    return Rows.at(*native.decode_row(group.row_layout, value))


def decode_rows_in_numpy(group: FeatureGroup, values: Sequence[bytes | None]) -> Rows:
    """Decode stored values: the reference for `decode_rows`, which does the same to the bit.

    Cost: one `join` and one `frombuffer` if every value has the right size; otherwise one more pass over the values.
    """
    size = group.stored_dtype.itemsize
    states = np.zeros(len(values), np.uint8)
    whole = values
    if not _all_of_size(values, size):
        blank = bytes(size)
        states[:] = [_MISSING if v is None else (_PRESENT if len(v) == size else _FOREIGN) for v in values]
        whole = [v if v is not None and len(v) == size else blank for v in values]
    stored = np.frombuffer(b"".join(whole), group.stored_dtype)  # type: ignore[arg-type]
    rows = stored["row"]
    readable = _readable(group, stored["fingerprint"], rows)
    if not readable.all():
        states[~readable & (states == _PRESENT)] = _FOREIGN
    if states.any():
        rows = rows.copy()
        rows[states != _PRESENT] = group.default_row
    return Rows(rows, states)


def encode_sequence(group: SequenceGroup, events: np.ndarray) -> bytes:
    """Encode the last `length_max` events, oldest first.

    Args:
        group: the group with the vocabularies that the codes refer to.
        events: structured[K] of `SequenceGroup.dtype`.
    """
    return group.fingerprint + events[-group.length_max :].astype(group.dtype, copy=False).tobytes()


def decode_sequence(group: SequenceGroup, value: bytes | None) -> tuple[np.ndarray, RowState]:
    """Return the events, oldest first (structured[K], empty unless PRESENT), and what was found."""
    empty = np.empty(0, group.dtype)
    if value is None:
        return empty, RowState.MISSING
    body = memoryview(value)[FINGERPRINT_BYTES:]
    if value[:FINGERPRINT_BYTES] != group.fingerprint or len(body) % group.dtype.itemsize:
        return empty, RowState.FOREIGN
    events = np.frombuffer(body, group.dtype)
    if len(events) and (events["action"].max() >= len(group.actions) or events["surface"].max() >= len(group.surfaces)):
        return empty, RowState.FOREIGN
    return events, RowState.PRESENT


class NewestEvents(NamedTuple):
    """The end of a stored sequence.

    Attributes:
        events: structured[K], the newest events, newest first.
        state: what was found under the sequence's key.
        future: how many stored events were ignored because their time is in the future.
    """

    events: np.ndarray
    state: RowState
    future: int


def newest_events(group: SequenceGroup, value: bytes | None, length: int, now_ms: int) -> NewestEvents:
    """Decode the newest `length` events of a sequence that are not in the future. Cost: one native call, about 5 us."""
    native = native_values()
    if native is None or not length:
        return newest_events_in_numpy(group, value, length, now_ms)
    codes, latest_ms = (len(group.actions), len(group.surfaces)), now_ms + STORED_AHEAD_MAX_MS
    events, future, state = native.newest_events(group.fingerprint, codes, value, latest_ms, length, group.dtype)
    return NewestEvents(events, _STATES[state], future)


def newest_events_in_numpy(group: SequenceGroup, value: bytes | None, length: int, now_ms: int) -> NewestEvents:
    """Decode the newest events of a sequence: the reference for `newest_events`, which does the same to the bit."""
    stored, state = decode_sequence(group, value)
    events = without_future(stored, now_ms)
    return NewestEvents(events[max(0, len(events) - length) :][::-1], state, len(stored) - len(events))


def _readable(group: FeatureGroup, fingerprints: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return bool[N]: whether each row was written for this group and is possible under its description."""
    readable: np.ndarray = fingerprints == group.fingerprint_word
    readable &= _possible(group, rows)
    return readable


def _possible(group: FeatureGroup, rows: np.ndarray) -> np.ndarray:
    """Return bool[N]: whether each row is possible under the group's description."""
    possible = np.ones(len(rows), bool)
    for coded in group.categoricals:
        possible &= rows[coded.name] < coded.cardinality
    for block in group.float_blocks:
        finite = np.isfinite(block.of(rows))
        if not finite.all():
            possible &= finite.all(axis=1)
    return possible


def _all_of_size(values: Sequence[bytes | None], size: int) -> bool:
    """Return whether every value exists and has this size. The check runs at C speed."""
    try:
        return set(map(len, values)) <= {size}  # type: ignore[arg-type]
    except TypeError:  # one of them is None
        return False
