"""A set-associative cache, like those of processors, of one group's rows that this process read before."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

from feature_client.cache_places import PlaceArrays, places_of
from feature_client.codec import Rows
from feature_client.groups import FeatureGroup

#: Two lookups of every four are noted: a sample is enough to estimate popularity. They are the second and the third,
#: because a request may look its candidates up first and the pins of its user's actions then: both kinds are noted.
_NOTED = 2


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

    def __init__(
        self, group: FeatureGroup, bytes_max: int, stale_s: float, outage_s: float = 0.0, *, native: bool = True
    ) -> None:
        """Allocate all memory of the cache.

        Args:
            group: the group of the rows.
            bytes_max: the size limit of all arrays together; the cache has at least one set.
            stale_s: for how many seconds a row may be used after it was read.
            outage_s: the same limit while the store cannot be read.
            native: whether to use the native library if it is built.
        """
        self.group = group
        self.counts = NearCacheCounts()
        #: Reads in flight, for other requests that need the same rows.
        self.flights: list[Flight] = []
        self._stale_s, self._outage_s = stale_s, max(stale_s, outage_s)
        self._arrays = PlaceArrays(group.dtype, bytes_max)
        self._places = places_of(self._arrays, native=native)
        self._lookups = 0

    @property
    def places(self) -> int:
        return self._arrays.places

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self._arrays.nbytes

    @property
    def struct_at(self) -> int | None:
        """The address of what native calls know of the cache; None if the native library is not used."""
        return self._places.struct_at

    def held(self, now_s: float) -> tuple[int, float]:
        """Return how many rows are cached, stale ones included, and their mean age in seconds (0 if there are none)."""
        read_s = self._arrays.read_s[self._arrays.read_s > -np.inf]
        return len(read_s), float(now_s - read_s.mean()) if len(read_s) else 0.0

    def get(self, ids: np.ndarray, now_s: float) -> tuple[Rows, np.ndarray | None]:
        """Look up rows.

        Args:
            ids: uint64[N], with or without repetitions.
            now_s: the time in seconds, on the same clock as for `put`.

        Returns:
            Copies of the rows in the order of `ids`; and bool[N], which of them are absent (those rows have no
            meaning), or None if all are present.

        Cost: that of `NativePlaces`, or of `NumpyPlaces` if the native library is not built.
        """
        oldest_s, noted = self.begin_lookup(now_s)
        rows, absent, misses = self._places.look_up(ids, oldest_s, noted=noted)
        self.counts.hits += len(ids) - misses
        self.counts.misses += misses
        return rows, absent

    def begin_lookup(self, now_s: float) -> tuple[float, bool]:
        """Return how old rows may be, and whether to note the requests, for a lookup by native code."""
        self._lookups += 1
        return now_s - self._stale_s, bool(self._lookups & _NOTED)

    def end_lookup(self, pins: int, misses: int, *, noted: bool) -> None:
        """Count a lookup by native code."""
        self.counts.hits += pins - misses
        self.counts.misses += misses
        if noted:
            self._arrays.note(pins)

    def aged(self, ids: np.ndarray, now_s: float) -> tuple[Rows, np.ndarray]:
        """Look up rows while the store cannot be read, including rows that are too old for `get`.

        Args:
            ids: uint64[N].
            now_s: the time, as for `get`.

        Returns:
            Copies of the rows in the order of `ids`; and bool[N], which of them are present and no older than
            `outage_s` (the other rows have no meaning).
        """
        rows, absent, _ = self._places.look_up(ids, now_s - self._outage_s, noted=False)
        return rows, np.ones(len(ids), bool) if absent is None else ~absent

    def put(self, ids: np.ndarray, rows: Rows, now_s: float) -> None:
        """Cache the rows that the store returned.

        Args:
            ids: uint64[N], all different.
            rows: their rows, in the same order.
            now_s: when they were read, in seconds.
        """
        self.counts.evictions += self._places.put(ids, rows, now_s, now_s - self._stale_s)


def near_caches(
    groups: tuple[FeatureGroup, ...], bytes_max: int, stale_s: float, outage_s: float = 0.0
) -> dict[bytes, NearCache]:
    """Return near caches by fingerprint; distinct groups share `bytes_max` equally."""
    distinct = {group.fingerprint: group for group in groups}
    return {key: NearCache(group, bytes_max // len(distinct), stale_s, outage_s) for key, group in distinct.items()}
