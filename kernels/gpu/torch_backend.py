"""The PyTorch backend: the network's operators one by one, and the early-fused encoder in the Triton kernel."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from subprocess import SubprocessError
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import onnx
import torch
from triton.errors import TritonError

from kernels.engine import ROW_REQUEST, EngineError, TensorSpec, UnavailableError
from kernels.fusion import inlined, parse
from kernels.gpu.encoder_node import NODE, with_kernel
from kernels.gpu.engine import WHOLE_DEVICE
from kernels.gpu.half import HALF_TOLERANCE, Half, with_half_products
from kernels.gpu.staging import Layout
from kernels.gpu.tiles import TILES
from kernels.gpu.torch_network import Operator, TorchNetwork
from kernels.gpu.triton_encoder import runs_on

_log = logging.getLogger(__name__)
_HALF: Half | None = "bfloat16"
#: By handle, in the whole process. PyTorch has 32 streams for each device and gives them out in turn, taken or not: on
#: one that two slots shared, what one of them runs would become part of what the other captures.
_STREAMS: WeakValueDictionary[int, TorchStream] = WeakValueDictionary()


def open_torch(
    network: bytes, inputs: Sequence[TensorSpec], heads: int, ordinal: int, _plan: bytes | None
) -> TorchBackend:
    """Open a network on a GPU in bf16, or, without a GPU, on the CPU in float32, for tests. Raises EngineError."""
    device, half = torch.device("cuda", ordinal), _HALF
    if ordinal == 0 and not torch.cuda.is_available():
        _log.warning("PyTorch finds no GPU; the network runs on the CPU, many times slower")
        device, half = torch.device("cpu"), None
    model = parse(network)
    named, expected = {value.name for value in model.graph.input}, {spec.name for spec in inputs} | {ROW_REQUEST}
    if named != expected:
        raise EngineError(f"the network takes {sorted(named)}, the manifest declares {sorted(expected)}")
    answered = with_kernel(model, inputs, half) if runs_on(device) else None
    if answered is not None:
        changed, encoder = answered
        return TorchBackend(changed, heads, device, {NODE: encoder.run})
    plain = inlined(model)
    return TorchBackend(with_half_products(plain, half) if half else plain, heads, device)


class TorchBackend:
    """A network without functions on one device. On a GPU it runs in CUDA graphs, on a CPU eagerly."""

    plan: bytes | None = None

    def __init__(
        self, model: onnx.ModelProto, heads: int, device: torch.device, kernels: Mapping[str, Operator] | None = None
    ) -> None:
        self._device, self._heads, self.captures = device, heads, device.type == "cuda"
        self.tiled = TILES in {value.name for value in model.graph.input}
        self.kernel = "triton" if kernels else "none"
        self.tolerance = HALF_TOLERANCE if kernels or self.captures else 0.0
        try:
            stream = TorchStream(device)
        except (AssertionError, RuntimeError) as error:
            raise UnavailableError(f"PyTorch cannot use {device}: {error}") from error
        with WHOLE_DEVICE, stream.entered():
            self._network: TorchNetwork | None = TorchNetwork(model, device, kernels)
            stream.wait()

    def stream(self) -> TorchStream:
        return TorchStream(self._device, self._network, self._heads)

    def close(self) -> None:
        self._network = None
        if self.captures:
            torch.cuda.empty_cache()


class TorchStream:
    """A PyTorch stream that does not wait for the default stream. On a CPU, calls compute immediately."""

    def __init__(self, device: torch.device, network: Any = None, heads: int = 0) -> None:
        self._device, self._network, self._heads = device, network, heads
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            ours = (torch.cuda.Stream(device) for _ in range(32))  # type: ignore[no-untyped-call]
            self._stream = next((one for one in ours if one.cuda_stream not in _STREAMS), None)
            if self._stream is None:
                raise UnavailableError(f"engines use all 32 streams of {device}; lower engine_streams")
            _STREAMS[self._stream.cuda_stream] = self
            self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            #: All graphs of a stream share memory, as only one runs at a time.
            self._pool = torch.cuda.graph_pool_handle()

    @property
    def number(self) -> int:
        """What PyTorch calls the stream; 0 on a CPU."""
        return int(self._stream.cuda_stream) if self._on_gpu and self._stream else 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream) if self._on_gpu else nullcontext():
                yield
        except (
            RuntimeError,
            TritonError,
            OSError,
            SubprocessError,
        ) as error:  # Triton writes files and runs a compiler
            kind = UnavailableError if isinstance(error, torch.OutOfMemoryError) else EngineError
            raise kind(f"PyTorch: {type(error).__name__}: {error}") from error

    def room(self, given: int, made: int) -> tuple[np.ndarray, np.ndarray]:
        pinned = [torch.zeros(size, dtype=torch.uint8, pin_memory=self._on_gpu) for size in (given, made)]
        self._host, self._read = pinned
        self._given = torch.empty(given, dtype=torch.uint8, device=self._device)
        return self._host.numpy(), self._read.numpy()

    def enqueue(self, layout: Layout) -> None:
        self._given[: layout.bytes].copy_(self._host[: layout.bytes], non_blocking=True)
        views = {
            name: self._given[place.start : place.stop].view(getattr(torch, place.dtype.name)).reshape(place.shape)
            for name, place in layout.places.items()
        }
        logits, expected = self._network(views), (layout.bucket.rows, self._heads)
        if logits.shape != expected:
            raise EngineError(f"the network returned shape {list(logits.shape)}, expected {list(expected)}")
        self._read.view(torch.float32)[: logits.numel()].copy_(logits.reshape(-1), non_blocking=True)

    def captured(self, work: Callable[[], None]) -> Callable[[], object]:
        if not self._on_gpu:
            return work
        work()
        self.wait()
        # `torch.cuda.graph` would wait for the whole device first.
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:  # more informative than the error at the end of the broken capture
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
        return graph.replay

    def wait(self) -> None:
        if self._on_gpu:
            self._done.record(self._stream)
            self._done.synchronize()
