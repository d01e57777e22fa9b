"""A set-associative cache, like those of processors, of one group's rows that this process read before."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

from feature_client.codec import Rows
from feature_client.groups import FeatureGroup

#: The number of places in which an id can be stored.
_WAYS = 8
#: Knuth's multiplicative hash (The Art of Computer Programming, 6.4): 2^64 over the golden ratio.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
#: Counters of how often ids were requested: how many there are per place, each up to 255, and after how many notes per
#: place all of them are halved.
_COUNTERS_A_PLACE = 16
_NOTES_A_PLACE = 48
#: Two lookups of every four are noted: a sample is enough to estimate popularity. They are the second and the third,
#: because a request may look its candidates up first and the pins of its user's actions then: both kinds are noted.
_NOTED = 2
#: Two more hashes: the count of an id is the lower of two counters, because few other ids share both.
_MIX = np.uint64(0xC2B2AE3D27D4EB4F)
_MIX2 = np.uint64(0xD6E8FEB86659FD93)


@dataclass(slots=True)
class NearCacheCounts:
    """Counts of pins since the start. A stale row counts as a miss."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A read in flight whose rows a cache will hold.

    Attributes:
        ids: uint64[U], all different.
        landed: their rows, or None if the read was incomplete or cancelled.
    """

    ids: np.ndarray
    landed: asyncio.Future[Rows | None]


class NearCache:
    """Decoded rows by id with their states; missing and foreign rows are cached too.

    An id hashes to a set of eight places. A new row takes an empty place of its set. If there is none, it replaces the
    least requested row, provided that this row is stale or was requested less often than the new one (TinyLFU:
    Einziger, Friedman and Manes, 2017). A row that is requested once therefore does not evict one that is requested
    often. Hashed counters estimate how often each id was requested, including ids that are not cached. They are halved
    from time to time so that rows that were popular long ago are evicted too. A row counts as absent `stale_s` seconds
    after it was read. A cache belongs to one event loop.
    """

    def __init__(self, group: FeatureGroup, bytes_max: int, stale_s: float, outage_s: float = 0.0) -> None:
        """Allocate all memory of the cache.

        Args:
            group: the group of the rows.
            bytes_max: the size limit of all arrays together; the cache has at least one set.
            stale_s: for how many seconds a row may be used after it was read.
            outage_s: the same limit while the store cannot be read.
        """
        # Besides its row, a place has a key, a time, a state and its share of the counters.
        place_bytes = group.dtype.itemsize + 8 + 8 + 1 + _COUNTERS_A_PLACE
        bits = max(0, (bytes_max // (place_bytes * _WAYS)).bit_length() - 1)
        places = _WAYS << bits
        self.group = group
        self.counts = NearCacheCounts()
        self._stale_s, self._outage_s = stale_s, max(stale_s, outage_s)
        #: Reads in flight, for other requests that need the same rows.
        self.flights: list[Flight] = []
        # A shift by all 64 bits is undefined in C. With a single set, the product is masked instead.
        self._shift, self._mask = np.uint64(min(63, 64 - bits)), np.uint64((1 << bits) - 1)
        self._flat_keys = np.zeros(places, np.uint64)
        self._keys = self._flat_keys.reshape(places // _WAYS, _WAYS)
        self._rows = np.zeros(places, group.dtype)
        # Rows are copied as plain bytes: NumPy copies structured ones field by field.
        self._bytes = self._rows.view(np.uint8).reshape(places, group.dtype.itemsize)
        #: When each row was read; -inf marks an empty place.
        self._read_s = np.full(places, -np.inf)
        self._states = np.zeros(places, np.uint8)
        self._counters = np.zeros(_COUNTERS_A_PLACE * places, np.uint8)
        self._counter_shift = np.uint64(64 - (len(self._counters).bit_length() - 1))
        self._lookups = self._notes = 0
        # The first write to a page can take half a millisecond, so all pages are written now and not during a request.
        for array in (self._keys, self._bytes, self._states, self._counters):
            array.fill(0)

    @property
    def places(self) -> int:
        return len(self._flat_keys)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self._keys, self._rows, self._read_s, self._states, self._counters)
        return sum(array.nbytes for array in arrays)

    def held(self, now_s: float) -> tuple[int, float]:
        """Return how many rows are cached, stale ones included, and their mean age in seconds (0 if there are none)."""
        read_s = self._read_s[self._read_s > -np.inf]
        return len(read_s), float(now_s - read_s.mean()) if len(read_s) else 0.0

    def get(self, ids: np.ndarray, now_s: float) -> tuple[Rows, np.ndarray | None]:
        """Look up rows.

        Args:
            ids: uint64[N], with or without repetitions.
            now_s: the time in seconds, on the same clock as for `put`.

        Returns:
            Copies of the rows in the order of `ids`; and bool[N], which of them are absent (those rows have no
            meaning), or None if all are present.

        Cost: a dozen NumPy calls, about 0.1 us per id for 200 ids.
        """
        sets = self._sets(ids)
        places = self._keys.take(sets, axis=0) == ids[:, None]
        at = sets * _WAYS + places.argmax(axis=1)
        found = (self._flat_keys.take(at) == ids) & (self._read_s.take(at) > now_s - self._stale_s)
        hits = int(np.count_nonzero(found))
        self.counts.hits += hits
        self.counts.misses += len(ids) - hits
        self._lookups += 1
        if self._lookups & _NOTED:
            self._note(ids)
        rows = Rows(self._bytes.take(at, axis=0).view(self.group.dtype).reshape(len(at)), self._states.take(at))
        return rows, None if hits == len(ids) else ~found

    def aged(self, ids: np.ndarray, now_s: float) -> tuple[Rows, np.ndarray]:
        """Look up rows while the store cannot be read, including rows that are too old for `get`.

        Args:
            ids: uint64[N].
            now_s: the time, as for `get`.

        Returns:
            Copies of the rows in the order of `ids`; and bool[N], which of them are present and no older than
            `outage_s` (the other rows have no meaning).
        """
        sets = self._sets(ids)
        at = sets * _WAYS + (self._keys.take(sets, axis=0) == ids[:, None]).argmax(axis=1)
        found = (self._flat_keys.take(at) == ids) & (self._read_s.take(at) > now_s - self._outage_s)
        return Rows(self._rows.take(at), self._states.take(at)), found

    def put(self, ids: np.ndarray, rows: Rows, now_s: float) -> None:
        """Cache the rows that the store returned.

        Args:
            ids: uint64[N], all different.
            rows: their rows, in the same order.
            now_s: when they were read, in seconds.
        """
        sets = self._sets(ids)
        left = np.arange(len(ids))
        while len(left):  # each round places at most one row per set, so that two rows never take the same place
            _, first = np.unique(sets[left], return_index=True)
            now = left[first]
            self._place(ids[now], sets[now], Rows(rows.rows[now], rows.states[now]), now_s)
            left = np.delete(left, first)

    def _place(self, ids: np.ndarray, sets: np.ndarray, rows: Rows, now_s: float) -> None:
        """Write rows of which no two belong to the same set."""
        in_set = sets[:, None] * _WAYS + np.arange(_WAYS)
        read_s, keys = self._read_s[in_set], self._keys[sets]
        # The preferred place is the id's own or the first empty one, then that of the least requested row. A set is
        # filled from its first place on and never emptied, so the id's own place comes before the empty ones.
        own_or_empty = (keys == ids[:, None]) | (read_s == -np.inf)
        rank = np.where(own_or_empty, -1, self._asked(keys).astype(np.int64))
        way = rank.argmin(axis=1)
        least = rank[np.arange(len(ids)), way]
        stale = read_s[np.arange(len(ids)), way] < now_s - self._stale_s
        welcome = (self._asked(ids) > least) | stale
        self.counts.evictions += int(np.count_nonzero(welcome & (least >= 0)))
        at, ids, rows = (
            in_set[np.arange(len(ids)), way][welcome],
            ids[welcome],
            Rows(rows.rows[welcome], rows.states[welcome]),
        )
        self._flat_keys[at] = ids
        self._rows[at] = rows.rows
        self._states[at] = rows.states
        self._read_s[at] = now_s

    def _note(self, ids: np.ndarray) -> None:
        """Note a request for each id."""
        one, other = self._counters_of(ids)
        asked = self._asked(ids)
        asked += asked < 255
        # The higher of the two counters includes other ids and stays as it is.
        self._counters[one] = np.maximum(self._counters.take(one), asked)
        self._counters[other] = np.maximum(self._counters.take(other), asked)
        self._notes += len(ids)
        if self._notes > _NOTES_A_PLACE * self.places:
            self._counters >>= 1
            self._notes //= 2

    def _asked(self, ids: np.ndarray) -> np.ndarray:
        """Return uint8 in the shape of `ids`: the noted requests for each id, or for others that share its counters."""
        one, other = self._counters_of(ids)
        return np.minimum(self._counters.take(one), self._counters.take(other))

    def _counters_of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (ids * _MIX) >> self._counter_shift, (ids * _MIX2) >> self._counter_shift

    def _sets(self, ids: np.ndarray) -> np.ndarray:
        return (((ids * _GOLDEN) >> self._shift) & self._mask).astype(np.int64)


def near_caches(
    groups: tuple[FeatureGroup, ...], bytes_max: int, stale_s: float, outage_s: float = 0.0
) -> dict[bytes, NearCache]:
    """Return near caches by fingerprint; distinct groups share `bytes_max` equally."""
    distinct = {group.fingerprint: group for group in groups}
    return {key: NearCache(group, bytes_max // len(distinct), stale_s, outage_s) for key, group in distinct.items()}
