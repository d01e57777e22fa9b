from __future__ import annotations

import logging
import queue
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from kernels.cost import LinearCost, warm_and_measure
from kernels.engine import LOGITS, ROW_REQUEST, EngineError, FeatureBatch, Progress, TensorSpec, WarmedUp, go_on
from kernels.gpu.cuda import Driver, PyCudaDriver
from kernels.gpu.half import HALF_TOLERANCE, Half
from kernels.gpu.staging import Bucket, Buckets, Layout
from kernels.gpu.tensorrt_build import Library, Settings, build, load_library, plan_name
from kernels.gpu.tiles import TILES, tiles_max, tiles_of

_log = logging.getLogger(__name__)


class TensorRtEngine:
    """The GPU engine: a TensorRT plan, run through PyCUDA streams and CUDA graphs.

    Every stream has a lane: an execution context, a pinned buffer with all of a batch's inputs, and a graph per bucket
    of shapes that copies it in, computes and copies the logits out. While one lane's thread fills its buffer another
    lane computes and a third is read back, so two streams already overlap all three.
    """

    def __init__(
        self,
        network: bytes,
        inputs: Sequence[TensorSpec],
        heads: int,
        streams: int = 1,
        *,
        plan: bytes | None = None,
        library: Library = "tensorrt",
        half: Half = "bfloat16",
        driver: Driver | None = None,
        trt: ModuleType | None = None,
    ) -> None:
        """Load the plan, or build one in a process of its own.

        Args:
            network: ONNX.
            inputs: the manifest's.
            heads: the network's columns.
            streams: runs in flight at once; two or more overlap copies with computing.
            plan: of this network; one that this library or this GPU does not take is built anew, and the log says so.
            library: TensorRT, or TensorRT for RTX.
            half: of the operands of products, in what is built here.
            driver: of the device; None takes the first GPU.
            trt: the library's module; None imports it.

        Raises:
            EngineError: there is no GPU or library, or what the library cannot honour.
        """
        self._inputs, self._heads, self.streams, self.kernel = tuple(inputs), heads, streams, "none"
        self.tolerance = HALF_TOLERANCE
        self._trt = trt or load_library(library)
        self._driver = driver or PyCudaDriver()
        digits = self._driver.architecture.removeprefix("sm_")
        self._settings = Settings(library, half, fused_for=f"{digits[:-1]}.{digits[-1]}")
        self._buckets = Buckets(self._settings.requests_max, self._settings.rows_max)
        self._cost = LinearCost()
        self._idle: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        self._lanes: list[_Lane] = []
        self._engine: Any = None
        try:
            with self._driver.entered():
                self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.WARNING))
                self._plan, self._engine = self._opened(network, plan)
                self._check_bindings()
                for _ in range(streams):
                    self._lanes.append(_Lane(self._driver, self._engine.create_execution_context(), self))
        except BaseException:
            self.close()
            raise
        for lane in self._lanes:
            self._idle.put(lane)

    def run(self, batch: FeatureBatch) -> np.ndarray:
        batch.check(self._inputs)
        logits = np.empty((batch.rows, self._heads), np.float32)
        lane = self._idle.get()
        start = 0
        try:
            with self._driver.entered():
                for part in self._buckets.cut(batch):
                    logits[start : start + part.rows] = lane.run(part, self._buckets.of(part.requests, part.rows))
                    start += part.rows
        finally:
            self._idle.put(lane)
        return logits

    def warm_up(self, sample: FeatureBatch, progress: Progress = go_on) -> WarmedUp:
        # Each lane captures graphs of its own; the largest bucket first, so that buffers grow once.
        shapes = ((bucket.requests, bucket.rows) for bucket in reversed(self._buckets.all()))
        done, self._cost = warm_and_measure(self.run, self.streams, sample, progress, shapes)
        return done

    def cost_s(self, requests: int, rows: int) -> float:  # noqa: ARG002 - measured for one request; others cost alike
        return self._cost(rows)

    def plan(self) -> bytes:
        return self._plan

    def plan_name(self) -> str:
        """Return the name that this engine's plan has in a bundle."""
        version = str(self._trt.__version__)
        return plan_name(self._settings.library, version, self._driver.architecture, self._settings.half)

    def close(self) -> None:
        with self._driver.entered():
            while self._lanes:
                self._lanes.pop().close()
            while not self._idle.empty():
                self._idle.get()
            self._engine = self._runtime = None
        self._driver.close()

    def _opened(self, network: bytes, plan: bytes | None) -> tuple[bytes, Any]:
        if plan is not None:
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is not None:
                return plan, engine
            _log.warning("the plan is not for %s: it is built anew", self.plan_name())
        built = build(network, self._inputs, self._settings).plan
        engine = self._runtime.deserialize_cuda_engine(built)
        if engine is None:
            raise EngineError(f"{self._settings.library} does not run what it built for {self._driver.architecture}")
        return built, engine

    def _check_bindings(self) -> None:
        """Raise EngineError where the plan takes or gives anything else than the manifest says."""
        trt, engine = self._trt, self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {
            name: (str(np.dtype(trt.nptype(engine.get_tensor_dtype(name)))), tuple(engine.get_tensor_shape(name))[1:])
            for name in names
        }
        expected = {spec.name: (spec.dtype, spec.shape) for spec in self._inputs}
        expected |= {ROW_REQUEST: ("int64", ()), LOGITS: ("float32", (self._heads,))}
        if TILES in found:
            expected[TILES] = ("int32", (3,))
            self.kernel = "triton"
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                plans, manifests = (names.get(name, "not there") for names in (found, expected))
                raise EngineError(f"the plan's {name!r} is {plans}, the manifest's {manifests}")


def plan_here(library: Library, half: Half = "bfloat16", device: int = 0) -> str:
    """Return what a plan for a GPU of this machine is called in a bundle. Raises UnavailableError."""
    version = str(load_library(library).__version__)
    driver = PyCudaDriver(device)
    try:
        return plan_name(library, version, driver.architecture, half)
    finally:
        driver.close()


class _Lane:
    """What one run at a time needs. All calls are made with the device's context entered."""

    def __init__(self, driver: Driver, context: Any, engine: TensorRtEngine) -> None:
        self._driver, self._context = driver, context
        self._inputs, self._heads = engine._inputs, engine._heads  # noqa: SLF001 - one module
        self._tiled = engine.kernel == "triton"
        self._stream = driver.stream()
        self._layouts: dict[Bucket, Layout] = {}
        self._graphs: dict[Bucket, int] = {}
        self._device = self._out = 0
        self._host, self._read = np.empty(0, np.uint8), np.empty(0, np.uint8)

    def run(self, part: FeatureBatch, bucket: Bucket) -> np.ndarray:
        """Return float32[N, H] of the lane's own buffer, to be copied before the next run."""
        layout = self._layouts.get(bucket)
        if layout is None:
            tiles = {TILES: ("int32", (tiles_max(bucket.requests, bucket.rows), 3))}
            layout = self._layouts[bucket] = Layout(self._inputs, bucket, tiles if self._tiled else None)
            self._make_room(layout)
        layout.fill(self._host, part)
        if self._tiled:
            room = layout.places[TILES]
            room.of(self._host)[...] = tiles_of(part.row_splits, tiles=room.shape[0])
        graph = self._graphs.get(bucket)
        if graph is None:
            # Once as it is, so that the library has chosen and allocated all it needs; only then can it be captured.
            self._enqueue(layout)
            self._driver.wait(self._stream)
            graph = self._graphs[bucket] = self._driver.captured(lambda: self._enqueue(layout), self._stream)
        self._driver.launch(graph, self._stream)
        self._driver.wait(self._stream)
        read: np.ndarray = self._read[: part.rows * self._heads * 4].view(np.float32)
        return read.reshape(part.rows, self._heads)

    def close(self) -> None:
        self._forget()
        for address in (self._device, self._out):
            if address:
                self._driver.free(address)
        self._context = None

    def _enqueue(self, layout: Layout) -> None:
        context, rows = self._context, layout.bucket.rows
        self._driver.to_device(self._device, self._host[: layout.bytes], self._stream)
        for name, place in layout.places.items():
            if not context.set_input_shape(name, place.shape):
                raise EngineError(f"the plan takes no {name!r} of {list(place.shape)}")
            context.set_tensor_address(name, self._device + place.start)
        context.set_tensor_address(LOGITS, self._out)
        if not context.execute_async_v3(self._stream):
            raise EngineError(f"TensorRT could not start a run of {rows} rows")
        self._driver.to_host(self._read[: rows * self._heads * 4], self._out, self._stream)

    def _make_room(self, layout: Layout) -> None:
        out = layout.bucket.rows * self._heads * 4
        if layout.bytes <= len(self._host) and out <= len(self._read):
            return
        self._forget()  # graphs know addresses
        size, out = max(layout.bytes, len(self._host)), max(out, len(self._read))
        for address in (self._device, self._out):
            if address:
                self._driver.free(address)
        self._device = self._out = 0
        self._host, self._read = self._driver.pinned(size), self._driver.pinned(out)
        self._device = self._driver.allocate(size)
        self._out = self._driver.allocate(out)

    def _forget(self) -> None:
        while self._graphs:
            self._driver.forget(self._graphs.popitem()[1])
