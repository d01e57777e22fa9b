"""The features of one request in one native call, where the store is local and the near caches hold its pins.

`kernels/native/fetch.cpp` writes all of them into one allocation. It begins with the table of sources from which
`kernels/native/assembly.cpp` makes the tensors, so that no array is made that nothing reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct

import numpy as np

from feature_client.action_times import STORED_AHEAD_MAX_MS
from feature_client.codec import NewestEvents, Rows, RowState
from feature_client.groups import FeatureNeeds, SequenceGroup
from feature_client.near_cache import NearCache
from kernels.native.library import address, library_if_built

#: The struct `Source` of sources.h, and the first source of a group there.
_SOURCE_BYTES, _FIRST_GROUP = 32, 2
_STATES = tuple(RowState)
_PLACE = Struct("=q").unpack_from
#: A call with more pins than this, some 50 us long, releases the interpreter lock.
_PINS_MAX_LOCKED = 1000


class _UserGroup(ctypes.Structure):
    _fields_ = [("layout", ctypes.c_void_p), ("row_bytes", ctypes.c_int64)]


class _PinGroup(ctypes.Structure):
    _fields_ = [("cache", ctypes.c_void_p), ("row_bytes", ctypes.c_int64)]


class _Plan(ctypes.Structure):
    """The struct `FetchPlan` of fetch.cpp."""

    _fields_ = [
        ("users", ctypes.POINTER(_UserGroup)), ("user_count", ctypes.c_int64),
        ("pins", ctypes.POINTER(_PinGroup)), ("pin_count", ctypes.c_int64),
        ("fingerprint", ctypes.c_char_p), ("actions", ctypes.c_uint64), ("surfaces", ctypes.c_uint64),
        ("length", ctypes.c_int64),
    ]  # fmt: skip


class PackedFetch:
    """Reads what one model needs. Belongs to the event loop of the near caches."""

    def __init__(self, needs: FeatureNeeds, caches: Sequence[NearCache], fetch: ctypes.CDLL) -> None:
        """Compile the plan; `new_packed_fetch` says when that is possible."""
        self.needs = needs
        self._caches = tuple(caches)
        self.user_names = tuple(group.name for group in needs.user_groups)
        self.pin_names = tuple(group.name for group in needs.pin_groups)
        user_bytes = [group.dtype.itemsize for group in needs.user_groups]
        pin_bytes = [group.dtype.itemsize for group in needs.pin_groups]
        sequence, users, pins = needs.sequence, len(user_bytes), len(pin_bytes)
        # The layouts belong to the groups, and the structs of the caches to these.
        read_users = [_UserGroup(group.row_layout.at, group.row_layout.row_bytes) for group in needs.user_groups]
        read_pins = [_PinGroup(cache.struct_at, size) for cache, size in zip(caches, pin_bytes, strict=True)]
        self._plan = _Plan(
            (_UserGroup * users)(*read_users), users, (_PinGroup * pins)(*read_pins), pins,
            sequence.fingerprint if sequence else None, len(sequence.actions) if sequence else 0,
            len(sequence.surfaces) if sequence else 0, needs.sequence_length if sequence else 0,
        )  # fmt: skip
        described = (*needs.user_groups, sequence) if sequence else needs.user_groups
        self._prefixes = [group.key_prefix for group in described]
        self._plan_at = ctypes.addressof(self._plan)
        self._values = ctypes.c_char_p * len(described)
        self._ask = Struct("=qqqQ" + pins * "dq" + len(described) * "q").pack
        #: Bytes of the table of sources.
        self.table_bytes = _SOURCE_BYTES * (_FIRST_GROUP + users + 3 * pins)
        self._found = Struct(f"={4 + pins}q").unpack_from
        length = self._length = self._plan.length
        #: Where in a block the ids begin, the events if there are no candidates, and the rows of the pins.
        self.ids_at = self.table_bytes + 8 * (5 + pins)
        self._events_at = self.ids_at + 8 * (length + 1)
        self._fixed_bytes = (
            self._events_at
            + _in_words(SequenceGroup.dtype.itemsize * length)
            + sum(_in_words(size + 1) for size in user_bytes)
            + 8 * pins
        )
        self._pin_bytes = sum(size + 3 for size in pin_bytes)
        address_, count = ctypes.c_void_p, ctypes.c_int64
        takes = (address_, ctypes.c_char_p, address_, address_, address_)
        self._fetch = ctypes.PYFUNCTYPE(count, *takes)(("pinrank_fetch", fetch))
        self._fetch_unlocked = ctypes.CFUNCTYPE(count, *takes)(("pinrank_fetch", fetch))

    def keys(self, user_id: int) -> list[bytes]:
        """Return the keys of the values that `read` takes."""
        name = user_id.to_bytes(8, "big")
        return [prefix + name for prefix in self._prefixes]

    def read(
        self, values: Sequence[bytes | None], pin_ids: np.ndarray, query_pin_id: int | None, now_s: float, now_ms: int
    ) -> Packed:
        """Read the features of one request.

        Args:
            values: what is stored under `keys`.
            pin_ids: uint64[N], the candidates.
            query_pin_id: the pin that is the query, if there is one.
            now_s: the time of the event loop.
            now_ms: Unix time.
        """
        candidates, has_query = len(pin_ids), query_pin_id is not None
        pin_ids = np.ascontiguousarray(pin_ids, np.uint64)
        ask: list[float] = [now_ms + STORED_AHEAD_MAX_MS, candidates, has_query, query_pin_id or 0]
        for cache in self._caches:
            ask += cache.begin_lookup(now_s)
        for value in values:
            ask.append(-1 if value is None else len(value))
        pins_max = candidates + self._length + has_query
        block = np.empty(self._fixed_bytes + 8 * candidates + self._pin_bytes * pins_max, np.uint8)
        at = address(block)
        call = self._fetch if candidates <= _PINS_MAX_LOCKED else self._fetch_unlocked
        call(self._plan_at, self._ask(*ask), self._values(*values), address(pin_ids), at)
        found = self._found(block, self.table_bytes + 8)  # type: ignore[arg-type]
        events, future, sequence, flawed = found[:4]
        absent, pins = found[4:], candidates + events + has_query
        for place, cache in enumerate(self._caches):
            cache.end_lookup(pins, absent[place], noted=bool(ask[5 + 2 * place]))
        acted = np.ndarray(events, SequenceGroup.dtype, block, self._events_at + 8 * candidates)
        newest = NewestEvents(acted, _STATES[sequence], future)
        return Packed(self, block, at, candidates, pins, newest, now_ms, absent, not flawed)


@dataclass(slots=True, eq=False)
class Packed:
    """What was read for one request.

    Attributes:
        fetch: what read it.
        block: uint8, all of it: the table of sources, the surface's index as int64, and what the sources refer to.
        at: its address.
        candidates: N.
        pins: how many pins were looked up: the candidates, the pins of the events, the query pin.
        newest: the user's newest events.
        read_ms: Unix time of the read.
        absent: how many rows each cache lacks.
        flawless: whether the user's rows and the sequence were found, as were all rows that no cache lacks.
    """

    fetch: PackedFetch
    block: np.ndarray
    at: int
    candidates: int
    pins: int
    newest: NewestEvents
    read_ms: int
    absent: tuple[int, ...]
    flawless: bool

    def pins_at(self, name: str, dtype: np.dtype[np.void]) -> int | None:
        """Return the address of the candidates' rows of a group; None if it was not read or has another dtype."""
        names = self.fetch.pin_names
        if name not in names:
            return None
        place = names.index(name)
        return self.at + self._pins_start(place) if self.fetch.needs.pin_groups[place].dtype is dtype else None

    def user_rows(self, place: int) -> Rows:
        """Return the row of a user group, by its place in the needs."""
        group = self.fetch.needs.user_groups[place]
        return self._rows(group.dtype, self._start(_FIRST_GROUP + place), 1)

    def pin_rows(self, place: int) -> Rows:
        """Return the rows of a pin group, by its place in the needs."""
        return self._rows(self.fetch.needs.pin_groups[place].dtype, self._pins_start(place), self.pins)

    def ids(self) -> np.ndarray:
        """Return the pins that were looked up, uint64."""
        return np.ndarray(self.pins, np.uint64, self.block, self.fetch.ids_at)

    def lookups(self) -> list[tuple[Rows, np.ndarray | None]]:
        """Return for each pin group what `NearCache.get` returns."""
        found: list[tuple[Rows, np.ndarray | None]] = []
        for place, group in enumerate(self.fetch.needs.pin_groups):
            absent_at = self._pins_start(place) + self.pins * (group.dtype.itemsize + 1)
            absent = np.ndarray(self.pins, np.bool_, self.block, absent_at) if self.absent[place] else None
            found.append((self.pin_rows(place), absent))
        return found

    def _rows(self, dtype: np.dtype[np.void], start: int, count: int) -> Rows:
        """Return rows with their states, which come after them."""
        states = np.ndarray(count, np.uint8, self.block, start + count * dtype.itemsize)
        return Rows.at(self.at + start, np.ndarray(count, dtype, self.block, start), states)

    def _pins_start(self, place: int) -> int:
        return self._start(_FIRST_GROUP + len(self.fetch.user_names) + 3 * place)

    def _start(self, source: int) -> int:
        """Return where in the block the rows of a source begin."""
        at: int = _PLACE(self.block, _SOURCE_BYTES * source)[0]  # type: ignore[arg-type]
        return at - self.at


class PackedRows(Mapping[str, Rows]):
    """Rows by group, each made when it is asked for."""

    __slots__ = ("_made", "_make", "_names")

    def __init__(self, names: tuple[str, ...], make: Callable[[int], Rows]) -> None:
        """Create it; `make` returns the rows of the group at a place in `names`."""
        self._names, self._make, self._made = names, make, dict[str, Rows]()

    def __getitem__(self, name: str) -> Rows:
        made = self._made.get(name)
        if made is None:
            if name not in self._names:
                raise KeyError(name)
            made = self._made[name] = self._make(self._names.index(name))
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def new_packed_fetch(needs: FeatureNeeds, near: Mapping[bytes, NearCache]) -> PackedFetch | None:
    """Return how to read these groups, or None if one has no near cache, or the native library is not built."""
    caches = [near.get(group.fingerprint) for group in needs.pin_groups]
    found = [cache for cache in caches if cache is not None and cache.struct_at is not None]
    loaded = library_if_built()
    return None if loaded is None or len(found) < len(caches) else PackedFetch(needs, found, loaded)


def _in_words(size: int) -> int:
    return -(-size // 8) * 8
