"""Rows of one group that this process read before: a set-associative cache, as processors have them, in NumPy."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

from feature_client.codec import Rows
from feature_client.groups import FeatureGroup

#: How many places an id may take.
_WAYS = 8
#: Knuth's multiplicative hash (The Art of Computer Programming, 6.4): 2^64 over the golden ratio.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
#: Counters of how often ids were asked for: so many a place, each up to 255, halved after so many notes a place.
_COUNTERS_A_PLACE = 16
_NOTES_A_PLACE = 48
#: Every so many lookups are noted: popularity is a statistic, a sample tells it.
_NOTED_EVERY = 2
#: Two more hashes: an id's count is the lower of two counters, as others on both are rare.
_MIX = np.uint64(0xC2B2AE3D27D4EB4F)
_MIX2 = np.uint64(0xD6E8FEB86659FD93)


@dataclass(slots=True)
class NearCacheCounts:
    """Since the start, in pins looked up; stale ones were there and too old."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A read on its way to a cache.

    Attributes:
        ids: uint64[U], ascending.
        landed: their rows; None when the read failed or was given up.
    """

    ids: np.ndarray
    landed: asyncio.Future[Rows | None]


class NearCache:
    """Decoded rows by id, with what was found for them: missing and foreign ones are remembered too.

    An id hashes to a set of eight places. A newcomer takes an empty place of its set, or that of the row asked for
    least, if that is stale or the newcomer was asked for more often (TinyLFU: Einziger, Friedman and Manes, 2017): what
    is asked for once does not drive out what is asked for often. How often, hashed counters know, also of ids that are
    not held; they are halved from time to time, so that what was popular long ago has to go too. A row counts as absent
    `stale_s` seconds after it was read. Belongs to one event loop.
    """

    def __init__(self, group: FeatureGroup, bytes_max: int, stale_s: float, outage_s: float = 0.0) -> None:
        """Allocate.

        Args:
            group: whose rows.
            bytes_max: of all arrays together; at least one set is kept.
            stale_s: seconds for which a row stands for what the store holds.
            outage_s: the same while the store cannot be read.
        """
        # Key, time, state and counters of a place, beside its row.
        place_bytes = group.dtype.itemsize + 8 + 8 + 1 + _COUNTERS_A_PLACE
        bits = max(0, (bytes_max // (place_bytes * _WAYS)).bit_length() - 1)
        places = _WAYS << bits
        self.group = group
        self.counts = NearCacheCounts()
        self._stale_s, self._outage_s = stale_s, max(stale_s, outage_s)
        #: Reads on their way, for those who want the same rows.
        self.flights: list[Flight] = []
        # A shift by all 64 bits is undefined in C: with a single set the product is masked instead.
        self._shift, self._mask = np.uint64(min(63, 64 - bits)), np.uint64((1 << bits) - 1)
        self._keys = np.zeros((places // _WAYS, _WAYS), np.uint64)
        self._flat_keys = self._keys.reshape(-1)
        self._rows = np.zeros(places, group.dtype)
        # Rows are copied as plain bytes: NumPy copies structured ones field by field.
        self._bytes = self._rows.view(np.uint8).reshape(places, group.dtype.itemsize)
        #: An empty place was read at no time.
        self._read_s = np.full(places, -np.inf)
        self._states = np.zeros(places, np.uint8)
        self._counters = np.zeros(_COUNTERS_A_PLACE * places, np.uint8)
        self._counter_shift = np.uint64(64 - (len(self._counters).bit_length() - 1))
        self._lookups = self._notes = 0
        # Fresh pages are given out at their first write, up to half a millisecond each: now rather than in a request.
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
        """Return how many rows are held, fresh or not, and the mean seconds since they were read (0 without any)."""
        read_s = self._read_s[self._read_s > -np.inf]
        return len(read_s), float(now_s - read_s.mean()) if len(read_s) else 0.0

    def get(self, ids: np.ndarray, now_s: float) -> tuple[Rows, np.ndarray | None]:
        """Look up rows.

        Args:
            ids: uint64[N]; may repeat.
            now_s: seconds, on the clock of `put`.

        Returns:
            Rows in the order of `ids`, copied; and bool[N], which of them are absent (their rows mean nothing), or None
            when all are there.

        Cost: a dozen NumPy calls, about 0.1 us an id for 200 ids.
        """
        sets = self._sets(ids)
        places = self._keys.take(sets, axis=0) == ids[:, None]
        at = sets * _WAYS + places.argmax(axis=1)
        found = (self._flat_keys.take(at) == ids) & (self._read_s.take(at) > now_s - self._stale_s)
        hits = int(np.count_nonzero(found))
        self.counts.hits += hits
        self.counts.misses += len(ids) - hits
        self._lookups += 1
        if self._lookups % _NOTED_EVERY == 0:
            self._note(ids)
        rows = Rows(self._bytes.take(at, axis=0).view(self.group.dtype).reshape(len(at)), self._states.take(at))
        return rows, None if hits == len(ids) else ~found

    def aged(self, ids: np.ndarray, now_s: float) -> tuple[Rows, np.ndarray]:
        """Look up rows that are too old for `get`: for when the store cannot be read.

        Args:
            ids: uint64[N].
            now_s: as of `get`.

        Returns:
            Rows in the order of `ids`, copied; and bool[N], which of them are there and no older than `outage_s` (the
            other rows mean nothing).
        """
        sets = self._sets(ids)
        at = sets * _WAYS + (self._keys.take(sets, axis=0) == ids[:, None]).argmax(axis=1)
        found = (self._flat_keys.take(at) == ids) & (self._read_s.take(at) > now_s - self._outage_s)
        return Rows(self._rows.take(at), self._states.take(at)), found

    def put(self, ids: np.ndarray, rows: Rows, now_s: float) -> None:
        """Remember what the store gave for distinct ids.

        Args:
            ids: uint64[N], distinct.
            rows: in the order of `ids`.
            now_s: seconds, when they were read.
        """
        sets = self._sets(ids)
        left = np.arange(len(ids))
        while len(left):  # a round for each newcomer to the fullest set: two newcomers must not take one place
            _, first = np.unique(sets[left], return_index=True)
            now = left[first]
            self._place(ids[now], sets[now], Rows(rows.rows[now], rows.states[now]), now_s)
            left = np.delete(left, first)

    def _place(self, ids: np.ndarray, sets: np.ndarray, rows: Rows, now_s: float) -> None:
        """Write rows whose sets are distinct."""
        in_set = sets[:, None] * _WAYS + np.arange(_WAYS)
        read_s, keys = self._read_s[in_set], self._keys[sets]
        free = read_s == -np.inf
        own = (keys == ids[:, None]) & ~free
        # The id's own place, an empty one, the least asked for.
        rank = np.where(own, -2, np.where(free, -1, self._asked(keys).astype(np.int64)))
        way = rank.argmin(axis=1)
        least = rank[np.arange(len(ids)), way]
        stale = ~free & (read_s < now_s - self._stale_s)
        welcome = (least < 0) | (self._asked(ids) > least) | stale[np.arange(len(ids)), way]
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
        """Count that ids were asked for."""
        one, other = self._counters_of(ids)
        asked = self._asked(ids)
        asked += asked < 255
        # The higher of the two counts others too and stays.
        self._counters[one] = np.maximum(self._counters.take(one), asked)
        self._counters[other] = np.maximum(self._counters.take(other), asked)
        self._notes += len(ids)
        if self._notes > _NOTES_A_PLACE * self.places:
            self._counters >>= 1
            self._notes //= 2

    def _asked(self, ids: np.ndarray) -> np.ndarray:
        """Return uint8 of the shape of `ids`: how often they, or others on their counters, were asked for."""
        one, other = self._counters_of(ids)
        return np.minimum(self._counters.take(one), self._counters.take(other))

    def _counters_of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (ids * _MIX) >> self._counter_shift, (ids * _MIX2) >> self._counter_shift

    def _sets(self, ids: np.ndarray) -> np.ndarray:
        return (((ids * _GOLDEN) >> self._shift) & self._mask).astype(np.int64)


def near_caches(
    groups: tuple[FeatureGroup, ...], bytes_max: int, stale_s: float, outage_s: float = 0.0
) -> dict[bytes, NearCache]:
    """Share `bytes_max` evenly among distinct groups; the caches by the groups' fingerprints."""
    distinct = {group.fingerprint: group for group in groups}
    return {key: NearCache(group, bytes_max // len(distinct), stale_s, outage_s) for key, group in distinct.items()}
