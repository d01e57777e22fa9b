"""PyTorch as an engine: the reference on GPUs, and the home of the fused kernel there."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from kernels.cost import LinearCost, measure_cost, warm_buckets
from kernels.engine import ROW_REQUEST, EngineError, FeatureBatch, Rest, ShapeError, TensorSpec, no_rest
from kernels.fusion import ENCODED, EncoderCall, inlined, parse, take_out_encoder
from kernels.gpu.encoder_node import NODE, encoder_alone
from kernels.gpu.half import HALF_TOLERANCE, Half, with_half_products
from kernels.gpu.staging import Bucket, Buckets, Layout
from kernels.gpu.tiles import TILES, tiles_max, tiles_of
from kernels.gpu.torch_network import TorchNetwork
from kernels.gpu.triton_encoder import TritonEncoder, runs_on


class TorchEngine:
    """The network's operators in PyTorch, the early-fused encoder in the Triton kernel.

    On a GPU every stream has a pinned buffer, one copy to the device per run, and a CUDA graph per bucket of shapes,
    captured at the bucket's first run; products are bf16. On a CPU it is float32, eager: for tests and comparisons.
    """

    def __init__(
        self,
        network: bytes,
        inputs: Sequence[TensorSpec],
        heads: int,
        streams: int = 1,
        *,
        plan: bytes | None = None,  # noqa: ARG002 - PyTorch keeps no form of its own
        device: str | None = None,
        half: Half | Literal["auto", "none"] = "auto",
        fused: bool = True,
        graphs: bool = True,
        compiled: bool = False,
    ) -> None:
        """Place the network.

        Args:
            network: ONNX.
            inputs: the manifest's.
            heads: the network's columns.
            streams: runs in flight at once.
            plan: none, ever.
            device: None takes a GPU where there is one.
            half: of the products' operands; `auto` is bfloat16 on a GPU and none on a CPU.
            fused: whether to use the Triton kernel where it can be.
            graphs: whether to capture CUDA graphs.
            compiled: whether PyTorch compiles the network for every bucket: seconds each, at its first run.

        Raises:
            EngineError: what PyTorch cannot honour.
        """
        try:
            self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=self._device)
        except (AssertionError, RuntimeError) as error:
            raise EngineError(f"PyTorch cannot use {device}: {error}") from error
        on_gpu = self._device.type == "cuda"
        parsed = parse(network)
        named = {value.name for value in parsed.graph.input}
        expected = {spec.name for spec in inputs} | {ROW_REQUEST}
        if named != expected:
            raise EngineError(f"the network takes {sorted(named)}, the manifest declares {sorted(expected)}")
        self._inputs, self._heads, self.streams = tuple(inputs), heads, streams
        call = take_out_encoder(parsed, inputs) if fused and runs_on(self._device) else None
        self._fused = _Fused(call, self._device) if call is not None and TritonEncoder.serves(call.shape) else None
        rest = parse(call.rest) if call is not None and self._fused is not None else inlined(parsed)
        if half == "auto":
            half = "bfloat16" if on_gpu else "none"
        if half != "none":
            rest = with_half_products(rest, half)
        self._network = TorchNetwork(rest, self._device)
        self._compiled: dict[Bucket, Callable[[dict[str, Tensor]], Tensor]] | None = {} if compiled else None
        self.kernel = "none" if self._fused is None else "triton"
        self.tolerance = HALF_TOLERANCE if half != "none" or self._fused is not None else 0.0
        self._graphs = graphs and on_gpu
        self._capturing = threading.Lock()
        self._buckets = Buckets()
        self._cost = LinearCost()
        self._idle: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        for number in range(streams):
            self._idle.put(_Lane(number, self._device, on_gpu))

    def run(self, batch: FeatureBatch) -> np.ndarray:
        batch.check(self._inputs)
        if self._fused is not None:
            self._fused.check(batch)
        logits = np.empty((batch.rows, self._heads), np.float32)
        lane = self._idle.get()
        start = 0
        try:
            for part in self._buckets.cut(batch):
                found = self._run_part(lane, part)
                if found.shape != (part.rows, self._heads):
                    raise EngineError(
                        f"the network returned {list(found.shape)}, expected [{part.rows}, {self._heads}]"
                    )
                logits[start : start + part.rows] = found
                start += part.rows
        except RuntimeError as error:
            raise EngineError(f"PyTorch failed a run of {batch.rows} rows: {error}") from error
        finally:
            self._idle.put(lane)
        return logits

    def warm_up(self, sample: FeatureBatch, rest: Rest = no_rest) -> None:
        if self._graphs:  # each lane captures its own
            warm_buckets(self.run, self._buckets.all(), self.streams, sample, rest)
        self._cost = measure_cost(self.run, sample, rest, repeats=max(2, self.streams))

    def cost_s(self, requests: int, rows: int) -> float:  # noqa: ARG002 - measured for one request; others cost alike
        return self._cost(rows)

    def plan(self) -> bytes | None:
        return None

    def close(self) -> None:
        while not self._idle.empty():
            self._idle.get()
        del self._network
        self._fused = self._compiled = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _run_part(self, lane: _Lane, part: FeatureBatch) -> np.ndarray:
        layout = self._layout(lane, part)
        self._fill(layout, lane.host, part)
        with torch.inference_mode(), lane.entered():
            lane.device[: layout.bytes].copy_(lane.pinned[: layout.bytes], non_blocking=True)
            graph = lane.graphs.get(layout)
            if graph is not None:
                graph.replay()
                out = lane.outputs[layout]
            elif self._graphs:
                out = self._captured(lane, layout)
            else:
                out = self._compute(lane, layout)
            # Copying to the host waits for the stream: the buffers may be written again afterwards.
            found: np.ndarray = out[: part.rows].cpu().numpy()
        return found

    def _layout(self, lane: _Lane, part: FeatureBatch) -> Layout:
        bucket = self._buckets.of(part.requests, part.rows)
        extra: dict[str, tuple[str, tuple[int, ...]]] = {}
        if self._fused is not None:
            extra[TILES] = "int32", (tiles_max(bucket.requests, bucket.rows), 3)
        return lane.layout(bucket, lambda: Layout(self._inputs, bucket, extra))

    def _fill(self, layout: Layout, host: np.ndarray, part: FeatureBatch) -> None:
        layout.fill(host, part)
        if self._fused is not None:
            room = layout.places[TILES]
            room.of(host)[...] = tiles_of(part.row_splits, tiles=room.shape[0])

    def _compute(self, lane: _Lane, layout: Layout) -> Tensor:
        values = {name: _view(lane.device, layout, name) for name in layout.places}
        if self._fused is not None:
            values[ENCODED] = self._fused.encoded(values, values.pop(TILES))
        if self._compiled is None:
            return self._network(values)
        if layout.bucket not in self._compiled:
            # Traced with the bucket's own sizes, as the network computes some of them from its inputs' shapes.
            self._compiled[layout.bucket] = torch.compile(make_fx(self._network)(values), dynamic=False)
        return self._compiled[layout.bucket](values)

    def _captured(self, lane: _Lane, layout: Layout) -> Tensor:
        """Run once, so that everything is loaded and compiled, then capture what was run."""
        out = self._compute(lane, layout)
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        # One at a time: a capture begins by waiting for the whole device, which nothing may do while another one is on.
        with self._capturing, torch.cuda.graph(graph, lane.pool, lane.stream, capture_error_mode="thread_local"):
            lane.outputs[layout] = self._compute(lane, layout)
        lane.graphs[layout] = graph
        return out


class _Lane:
    """What one run at a time needs: a stream, a buffer on either side, and the graphs that read it."""

    def __init__(self, number: int, device: torch.device, on_gpu: bool) -> None:
        self.number = number
        self.stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        #: All its graphs use the same memory, as only one runs at a time.
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._on_gpu, self._where = on_gpu, device
        self._layouts: dict[Bucket, Layout] = {}
        self.graphs: dict[Layout, torch.cuda.CUDAGraph] = {}
        self.outputs: dict[Layout, Tensor] = {}
        self._grow(1)

    def entered(self) -> torch.cuda.StreamContext | nullcontext[None]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def layout(self, bucket: Bucket, make: Callable[[], Layout]) -> Layout:
        """Return the layout of a bucket, and have room for it."""
        if bucket not in self._layouts:
            self._layouts[bucket] = make()
        layout = self._layouts[bucket]
        if layout.bytes > len(self.host):
            self._grow(layout.bytes)
        return layout

    def _grow(self, size: int) -> None:
        # Graphs read fixed addresses: with another buffer they have to be captured again.
        self.graphs.clear()
        self.outputs.clear()
        self.pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=self._on_gpu)
        self.device = torch.zeros(size, dtype=torch.uint8, device=self._where)
        self.host: np.ndarray = self.pinned.numpy()


class _Fused:
    """The encoder's call in the network, and the kernel that answers it."""

    def __init__(self, call: EncoderCall, device: torch.device) -> None:
        self._actions, self._embeddings, self.candidates = call.inputs
        self._known = len(call.weights["action_table"])
        kernel = TritonEncoder(call.weights, call.shape)
        self._network = TorchNetwork(encoder_alone(kernel), device, {NODE: kernel.run})

    def check(self, batch: FeatureBatch) -> None:
        """Raise ShapeError for a code that no action has."""
        codes = batch.request[self._actions]
        if codes.size and not 0 <= codes.min() <= codes.max() < self._known:
            raise ShapeError(f"actions must be codes from 0 to {self._known - 1}, got {codes.min()} to {codes.max()}")

    def encoded(self, values: dict[str, Tensor], tiles: Tensor) -> Tensor:
        read = {"actions": self._actions, "embeddings": self._embeddings, "candidates": self.candidates}
        return self._network({role: values[name] for role, name in read.items()} | {TILES: tiles})


_DTYPES = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "int8": torch.int8}


def _view(buffer: Tensor, layout: Layout, name: str) -> Tensor:
    place = layout.places[name]
    return buffer[place.start : place.stop].view(_DTYPES[place.dtype.name]).reshape(place.shape)
