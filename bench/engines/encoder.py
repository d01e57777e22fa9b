"""Compare the published ranker with its serving form on the same weights, requests and cores, in alternating rounds.

Every request has a full sequence of 100 actions, the most expensive case. Each side runs as one stream per core or as
one stream over all cores, whichever is faster in a short trial.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import onnxruntime
import torch

from bench.engines.peak_share import PeakShare, claims_of, flop_per_row, measure_shares, per_second, table_of
from bench.harness import BenchmarkError, Claim, Conclusion, Raw, markdown_table
from kernels.cpu.openvino_engine import OpenVinoEngine
from kernels.cpu.openvino_without_telemetry import openvino
from kernels.encoder import FusedEncoder, Numbers, has_instruction, instruction_sets
from kernels.engine import LOGITS, ROW_REQUEST, FeatureBatch, TensorSpec
from kernels.fusion import EncoderCall, inlined, parse, take_out_encoder
from ranker.export.bundle import export_encoder, export_onnx
from ranker.network.model import NetworkConfig, RankerNetwork
from ranker.training.minibatches import tensors

CANDIDATES = (128, 512)
LENGTH = 100
#: Goals of the first table, followed by its requirements.
AIMS = {"openvino": 6.0, "onnxruntime": 12.0, "rows_per_s": 100_000.0}
REQUIRED = {"openvino": 4.0, "onnxruntime": 8.0, "whole_over_encoder": 2 / 3, "difference": 1e-4}
#: Our side, and the same with products of bf16, where the processor has them. The ratio of the latter is aimed at.
ENGINE, ENGINE_BF16 = "serving form in the engine", "serving form in the engine, bf16"
AIMED_BF16 = 1.5
#: Scores closer than this count as a tie: it is about the float32 rounding error of sums of this size.
TIE = 1e-5

Run = Callable[[FeatureBatch], np.ndarray]
#: Creates a side for a given number of threads per stream.
Opened = Callable[[int], Run]


@dataclass(frozen=True, slots=True)
class Side:
    """One way to compute one part. `open` creates an independent stream, which runs on the calling thread."""

    part: str
    name: str
    open: Opened
    #: Whether a stream may use several cores.
    threaded: bool


def measure(*, quick: bool) -> Iterator[Raw]:
    """Measure every side with every number of candidates.

    Raises:
        BenchmarkError: the native kernel is not built.
    """
    if not instruction_sets():
        raise BenchmarkError("the native kernel is not built; reinstall pinrank with a C++ compiler present")
    networks = {"encoder": _network(), "ranker": _network(), "flat ranker": _network(readout_dim=0)}
    call = _encoder_call(networks["ranker"])
    sides = _sides(networks, call)
    cores = len(os.sched_getaffinity(0))
    rounds, window_s = (1, 0.05) if quick else (5, 1.0)
    rates: dict[str, dict[str, list[float]]] = {}
    layouts: dict[str, str] = {}
    differences: dict[str, float] = {}
    inversions: dict[str, int] = {}
    for candidates in CANDIDATES[:1] if quick else CANDIDATES:
        batch = _batch(candidates, seed=candidates)
        expected = {part: _oracle(network, part, batch) for part, network in networks.items()}
        opened: dict[str, list[Run]] = {}
        for side in sides:
            key = f"{side.part}, {side.name}, {candidates} candidates"
            opened[key], layouts[key] = _layout(side, cores, batch, window_s / 2)
            found = opened[key][0](batch)
            differences[key] = float(np.max(np.abs(found - expected[side.part])))
            inversions[key] = 0 if side.part == "encoder" else inversion_count(found, expected[side.part])
        rates |= {key: {"rows_per_s": []} for key in opened}
        for _ in range(rounds):
            for key, streams in opened.items():
                rates[key]["rows_per_s"].append(_rate(streams, batch, window_s))
    shares = measure_shares(call, _batch(CANDIDATES[0], seed=CANDIDATES[0]), quick=quick)
    yield {
        "rows_per_s_by_round": {key: value["rows_per_s"] for key, value in rates.items()},
        "layout": layouts,
        "largest_difference": differences,
        "inversions": inversions,
        "kernel": instruction_sets()[-1],
        "cores": cores,
        "shares_of_peak": [asdict(share) for share in shares],
        "flop_per_row": flop_per_row(call.weights, call.shape),
    }


def _network(**sizes: int) -> RankerNetwork:
    """Return a ranker of the published size with seeded random weights, including all biases and gains."""
    torch.manual_seed(7)
    network = RankerNetwork(NetworkConfig(heads=4, actions=4, surfaces=2, scalars=4, **sizes)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def _batch(candidates: int, seed: int, requests: int = 1) -> FeatureBatch:
    rng = np.random.default_rng(seed)

    def unit(*shape: int) -> np.ndarray:
        drawn = rng.normal(size=shape)
        normed: np.ndarray = drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)
        return normed.astype(np.float32)

    request = {
        "user_embedding": unit(requests, 32),
        "user_scalars": rng.normal(size=(requests, 4)).astype(np.float32),
        "surface": rng.integers(0, 2, requests),
        "query": unit(requests, 32),
        "sequence_actions": rng.integers(1, 5, (requests, LENGTH)),
        "sequence_embeddings": unit(requests, LENGTH, 32),
    }
    pins = {
        "pin_embedding": unit(candidates, 32),
        "pin_scalars": rng.normal(size=(candidates, 4)).astype(np.float32),
    }
    splits = np.linspace(0, candidates, requests + 1).astype(np.int32)
    return FeatureBatch(request, pins, splits)


def _oracle(network: RankerNetwork, part: str, batch: FeatureBatch) -> np.ndarray:
    """Compute the published form in float64."""
    with torch.inference_mode():
        double = RankerNetwork(network.config).double().eval()
        double.load_state_dict(network.state_dict())
        given = {name: value.double() if value.is_floating_point() else value for name, value in tensors(batch).items()}
        if part != "encoder":
            logits: torch.Tensor = double.published(**given)
            return logits.numpy()
        assert double.encoder is not None  # noqa: S101 - the published size has one
        names = ("sequence_actions", "sequence_embeddings", "pin_embedding", ROW_REQUEST)
        encoded: torch.Tensor = double.encoder(*(given[name] for name in names))
        return encoded.numpy()


def _encoder_call(network: RankerNetwork) -> EncoderCall:
    call = take_out_encoder(parse(export_onnx(network, _sample())), _specs(_sample()))
    if call is None:
        raise BenchmarkError("the serving form does not call the encoder function")
    return call


def _sample() -> FeatureBatch:
    return _batch(17, seed=1, requests=3)


def _specs(sample: FeatureBatch) -> list[TensorSpec]:
    specs = [TensorSpec(n, "request", str(array.dtype), array.shape[1:]) for n, array in sample.request.items()]
    return specs + [
        TensorSpec(n, "candidate", str(array.dtype), array.shape[1:]) for n, array in sample.candidate.items()
    ]


def _sides(networks: Mapping[str, RankerNetwork], call: EncoderCall) -> list[Side]:
    network, flat = networks["ranker"], networks["flat ranker"]
    sample = _sample()
    specs = _specs(sample)
    serving = export_onnx(network, sample)
    published = {"encoder": export_encoder(network, sample), "ranker": export_onnx(network, sample, "published")}
    plain = inlined(parse(serving)).SerializeToString()

    def native_encoder(numbers: Numbers) -> Opened:
        def opened(_threads: int) -> Run:
            kernel = FusedEncoder(call.weights, call.shape, numbers=numbers)

            def run(batch: FeatureBatch) -> np.ndarray:
                tensors_of = {**batch.request, **batch.candidate}
                actions, embeddings, candidates = (tensors_of[name] for name in call.inputs)
                return kernel.run(actions, embeddings, candidates, batch.row_splits)

            return run

        return opened

    def engine(numbers: Numbers) -> Opened:
        def opened(_threads: int) -> Run:
            engine = OpenVinoEngine(serving, specs, 4, products=numbers)
            engine.multiply(numbers)
            return engine.run

        return opened

    sides = []
    for part, content in published.items():
        sides += [
            Side(part, "published form in ONNX Runtime", _onnx_runtime(content), threaded=True),
            Side(part, "published form in OpenVINO", _openvino(content, "f32"), threaded=True),
            Side(part, "published form in OpenVINO, bf16", _openvino(content, "bf16"), threaded=True),
        ]
    sides.append(Side("ranker", "serving form in OpenVINO, without the kernel", _openvino(plain, "f32"), threaded=True))
    kinds: tuple[tuple[str, Numbers], ...] = ((ENGINE, "float32"), (ENGINE_BF16, "bf16"))
    for name, numbers in kinds:
        if has_instruction(numbers):
            sides.append(Side("encoder", name, native_encoder(numbers), threaded=False))
            sides.append(Side("ranker", name, engine(numbers), threaded=False))
    flat_published, flat_serving = export_onnx(flat, sample, "published"), export_onnx(flat, sample)
    sides.append(Side("flat ranker", "published form in OpenVINO", _openvino(flat_published, "f32"), threaded=True))
    flat_engine: Opened = lambda _threads: OpenVinoEngine(flat_serving, specs, 4).run  # noqa: E731
    sides.append(Side("flat ranker", ENGINE, flat_engine, threaded=False))
    return sides


def _onnx_runtime(content: bytes) -> Opened:
    def opened(threads: int) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}

        def run(batch: FeatureBatch) -> np.ndarray:
            return np.asarray(session.run([LOGITS], _feeds(batch, names))[0])

        return run

    return opened


def _openvino(content: bytes, precision: str) -> Opened:
    def opened(threads: int) -> Run:
        core = openvino.Core()
        properties = {
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
            "ENABLE_CPU_PINNING": "NO",
            "INFERENCE_PRECISION_HINT": precision,
        }
        request = core.compile_model(core.read_model(content), "CPU", properties).create_infer_request()
        names = {name for port in request.model_inputs for name in port.get_names()}

        def run(batch: FeatureBatch) -> np.ndarray:
            held = _feeds(batch, names)
            for name, array in held.items():
                request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
            request.infer()
            found: np.ndarray = request.get_tensor(LOGITS).data.astype(np.float32)
            return found

        return run

    return opened


def _feeds(batch: FeatureBatch, names: set[str]) -> dict[str, np.ndarray]:
    given = {**batch.request, **batch.candidate, ROW_REQUEST: batch.row_request()}
    return {name: np.ascontiguousarray(array) for name, array in given.items() if name in names}


def _layout(side: Side, cores: int, batch: FeatureBatch, window_s: float) -> tuple[list[Run], str]:
    """Open a side as one stream per core or one stream over all cores, whichever is faster in a trial."""
    layouts = {f"{cores} streams of 1 thread": [side.open(1) for _ in range(cores)]}
    if side.threaded:
        layouts[f"1 stream of {cores} threads"] = [side.open(cores)]
    for streams in layouts.values():
        for run in streams:
            run(batch)
    if len(layouts) == 1:
        return next((streams, name) for name, streams in layouts.items())
    best = max(layouts, key=lambda name: _rate(layouts[name], batch, window_s))
    return layouts[best], best


def _rate(streams: list[Run], batch: FeatureBatch, window_s: float) -> float:
    """Return the total rows/s of all streams, each in a loop on its own thread."""

    def work(run: Run) -> Callable[[], float]:
        def once() -> float:
            run(batch)
            return batch.rows

        return once

    return per_second([work(run) for run in streams], window_s)


def inversion_count(found: np.ndarray, expected: np.ndarray) -> int:
    """Count rows, in the order of `found`, that `expected` ranks above an earlier row by more than a tie."""
    order = np.argsort(-found, axis=0, kind="stable")
    ordered = np.take_along_axis(expected, order, axis=0)
    return int((ordered[1:] - np.minimum.accumulate(ordered, axis=0)[:-1] > TIE).sum())


def conclude(raw: Raw) -> Conclusion:
    rates = {key: {"rows_per_s": by_round} for key, by_round in raw["rows_per_s_by_round"].items()}
    layouts, differences, inversions = raw["layout"], raw["largest_difference"], raw["inversions"]
    sizes = sorted({int(key.split(", ")[-1].split()[0]) for key in rates})

    def ratio(over: str, under: str, size: int) -> float:
        pairs = zip(
            rates[f"{over}, {size} candidates"]["rows_per_s"],
            rates[f"{under}, {size} candidates"]["rows_per_s"],
            strict=True,
        )
        return float(np.median([a / b for a, b in pairs]))

    claims = []
    for size in sizes:
        for peer, key in (("OpenVINO", "openvino"), ("ONNX Runtime", "onnxruntime")):
            measured = ratio(f"encoder, {ENGINE}", f"encoder, published form in {peer}", size)
            for what, target in (("required", REQUIRED[key]), ("aimed at", AIMS[key])):
                name = f"encoder alone over the published form in {peer}, {size} candidates, {what}"
                claims.append(Claim(name, measured, target, "ratio", "at_least"))
        rows_per_s = float(np.median(rates[f"encoder, {ENGINE}, {size} candidates"]["rows_per_s"]))
        claims.append(
            Claim(f"encoder alone, {size} candidates, aimed at", rows_per_s, AIMS["rows_per_s"], "rows/s", "at_least")
        )
        if f"encoder, {ENGINE_BF16}, {size} candidates" in rates:
            for part in ("encoder", "ranker"):
                name = f"{part}, products of bf16 over float32, {size} candidates, aimed at"
                measured = ratio(f"{part}, {ENGINE_BF16}", f"{part}, {ENGINE}", size)
                claims.append(Claim(name, measured, AIMED_BF16, "ratio", "at_least"))
        whole = ratio(f"ranker, {ENGINE}", f"encoder, {ENGINE}", size)
        claims.append(
            Claim(
                f"whole ranker over encoder alone, {size} candidates",
                whole,
                REQUIRED["whole_over_encoder"],
                "ratio",
                "at_least",
            )
        )
    exact = {key: value for key, value in differences.items() if "bf16" not in key}
    claims.append(
        Claim("largest difference from float64, fp32 sides", max(exact.values()), REQUIRED["difference"], "", "at_most")
    )
    swapped = float(sum(count for key, count in inversions.items() if "bf16" not in key))
    claims.append(Claim("rows ranked above one that they belong below, beyond ties", swapped, 0, "pairs", "at_most"))
    summary = {f"{key}, rows/s": float(np.median(value["rows_per_s"])) for key, value in rates.items()}
    summary |= {f"{key}, largest difference": value for key, value in differences.items()}
    shares = [PeakShare(**share) for share in raw["shares_of_peak"]]
    of_peak = claims_of(shares)
    summary |= {f"{claim.name}, {claim.unit}": claim.measured for claim in of_peak if claim.measured is not None}
    tables = (_table(rates, layouts, differences, sizes, raw["cores"]), table_of(shares, *raw["flop_per_row"]))
    return Conclusion(summary, (*claims, *of_peak), "\n".join(tables))


def _table(
    rates: Mapping[str, Mapping[str, list[float]]],
    layouts: Mapping[str, str],
    differences: Mapping[str, float],
    sizes: list[int],
    cores: int,
) -> str:
    """Return a table of rows/s and differences, for the encoder alone and the whole ranker, one line per side."""
    header = ["", "layout"]
    for size in sizes:
        header += [f"rows/s, {size} candidates", "over OpenVINO", "largest difference"]
    text = f"# {cores} cores, one request of full length at a time per stream; medians of rounds\n"
    titles = {
        "encoder": "Encoder alone",
        "ranker": "Whole ranker",
        "flat ranker": "Whole ranker whose cross network takes the readout as it is (readout_dim = 0)",
    }
    for part, title in titles.items():
        names = dict.fromkeys(key.split(", ", 1)[1].rsplit(", ", 1)[0] for key in rates if key.startswith(f"{part}, "))
        lines = []
        for name in names:
            cells = [name, layouts[f"{part}, {name}, {sizes[0]} candidates"]]
            for size in sizes:
                mine = np.array(rates[f"{part}, {name}, {size} candidates"]["rows_per_s"])
                peer = np.array(rates[f"{part}, published form in OpenVINO, {size} candidates"]["rows_per_s"])
                difference = differences[f"{part}, {name}, {size} candidates"]
                cells += [f"{np.median(mine):,.0f}", f"{np.median(mine / peer):.2f}", f"{difference:.1e}"]
            lines.append(cells)
        text += "\n" + markdown_table(title, header, lines)
    return text + "\nThe difference is from the published form in float64: of encoder outputs, or of logits.\n"
