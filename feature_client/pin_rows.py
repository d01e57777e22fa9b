"""The rows of one feature group for pins of a request: from the near cache, other requests' reads, and the store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import numpy as np

from feature_client.codec import Rows, decode_rows
from feature_client.groups import FeatureGroup
from feature_client.near_cache import Flight, NearCache
from feature_client.stores.keys import KeyRun


class PinRows:
    """The rows that a request needs of one group.

    Attributes:
        distinct: the absent pins once each, uint64[U] in ascending order.
        owed: bool[U], those of them that this request has yet to read from the store itself.
    """

    def __init__(
        self, group: FeatureGroup, cache: NearCache | None, ids: np.ndarray, now_s: float, earlier: PinRows | None
    ) -> None:
        """Look pins up in the near cache.

        Args:
            group: the group of the rows.
            cache: its near cache, if it has one.
            ids: uint64[M], with or without repetitions.
            now_s: the time of the event loop; rows that are read count as read then.
            earlier: what the same request looked up before. Pins that were absent there are not read twice.
        """
        self._group, self._cache, self._now_s = group, cache, now_s
        #: The rows that the cache holds, in the order of `ids`; `finish` completes them.
        self._found: Rows | None = None
        self._absent: np.ndarray | None = None
        if cache is not None:
            self._found, self._absent = cache.get(ids, now_s)
            ids = ids[:0] if self._absent is None else ids[self._absent]
        #: The position of each absent row among them.
        self.distinct, self._index = np.unique(ids, return_inverse=True) if len(ids) else (ids, np.zeros(0, np.int64))
        self._rows: Rows | None = None
        self.owed = np.ones(len(self.distinct), bool)
        self._lost: np.ndarray | None = None
        self._aged: np.ndarray | None = None
        self._flight: Flight | None = None
        self._landed: Rows | None = None
        self._earlier, self._there = earlier, None
        if earlier is not None and len(ids) and len(earlier.distinct):
            self._there, self._at = _find(self.distinct, earlier.distinct)
            self.owed &= ~self._there

    def join_flights(self) -> Iterator[tuple[Flight, np.ndarray]]:
        """Yield each read in flight that covers owed pins, with bool[U], which ones. They are not owed any more."""
        for flight in self._cache.flights if self._cache is not None and len(self.distinct) else ():
            theirs = self.owed & _find(self.distinct, flight.ids)[0]
            if theirs.any():
                self.owed &= ~theirs
                yield flight, theirs

    def land(self, flight: Flight, theirs: np.ndarray, rows: Rows | None) -> None:
        """Take the rows that another request's read returned; if it failed, these pins are owed again."""
        if rows is None:
            self.owed |= theirs
        else:
            self._put(theirs, rows.take(np.searchsorted(flight.ids, self.distinct[theirs])))

    def begin_read(self, *, shared: bool) -> KeyRun:
        """Return the keys of the owed pins. If `shared`, other requests can wait for this read from now on."""
        ids = self.distinct[self.owed]
        if shared and self._cache is not None and len(ids):
            self._flight, self._landed = Flight(ids, asyncio.get_running_loop().create_future()), None
            self._cache.flights.append(self._flight)
        return KeyRun(self._group.key_prefix, ids)

    def take(self, ids: np.ndarray, values: Sequence[bytes | None], lost: np.ndarray | None) -> None:
        """Decode the values of the owed pins and put them into the cache.

        Args:
            ids: the owed pins.
            values: their values.
            lost: bool of the same length, which values could not be read, or None. The store may hold them, so the
                cache does not record them as missing.
        """
        rows = decode_rows(self._group, values)
        self._put(self.owed, rows)
        if lost is not None and lost.any():
            self._lost = np.zeros(len(self.distinct), bool)
            self._lost[self.owed] = lost
            ids, rows = ids[~lost], rows.take(~lost)
        else:
            self._landed = rows
        if self._cache is not None:
            self._cache.put(ids, rows, self._now_s)
        self.owed[:] = False

    def end_read(self) -> None:
        """Give the rows to the requests that wait for them, or None if the read was incomplete or cancelled."""
        flight, self._flight = self._flight, None
        if flight is None or self._cache is None:
            return
        self._cache.flights.remove(flight)
        if not flight.landed.done():
            flight.landed.set_result(self._landed)

    def finish(self) -> tuple[Rows, int]:
        """Return all rows in the order in which they were asked for, once nothing is owed, and how many are aged.

        Rows of the cache that are too old to be used otherwise take the place of those that could not be read. What was
        looked up earlier must have been finished before.
        """
        if not len(self.distinct) and self._found is not None:
            return self._found, 0
        if self._earlier is not None and self._there is not None:
            self._take_earlier(self._earlier, self._there)
        if self._cache is not None and self._lost is not None:
            rows, known = self._cache.aged(self.distinct, self._now_s)
            usable = self._lost & known
            self._put(usable, rows.take(usable))
            self._note_aged(usable)
        aged = 0 if self._aged is None else int(np.count_nonzero(self._aged[self._index]))
        if self._rows is None:  # no pin was asked for
            return Rows(np.empty(0, self._group.dtype), np.empty(0, np.uint8)), 0
        rows = self._rows.take(self._index)
        if self._found is None or self._absent is None:
            return rows, aged
        self._found.put(self._absent, rows)
        return self._found, aged

    def _take_earlier(self, earlier: PinRows, there: np.ndarray) -> None:
        if earlier._rows is not None and there.any():
            self._put(there, earlier._rows.take(self._at[there]))
            if earlier._aged is not None:
                aged = np.zeros(len(there), bool)
                aged[there] = earlier._aged[self._at[there]]
                self._note_aged(aged)

    def _note_aged(self, aged: np.ndarray) -> None:
        self._aged = aged if self._aged is None else self._aged | aged

    def _put(self, where: np.ndarray, rows: Rows) -> None:
        count = len(self.distinct)
        if self._rows is None and len(rows.states) == count:  # all of them
            self._rows = rows
            return
        if self._rows is None:
            self._rows = Rows(np.empty(count, self._group.dtype), np.zeros(count, np.uint8))
        self._rows.put(where, rows)


def _find(ids: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which ids are among others, bool[N], and where, int64[N]. The others are ascending, and at least one."""
    at = np.searchsorted(among, ids)
    np.minimum(at, len(among) - 1, out=at)
    return among[at] == ids, at
