"""Fakes of the CUDA driver and of TensorRT that enforce their rules without a GPU.

`FakeCuda` replaces `cuda.bindings.driver`. Work in a stream runs only when a thread waits for it, in order, and reads
memory at that time. So the fake detects buffers that are written too early, results that are read too early, memory
that is used after its release or never released, calls without a context, contexts that are released twice, and waits
for the whole device during a capture.
"""

# ruff: noqa: N802 - the driver's names
from __future__ import annotations

import ctypes
import functools
import itertools
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from onnx.reference import ReferenceEvaluator

from kernels.engine import LOGITS
from kernels.fusion import parse

PLAN = b"a plan for the fake, and then the network: "
_UNWRITTEN = 0x7F

Status = IntEnum(
    "Status",
    {
        "CUDA_SUCCESS": 0,
        "CUDA_ERROR_INVALID_VALUE": 1,
        "CUDA_ERROR_OUT_OF_MEMORY": 2,
        "CUDA_ERROR_INVALID_DEVICE": 101,
        "CUDA_ERROR_INVALID_CONTEXT": 201,
        "CUDA_ERROR_INVALID_HANDLE": 400,
        "CUDA_ERROR_ILLEGAL_ADDRESS": 700,
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": 900,
        "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": 901,
    },
)


class RefusedError(Exception):
    """The driver answers a call with a status other than success."""


@dataclass
class FakeStream:
    context: int
    flags: int
    works: list[Any] = field(default_factory=list)
    noted: list[Any] | None = None  # its work while it is being captured
    broken: bool = False


def _answers(call):
    """Return what cuda-bindings returns: the status, and the value if the call has one."""

    @functools.wraps(call)
    def answered(self, *given):
        try:
            made = call(self, *given)
        except RefusedError as refused:
            return Status[f"CUDA_ERROR_{refused}"], None
        return (Status.CUDA_SUCCESS,) if made is None else (Status.CUDA_SUCCESS, made)

    return answered


class FakeCuda:
    """A number of fake devices with memory on the host. `log` lists all work in the order in which it ran."""

    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_BLOCKING_SYNC=1, CU_EVENT_DISABLE_TIMING=2)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
    )

    def __init__(self, devices=1):
        self.log = []
        self.retained = Counter(dict.fromkeys(range(devices), 0))
        self.memory, self.pinned = {}, {}
        self.streams, self.events, self.graphs, self.executables = {}, {}, {}, {}
        #: The contexts that each thread has pushed, with the current one last.
        self.pushed = {}
        #: Called when a thread waits for the whole device.
        self.on_wait = lambda: None
        self._handles = itertools.count(1 << 20, 1 << 20)

    def left(self):
        """Return everything that was not released."""
        held = (self.memory, self.pinned, self.streams, self.events, self.graphs, self.executables)
        current = [pushed for pushed in self.pushed.values() if pushed]
        return [*(found for found in held if found), *current, *(n for n in self.retained.values() if n)]

    @_answers
    def cuInit(self, flags):
        pass

    @_answers
    def cuDeviceGet(self, ordinal):
        if ordinal not in self.retained:
            raise RefusedError("INVALID_DEVICE")
        return ordinal

    @_answers
    def cuDeviceGetAttribute(self, attribute, device):
        return {75: 9, 76: 0}[attribute]

    @_answers
    def cuDevicePrimaryCtxRetain(self, device):
        self.retained[device] += 1
        return 1000 + device

    @_answers
    def cuDevicePrimaryCtxRelease(self, device):
        if not self.retained[device]:
            raise RefusedError("INVALID_CONTEXT")
        self.retained[device] -= 1

    @_answers
    def cuCtxPushCurrent(self, context):
        if not self.retained[context - 1000]:
            raise RefusedError("INVALID_CONTEXT")
        self.pushed.setdefault(threading.get_ident(), []).append(context)

    @_answers
    def cuCtxPopCurrent(self):
        self._inside()
        return self.pushed[threading.get_ident()].pop()

    @_answers
    def cuCtxSynchronize(self):
        self.on_wait()
        mine = [stream for stream in list(self.streams.values()) if stream.context == self._inside()]
        for stream in mine:
            stream.broken = stream.broken or stream.noted is not None
        if any(stream.broken for stream in mine):
            raise RefusedError("STREAM_CAPTURE_UNSUPPORTED")
        for stream in mine:
            self._finish(stream, len(stream.works))

    @_answers
    def cuStreamCreate(self, flags):
        return self._new(self.streams, FakeStream(self._inside(), int(flags)))

    @_answers
    def cuStreamDestroy(self, stream):
        self._drop(self.streams, stream)

    @_answers
    def cuEventCreate(self, flags):
        return self._new(self.events, None)

    @_answers
    def cuEventDestroy(self, event):
        self._drop(self.events, event)

    @_answers
    def cuEventRecord(self, event, stream):
        self._inside()
        self.events[event] = (self.streams[stream], len(self.streams[stream].works))

    @_answers
    def cuEventSynchronize(self, event):
        self._inside()
        self._finish(*self.events[event])

    @_answers
    def cuMemHostAlloc(self, size, flags):
        self._inside()
        array = np.full(size, _UNWRITTEN, np.uint8)
        self.pinned[array.ctypes.data] = array
        return array.ctypes.data

    @_answers
    def cuMemFreeHost(self, address):
        self._drop(self.pinned, address)

    @_answers
    def cuMemAlloc(self, size):
        self._inside()
        return self._new(self.memory, np.full(size, _UNWRITTEN, np.uint8))

    @_answers
    def cuMemFree(self, address):
        self._drop(self.memory, address)

    @_answers
    def cuMemcpyHtoDAsync(self, address, host, size, stream):
        copy = lambda: self.bytes_at(address, size).__setitem__(slice(None), _host(host, size))  # noqa: E731
        self.put(stream, "to device", copy)

    @_answers
    def cuMemcpyDtoHAsync(self, host, address, size, stream):
        copy = lambda: _host(host, size).__setitem__(slice(None), self.bytes_at(address, size))  # noqa: E731
        self.put(stream, "to host", copy)

    @_answers
    def cuStreamBeginCapture(self, stream, mode):
        held = self.streams[stream]
        assert not held.works, "a stream with work in flight cannot be captured"
        assert mode == 1, "other threads go on allocating"
        held.noted, held.broken = [], False

    @_answers
    def cuStreamEndCapture(self, stream):
        held = self.streams[stream]
        noted, held.noted = held.noted, None
        if held.broken:
            held.broken = False
            raise RefusedError("STREAM_CAPTURE_INVALIDATED")
        return self._new(self.graphs, noted)

    @_answers
    def cuGraphInstantiate(self, graph, flags):
        self.log.append(("captured", graph))
        return self._new(self.executables, self.graphs[graph])

    @_answers
    def cuGraphDestroy(self, graph):
        self._drop(self.graphs, graph)

    @_answers
    def cuGraphExecDestroy(self, executable):
        self._drop(self.executables, executable)

    @_answers
    def cuGraphLaunch(self, executable, stream):
        self._inside()
        self.streams[stream].works += self.executables[executable]

    def put(self, stream, name, work):
        """Put work into a stream, or into the graph that is being captured."""
        held = self.streams.get(stream)  # work for the legacy default stream, which is 0, is an error
        if held is None or held.context != self._inside():
            raise RefusedError("INVALID_HANDLE")
        if held.broken:
            raise RefusedError("STREAM_CAPTURE_INVALIDATED")
        (held.works if held.noted is None else held.noted).append((name, stream, work))

    def bytes_at(self, address, size):
        """Return a view of device memory. Raises RefusedError for memory that is not allocated."""
        for start, content in list(self.memory.items()):
            if start <= address and address + size <= start + len(content):
                return content[address - start : address - start + size]
        raise RefusedError("ILLEGAL_ADDRESS")

    def _inside(self):
        pushed = self.pushed.get(threading.get_ident())
        if not pushed:
            raise RefusedError("INVALID_CONTEXT")
        return pushed[-1]

    def _finish(self, stream, count):
        works, stream.works = stream.works[:count], stream.works[count:]
        for name, handle, work in works:
            self.log.append((name, handle))
            work()

    def _new(self, held, content):
        handle = next(self._handles)
        held[handle] = content
        return handle

    def _drop(self, held, handle):
        self._inside()
        if handle not in held:
            raise RefusedError("INVALID_VALUE")
        del held[handle]


def _host(address, size):
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def fake_trt(cuda, inputs, heads):
    """Return a fake TensorRT whose plans are `PLAN` and a network, and whose contexts compute the network in NumPy.

    Like the real one, it may wait for the whole device when it loads a plan or creates a context.
    """

    class Context:
        def __init__(self, network):
            cuda.cuCtxSynchronize()
            self._reference = ReferenceEvaluator(parse(network))
            self._shapes, self._addresses = {}, {}

        def set_input_shape(self, name, shape):
            self._shapes[name] = tuple(shape)
            return all(size > 0 for size in shape)

        def set_tensor_address(self, name, address):
            self._addresses[name] = address

        def execute_async_v3(self, stream):
            shapes, addresses = dict(self._shapes), dict(self._addresses)
            try:
                cuda.put(stream, "compute", lambda: self._compute(shapes, addresses))
            except RefusedError:
                return False
            return True

        def _compute(self, shapes, addresses):
            feeds = {}
            for name, shape in shapes.items():
                dtype = np.dtype(dtypes[name])
                content = cuda.bytes_at(addresses[name], dtype.itemsize * int(np.prod(shape)))
                feeds[name] = content.view(dtype).reshape(shape).copy()
            logits = np.ascontiguousarray(self._reference.run([LOGITS], feeds)[0], np.float32)
            cuda.bytes_at(addresses[LOGITS], logits.nbytes)[:] = logits.reshape(-1).view(np.uint8)

    dtypes = {spec.name: spec.dtype for spec in inputs} | {"row_request": "int64", LOGITS: "float32"}

    class Engine:
        def __init__(self, network):
            self._network = network
            graph = parse(network).graph
            self._values = [*graph.input, *graph.output]
            self.num_io_tensors = len(self._values)

        def get_tensor_name(self, index):
            return self._values[index].name

        def get_tensor_dtype(self, name):
            return dtypes.get(name, "float32")

        def get_tensor_shape(self, name):
            value = next(value for value in self._values if value.name == name)
            return [size.dim_value or -1 for size in value.type.tensor_type.shape.dim]

        def create_execution_context(self):
            return Context(self._network)

    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, plan):
            cuda.cuCtxSynchronize()
            return Engine(plan.removeprefix(PLAN)) if plan.startswith(PLAN) else None

    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    return SimpleNamespace(Runtime=Runtime, Logger=logger, nptype=np.dtype, __version__="10.13.0")


def install(monkeypatch, cuda, trt=None):
    """Make `import` find the fakes."""
    bindings = ModuleType("cuda.bindings")
    bindings.driver = cuda
    for name, module in {"cuda": ModuleType("cuda"), "cuda.bindings": bindings, "tensorrt": trt}.items():
        monkeypatch.setitem(sys.modules, name, module)
