"""The keys of one read, without an object for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import overload

import numpy as np


@dataclass(frozen=True, slots=True)
class KeyRun:
    """Keys that differ only in an id.

    Attributes:
        prefix: what all keys begin with.
        ids: uint64[N]; an id is the last 8 bytes of its key, big-endian.
    """

    prefix: bytes
    ids: np.ndarray

    def keys(self) -> list[bytes]:
        """Return the keys. Cost: NumPy builds all of them; no Python code runs per key."""
        keys = np.empty(len(self.ids), np.dtype([("prefix", f"V{len(self.prefix)}"), ("id", ">u8")]))
        keys["prefix"] = np.void(self.prefix)
        keys["id"] = self.ids
        cut: list[bytes] = keys.view(f"V{keys.dtype.itemsize}").tolist()
        return cut


class Keys(Sequence[bytes]):
    """Single keys, then runs of keys. A store that knows no better reads them as a sequence of bytes."""

    __slots__ = ("_length", "_listed", "runs", "single")

    def __init__(self, single: Sequence[bytes], runs: Sequence[KeyRun] = ()) -> None:
        self.single, self.runs = single, runs
        self._length = len(single) + sum(len(run.ids) for run in runs)
        self._listed: list[bytes] | None = None

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        return self._list()[index]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._list())

    def _list(self) -> list[bytes]:
        if self._listed is None:
            self._listed = list(chain(self.single, *(run.keys() for run in self.runs)))
        return self._listed
