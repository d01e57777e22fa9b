"""Calls of `kernels/native/values.cpp`: from stored values to rows and events, without an object for each.

They take microseconds, so they keep the interpreter lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cache
from typing import Any

import numpy as np

from feature_client.values.stored_values import StoredValues
from kernels.native.library import address, library_if_built

_CODE, _FLOAT = 0, 1
_ADDRESS, _INT64, _UINT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_int32
_Byte = ctypes.c_char
#: How many events were found, how many ignored, and the state of the value.
_Found = ctypes.c_int64 * 3


class Check(ctypes.Structure):
    """What a field, or a block of adjacent floats, must be; the struct `Check` of values.cpp."""

    _fields_ = [
        ("kind", _INT64), ("offset", _INT64), ("width", _INT64), ("count", _INT64), ("codes", _UINT64),
    ]  # fmt: skip

    @classmethod
    def code(cls, offset: int, width: int, codes: int) -> Check:
        """Require a code below `codes`, in an unsigned integer of `width` bytes."""
        return cls(_CODE, offset, width, 1, codes)

    @classmethod
    def floats(cls, offset: int, width: int, count: int) -> Check:
        """Require `count` adjacent floats of `width` bytes to be finite."""
        return cls(_FLOAT, offset, width, count, 0)


class _Layout(ctypes.Structure):
    """The struct `RowLayout` of values.cpp."""

    _fields_ = [
        ("fingerprint", _UINT64), ("row_bytes", _INT64), ("check_count", _INT64),
        ("checks", ctypes.POINTER(Check)), ("default_row", ctypes.c_char_p),
    ]  # fmt: skip


class RowLayout:
    """How a group's rows are stored. Immutable; any number of threads may use it.

    Attributes:
        dtype: the dtype of a row.
        row_bytes: its bytes.
        at: the address of the layout in memory.
    """

    def __init__(self, dtype: np.dtype[np.void], fingerprint: int, checks: Sequence[Check], default_row: bytes) -> None:
        self.dtype, self.row_bytes = dtype, dtype.itemsize
        self._struct = _Layout(
            fingerprint, dtype.itemsize, len(checks), (Check * len(checks))(*checks), default_row
        )  # it keeps what it points to
        self.at = ctypes.addressof(self._struct)


class NativeValues:
    """The functions of a loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        def bound(name: str, returns: Any, *takes: Any) -> Callable[..., Any]:
            return ctypes.PYFUNCTYPE(returns, *takes)((name, library))

        at, count, word = _ADDRESS, _INT64, _UINT64
        self._decode_row = bound("pinrank_decode_row", None, at, at, count, at)
        self._decode_rows = bound("pinrank_decode_rows", count, at, at, at, at, count, at, at)
        self._newest_events = bound("pinrank_newest_events", None, at, word, word, at, count, count, count, at, at)
        self._read_values = bound(
            "pinrank_read_values", _INT32, at, count, at, count, count, at, count, count, at, at, at
        )

    def decode_rows(self, layout: RowLayout, values: StoredValues) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows, structured[N], and their states, uint8[N]. Cost: 3 us, and about 10 ns a row."""
        count, row_bytes = len(values.sizes), layout.dtype.itemsize
        if not count:
            return np.empty(0, layout.dtype), np.empty(0, np.uint8)
        made = np.empty(count * (row_bytes + 1), np.uint8)  # one allocation, and one address, for both
        at, states_at = address(made), count * row_bytes
        self._decode_rows(
            layout.at, values.buffer, address(values.starts), address(values.sizes), count, at, at + states_at
        )
        return np.ndarray(count, layout.dtype, made), made[states_at:]  # `view` would take four times as long

    def decode_row(self, layout: RowLayout, value: bytes | None) -> tuple[int, np.ndarray, np.ndarray]:
        """Return the address of a row, the row, structured[1], and its state, uint8[1]. Cost: 2 us."""
        row_bytes = layout.row_bytes
        made = np.empty(row_bytes + 1, np.uint8)
        at = address(made)
        self._decode_row(layout.at, value, -1 if value is None else len(value), at)
        return at, np.ndarray(1, layout.dtype, made), np.ndarray(1, np.uint8, made, row_bytes)

    def values_reply(self, count: int, head: bytes, tail: bytes, size_max: int) -> ValuesReply:
        """Prepare to read a reply of `count` values.

        Args:
            count: at least one.
            head: what comes before the values.
            tail: what comes after them, and ends what is received.
            size_max: how many bytes the reply may have.
        """
        return ValuesReply(self._read_values, count, head, tail, size_max)

    def newest_events(
        self,
        fingerprint: bytes,
        codes: tuple[int, int],
        value: bytes | None,
        latest_ms: int,
        length: int,
        dtype: np.dtype[np.void],
    ) -> tuple[np.ndarray, int, int]:
        """Decode the newest events, newest first.

        Args:
            fingerprint: the 8 bytes of the sequence's group.
            codes: the numbers of actions and surfaces.
            value: the stored value.
            latest_ms: later events are ignored.
            length: the most events to return.
            dtype: that of an event.

        Returns:
            The events, structured[K]; how many were ignored; and the state of the value. Cost: 2 us.
        """
        made, found = np.empty(length * dtype.itemsize + 1, np.uint8), _Found()
        size = -1 if value is None else len(value)
        self._newest_events(fingerprint, *codes, value, size, latest_ms, length, address(made), found)
        kept, ignored, state = found
        return np.ndarray(kept, dtype, made), ignored, state


class ReadOutcome(IntEnum):
    """How far a reply was read; the enum `Outcome` of values.cpp."""

    COMPLETE = 0
    INCOMPLETE = 1
    #: The reply has to be read in another way, from its first byte.
    UNUSUAL = 2


class ValuesReply:
    """The reply to a read of many keys.

    Attributes:
        starts: int64[N], where each value begins, once the reply is complete.
        sizes: int64[N], how many bytes it has, or `ABSENT`.
    """

    def __init__(self, read: Callable[..., int], count: int, head: bytes, tail: bytes, size_max: int) -> None:
        self._read = read
        spans = np.zeros(2 + 2 * count, np.int64)  # one allocation: the progress, the starts, the sizes
        self.starts, self.sizes = spans[2 : 2 + count], spans[2 + count :]
        at = address(spans)
        self._arguments = (head, len(head), count, tail, len(tail), size_max, at, at + 16, at + 16 + 8 * count)

    def read(self, received: bytes | bytearray) -> int:
        """Return the `ReadOutcome` of all bytes that were received. Later calls go on where this one ended."""
        where = received if isinstance(received, bytes) else ctypes.addressof(_Byte.from_buffer(received))
        return self._read(where, len(received), *self._arguments)


@cache
def native_values() -> NativeValues | None:
    """Return the functions, or None if the library is not built."""
    library = library_if_built()
    return None if library is None else NativeValues(library)
