"""The CPU engine: OpenVINO, with the early-fused encoder in the native kernel."""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence

import numpy as np

from kernels.cost import LinearCost, warm_and_measure
from kernels.cpu.openvino_without_telemetry import openvino
from kernels.encoder import FusedEncoder, Numbers, has_instruction, instruction_sets, serves
from kernels.engine import LOGITS, ROW_REQUEST, EngineError, FeatureBatch, Progress, TensorSpec, WarmedUp, go_on
from kernels.fusion import ENCODED, inlined, parse, take_out_encoder

_PROPERTIES = {
    # Compute on the calling thread. A model with several streams passes each run to a thread of OpenVINO and back, and
    # a stream over several cores wastes half of them on small networks.
    "NUM_STREAMS": "1",
    "INFERENCE_NUM_THREADS": "1",
    "ENABLE_CPU_PINNING": "NO",
    # float32 even if the processor offers bf16, so that all machines give the same answers.
    "INFERENCE_PRECISION_HINT": "f32",
}


class _Stream:
    """An infer request, with memory of its own for the tensors of a single request, whose shapes never change.

    Pointing OpenVINO at an array takes 3.6 us, and copying such a tensor a tenth of that.
    """

    def __init__(self, request: openvino.InferRequest, fixed: Mapping[int, TensorSpec]) -> None:
        self.request = request
        self._own = {port: openvino.Tensor(np.dtype(spec.dtype), [1, *spec.shape]) for port, spec in fixed.items()}
        self._views = {port: tensor.data for port, tensor in self._own.items()}
        self._uses_own = False

    def feed(self, arrays: Sequence[tuple[int, np.ndarray]], *, single: bool) -> None:
        """Set the inputs to arrays by port, which must live until the run ends. `single`: of one request only."""
        if single and not self._uses_own:
            for port, tensor in self._own.items():
                self.request.set_input_tensor(port, tensor)
        self._uses_own = single
        for port, array in arrays:
            if single and port in self._views:
                self._views[port][:] = array
            else:  # costs half as much as passing a dictionary to `infer`
                self.request.set_input_tensor(port, openvino.Tensor(array, shared_memory=True))


class OpenVinoEngine:
    """Compiles the network once per stream, and computes each run on the calling thread.

    The native kernel computes the network's early-fused encoder on the same thread, and OpenVINO the rest. If the
    kernel is not built or does not support the encoder's shape, OpenVINO computes everything, with the same answers but
    several times slower. `kernel` says which.

    The kernel multiplies float32, and after `multiply("bf16")` numbers of 8 bits, if the engine was opened for that.
    """

    def __init__(
        self,
        network: bytes,
        inputs: Sequence[TensorSpec],
        heads: int,
        streams: int = 1,
        *,
        plan: bytes | None = None,
        native: bool = True,
        products: Numbers = "float32",
    ) -> None:
        """Compile the network.

        Args:
            network: the content of an ONNX file.
            inputs: the inputs in the manifest.
            heads: number of output columns.
            streams: number of concurrent runs.
            plan: `plan()` of an engine of the same network, with the same OpenVINO on the same machine. Loading it
                takes a quarter of the time of compiling.
            native: whether to use the native kernel if it supports the network.
            products: what the kernel is to multiply once `multiply` asks for it, if this processor does that fast.

        Raises:
            EngineError: OpenVINO cannot compile the network, or its inputs differ from the manifest's.
        """
        self._inputs = tuple(inputs)
        self._heads = heads
        self._cost = LinearCost()
        self.streams = streams
        # Whoever takes a stream from the queue owns it until putting it back.
        self._idle: queue.SimpleQueue[_Stream] = queue.SimpleQueue()
        try:
            parsed = parse(network)
            named = {value.name for value in parsed.graph.input}
            expected = {spec.name for spec in inputs} | {ROW_REQUEST}
            if named != expected:
                raise EngineError(f"the network takes {sorted(named)}, the manifest declares {sorted(expected)}")
            call = take_out_encoder(parsed, inputs) if native and instruction_sets() else None
            self._encoders: dict[str, FusedEncoder] = {}
            rest = None
            if call is not None and serves(call.shape):
                self._encoders["float32"] = FusedEncoder(call.weights, call.shape)
                self._read, rest = call.inputs, call.rest
                if products != "float32" and has_instruction(products):
                    self._encoders[products] = FusedEncoder(call.weights, call.shape, numbers=products)
            self.products_asked: str = products
            self.products_lacking = "" if products in self._encoders else _lacking(products, self._encoders)
            self._use(self._encoders.get("float32"))
            self.tolerance = 0.0
            core = openvino.Core()
            if plan is None:
                model = core.read_model(rest or inlined(parsed).SerializeToString())
                self._compiled = core.compile_model(model, "CPU", _PROPERTIES)
            else:
                self._compiled = core.import_model(plan, "CPU", _PROPERTIES)
            # Ports are addressed by number: finding one by its name costs 1 us for each tensor of each run.
            fed = expected | {ENCODED}
            inputs_named = ((name, i) for i, port in enumerate(self._compiled.inputs) for name in port.get_names())
            self._ports = {name: i for name, i in inputs_named if name in fed}
            outputs = [i for i, port in enumerate(self._compiled.outputs) if LOGITS in port.get_names()]
            if not outputs:
                raise EngineError(f"the network has no output {LOGITS!r}")
            (self._logits,) = outputs
            fixed = {
                self._ports[spec.name]: spec for spec in inputs if spec.side == "request" and spec.name in self._ports
            }
            self._idle.put(_Stream(self._compiled.create_infer_request(), fixed))
            if streams > 1:  # one per stream: infer requests of the same compiled model run sequentially
                plan = plan or self.plan()
                for _ in range(streams - 1):
                    self._idle.put(_Stream(core.import_model(plan, "CPU", _PROPERTIES).create_infer_request(), fixed))
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot compile the network: {error}") from error

    def multiply(self, numbers: str) -> None:
        if numbers not in self._encoders:
            raise EngineError(f"this engine multiplies {', '.join(self._encoders) or 'nothing itself'}, not {numbers}")
        self._use(self._encoders[numbers])

    def _use(self, encoder: FusedEncoder | None) -> None:
        self._encoder = encoder
        self.kernel = "none" if encoder is None else encoder.isa

    def run(self, batch: FeatureBatch) -> np.ndarray:
        batch.check(self._inputs)
        feeds = {**batch.request, **batch.candidate}
        if ROW_REQUEST in self._ports:
            feeds[ROW_REQUEST] = batch.row_request()
        if self._encoder is not None:
            actions, embeddings, candidates = (feeds[name] for name in self._read)
            feeds[ENCODED] = self._encoder.run(actions, embeddings, candidates, batch.row_splits)
        # OpenVINO reads most of these arrays without a copy, so they must live until the run ends.
        held = [(port, np.ascontiguousarray(feeds[name])) for name, port in self._ports.items()]
        stream = self._idle.get()
        try:
            stream.feed(held, single=batch.requests == 1)
            stream.request.infer(share_outputs=True)
            logits: np.ndarray = stream.request.get_output_tensor(self._logits).data.copy()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed a run of {batch.rows} rows: {error}") from error
        finally:
            self._idle.put(stream)
        if logits.shape != (batch.rows, self._heads):
            raise EngineError(
                f"the network returned shape {list(logits.shape)}, expected [{batch.rows}, {self._heads}]"
            )
        return logits

    def warm_up(self, sample: FeatureBatch, progress: Progress = go_on) -> WarmedUp:
        # The first runs of a stream allocate memory. The queue rotates the streams, so each runs every size.
        done, self._cost = warm_and_measure(self.run, self.streams, sample, progress)
        return done

    def cost_s(self, rows: int) -> float:
        return self._cost(rows)

    @property
    def slowdown(self) -> float:
        return self._cost.slowdown

    def plan(self) -> bytes:
        plan: bytes = self._compiled.export_model().getvalue()
        return plan

    def close(self) -> None:
        del self._compiled
        while not self._idle.empty():
            self._idle.get()


def _lacking(products: Numbers, encoders: Mapping[str, FusedEncoder]) -> str:
    """Say why there is no encoder with such products."""
    if not encoders:
        return "the native kernel does not compute this network's encoder, or the network has none"
    return f"this processor has no instruction for products of {products}"
