"""Measure whether half precision changes rankings: HIT@3 of the demo's model with products in float32 and in bf16.

- As on GPUs: a CPU emulates the arithmetic of the GPU engines, whose products all round their operands to bf16 and sum
  in float32. A real GPU differs only in the order of the sums.
- As with `engine_products = "bf16"`: the native encoder's products of layers 1 and 2 multiply bf16, by the processor's
  own instruction. A processor without it leaves this part out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from pydantic import TypeAdapter

from bench.harness import Claim, Conclusion, Raw
from kernels.cpu.openvino_engine import OpenVinoEngine
from kernels.encoder import has_instruction
from kernels.engine import Engine
from kernels.fusion import inlined, parse
from kernels.gpu.engine import GpuEngine
from kernels.gpu.half import HALF_TOLERANCE, with_half_products
from kernels.gpu.torch_backend import TorchBackend
from model_store.bundle.files import NETWORK, Bundle
from model_store.registry.store import open_model_store
from ranker.cache_folder import default_cache_dir
from ranker.data import movielens
from ranker.data.actions import ActionLog, action_log
from ranker.data.atomic.recbole import read_atomic
from ranker.evaluation.evaluate import evaluate
from ranker.evaluation.results import Evaluation
from ranker.training.examples import Sampling

STORE = Path(__file__).parents[2] / "deploy" / "demo" / "models"
MODEL, LABEL = "ml1m", "stable"
_FULL: Final = "float32"
_HALF: Final = "bfloat16"
_NATIVE: Final = "native bf16"


def measure(*, quick: bool = False, bundle: Bundle | None = None, log: ActionLog | None = None) -> Iterator[Raw]:
    """Evaluate a bundle in every precision, with the same candidates and the same resamples of users."""
    if bundle is None:
        store = open_model_store(STORE)
        bundle = store.read(MODEL, store.resolve(MODEL, LABEL))
    if log is None:
        log = action_log(read_atomic(movielens.obtain(default_cache_dir())))
    in_half, native = _marked(bundle, _HALF), _marked(bundle, _NATIVE)
    bundles = {_FULL: bundle, _HALF: in_half} | ({_NATIVE: native} if has_instruction("bf16") else {})

    def factory(network: bytes, *given: Any, **more: Any) -> Engine:
        if network == in_half.files[NETWORK]:
            return GpuEngine(open_rounded, network, *given, **more)
        if network == native.files[NETWORK]:
            engine = OpenVinoEngine(network, *given, products="bf16", **more)
            engine.multiply("bf16")
            return engine
        return OpenVinoEngine(network, *given, **more)

    found = evaluate(bundles, log, factory, Sampling(requests_max=50 if quick else 1_500), 7, baseline=_FULL)
    yield {"evaluation": found.as_json()}


def conclude(raw: Raw) -> Conclusion:
    found = TypeAdapter(Evaluation).validate_python(raw["evaluation"])
    claims: list[Claim] = []
    summary: dict[str, float] = {"requests": found.requests, "rows": found.rows}
    for score in found.scores:
        if score.scorer == _FULL or score.hit_at_3_by_utility is None:
            continue
        name = f"HIT@3 {score.head}" + ("" if score.scorer == _HALF else f", {score.scorer}")
        summary[name] = score.hit_at_3_by_utility.mean.value or 0.0
        lift = score.hit_at_3_by_utility.lift_percent
        if lift is not None and lift.value is not None and lift.low is not None and lift.high is not None:
            summary[f"{name}, difference in %"] = lift.value
            apart = max(lift.low, -lift.high)
            claims.append(
                Claim(
                    f"{name}: what lies between 0 and the difference's interval",
                    apart,
                    0.0,
                    "percent",
                    "at_most",
                )
            )
    return Conclusion(summary, tuple(claims))


def _marked(bundle: Bundle, name: str) -> Bundle:
    """Return the bundle with the same network under another name, so that it gets an engine of its own."""
    renamed = onnx.load_model_from_string(bundle.files[NETWORK])
    renamed.doc_string = name
    return replace(bundle, files={**bundle.files, NETWORK: renamed.SerializeToString()})


def open_rounded(network: bytes, _inputs: object, heads: int, _ordinal: int, _plan: object) -> TorchBackend:
    backend = TorchBackend(with_half_products(inlined(parse(network)), _HALF), heads, torch.device("cpu"))
    backend.tolerance = HALF_TOLERANCE  # as on a GPU
    return backend
