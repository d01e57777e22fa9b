"""The GPU engine: stream slots, buckets, staging and CUDA graphs, with PyTorch or TensorRT behind it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import numpy as np

from kernels.cost import LinearCost, warm_and_measure
from kernels.engine import FeatureBatch, Progress, ShapeError, TensorSpec, WarmedUp, go_on
from kernels.fusion import parse, take_out_encoder
from kernels.gpu.staging import Bucket, Buckets, Layout

#: Held by whoever captures, opens or closes, in any engine of the process: a capture breaks when another thread waits
#: for the whole device, as opening, closing and a shape's first run may. So no version that is warmed up breaks the one
#: that serves.
WHOLE_DEVICE = threading.Lock()


class Stream(Protocol):
    """A stream of one device with the network on it. It runs its work in order, and waits for no other stream.

    A thread must enter the stream (`entered`) before it makes any other call. All calls raise EngineError.
    """

    def entered(self) -> AbstractContextManager[object]:
        """Make the device current for this thread, and the stream as well if the runtime has a current stream."""

    def room(self, given: int, made: int) -> tuple[np.ndarray, np.ndarray]:
        """Allocate zeroed pinned memory of these sizes, for inputs and logits, and the same on the device."""

    def enqueue(self, layout: Layout) -> None:
        """Enqueue the copy of the inputs, laid out as `layout`, the network, and the copy of the logits back."""

    def captured(self, work: Callable[[], None]) -> Callable[[], object]:
        """Run `work` once, so that the runtime loads and tunes it; then return a function that enqueues it."""

    def wait(self) -> None:
        """Wait until all enqueued work is done, without using the CPU."""


class Backend(Protocol):
    """A network on one device."""

    kernel: str
    tolerance: float
    plan: bytes | None
    #: Whether the network reads `TILES`.
    tiled: bool
    #: Whether a shape's first run costs more than later ones.
    captures: bool

    def stream(self) -> Stream:
        """Create another stream."""

    def close(self) -> None:
        """Release the device and all streams."""


#: Arguments: network, the manifest's inputs, number of heads, ordinal of the device, plan or None.
OpenBackend = Callable[[bytes, Sequence[TensorSpec], int, int, bytes | None], Backend]


class GpuEngine:
    """A network on one or more GPUs, whose slots take runs as they are idle.

    A slot has a stream, a pinned buffer with all of a batch's inputs, and a graph per bucket of shapes that copies it
    in, computes and copies the logits out. While one slot's thread fills its buffer another slot computes and a third
    is read back, so two streams already overlap all three.
    """

    def __init__(
        self,
        open_backend: OpenBackend,
        network: bytes,
        inputs: Sequence[TensorSpec],
        heads: int,
        streams: int = 1,
        *,
        plan: bytes | None = None,
        devices: Sequence[int] = (0,),
    ) -> None:
        """Open the network on each of `devices` (ordinals), for as many runs at once on each as `streams` says.

        The rest is as `kernels.engine.EngineFactory` has it. A plan that is made for one device is given to the next.
        """
        self._inputs, self._heads, self.streams = tuple(inputs), heads, streams * len(devices)
        call = take_out_encoder(parse(network), inputs)
        self._codes = None if call is None else (call.inputs[0], len(call.weights["action_table"]))
        self._buckets, self._cost = Buckets(), LinearCost()
        self._backends: list[Backend] = []
        # Who takes a slot owns it until it is put back.
        self._idle: queue.SimpleQueue[_StreamSlot] = queue.SimpleQueue()
        try:
            for ordinal in devices:
                self._backends.append(open_backend(network, self._inputs, heads, ordinal, plan))
                plan = self._backends[-1].plan
            first = self._backends[0]
            self.kernel, self.tolerance = first.kernel, first.tolerance
            layouts = {bucket: Layout(inputs, bucket, tiled=first.tiled) for bucket in self._buckets.all()}
            with WHOLE_DEVICE:
                for _ in range(streams):
                    for backend in self._backends:
                        self._idle.put(_StreamSlot(backend.stream(), layouts, heads))
        except BaseException:
            self.close()
            raise

    def run(self, batch: FeatureBatch) -> np.ndarray:
        batch.check(self._inputs)
        self._check_codes(batch)
        logits = np.empty((batch.rows, self._heads), np.float32)
        slot, start = self._idle.get(), 0
        try:
            for part in self._buckets.cut(batch):
                logits[start : start + part.rows] = slot.run(part, self._buckets.of(part.requests, part.rows))
                start += part.rows
        finally:
            self._idle.put(slot)
        return logits

    def warm_up(self, sample: FeatureBatch, progress: Progress = go_on) -> WarmedUp:
        shapes = self._buckets.all() if self._backends[0].captures else ()  # each slot captures its own graphs
        done, self._cost = warm_and_measure(self.run, self.streams, sample, progress, shapes)
        return done

    def cost_s(self, rows: int) -> float:
        return self._cost(rows)

    @property
    def slowdown(self) -> float:
        return self._cost.slowdown

    def plan(self) -> bytes | None:
        return self._backends[0].plan

    def close(self) -> None:
        with WHOLE_DEVICE:
            while not self._idle.empty():
                self._idle.get()
            while self._backends:
                self._backends.pop().close()

    def _check_codes(self, batch: FeatureBatch) -> None:
        """Raise ShapeError for an unknown action code: a GPU would read beyond the table."""
        if self._codes is None:
            return
        name, known = self._codes
        codes = batch.request[name]
        if codes.size and not 0 <= codes.min() <= codes.max() < known:
            raise ShapeError(f"actions must be codes from 0 to {known - 1}, got {codes.min()} to {codes.max()}")


class _StreamSlot:
    """What one run at a time needs, for the largest bucket: graphs know addresses, so no buffer ever grows."""

    def __init__(self, stream: Stream, layouts: Mapping[Bucket, Layout], heads: int) -> None:
        self._stream, self._layouts, self._heads = stream, layouts, heads
        self._graphs: dict[Bucket, Callable[[], object]] = {}
        given, rows = max(layout.bytes for layout in layouts.values()), max(bucket.rows for bucket in layouts)
        with stream.entered():
            self._host, self._read = stream.room(given, rows * heads * 4)

    def run(self, part: FeatureBatch, bucket: Bucket) -> np.ndarray:
        """Return float32[N, H] of the slot's own buffer, to be copied before the next run."""
        stream, layout = self._stream, self._layouts[bucket]
        layout.fill(self._host, part)
        with stream.entered():
            if bucket not in self._graphs:
                with WHOLE_DEVICE:
                    self._graphs[bucket] = stream.captured(partial(stream.enqueue, layout))
            self._graphs[bucket]()
            stream.wait()
        logits: np.ndarray = self._read.view(np.float32)[: part.rows * self._heads]
        return logits.reshape(part.rows, self._heads)
