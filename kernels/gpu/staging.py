"""One buffer for all of a batch's tensors, so that a run costs one copy to the device, whatever the network reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kernels.engine import ROW_REQUEST, FeatureBatch, TensorSpec

#: Devices read fastest from multiples of this.
_ALIGNED_BYTES = 256


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A shape that runs are padded to, so that what was captured or tuned for it serves many."""

    rows: int
    requests: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a buffer."""

    start: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.dtype.itemsize * int(np.prod(self.shape))

    def of(self, buffer: np.ndarray) -> np.ndarray:
        """Return the tensor as a view of uint8[...]."""
        return buffer[self.start : self.stop].view(self.dtype).reshape(self.shape)


class Layout:
    """Where each of a network's inputs lies in one buffer, for one bucket."""

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        bucket: Bucket,
        extra: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    ) -> None:
        """Place the inputs, `row_request`, and the `extra` tensors (dtype, shape) that an engine fills in itself."""
        self.bucket = bucket
        self._inputs = tuple(inputs)
        self.places: dict[str, Place] = {}
        leading = {"request": bucket.requests, "candidate": bucket.rows}
        shapes = {spec.name: (spec.dtype, (leading[spec.side], *spec.shape)) for spec in inputs}
        start = 0
        for name, (dtype, shape) in {**shapes, ROW_REQUEST: ("int64", (bucket.rows,)), **(extra or {})}.items():
            place = Place(start, np.dtype(dtype), shape)
            self.places[name] = place
            start = -(-place.stop // _ALIGNED_BYTES) * _ALIGNED_BYTES
        self.bytes = max(start, _ALIGNED_BYTES)

    def fill(self, buffer: np.ndarray, batch: FeatureBatch) -> None:
        """Write a batch that fits the bucket into uint8[bytes]; padded rows belong to the first request."""
        for spec in self._inputs:
            tensor = (batch.request if spec.side == "request" else batch.candidate)[spec.name]
            room = self.places[spec.name].of(buffer)
            room[: len(tensor)] = tensor
            room[len(tensor) :] = 0
        owner = self.places[ROW_REQUEST].of(buffer)
        owner[: batch.rows] = batch.row_request()
        owner[batch.rows :] = 0


class Buckets:
    """Powers of two in rows and requests, up to the largest batch that is run at once."""

    def __init__(self, requests_max: int = 64, rows_max: int = 4096, rows_min: int = 64) -> None:
        self.requests_max, self.rows_max, self._rows_min = requests_max, rows_max, rows_min

    def of(self, requests: int, rows: int) -> Bucket:
        """Return the smallest bucket that holds a batch of so many requests and rows."""
        return Bucket(max(self._rows_min, _power(rows)), _power(requests))

    def all(self) -> list[Bucket]:
        """Return every bucket, the smallest first."""
        rows = [n for n in _powers(self.rows_max) if n >= self._rows_min]
        return sorted(Bucket(n, r) for n in rows for r in _powers(self.requests_max))

    def cut(self, batch: FeatureBatch) -> Iterator[FeatureBatch]:
        """Cut a batch into parts that each fit the largest bucket; rows keep their order."""
        splits = batch.row_splits
        start = 0
        while start < batch.rows:
            first = int(np.searchsorted(splits, start, side="right")) - 1
            stop = min(start + self.rows_max, batch.rows, int(splits[min(first + self.requests_max, batch.requests)]))
            last = int(np.searchsorted(splits, stop, side="left"))
            yield FeatureBatch(
                {name: tensor[first:last] for name, tensor in batch.request.items()},
                {name: tensor[start:stop] for name, tensor in batch.candidate.items()},
                (np.clip(splits[first : last + 1], start, stop) - start).astype(np.int32),
            )
            start = stop


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _powers(largest: int) -> list[int]:
    return [1 << n for n in range(_power(largest).bit_length())]
