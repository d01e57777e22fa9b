"""The rows of one feature group for pins of a request: from the near cache, other requests' reads, and the store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from feature_client.codec import Rows, decode_rows
from feature_client.groups import FeatureGroup
from feature_client.near_cache import Flight, NearCache
from feature_client.values.distinct import distinct
from feature_client.values.keys import KeyRun

_NO_IDS, _NO_PLACES = np.empty(0, np.uint64), np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Join:
    """A part of another request's read that this request waits for.

    Attributes:
        flight: the read.
        pins: bool[U], which pins are read there.
        places: int64, their places in that read.
    """

    flight: Flight
    pins: np.ndarray
    places: np.ndarray


class PinRows:
    """The rows that a request needs of one group.

    Attributes:
        absent: uint64[U], the pins that neither the near cache holds nor an earlier lookup reads, once each.
        owed: how many of them this request has yet to read from the store itself.
        rows: their rows, once any of them was read.
        aged: bool[U], the rows that could not be read, and in whose place older ones of the cache were put, if any.
    """

    # Most requests find all pins in the near cache, and change none of these.
    absent = _NO_IDS
    owed = 0
    rows: Rows | None = None
    aged: np.ndarray | None = None
    #: The place of each row that the cache lacks in the absent pins, those of the earlier lookup first.
    _index = _NO_PLACES
    #: Which of the absent pins are not owed; None as long as all are.
    _settled: np.ndarray | None = None
    _lost: np.ndarray | None = None
    _flight: Flight | None = None
    _landed: Rows | None = None

    def __init__(
        self,
        group: FeatureGroup,
        cache: NearCache | None,
        ids: np.ndarray,
        now_s: float,
        earlier: PinRows | None,
        found: tuple[Rows, np.ndarray | None] | None = None,
    ) -> None:
        """Look pins up in the near cache.

        Args:
            group: the group of the rows.
            cache: its near cache, if it has one.
            ids: uint64[M], with or without repetitions.
            now_s: the time of the event loop; rows that are read count as read then.
            earlier: an earlier lookup by the same request. Pins that are read there are not read twice.
            found: what the near cache returned, if it was asked already.
        """
        self._group, self._cache, self._now_s = group, cache, now_s
        #: The rows that the cache holds, in the order of `ids`, and which it lacks; `finish` completes them.
        self._found: Rows | None = None
        self._lacking: np.ndarray | None = None
        if cache is not None:
            self._found, self._lacking = cache.get(ids, now_s) if found is None else found
            ids = _NO_IDS if self._lacking is None else ids[self._lacking]
        self._earlier = earlier
        if len(ids):
            self.absent, self._index = distinct(ids, _NO_IDS if earlier is None else earlier.absent)
            self.owed = len(self.absent)

    def join_flights(self) -> Iterator[Join]:
        """Yield the reads in flight that cover owed pins. These pins are not owed any more."""
        for flight in self._cache.flights if self._cache is not None and self.owed else ():
            _, at = distinct(self.absent, flight.ids)
            theirs = at < len(flight.ids)
            if self._settled is not None:
                theirs &= ~self._settled
            if theirs.any():
                self._settle(theirs)
                yield Join(flight, theirs, at[theirs])

    def land(self, join: Join, rows: Rows | None) -> None:
        """Take the rows that another request's read returned; if it failed, these pins are owed again."""
        if rows is not None:
            self._put(join.pins, rows.take(join.places))
        elif self._settled is not None:
            self._settled &= ~join.pins
            self.owed += len(join.places)

    def begin_read(self, *, shared: bool) -> KeyRun:
        """Return the keys of the owed pins. If `shared`, other requests can wait for this read from now on."""
        ids = self.absent if self._settled is None else self.absent[~self._settled]
        if shared and self._cache is not None:
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
        owed = None if self._settled is None else ~self._settled
        self._put(owed, rows)
        if lost is not None and lost.any():
            self._lost = np.zeros(len(self.absent), bool)
            self._lost[slice(None) if owed is None else owed] = lost
            ids, rows = ids[~lost], rows.take(~lost)
        else:
            self._landed = rows
        if self._cache is not None:
            self._cache.put(ids, rows, self._now_s)
        self.owed = 0
        if self._settled is not None:
            self._settled[:] = True

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

        Rows of the cache that are too old to be used otherwise take the place of those that could not be read. An
        earlier lookup must have been finished before.
        """
        if not len(self._index):
            return self._found or _no_rows(self._group), 0
        if self._cache is not None and self._lost is not None:
            rows, known = self._cache.aged(self.absent, self._now_s)
            self.aged = self._lost & known
            self._put(self.aged, rows.take(self.aged))
        rows = self.rows or _no_rows(self._group)
        if self._earlier is not None and self._earlier.rows is not None:
            rows = self._earlier.rows.with_inserted(len(self._earlier.absent), rows)
        elif len(self.absent) == len(self._index):  # all pins are different, so they are in this order
            return self._completed(rows), self._aged_rows()
        return self._completed(rows.take(self._index)), self._aged_rows()

    def _completed(self, rows: Rows) -> Rows:
        """Return all rows, given those that the cache lacks."""
        if self._found is None or self._lacking is None:
            return rows
        self._found.put(self._lacking, rows)
        return self._found

    def _aged_rows(self) -> int:
        """Return how many of the rows that were asked for are aged."""
        lookups = [self] if self._earlier is None else [self._earlier, self]
        if all(lookup.aged is None for lookup in lookups):
            return 0
        aged = [np.zeros(len(lookup.absent), bool) if lookup.aged is None else lookup.aged for lookup in lookups]
        return int(np.count_nonzero(np.concatenate(aged)[self._index]))

    def _settle(self, pins: np.ndarray) -> None:
        self._settled = pins.copy() if self._settled is None else self._settled | pins
        self.owed = len(self.absent) - int(np.count_nonzero(self._settled))

    def _put(self, where: np.ndarray | None, rows: Rows) -> None:
        """Set the rows of these pins, bool[U], or of all."""
        if where is None or (self.rows is None and len(rows.states) == len(self.absent)):
            self.rows = rows
            return
        if self.rows is None:
            self.rows = Rows(np.empty(len(self.absent), self._group.dtype), np.zeros(len(self.absent), np.uint8))
        self.rows.put(where, rows)


def _no_rows(group: FeatureGroup) -> Rows:
    return Rows(np.empty(0, group.dtype), np.empty(0, np.uint8))
