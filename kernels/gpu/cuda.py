"""CUDA contexts, streams, memory and graphs for the TensorRT backend, through cuda-bindings.

cuda-bindings, from 12.9.1 on, releases the interpreter lock while it waits.
docs/gpu-internals.md compares it with PyCUDA.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from kernels.engine import EngineError, UnavailableError


class Device:
    """The primary context of a device, which PyTorch and TensorRT in the same process share."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises UnavailableError if the device or cuda-bindings is missing."""
        try:
            from cuda.bindings import driver  # noqa: PLC0415

            self.driver: Any = driver
            did(driver.cuInit(0))
            self._device = did(driver.cuDeviceGet(ordinal))
        except ImportError as error:
            raise UnavailableError(f"{error}; pip install 'pinrank[gpu]'") from error
        except (EngineError, RuntimeError) as error:  # there is no such device, or no driver
            raise UnavailableError(f"there is no CUDA device {ordinal}: {error}; use engine = 'openvino'") from error
        kinds = [f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}" for part in ("MAJOR", "MINOR")]
        asked = [getattr(driver.CUdevice_attribute, kind) for kind in kinds]
        #: Compute capability, such as `9.0`.
        self.capability = ".".join(str(did(driver.cuDeviceGetAttribute(kind, self._device))) for kind in asked)
        #: Frees the resources of the streams, the newest first.
        self.held = ExitStack()
        self._context = did(driver.cuDevicePrimaryCtxRetain(self._device))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make this the current context of the thread, and restore the previous one afterwards."""
        did(self.driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            did(self.driver.cuCtxPopCurrent())

    def close(self) -> None:
        """Free all resources and release the context. Any thread may call it; later calls do nothing."""
        if self._context is None:
            return
        with self.entered():
            self.held.close()
        self._context = None
        did(self.driver.cuDevicePrimaryCtxRelease(self._device))


class CudaStream:
    """Implements `kernels.gpu.engine.Stream` except `enqueue`. Buffers and graphs live until the device is closed.

    The stream does not synchronise with the legacy default stream, which nothing here uses.
    """

    def __init__(self, device: Device) -> None:
        self.entered, self._held, self._cuda = device.entered, device.held, device.driver
        cuda, flags = device.driver, device.driver.CUevent_flags
        with self.entered():
            stream = cuda.cuStreamCreate(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
            self._stream = self._made(stream, cuda.cuStreamDestroy)
            event = cuda.cuEventCreate(flags.CU_EVENT_BLOCKING_SYNC | flags.CU_EVENT_DISABLE_TIMING)
            self._done = self._made(event, cuda.cuEventDestroy)
        self.handle = int(self._stream)

    def _made(self, answer: tuple[Any, ...], free: Callable[[Any], object]) -> Any:
        found = did(answer)
        self._held.callback(free, found)
        return found

    def room(self, given: int, made: int) -> tuple[np.ndarray, np.ndarray]:
        cuda, rooms = self._cuda, []
        for size in (given, made):
            address = int(self._made(cuda.cuMemHostAlloc(size, 0), cuda.cuMemFreeHost))
            ctypes.memset(address, 0, size)
            pinned = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
            rooms.append((pinned, int(self._made(cuda.cuMemAlloc(size), cuda.cuMemFree))))
        (self._host, self.given), (self._read, self.made) = rooms
        return self._host, self._read

    def to_device(self, size: int) -> None:
        """Copy `size` bytes of the inputs to the device."""
        did(self._cuda.cuMemcpyHtoDAsync(self.given, self._host.ctypes.data, size, self._stream))

    def to_host(self, size: int) -> None:
        """Copy `size` bytes of the logits to the host."""
        did(self._cuda.cuMemcpyDtoHAsync(self._read.ctypes.data, self.made, size, self._stream))

    def captured(self, work: Callable[[], None]) -> Callable[[], object]:
        work()
        self.wait()
        cuda = self._cuda
        did(cuda.cuStreamBeginCapture(self._stream, cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            work()
        except BaseException:
            _, graph = cuda.cuStreamEndCapture(self._stream)  # end the capture, so that the stream can run again
            cuda.cuGraphDestroy(graph)
            raise
        graph = did(cuda.cuStreamEndCapture(self._stream))
        try:
            executable = self._made(cuda.cuGraphInstantiate(graph, 0), cuda.cuGraphExecDestroy)
        finally:
            cuda.cuGraphDestroy(graph)
        return lambda: did(cuda.cuGraphLaunch(executable, self._stream))

    def wait(self) -> None:
        did(self._cuda.cuEventRecord(self._done, self._stream))
        did(self._cuda.cuEventSynchronize(self._done))


def did(answer: tuple[Any, ...]) -> Any:
    """Check the status of a driver call, and return its value. Raises EngineError, UnavailableError."""
    status, *values = answer
    if status != 0:
        raise (UnavailableError if "OUT_OF_MEMORY" in status.name else EngineError)(f"CUDA: {status.name}")
    return values[0] if values else None
