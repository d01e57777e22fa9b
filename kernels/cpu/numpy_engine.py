"""The reference engine: ONNX operators in NumPy, one by one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx.reference import ReferenceEvaluator

from kernels.cost import LinearCost, warm_and_measure
from kernels.engine import LOGITS, ROW_REQUEST, EngineError, FeatureBatch, Progress, TensorSpec, WarmedUp, go_on
from kernels.fusion import parse


class NumpyEngine:
    """Runs the network's ONNX operators in NumPy: slow, and the reference that the other engines are tested against."""

    def __init__(
        self,
        network: bytes,
        inputs: Sequence[TensorSpec],
        heads: int,
        streams: int = 1,
        *,
        plan: bytes | None = None,  # noqa: ARG002 - this engine compiles nothing
    ) -> None:
        try:
            self._evaluator = ReferenceEvaluator(parse(network))
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise EngineError(f"the network cannot be loaded: {error}") from error
        self._inputs = tuple(inputs)
        self._heads = heads
        self._cost = LinearCost()
        self.streams = streams
        self.kernel = "none"
        self.tolerance = 0.0

    def run(self, batch: FeatureBatch) -> np.ndarray:
        batch.check(self._inputs)
        feeds = {**batch.request, **batch.candidate, ROW_REQUEST: batch.row_request()}
        try:
            logits = np.asarray(self._evaluator.run([LOGITS], feeds)[0])  # type: ignore[index]
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise EngineError(f"NumPy failed a run of {batch.rows} rows: {error}") from error
        if logits.shape != (batch.rows, self._heads):
            raise EngineError(
                f"the network returned shape {list(logits.shape)}, expected [{batch.rows}, {self._heads}]"
            )
        return logits.astype(np.float32, copy=False)

    def warm_up(self, sample: FeatureBatch, progress: Progress = go_on) -> WarmedUp:
        done, self._cost = warm_and_measure(self.run, 1, sample, progress)  # streams have no state
        return done

    def cost_s(self, rows: int) -> float:
        return self._cost(rows)

    @property
    def slowdown(self) -> float:
        return self._cost.slowdown

    def plan(self) -> bytes | None:
        return None

    def close(self) -> None:
        pass
