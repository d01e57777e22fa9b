"""A CUDA device and a TensorRT that keep their rules without a GPU.

What is put into a stream happens when somebody waits for it, in order, and reads memory as it is then. So a buffer
that is written too early, an answer that is read too early, memory that was freed or never given back, and calls
outside the device's context all show.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from kernels.engine import LOGITS, EngineError
from kernels.fusion import parse
from kernels.numpy_engine import NumpyEngine

PLAN = b"a plan for the fake, and then the network: "
_UNWRITTEN = 0x7F


class FakeDriver:
    """A device whose memory is the host's. `log` tells what was done, in order."""

    architecture = "sm_90"

    def __init__(self):
        self.log = []
        self.memory = {}
        self.streams = {}
        self.graphs = {}
        self.closed = False
        self._entered = threading.local()
        self._capturing = threading.local()
        self._next = 1 << 20
        self._lock = threading.Lock()

    @contextmanager
    def entered(self):
        assert not self.closed
        self._entered.depth = getattr(self._entered, "depth", 0) + 1
        try:
            yield
        finally:
            self._entered.depth -= 1

    def stream(self):
        with self._lock:
            handle = 100 + len(self.streams)
            self.streams[handle] = []
        return handle

    def pinned(self, size):
        self._inside()
        return np.zeros(size, np.uint8)

    def allocate(self, size):
        self._inside()
        with self._lock:
            address, self._next = self._next, self._next + (size + 511) // 256 * 256
            self.memory[address] = np.full(size, _UNWRITTEN, np.uint8)
        return address

    def free(self, address):
        self._inside()
        del self.memory[address]

    def bytes_at(self, address, size):
        """Return the device's bytes; fails like the device for what was not allocated."""
        for start, content in list(self.memory.items()):
            if start <= address and address + size <= start + len(content):
                return content[address - start : address - start + size]
        raise EngineError(f"illegal address {address}")

    def to_device(self, address, host, stream):
        self.put(stream, "to device", lambda: self.bytes_at(address, len(host)).__setitem__(slice(None), host))

    def to_host(self, host, address, stream):
        self.put(stream, "to host", lambda: host.__setitem__(slice(None), self.bytes_at(address, len(host))))

    def put(self, stream, name, work):
        """Put work into a stream, or into the graph that is being captured."""
        self._inside()
        capturing = getattr(self._capturing, "works", None)
        (self.streams[stream] if capturing is None else capturing).append((name, work))

    def captured(self, work, stream):
        self._inside()
        assert not self.streams[stream], "a stream with work in flight cannot be captured"
        self._capturing.works = []
        try:
            work()
            with self._lock:
                graph = 10_000 + len(self.log)
                self.log.append(("captured", stream))
                self.graphs[graph] = self._capturing.works
        finally:
            self._capturing.works = None
        return graph

    def launch(self, graph, stream):
        self._inside()
        self.streams[stream] += self.graphs[graph]

    def forget(self, graph):
        self._inside()
        del self.graphs[graph]

    def wait(self, stream):
        self._inside()
        works, self.streams[stream] = self.streams[stream], []
        for name, work in works:
            self.log.append((name, stream))
            work()

    def close(self):
        self.closed = True

    def _inside(self):
        assert getattr(self._entered, "depth", 0) > 0, "a call outside the device's context"


def fake_trt(driver, inputs, heads):
    """Return a TensorRT whose plans are `PLAN` and a network, and whose contexts compute it in NumPy."""

    class Context:
        def __init__(self, network):
            self._reference = NumpyEngine(network, inputs, heads)._evaluator
            self._shapes, self._addresses = {}, {}

        def set_input_shape(self, name, shape):
            self._shapes[name] = tuple(shape)
            return all(size > 0 for size in shape)

        def set_tensor_address(self, name, address):
            self._addresses[name] = address

        def execute_async_v3(self, stream):
            shapes, addresses = dict(self._shapes), dict(self._addresses)
            driver.put(stream, "compute", lambda: self._compute(shapes, addresses))
            return True

        def _compute(self, shapes, addresses):
            feeds = {}
            for name, shape in shapes.items():
                dtype = np.dtype(dtypes[name])
                content = driver.bytes_at(addresses[name], dtype.itemsize * int(np.prod(shape)))
                feeds[name] = content.view(dtype).reshape(shape).copy()
            logits = np.ascontiguousarray(self._reference.run([LOGITS], feeds)[0], np.float32)
            driver.bytes_at(addresses[LOGITS], logits.nbytes)[:] = logits.reshape(-1).view(np.uint8)

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
            return Engine(plan.removeprefix(PLAN)) if plan.startswith(PLAN) else None

    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    return SimpleNamespace(Runtime=Runtime, Logger=logger, nptype=np.dtype, __version__="10.13.0")
