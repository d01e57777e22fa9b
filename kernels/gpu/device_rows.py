"""Rows that a device keeps, so that the host sends the numbers of their places instead of their vectors.

Rows are told apart by what they hold, not by whose they are: a pin whose embedding changed is another row, nothing
here can be out of date, and no one above an engine needs to know. They are int8 with a scale each, a quarter of what
the host has: a million rows of 32 numbers take 36 MB, and a number is wrong by at most 1/254 of its row's largest.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

#: Places in a set: a row may lie in any of its set's.
_WAYS = 8


@dataclass(frozen=True, slots=True)
class Taken:
    """Where a batch's rows lie, until they are given back.

    Attributes:
        places: int32[N] in the table, by row.
        missed: int64[M], the rows that the table does not hold yet, each different row once.
        targets: int32[M], where those have to be written.
        keys: uint64[M] of those.
        tick: of this batch.
    """

    places: np.ndarray
    missed: np.ndarray
    targets: np.ndarray
    keys: np.ndarray
    tick: int


def quantised(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int8[N, dim] and float32[N]: numbers and a scale, whose product is the row float32[N, dim]."""
    scales = np.abs(rows).max(axis=1, initial=0.0) / 127
    numbers = np.rint(rows / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
    return numbers, scales.astype(np.float32)


class DeviceRows:
    """Says which place of a device's table holds which row. May be used from any thread.

    The table has `size` places: sets of eight, in which the row that was read longest ago gives way, and behind them a
    few for every lane, for rows whose set is full of what runs in flight still read. A row can be found by others only
    when the run that brought it has ended, and so has its copy.
    """

    def __init__(self, rows: int, dim: int, lanes: int, lane_rows: int) -> None:
        """Lay out.

        Args:
            rows: to hold; the next power of two is taken.
            dim: numbers in a row, an even count.
            lanes: runs in flight at once.
            lane_rows: of the largest run.
        """
        self._sets = max(1, 1 << max(0, rows // _WAYS - 1).bit_length())
        self._keys = np.zeros((self._sets, _WAYS), np.uint64)
        #: The tick of the batch that read a place last.
        self._read = np.zeros((self._sets, _WAYS), np.int64)
        self._spare, self._lane_rows = self._sets * _WAYS, lane_rows
        self.size = self._spare + lanes * lane_rows + 1
        rng = np.random.default_rng()  # not to be foreseen: whoever could would make rows of one key
        self._added, self._factors = (rng.integers(0, 1 << 63, dim // 2, np.uint64) * 2 + 1 for _ in range(2))
        self._running: set[int] = set()
        self._tick = 0
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    @property
    def nowhere(self) -> int:
        """The place that no row is ever read from: where padding is written."""
        return self.size - 1

    def take(self, rows: np.ndarray, lane: int) -> Taken:
        """Find a batch's rows, and places for those that are missing.

        Args:
            rows: float32[N, dim], N at most `lane_rows`.
            lane: which lane runs the batch.
        """
        keys = self._keys_of(rows)
        sets = (keys & np.uint64(self._sets - 1)).astype(np.int64)
        with self._lock:
            self._tick += 1
            tick = self._tick
            self._running.add(tick)
            found = self._keys[sets] == keys[:, None]
            way = found.argmax(1)
            hit = found[np.arange(len(keys)), way]
            self._read[sets[hit], way[hit]] = tick
            places = (sets * _WAYS + way).astype(np.int32)
            missed = np.flatnonzero(~hit)
            _, first, again = np.unique(keys[missed], return_index=True, return_inverse=True)
            new = missed[first]
            targets = self._claimed(sets[new], tick, self._spare + lane * self._lane_rows)
            places[missed] = targets[again]
            self.hits += len(keys) - len(missed)
            self.misses += len(missed)
        return Taken(places, new, targets, keys[new], tick)

    def give(self, taken: Taken, *, written: bool) -> None:
        """End a batch: what it wrote can be found from now on, if it was."""
        with self._lock:
            self._running.discard(taken.tick)
            if written:
                kept = taken.targets < self._spare
                self._keys.reshape(-1)[taken.targets[kept]] = taken.keys[kept]

    def _claimed(self, sets: np.ndarray, tick: int, spare: int) -> np.ndarray:
        """Return int32[M], a place for a new row of each set, in the lane's own where a set has none to give."""
        targets = np.full(len(sets), -1, np.int32)
        oldest = min(self._running)
        for _ in range(_WAYS):  # one row a set each time
            waiting = np.flatnonzero(targets < 0)
            if not len(waiting):
                break
            of_set, one = np.unique(sets[waiting], return_index=True)
            way = self._read[of_set].argmin(1)
            free = self._read[of_set, way] < oldest
            of_set, way = of_set[free], way[free]
            self._read[of_set, way] = tick
            self._keys[of_set, way] = 0
            targets[waiting[one[free]]] = of_set * _WAYS + way
        left = np.flatnonzero(targets < 0)
        targets[left] = spare + np.arange(len(left))
        return targets

    def _keys_of(self, rows: np.ndarray) -> np.ndarray:
        """Return uint64[N], a key of each row's bits and never 0; two rows share one with odds of about 2^-60."""
        words = np.ascontiguousarray(rows).view(np.uint64)
        mixed = words + self._added
        mixed ^= mixed >> np.uint64(29)
        mixed *= self._factors
        mixed ^= mixed >> np.uint64(32)
        mixed *= self._added
        keys: np.ndarray = mixed.sum(axis=1, dtype=np.uint64)
        keys ^= keys >> np.uint64(31)
        return keys | np.uint64(1 << 63)
