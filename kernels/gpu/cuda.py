"""The few things that an engine asks of the CUDA driver, and PyCUDA and cuda-bindings doing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np

from kernels.engine import EngineError, UnavailableError


class Driver(Protocol):
    """One device. Every call but `entered` is made by a thread that has entered; addresses are of the device."""

    #: Such as `sm_90`.
    architecture: str

    def entered(self) -> AbstractContextManager[None]:
        """Make the device's context this thread's, for as long as the block takes."""

    def stream(self) -> int:
        """Make a stream, and return its handle."""

    def pinned(self, size: int) -> np.ndarray:
        """Return uint8[size] of the host that the device reads and writes by itself."""

    def allocate(self, size: int) -> int:
        """Return the address of so many bytes."""

    def free(self, address: int) -> None:
        """Give back what `allocate` returned."""

    def to_device(self, address: int, host: np.ndarray, stream: int) -> None:
        """Copy pinned bytes, in the stream's order."""

    def to_host(self, host: np.ndarray, address: int, stream: int) -> None:
        """Copy to pinned bytes, in the stream's order."""

    def captured(self, work: Callable[[], None], stream: int) -> int:
        """Note what `work` puts into the stream instead of running it, and return the graph of it."""

    def launch(self, graph: int, stream: int) -> None:
        """Run a graph, in the stream's order."""

    def forget(self, graph: int) -> None:
        """Free a graph."""

    def wait(self, stream: int) -> None:
        """Wait until the stream has done all it was given, leaving the processor to others."""

    def close(self) -> None:
        """Free the streams and pinned memory, and leave the device."""


class PyCudaDriver:
    """The primary context of a device: what PyTorch and TensorRT in the same process use too."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises UnavailableError where there is no device, or no PyCUDA or cuda-bindings."""
        try:
            import pycuda.driver as pycuda  # noqa: PLC0415
            from cuda.bindings import driver as bindings  # noqa: PLC0415

            pycuda.init()
            device = pycuda.Device(ordinal)
        except ImportError as error:
            raise UnavailableError(f"{error}; pip install 'pinrank[gpu]'") from error
        except pycuda.Error as error:
            raise UnavailableError(f"there is no CUDA device {ordinal}: {error}; use engine = 'openvino'") from error
        self._pycuda: Any = pycuda
        self._bindings: Any = bindings
        self._context = device.retain_primary_context()
        self.architecture = "sm_{}{}".format(*device.compute_capability())
        self._streams: dict[int, Any] = {}
        self._waits: dict[int, Any] = {}
        self._allocated: dict[int, Any] = {}

    @contextmanager
    def entered(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def stream(self) -> int:
        stream = self._pycuda.Stream()
        flags = self._pycuda.event_flags
        handle = int(stream.handle)
        self._streams[handle] = stream
        self._waits[handle] = self._pycuda.Event(flags.BLOCKING_SYNC | flags.DISABLE_TIMING)
        return handle

    def pinned(self, size: int) -> np.ndarray:
        array: np.ndarray = self._pycuda.pagelocked_zeros(size, np.uint8)
        return array

    def allocate(self, size: int) -> int:
        memory = self._pycuda.mem_alloc(size)
        self._pycuda.memset_d8(memory, 0, size)
        self._allocated[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        self._allocated.pop(address).free()

    def to_device(self, address: int, host: np.ndarray, stream: int) -> None:
        self._pycuda.memcpy_htod_async(address, host, self._streams[stream])

    def to_host(self, host: np.ndarray, address: int, stream: int) -> None:
        self._pycuda.memcpy_dtoh_async(host, address, self._streams[stream])

    def captured(self, work: Callable[[], None], stream: int) -> int:
        mode = self._bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._did(self._bindings.cuStreamBeginCapture(stream, mode))
        try:
            work()
        except BaseException:
            self._bindings.cuStreamEndCapture(stream)  # whatever was noted, the stream must run again
            raise
        graph = self._did(self._bindings.cuStreamEndCapture(stream))
        try:
            executable = self._did(self._bindings.cuGraphInstantiate(graph, 0))
        finally:
            self._did(self._bindings.cuGraphDestroy(graph))
        return int(executable)

    def launch(self, graph: int, stream: int) -> None:
        self._did(self._bindings.cuGraphLaunch(graph, stream))

    def forget(self, graph: int) -> None:
        self._did(self._bindings.cuGraphExecDestroy(graph))

    def wait(self, stream: int) -> None:
        event = self._waits[stream]
        event.record(self._streams[stream])
        event.synchronize()

    def close(self) -> None:
        with self.entered():
            for address in list(self._allocated):
                self.free(address)
            self._streams.clear()
            self._waits.clear()
        self._context.detach()

    def _did(self, answer: tuple[Any, ...]) -> Any:
        """Return what a call of cuda-bindings returned beside its status. Raises EngineError for a failed one."""
        status, *values = answer
        if status != self._bindings.CUresult.CUDA_SUCCESS:
            raise EngineError(f"CUDA: {status.name}")
        return values[0] if values else None
