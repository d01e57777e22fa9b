"""What one GPU does with the ranker: one run, one JSON and one table. `make bench-gpu`.

Needs PyTorch, Triton and NumPy, and no network; with what `bench/gpu-carry.txt` lists it measures the whole ranker as
well, through TensorRT too, and served. The kernel comes first: when the time is up, what is left says "not measured",
as does whatever could not be, and why.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.fused_encoder import EncoderShape
from kernels.gpu.encoder_node import NODE, encoder_alone
from kernels.gpu.tiles import TILES, Launch, tiles_of
from kernels.gpu.torch_network import TorchNetwork
from kernels.gpu.triton_encoder import TritonEncoder
from ranker.encoder import EarlyFusion
from ranker.serving_form import fold_early

NOT_MEASURED = "not measured"
OUT_OF_TIME = "the time was up"
Way = Callable[["Inputs"], Callable[[], object]]
#: MFLOP of the published encoder per row, exactly rewritten and with only what the readout reads.
_FIRST_K = 4.1
#: Bytes that a row cannot but move through the device's memory: its candidate in and its readout out, in float32;
#: unfused, two layers' intermediates besides.
_FUSED_BYTES, _UNFUSED_BYTES = 4 * (32 + 960), 0.57e6
_GOAL_ROWS_S = 10e6
_PARITY_MAX = 1e-2
_TARGET_MS = 10.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """An encoder's sizes, as `ranker.encoder.EncoderSizes`."""

    actions: int = 5
    dim: int = 32
    action_dim: int = 32
    token_pin_dim: int = 32
    encoder_layers: int = 2
    encoder_hidden: int = 32
    readout_rows: int = 10
    readout_pool: bool = False


#: The public baseline's shape: 256 sequences of 256 tokens of 64 numbers, two layers.
_BASELINE = Sizes(dim=16, action_dim=32, token_pin_dim=16, encoder_hidden=64)
_BASELINE_SEQUENCES = _BASELINE_TOKENS = 256
_BASELINE_MS = 0.324


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured; the quick one only shows that the script runs."""

    shapes: tuple[tuple[int, int], ...] = ((1, 128), (1, 1024), (4, 512), (16, 128), (16, 512), (64, 256), (64, 512))
    length: int = 100
    #: Rows that the published form computes at once: unfused, a row takes more than half a megabyte.
    eager_rows: int = 4096
    repeats: int = 200
    matrix: int = 8192
    copied_bytes: int = 1 << 32
    baseline_sequences: int = _BASELINE_SEQUENCES
    #: Of every rate that is tried.
    served_s: float = 4.0
    #: Warps of a program, and rows in a tile, tried on the last but one shape.
    tunings: tuple[tuple[int, int], ...] = tuple((warps, rows) for warps in (4, 8) for rows in (4, 8, 16, 32))
    #: After which nothing more begins.
    budget_s: float = 480.0


_QUICK = Plan(((1, 4), (2, 2)), 12, 16, 1, 64, 1 << 16, 2, 0.0, ((4, 8),))


class Inputs:
    """A random batch: requests with whole sequences, and as many rows each."""

    def __init__(
        self, sizes: Sizes, requests: int, rows: int, length: int, device: torch.device, tile_rows: int = 0
    ) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.rows = requests * rows
        self.actions = torch.randint(1, sizes.actions + 1, (requests, length), generator=drawn).to(device)
        self.embeddings = torch.randn(requests, length, sizes.dim, generator=drawn).to(device)
        self.candidates = torch.randn(self.rows, sizes.dim, generator=drawn).to(device)
        splits = np.arange(requests + 1, dtype=np.int32) * rows
        self.row_request = torch.arange(requests, device=device).repeat_interleave(rows)
        self.tiles = torch.from_numpy(tiles_of(splits, tile_rows)).to(device)


def measure(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Measure everything that this machine can."""
    until_s = time.monotonic() + plan.budget_s
    torch.manual_seed(0)
    encoder = EarlyFusion(Sizes()).eval()
    weights = {name: weight.detach().numpy() for name, weight in fold_early(encoder).items()}
    found: dict[str, Any] = {"device": _device(device), "plan": {"length": plan.length, "repeats": plan.repeats}}
    found["limits"] = _limits(plan, device)
    kernel = TritonEncoder(weights, EncoderShape(plan.length, Sizes().readout_rows, 2))
    found["parity"] = _parity(encoder, kernel, Inputs(Sizes(), 2, 8, plan.length, device))
    published = encoder.to(device)
    ways: dict[str, Way] = {
        "fused kernel, CUDA graph": lambda batch: _graphed(_fused(kernel, batch)),
        "fused kernel": lambda batch: _fused(kernel, batch),
        "published form, eager bf16": lambda batch: _published(published, batch, plan.eager_rows),
        "published form, compiled bf16": lambda batch: _published(torch.compile(published), batch, plan.eager_rows),
    }

    def tried(names: Iterable[str]) -> list[dict[str, Any]]:
        return [
            {"requests": requests, "rows": rows, **_tried(name, ways[name], requests, rows, plan, device, until_s)}
            for name in names
            for requests, rows in plan.shapes
        ]

    found["encoder"] = tried(list(ways)[:2])
    found["baseline shape"] = _baseline(plan, device)
    found["tuning"] = _tuning(weights, plan, device)
    found["ranker"], found["served"] = _ranker(plan, until_s)
    found["encoder"] += tried(list(ways)[2:])
    return found


def _device(device: torch.device) -> dict[str, object]:
    if device.type != "cuda":
        return {"name": "CPU, in Triton's interpreter: its times mean nothing"}
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "compute_capability": f"{facts.major}.{facts.minor}",
        "memory_bytes": facts.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def _limits(plan: Plan, device: torch.device) -> dict[str, float]:
    """Return what the device reaches on random data: dense bf16 products, and copies within its memory."""
    a = torch.randn(plan.matrix, plan.matrix, device=device, dtype=torch.bfloat16)
    b = torch.randn(plan.matrix, plan.matrix, device=device, dtype=torch.bfloat16)
    source = torch.zeros(plan.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_s = float(np.median(_seconds(lambda: torch.matmul(a, b), device, 20)))
    copy_s = float(np.median(_seconds(lambda: target.copy_(source), device, 20)))
    return {"bf16_flop_s": 2 * plan.matrix**3 / product_s, "copy_bytes_s": 2 * plan.copied_bytes / copy_s}


def _parity(encoder: EarlyFusion, kernel: TritonEncoder, batch: Inputs) -> dict[str, float]:
    """Return the kernel's largest relative difference, row by row, from the published form in float64."""
    with torch.inference_mode():
        exact = encoder.double()(
            batch.actions.cpu(),
            batch.embeddings.cpu().double(),
            batch.candidates.cpu().double(),
            batch.row_request.cpu(),
        )
        found = _fused(kernel, batch)().cpu().double()
        encoder.float()
    difference = ((found - exact).norm(dim=1) / exact.norm(dim=1)).max().item()
    return {"relative_difference": difference, "allowed": _PARITY_MAX}


def _published(encoder: Callable[..., Tensor], batch: Inputs, at_once: int) -> Callable[[], object]:
    device = batch.candidates.device

    def run() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            for start in range(0, batch.rows, at_once):
                part = slice(start, start + at_once)
                encoder(batch.actions, batch.embeddings, batch.candidates[part], batch.row_request[part])

    return run


def _fused(kernel: TritonEncoder, batch: Inputs) -> Callable[[], Tensor]:
    network = TorchNetwork(encoder_alone(kernel), batch.candidates.device, {NODE: kernel.run})
    names = ("actions", "embeddings", "candidates", TILES)
    given = {name: getattr(batch, name) for name in names}

    def run() -> Tensor:
        with torch.inference_mode():
            return network(given)

    return run


def _graphed(run: Callable[[], object]) -> Callable[[], object]:
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device")
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _tried(
    name: str, way: Way, requests: int, rows: int, plan: Plan, device: torch.device, until_s: float
) -> dict[str, Any]:
    if time.monotonic() > until_s:
        return {"way": name, "rows_s": NOT_MEASURED, "why": OUT_OF_TIME}
    try:
        batch = Inputs(Sizes(), requests, rows, plan.length, device)
        seconds = _seconds(way(batch), device, plan.repeats)
    except (
        RuntimeError,
        OSError,
    ) as error:  # out of memory, no compiler, no graphs: this way has no number, others have
        return {"way": name, "rows_s": NOT_MEASURED, "why": f"{type(error).__name__}: {error}"[:300]}
    return {"way": name, "rows_s": batch.rows / float(seconds.mean()), **_quantiles(seconds)}


def _tuning(weights: dict[str, np.ndarray], plan: Plan, device: torch.device) -> list[dict[str, Any]]:
    """Try the kernel's two free choices on one shape: what the next version should choose."""
    requests, rows = plan.shapes[-2]
    found = []
    for warps, tile_rows in plan.tunings:
        kernel = TritonEncoder(weights, EncoderShape(plan.length, Sizes().readout_rows, 2), Launch(warps=warps))
        batch = Inputs(Sizes(), requests, rows, plan.length, device, tile_rows)
        about: dict[str, Any] = {"requests": requests, "rows": rows, "warps": warps, "tile_rows": tile_rows}
        try:
            seconds = _seconds(_fused(kernel, batch), device, plan.repeats)
        except RuntimeError as error:  # a program that does not fit
            found.append({**about, "rows_s": NOT_MEASURED, "why": f"{type(error).__name__}: {error}"[:300]})
        else:
            found.append({**about, "rows_s": batch.rows / float(seconds.mean()), **_quantiles(seconds)})
    return found


def _baseline(plan: Plan, device: torch.device) -> dict[str, Any]:
    encoder = EarlyFusion(_BASELINE).eval()
    weights = {name: weight.detach().numpy() for name, weight in fold_early(encoder).items()}
    try:
        kernel = TritonEncoder(weights, EncoderShape(_BASELINE_TOKENS, _BASELINE.readout_rows, 2))
        batch = Inputs(_BASELINE, plan.baseline_sequences, 1, _BASELINE_TOKENS, device)
        run = _fused(kernel, batch)
        seconds = _seconds(_graphed(run) if device.type == "cuda" else run, device, plan.repeats)
    except RuntimeError as error:
        return {"ms_p50": NOT_MEASURED, "why": f"{type(error).__name__}: {error}"[:300]}
    return {"sequences": plan.baseline_sequences, "published_ms": _BASELINE_MS, **_quantiles(seconds)}


def _ranker(plan: Plan, until_s: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure the whole ranker through each engine, its copies included, and then served through gRPC."""
    try:
        from bench.gpu_ranker import ENGINES, ranker, served  # noqa: PLC0415
    except ImportError as error:
        nothing = [{"engine": "all", "rows_s": NOT_MEASURED, "why": f"{error}: see bench/gpu-carry.txt"}]
        return nothing, nothing
    late = {"rows_s": NOT_MEASURED, "why": OUT_OF_TIME}
    alone = [
        {"engine": engine, **late} if time.monotonic() > until_s else one
        for engine in ENGINES
        for one in ranker(engine, plan.shapes, plan.repeats)
    ]
    through = [
        {"engine": engine, **late} if time.monotonic() > until_s else served(engine, plan.served_s)
        for engine in ENGINES
        if plan.served_s
    ]
    return alone, through


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> np.ndarray:
    """Return each run's seconds, on the device's own clock, after a few that are not counted."""
    for _ in range(min(3, repeats)):
        run()
    if device.type != "cuda":
        return np.array([_elapsed(run) for _ in range(repeats)])
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return np.array([one.elapsed_time(other) / 1e3 for one, other in pairwise(marks)])


def _elapsed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _quantiles(seconds: np.ndarray) -> dict[str, float]:
    return {f"ms_p{int(at * 100)}": float(np.quantile(seconds, at)) * 1e3 for at in (0.5, 0.99)}


def table(found: dict[str, Any]) -> str:
    """Return everything as one Markdown table."""
    peak, copies = found["limits"]["bf16_flop_s"], found["limits"]["copy_bytes_s"]
    differs = found["parity"]["relative_difference"]
    lines = [
        f"# {found['device']['name']}",
        "",
        f"bf16 products {peak / 1e12:.0f} TFLOP/s, copies {copies / 1e12:.2f} TB/s.",
        f"The kernel differs from float64 by {differs:.1e}, allowed are {_PARITY_MAX:.0e}.",
        "",
        "| what | requests x rows | rows/s | of the goal | of the peak | of the copies | P50 ms | P99 ms |",
        "|---|---|---|---|---|---|---|---|",
        *_lines(found, peak),
        "",
        "| warps | rows in a tile | rows/s |",
        "|---|---|---|",
        *(f"| {one['warps']} | {one['tile_rows']} | {_rate(one)} |" for one in found["tuning"]),
    ]
    return "\n".join(lines) + "\n"


def _rate(one: dict[str, Any]) -> str:
    return f"{one['rows_s']:,.0f}" if one["rows_s"] != NOT_MEASURED else f"{NOT_MEASURED}: {one['why']}"


def _lines(found: dict[str, Any], peak: float) -> Iterator[str]:
    for one in (*found["encoder"], *found["ranker"]):
        what = one.get("way") or f"ranker, {one['engine']}"
        shape = f"{one['requests']} x {one['rows']}" if "requests" in one else ""
        if one["rows_s"] == NOT_MEASURED:
            yield f"| {what} | {shape} | {_rate(one)} | | | | | |"
            continue
        rate = one["rows_s"]
        goal = _GOAL_ROWS_S if "way" in one else _GOAL_ROWS_S / 2
        moved = rate * (_UNFUSED_BYTES if what.startswith("published") else _FUSED_BYTES)
        yield (
            f"| {what} | {shape} | {rate:,.0f} | {rate / goal:.2f} | {rate * _FIRST_K * 1e6 / peak:.1%} "
            f"| {moved / found['limits']['copy_bytes_s']:.1%} | {one['ms_p50']:.3f} | {one['ms_p99']:.3f} |"
        )
    for one in found["served"]:
        what = f"served by {one['engine']} within {_TARGET_MS:.0f} ms at P99"
        shape = f"{one['requests_s']:,.0f}/s x {one['candidates']}" if "requests_s" in one else ""
        yield f"| {what} | {shape} | {_rate(one)} | | | | | |"
    base = found["baseline shape"]
    took = base["ms_p50"] if base["ms_p50"] == NOT_MEASURED else f"{base['ms_p50']:.3f}"
    what = f"256 sequences x 256 tokens x 64, two layers (published: {_BASELINE_MS} ms on an L40S)"
    yield f"| {what} | | | | | | {took} | |"


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of gpu.json and gpu.md")
    parser.add_argument(
        "--quick", action="store_true", help="see that the script runs, also without a GPU (TRITON_INTERPRET=1)"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.quick:
        print("There is no CUDA device, so nothing is measured. --quick tries the script without one.", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(_QUICK if options.quick else Plan(), device)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "gpu.md").write_text(table(found))
    print(table(found))
    return 0 if found["parity"]["relative_difference"] <= _PARITY_MAX else 1


if __name__ == "__main__":
    sys.exit(main())
