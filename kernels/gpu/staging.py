"""Lay out all tensors of a batch in one buffer, so that a run needs a single copy to the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kernels.engine import ROW_REQUEST, FeatureBatch, TensorSpec
from kernels.gpu.tiles import TILES, tiles_max, tiles_of

#: Devices read fastest from addresses that are multiples of this.
_ALIGNED_BYTES = 256


class Bucket(NamedTuple):
    """A shape to which batches are padded, so that one captured graph or tuned plan serves many of them."""

    requests: int
    rows: int


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a tensor in a buffer."""

    start: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.dtype.itemsize * int(np.prod(self.shape))

    def of(self, buffer: np.ndarray) -> np.ndarray:
        """Return the tensor as a view of the buffer, uint8[...]."""
        return buffer[self.start : self.stop].view(self.dtype).reshape(self.shape)


class Layout:
    """The positions of a network's inputs in one buffer, for one bucket."""

    def __init__(self, inputs: Sequence[TensorSpec], bucket: Bucket, *, tiled: bool = False) -> None:
        """Place the inputs and `row_request`, and `TILES` if `tiled`."""
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
        """Write a batch that fits the bucket into a buffer, uint8[bytes].

        Padding rows belong to the first request and to no tile.
        """
        given = {**batch.request, **batch.candidate, ROW_REQUEST: batch.row_request()}
        if TILES in self.places:
            given[TILES] = tiles_of(batch.row_splits, tiles=self.places[TILES].shape[0])
        for name, place in self.places.items():
            room, tensor = place.of(buffer), given[name]
            room[: len(tensor)] = tensor
            room[len(tensor) :] = 0


@dataclass(frozen=True, slots=True)
class Buckets:
    """The shapes of runs: powers of two for rows, and powers of four for requests, whose padding costs little."""

    requests: tuple[int, ...] = (1, 4, 16, 64)
    rows: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)

    def of(self, requests: int, rows: int) -> Bucket:
        """Return the smallest bucket for a batch with these numbers of requests and rows."""
        wide = next(size for size in self.requests if size >= requests)
        return Bucket(wide, next(size for size in self.rows if size >= max(wide, rows)))

    def all(self) -> list[Bucket]:
        """Return all buckets, the likeliest first: those of one request by rows, then those of more requests."""
        return [Bucket(requests, rows) for requests in self.requests for rows in self.rows if requests <= rows]

    def cut(self, batch: FeatureBatch) -> Iterator[FeatureBatch]:
        """Split a batch into parts that fit the largest bucket. Rows keep their order."""
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
