"""The engine contract: from a ragged batch of (user, candidate) rows to one logit per row and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

Side = Literal["request", "candidate"]

#: The network's input with the index of each row's request: int64[N], from `FeatureBatch.row_splits`.
ROW_REQUEST = "row_request"
#: The network's output: float32[N, H].
LOGITS = "logits"


class EngineError(Exception):
    """An engine could not load or run a network."""


class UnavailableError(EngineError):
    """The runtime or its device is missing or out of memory. The network is not at fault."""


class ShapeError(EngineError):
    """The tensors, dtypes or shapes of a batch differ from the network's inputs."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input of a network. `shape` excludes the leading dimension: R (request side) or N (candidate side)."""

    name: str
    side: Side
    dtype: str
    shape: tuple[int, ...]


@dataclass(slots=True)
class FeatureBatch:
    """The rows of one or more requests. The tensors of a request are stored once, not once per candidate.

    Attributes:
        request: tensors of shape [R, ...] by name.
        candidate: tensors of shape [N, ...] by name.
        row_splits: int32[R + 1], non-decreasing from 0 to N. Request r owns rows row_splits[r]:row_splits[r + 1].
    """

    request: Mapping[str, np.ndarray]
    candidate: Mapping[str, np.ndarray]
    row_splits: np.ndarray

    @property
    def requests(self) -> int:
        return len(self.row_splits) - 1

    @property
    def rows(self) -> int:
        return int(self.row_splits[-1])

    def row_request(self) -> np.ndarray:
        """Return the index of each row's request, int64[N]."""
        if self.requests == 1:
            return np.zeros(self.rows, np.int64)
        return np.repeat(np.arange(self.requests, dtype=np.int64), np.diff(self.row_splits))

    def piece(self, start: int, stop: int) -> FeatureBatch:
        """Return rows start:stop of a batch of one request, without copying."""
        if (start, stop) == (0, self.rows):
            return self
        candidate = {name: tensor[start:stop] for name, tensor in self.candidate.items()}
        return FeatureBatch(self.request, candidate, np.array([0, stop - start], np.int32))

    @staticmethod
    def concat(batches: Sequence[FeatureBatch]) -> FeatureBatch:
        """Concatenate batches of one model. Rows keep their order."""
        if len(batches) == 1:
            return batches[0]
        counts = np.concatenate([np.diff(batch.row_splits) for batch in batches])
        return FeatureBatch(
            {name: np.concatenate([b.request[name] for b in batches]) for name in batches[0].request},
            {name: np.concatenate([b.candidate[name] for b in batches]) for name in batches[0].candidate},
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        )

    def check(self, inputs: Sequence[TensorSpec]) -> None:
        """Raise ShapeError if a tensor differs from `inputs`. The message names the first one."""
        for spec in inputs:
            side, leading = (self.request, self.requests) if spec.side == "request" else (self.candidate, self.rows)
            tensor = side.get(spec.name)
            expected = (leading, *spec.shape)
            if tensor is None:
                raise ShapeError(f"the batch lacks the {spec.side} tensor {spec.name!r}; it has {sorted(side)}")
            if tensor.shape != expected or tensor.dtype != np.dtype(spec.dtype):
                raise ShapeError(
                    f"tensor {spec.name!r}: expected {spec.dtype}{list(expected)}, "
                    f"got {tensor.dtype}{list(tensor.shape)}"
                )


#: Called before a warm-up's first run and after each, on the same thread, with the runs made and those of the whole:
#: rests, tells, and says whether there is time for another shape. What it raises ends the warm-up.
Progress = Callable[[int, int], bool]


def go_on(runs: int, of: int) -> bool:  # noqa: ARG001 - the signature is `Progress`'s
    """Continue the warm-up to its end."""
    return True


@dataclass(frozen=True, slots=True)
class WarmedUp:
    """The progress of a warm-up.

    Attributes:
        runs: number of runs that were made.
        of: number of runs of a complete warm-up. For each run that was skipped, a stream meets a shape for the first
            time when it serves a request.
    """

    runs: int
    of: int


class Engine(Protocol):
    """Runs one network on one device.

    As many threads as the engine has streams may call `run` concurrently. Padding, tiles, shape buckets and graphs are
    internal to the engine.
    """

    #: Number of concurrent runs.
    streams: int
    #: The kernel that computes the encoder (an instruction set or `triton`); `none` if the runtime computes everything.
    kernel: str
    #: Largest error of a probability due to products in half precision; 0 for products in float32.
    tolerance: float

    def run(self, batch: FeatureBatch) -> np.ndarray:
        """Return the logits, float32[N, H], in row order. Raises ShapeError, EngineError."""

    def warm_up(self, sample: FeatureBatch, progress: Progress = go_on) -> WarmedUp:
        """Run batches made from `sample` until later runs have no first-run costs, and measure the cost of a run.

        Args:
            sample: at least one request with at least one row.
            progress: called after each run. It can end the warm-up of shapes early; the cost is measured anyway.

        Raises:
            UnavailableError: the device is out of memory.
            EngineError: a run failed.
        """

    def cost_s(self, rows: int) -> float:
        """Predict the seconds of one run while no other stream runs; 0 before `warm_up`."""

    @property
    def slowdown(self) -> float:
        """How many times as long a run takes while all streams run; 1 before `warm_up`."""

    def plan(self) -> bytes | None:
        """Return the network as compiled for this machine and runtime, or None if the runtime cannot export it."""

    def close(self) -> None:
        """Release the device. No run may be in progress."""


@runtime_checkable
class LowersProducts(Protocol):
    """An engine that can multiply numbers of fewer bits. It multiplies float32 until `multiply` says otherwise."""

    #: What it was opened to multiply, if that is correct and faster: `float32`, or `bf16`.
    products_asked: str
    #: Why this processor or network cannot do what is asked; empty if it can.
    products_lacking: str

    def multiply(self, numbers: str) -> None:
        """Multiply such numbers from the next run on. No run may be in progress.

        Raises:
            EngineError: they are neither float32 nor what it was opened for.
        """


class EngineFactory(Protocol):
    """Compiles an ONNX network for one runtime."""

    def __call__(
        self, network: bytes, inputs: Sequence[TensorSpec], heads: int, streams: int, *, plan: bytes | None = None
    ) -> Engine:
        """Return a ready engine.

        Args:
            network: the content of an ONNX file.
            inputs: the inputs in the manifest.
            heads: number of output columns.
            streams: number of concurrent runs; on several GPUs, on each of them.
            plan: `Engine.plan()` of this network, by the same runtime on the same machine; saves compiling it again.

        Raises:
            UnavailableError: the runtime or its device is missing.
            EngineError: the runtime cannot compile the network.
        """
