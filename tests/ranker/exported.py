"""Exports a ranker of every form for the tests of engines; each export takes seconds and is cached."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from kernels.engine import FeatureBatch, Side, TensorSpec
from ranker.export.bundle import Form, export_onnx
from ranker.network.model import FUSIONS, Fusion, NetworkConfig, RankerNetwork

#: Every fusion in its serving form, and in its published form where that differs.
FORMS: tuple[tuple[Fusion, Form], ...] = (
    *((fusion, "serving") for fusion in FUSIONS),
    ("early", "published"),
    ("cross", "published"),
)
LENGTH = 30


def batch(fills: tuple[int, ...] = (LENGTH, 0, 7), rows: int = 11) -> FeatureBatch:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(scale=shape[-1] ** -0.5, size=shape).astype(np.float32)

    requests = len(fills)
    actions = rng.integers(1, 5, (requests, LENGTH))
    actions[np.arange(LENGTH) >= np.array(fills)[:, None]] = 0
    request = {
        "user_embedding": normal(requests, 32),
        "user_scalars": normal(requests, 4),
        "surface": rng.integers(0, 2, requests),
        "query": normal(requests, 32),
        "sequence_actions": actions,
        "sequence_embeddings": normal(requests, LENGTH, 32),
    }
    candidate = {"pin_embedding": normal(rows, 32), "pin_scalars": normal(rows, 4)}
    return FeatureBatch(request, candidate, np.linspace(0, rows, requests + 1).astype(np.int32))


def read_by(fusion: Fusion, whole: FeatureBatch) -> tuple[FeatureBatch, list[TensorSpec]]:
    """Return the part of a batch that a network of this fusion reads, and the specs of its inputs."""
    request = {n: a for n, a in whole.request.items() if fusion != "none" or not n.startswith("sequence_")}
    sides: list[tuple[Side, dict[str, np.ndarray]]] = [("request", request), ("candidate", dict(whole.candidate))]
    specs = [TensorSpec(n, side, a.dtype.name, a.shape[1:]) for side, held in sides for n, a in held.items()]
    return FeatureBatch(request, whole.candidate, whole.row_splits), specs


def network(fusion: Fusion = "early", **sizes: int) -> RankerNetwork:
    torch.manual_seed(2)
    return RankerNetwork(NetworkConfig(heads=3, actions=4, surfaces=2, scalars=4, fusion=fusion, **sizes)).eval()  # type: ignore[arg-type]


@cache
def exported(fusion: Fusion = "early", form: Form = "serving") -> tuple[bytes, list[TensorSpec]]:
    """Return an exported network (ONNX) and the specs of its inputs."""
    taken, specs = read_by(fusion, batch())
    return export_onnx(network(fusion), taken, form), specs
