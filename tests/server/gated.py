"""An engine whose runs wait at a gate, so that a test can keep a server busy without sleeping."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from kernels.cpu.numpy_engine import NumpyEngine
from kernels.engine import EngineError, FeatureBatch, TensorSpec


class GatedEngine(NumpyEngine):
    """The reference engine behind a gate, which is open at first. It records its runs, and fails while `failing`."""

    def __init__(
        self,
        network: bytes,
        inputs: Sequence[TensorSpec],
        heads: int,
        streams: int = 1,
        *,
        plan: bytes | None = None,
    ) -> None:
        super().__init__(network, inputs, heads, streams, plan=plan)
        self.gate = threading.Event()
        self.gate.set()
        self.runs: list[FeatureBatch] = []
        self.failing = False
        self.spoiled = False

    def run(self, batch: FeatureBatch) -> np.ndarray:
        self.runs.append(batch)
        if not self.gate.wait(timeout=30):
            raise AssertionError("the test never opened the gate")
        if self.failing:
            raise EngineError("told to fail")
        logits = super().run(batch)
        return logits * np.nan if self.spoiled else logits
