"""One buffer for all of a batch's tensors, so that a run costs one copy to the device, whatever the network reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kernels.engine import ROW_REQUEST, FeatureBatch, TensorSpec
from kernels.gpu.tiles import TILES, tiles_max, tiles_of

#: Devices read fastest from multiples of this.
_ALIGNED_BYTES = 256


class Bucket(NamedTuple):
    """A shape that runs are padded to, so that what was captured or tuned for it serves many."""

    requests: int
    rows: int


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

    def __init__(self, inputs: Sequence[TensorSpec], bucket: Bucket, *, tiled: bool = False) -> None:
        """Place the inputs, `row_request`, and `TILES` for a network that reads them."""
        self.bucket = bucket
        leading = {"request": bucket.requests, "candidate": bucket.rows}
        shapes = {spec.name: (spec.dtype, (leading[spec.side], *spec.shape)) for spec in inputs}
        shapes[ROW_REQUEST] = "int64", (bucket.rows,)
        if tiled:
            shapes[TILES] = "int32", (tiles_max(bucket.requests, bucket.rows), 3)
        self.places: dict[str, Place] = {}
        start = 0
        for name, (dtype, shape) in shapes.items():
            place = self.places[name] = Place(start, np.dtype(dtype), shape)
            start = -(-place.stop // _ALIGNED_BYTES) * _ALIGNED_BYTES
        self.bytes = max(start, _ALIGNED_BYTES)

    def fill(self, buffer: np.ndarray, batch: FeatureBatch) -> None:
        """Write a batch that fits the bucket into uint8[bytes]; padded rows belong to the first request and no tile."""
        given = {**batch.request, **batch.candidate, ROW_REQUEST: batch.row_request()}
        if TILES in self.places:
            given[TILES] = tiles_of(batch.row_splits, tiles=self.places[TILES].shape[0])
        for name, place in self.places.items():
            room, tensor = place.of(buffer), given[name]
            room[: len(tensor)] = tensor
            room[len(tensor) :] = 0


@dataclass(frozen=True, slots=True)
class Buckets:
    """The shapes there are: rows by powers of two, and requests, which cost little where there are none, of four."""

    requests: tuple[int, ...] = (1, 4, 16, 64)
    rows: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)

    def of(self, requests: int, rows: int) -> Bucket:
        """Return the smallest bucket that holds a batch of so many requests and rows."""
        wide = next(size for size in self.requests if size >= requests)
        return Bucket(wide, next(size for size in self.rows if size >= max(wide, rows)))

    def all(self) -> list[Bucket]:
        """Return every bucket, the likeliest first: of one request by rows, then of more."""
        return [Bucket(requests, rows) for requests in self.requests for rows in self.rows if requests <= rows]

    def cut(self, batch: FeatureBatch) -> Iterator[FeatureBatch]:
        """Cut a batch into parts that each fit the largest bucket; rows keep their order."""
        splits = batch.row_splits
        start = 0
        while start < batch.rows:
            first = int(np.searchsorted(splits, start, side="right")) - 1
            stop = min(start + self.rows[-1], batch.rows, int(splits[min(first + self.requests[-1], batch.requests)]))
            last = int(np.searchsorted(splits, stop, side="left"))
            yield FeatureBatch(
                {name: tensor[first:last] for name, tensor in batch.request.items()},
                {name: tensor[start:stop] for name, tensor in batch.candidate.items()},
                (np.clip(splits[first : last + 1], start, stop) - start).astype(np.int32),
            )
            start = stop
