"""The places of a near cache: arrays, and the two implementations of their use, in NumPy and in C++.

`NumpyPlaces` is the reference, and serves where the native library is not built. `NativePlaces` calls
`kernels/native/near_cache.cpp`. Both give the same rows and leave the same bytes in the arrays.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np

from feature_client.codec import Rows
from kernels.native.library import address, library_if_built

#: The number of places in which an id can be stored.
WAYS = 8
#: Knuth's multiplicative hash (The Art of Computer Programming, 6.4): 2^64 over the golden ratio.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
#: Counters of how often ids were requested: how many there are per place, each up to 255, and after how many notes per
#: place all of them are halved.
_COUNTERS_A_PLACE = 16
_NOTES_A_PLACE = 48
#: Two more hashes: the count of an id is the lower of two counters, because few other ids share both.
_MIX = np.uint64(0xC2B2AE3D27D4EB4F)
_MIX2 = np.uint64(0xD6E8FEB86659FD93)
#: Arrays begin on a cache line: a set's eight keys are one line.
_LINE = 64


class PlaceArrays:
    """The memory of a near cache, all of it allocated here.

    Attributes:
        keys: uint64[places], the id of each place; 0 in an empty one.
        rows: structured[places].
        read_s: float64[places], when each row was read; -inf marks an empty place.
        states: uint8[places].
        counters: uint8, how often ids were requested; an id hashes to two of them.
        notes: how many requests were counted since the counters were last halved, half of those before included.
    """

    def __init__(self, dtype: np.dtype[np.void], bytes_max: int) -> None:
        # Besides its row, a place has a key, a time, a state and its share of the counters.
        place_bytes = dtype.itemsize + 8 + 8 + 1 + _COUNTERS_A_PLACE
        bits = max(0, (bytes_max // (place_bytes * WAYS)).bit_length() - 1)
        self.places = WAYS << bits
        # A shift by all 64 bits is undefined in C. With a single set, the product is masked instead.
        self.shift, self.mask = np.uint64(min(63, 64 - bits)), np.uint64((1 << bits) - 1)
        self.keys = _lines(self.places, np.dtype(np.uint64))
        self.rows = _lines(self.places, dtype)
        self.read_s = _lines(self.places, np.dtype(np.float64))
        self.states = _lines(self.places, np.dtype(np.uint8))
        self.counters = _lines(_COUNTERS_A_PLACE * self.places, np.dtype(np.uint8))
        self.counter_shift = np.uint64(64 - (len(self.counters).bit_length() - 1))
        self.notes = 0
        # The first write to a page can take half a millisecond, so all pages are written now and not during a request.
        for array in (self.keys, self.rows.view(np.uint8), self.states, self.counters):
            array.fill(0)
        self.read_s.fill(-np.inf)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.keys, self.rows, self.read_s, self.states, self.counters))

    def check(self, ids: np.ndarray, rows: Rows) -> None:
        """Raise ValueError if these rows cannot be those of the ids."""
        found = (len(rows.rows), len(rows.states))
        if rows.rows.dtype != self.rows.dtype or found != (len(ids), len(ids)):
            raise ValueError(
                f"{len(ids)} ids need as many rows of {self.rows.dtype} with their states, "
                f"got {found[0]} rows of {rows.rows.dtype} and {found[1]} states"
            )

    def note(self, count: int) -> None:
        """Say that so many requests were counted. From time to time, all counters are halved."""
        self.notes += count
        if self.notes > _NOTES_A_PLACE * self.places:
            self.counters >>= 1
            self.notes //= 2


class Places(Protocol):
    """What a near cache does with its places.

    Attributes:
        struct_at: the address of the struct `NearCache` of near_cache.cpp; None if native code must not use it.
    """

    @property
    def struct_at(self) -> int | None: ...

    def look_up(self, ids: np.ndarray, oldest_s: float, *, noted: bool) -> tuple[Rows, np.ndarray | None, int]:
        """Find rows that were read after `oldest_s`.

        Args:
            ids: uint64[N].
            oldest_s: the time.
            noted: whether to count a request for each id. A repeated id counts once.

        Returns:
            Copies of the rows in the order of `ids`; bool[N], which of them are absent (those rows and their states are
            zeros), or None if all are present; and how many are absent.
        """

    def put(self, ids: np.ndarray, rows: Rows, now_s: float, stale_s: float) -> int:
        """Place rows one after the other and return the number of evictions.

        Args:
            ids: uint64[N], all different.
            rows: their rows, in the same order.
            now_s: when they were read.
            stale_s: a cached row that was read before this time may be replaced by any other.

        Raises:
            ValueError: the rows are of another group, or not as many as the ids.
        """


def places_of(arrays: PlaceArrays, *, native: bool) -> Places:
    """Choose the implementation: C++, or NumPy if it is not wanted or not built."""
    return NativePlaces(arrays) if native and library_if_built() is not None else NumpyPlaces(arrays)


class NumpyPlaces:
    """The reference. Cost: a dozen NumPy calls, about 0.1 us per id for 200 ids."""

    struct_at: int | None = None

    def __init__(self, arrays: PlaceArrays) -> None:
        self._arrays = arrays
        self._keys = arrays.keys.reshape(-1, WAYS)
        # Rows are copied as plain bytes: NumPy copies structured ones field by field.
        self._bytes = arrays.rows.view(np.uint8).reshape(arrays.places, -1)

    def look_up(self, ids: np.ndarray, oldest_s: float, *, noted: bool) -> tuple[Rows, np.ndarray | None, int]:
        arrays, sets = self._arrays, self._sets(ids)
        at = sets * WAYS + (self._keys.take(sets, axis=0) == ids[:, None]).argmax(axis=1)
        found = (arrays.keys.take(at) == ids) & (arrays.read_s.take(at) > oldest_s)
        misses = len(ids) - int(np.count_nonzero(found))
        if noted:
            self._note(ids)
        rows, states, absent = self._bytes.take(at, axis=0), arrays.states.take(at), None
        if misses:
            absent = ~found
            rows[absent], states[absent] = 0, 0
        return Rows(rows.view(arrays.rows.dtype).reshape(len(at)), states), absent, misses

    def put(self, ids: np.ndarray, rows: Rows, now_s: float, stale_s: float) -> int:
        self._arrays.check(ids, rows)
        sets, evictions = self._sets(ids), 0
        left = np.arange(len(ids))
        while len(left):  # each round places at most one row per set, so that two rows never take the same place
            _, first = np.unique(sets[left], return_index=True)
            now = left[first]
            evictions += self._place(ids[now], sets[now], Rows(rows.rows[now], rows.states[now]), now_s, stale_s)
            left = np.delete(left, first)
        return evictions

    def _place(self, ids: np.ndarray, sets: np.ndarray, rows: Rows, now_s: float, stale_s: float) -> int:
        """Write rows of which no two belong to the same set."""
        arrays, each = self._arrays, np.arange(len(ids))
        in_set = sets[:, None] * WAYS + np.arange(WAYS)
        read_s, keys = arrays.read_s[in_set], self._keys[sets]
        # The preferred place is the id's own or the first empty one, then that of the least requested row. A set is
        # filled from its first place on and never emptied, so the id's own place comes before the empty ones.
        own_or_empty = (keys == ids[:, None]) | (read_s == -np.inf)
        rank = np.where(own_or_empty, -1, self._asked(keys).astype(np.int64))
        way = rank.argmin(axis=1)
        least = rank[each, way]
        welcome = (self._asked(ids) > least) | (read_s[each, way] < stale_s)
        at = in_set[each, way][welcome]
        arrays.keys[at] = ids[welcome]
        arrays.rows[at] = rows.rows[welcome]
        arrays.states[at] = rows.states[welcome]
        arrays.read_s[at] = now_s
        return int(np.count_nonzero(welcome & (least >= 0)))

    def _note(self, ids: np.ndarray) -> None:
        """Count a request for each id. All counts are read before one is raised."""
        counters = self._arrays.counters
        asked = self._asked(ids)
        asked += asked < 255
        # The higher of the two counters includes other ids and stays as it is.
        for indices in self._counters_of(ids):
            np.maximum.at(counters, indices, asked)
        self._arrays.note(len(ids))

    def _asked(self, ids: np.ndarray) -> np.ndarray:
        """Return uint8 in the shape of `ids`: the noted requests for each id, or for others that share its counters."""
        one, other = (self._arrays.counters.take(indices) for indices in self._counters_of(ids))
        asked: np.ndarray = np.minimum(one, other)
        return asked

    def _counters_of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shift = self._arrays.counter_shift
        return ((ids * _MIX) >> shift).astype(np.int64), ((ids * _MIX2) >> shift).astype(np.int64)

    def _sets(self, ids: np.ndarray) -> np.ndarray:
        return (((ids * _GOLDEN) >> self._arrays.shift) & self._arrays.mask).astype(np.int64)


class _Struct(ctypes.Structure):
    """The struct `NearCache` of near_cache.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "read_s", "rows", "states", "counters")),
        ("row_bytes", ctypes.c_int64),
        *((name, ctypes.c_uint64) for name in ("shift", "mask", "counter_shift")),
    ]


class NativePlaces:
    """The same in C++. Cost: about 2 us, and per id 10 ns, or 40 ns in a cache larger than the processor's."""

    def __init__(self, arrays: PlaceArrays) -> None:
        loaded = library_if_built()
        assert loaded is not None, "places_of has asked"  # noqa: S101
        at, count, time, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
        self._look_up, self._put = loaded.pinrank_near_cache_look_up, loaded.pinrank_near_cache_put
        self._look_up.argtypes = (at, at, count, time, flag, at)
        self._put.argtypes = (at, at, count, at, count, at, time, time)
        self._look_up.restype = self._put.restype = count
        self._arrays = arrays
        self._dtype = arrays.rows.dtype
        self._row_bytes = self._dtype.itemsize
        self._struct = _Struct(
            **{name: getattr(arrays, name).ctypes.data for name in ("keys", "read_s", "rows", "states", "counters")},
            **{name: int(getattr(arrays, name)) for name in ("shift", "mask", "counter_shift")},
            row_bytes=self._row_bytes,
        )
        self.struct_at: int | None = ctypes.addressof(self._struct)

    def look_up(self, ids: np.ndarray, oldest_s: float, *, noted: bool) -> tuple[Rows, np.ndarray | None, int]:
        ids = np.ascontiguousarray(ids, np.uint64)
        count = len(ids)
        # One allocation: the rows, and for each id its state, whether it is absent, and a byte for the function's use.
        states = count * self._row_bytes
        out = np.empty(states + 3 * count, np.uint8)
        at = address(out)
        misses = self._look_up(self.struct_at, address(ids), count, oldest_s, noted, at)
        if noted:
            self._arrays.note(count)
        rows = Rows.at(at, np.ndarray(count, self._dtype, out), np.ndarray(count, np.uint8, out, states))
        return rows, np.ndarray(count, np.bool_, out, states + count) if misses else None, misses

    def put(self, ids: np.ndarray, rows: Rows, now_s: float, stale_s: float) -> int:
        ids, states = np.ascontiguousarray(ids, np.uint64), np.ascontiguousarray(rows.states, np.uint8)
        self._arrays.check(ids, rows)
        evictions: int = self._put(
            *(self.struct_at, address(ids), len(ids), rows.address, rows.rows.strides[0], address(states)),
            *(now_s, stale_s),
        )
        return evictions


def _lines(count: int, dtype: np.dtype[np.generic]) -> np.ndarray:
    """Return an uninitialised array that begins on a cache line."""
    room = np.empty(count * dtype.itemsize + _LINE, np.uint8)
    start = -room.ctypes.data % _LINE
    return room[start : start + count * dtype.itemsize].view(dtype)
