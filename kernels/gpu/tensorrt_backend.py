"""The TensorRT backend (also TensorRT for RTX): a plan, and an execution context for each stream."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from kernels.engine import LOGITS, EngineError, TensorSpec
from kernels.gpu.cuda import CudaStream, Device
from kernels.gpu.engine import WHOLE_DEVICE
from kernels.gpu.half import HALF_TOLERANCE
from kernels.gpu.staging import Bucket, Layout
from kernels.gpu.tensorrt_build import Library, Settings, build, load_library, plan_name
from kernels.gpu.tiles import TILES

_log = logging.getLogger(__name__)


class TensorRtBackend:
    """A plan on one device. A plan that this library or GPU does not accept is rebuilt, with a warning in the log."""

    captures = True
    tolerance = HALF_TOLERANCE

    def __init__(
        self,
        library: Library,
        network: bytes,
        inputs: Sequence[TensorSpec],
        heads: int,
        ordinal: int,
        plan: bytes | None,
    ) -> None:
        """Load the plan, or build one in a separate process. Raises EngineError."""
        self._trt, self._device = load_library(library), Device(ordinal)
        self._streams: list[_Stream] = []
        self._runtime: Any = None
        self._engine: Any = None
        try:
            if plan is not None and not self._loaded(plan):
                _log.warning("the plan does not fit %s; building a new one", plan_here(library, ordinal))
            if plan is None or self._engine is None:
                architectures = (self._device.capability,) if library == "tensorrt" else ()
                plan = build(network, inputs, Settings(library, architectures=architectures)).plan
                if not self._loaded(plan):
                    raise EngineError(f"{library} cannot load the plan that it built for {self._device.capability}")
            self.plan, self._row_bytes = plan, 4 * heads
            self.tiled = self._checked(inputs, heads)
        except BaseException:
            with WHOLE_DEVICE:
                self.close()
            raise
        self.kernel = "triton" if self.tiled else "none"

    def stream(self) -> CudaStream:
        with self._device.entered():
            self._streams.append(_Stream(self._device, self._engine.create_execution_context(), self._row_bytes))
        return self._streams[-1]

    def close(self) -> None:
        with self._device.entered():
            for stream in self._streams:
                stream.context = None
            self._engine = self._runtime = None
        self._device.close()

    def _loaded(self, plan: bytes) -> bool:
        with WHOLE_DEVICE, self._device.entered():
            self._runtime = self._runtime or self._trt.Runtime(self._trt.Logger(self._trt.Logger.WARNING))
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        return self._engine is not None

    def _checked(self, inputs: Sequence[TensorSpec], heads: int) -> bool:
        """Return whether the plan contains the kernel. Raises EngineError if its tensors differ from the manifest's."""
        trt, engine = self._trt, self._engine
        found = {}
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
            found[name] = dtype, tuple(engine.get_tensor_shape(name))[1:]
        layout = Layout(inputs, Bucket(1, 1), tiled=TILES in found)
        expected = {name: (place.dtype.name, place.shape[1:]) for name, place in layout.places.items()}
        expected[LOGITS] = "float32", (heads,)
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                plans, manifests = (names.get(name, "missing") for names in (found, expected))
                raise EngineError(f"tensor {name!r} is {plans} in the plan, but {manifests} in the manifest")
        return TILES in found


class _Stream(CudaStream):
    def __init__(self, device: Device, context: Any, row_bytes: int) -> None:
        super().__init__(device)
        self.context, self._row_bytes = context, row_bytes

    def enqueue(self, layout: Layout) -> None:
        self.to_device(layout.bytes)
        for name, place in layout.places.items():
            if not self.context.set_input_shape(name, place.shape):
                raise EngineError(f"the plan does not accept shape {list(place.shape)} for {name!r}")
            self.context.set_tensor_address(name, self.given + place.start)
        self.context.set_tensor_address(LOGITS, self.made)
        if not self.context.execute_async_v3(self.handle):
            raise EngineError(f"TensorRT could not start a run of {layout.bucket.rows} rows")
        self.to_host(layout.bucket.rows * self._row_bytes)


def plan_here(library: Library, ordinal: int = 0) -> str:
    """Return the file name, in a bundle, of a plan for a GPU of this machine. Raises UnavailableError."""
    version, device = str(load_library(library).__version__), Device(ordinal)
    device.close()
    return plan_name(library, version, f"sm_{device.capability.replace('.', '')}", Settings(library).half)
