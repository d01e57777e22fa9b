"""The engine contract: a ragged batch of (user, candidate) rows in, one logit per head and row out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Side = Literal["request", "candidate"]

#: The network's input that says which request each row belongs to: int64[N], from `FeatureBatch.row_splits`.
ROW_REQUEST = "row_request"
#: The network's output: float32[N, H].
LOGITS = "logits"


class EngineError(Exception):
    """An engine could not load or run a network."""


class UnavailableError(EngineError):
    """The runtime or its device is not there, or has no memory left, which no network is at fault of."""


class ShapeError(EngineError):
    """A batch does not have the tensors, dtypes or shapes that the network takes."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input of a network. `shape` is what follows the leading R (request side) or N (candidate side)."""

    name: str
    side: Side
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """Rows of several requests; a request's own tensors appear once, not once per candidate.

    Attributes:
        request: [R, ...] by tensor name.
        candidate: [N, ...] by tensor name.
        row_splits: int32[R + 1], non-decreasing from 0 to N; request r owns rows row_splits[r]:row_splits[r + 1].
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
        """Return int64[N], the request that each row belongs to."""
        return np.repeat(np.arange(self.requests, dtype=np.int64), np.diff(self.row_splits))

    def piece(self, start: int, stop: int) -> FeatureBatch:
        """Return rows start:stop of a batch of one request; nothing is copied."""
        if (start, stop) == (0, self.rows):
            return self
        candidate = {name: tensor[start:stop] for name, tensor in self.candidate.items()}
        return FeatureBatch(self.request, candidate, np.array([0, stop - start], np.int32))

    @staticmethod
    def concat(batches: Sequence[FeatureBatch]) -> FeatureBatch:
        """Join batches of one model; rows keep their order."""
        if len(batches) == 1:
            return batches[0]
        counts = np.concatenate([np.diff(batch.row_splits) for batch in batches])
        return FeatureBatch(
            {name: np.concatenate([b.request[name] for b in batches]) for name in batches[0].request},
            {name: np.concatenate([b.candidate[name] for b in batches]) for name in batches[0].candidate},
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        )

    def check(self, inputs: Sequence[TensorSpec]) -> None:
        """Raise ShapeError naming the first tensor that differs from `inputs`."""
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
    """Go on at once, to the end."""
    return True


@dataclass(frozen=True, slots=True)
class WarmedUp:
    """What a warm-up did.

    Attributes:
        runs: that were made.
        of: that it takes; each one that was left out is a shape that a stream runs for the first time for a request.
    """

    runs: int
    of: int


class Engine(Protocol):
    """Runs one network on one device.

    `run` may be called from as many threads at once as the engine has streams. Padding, tiles, shape buckets and graphs
    are its private business.
    """

    #: How many runs can be in flight at once.
    streams: int
    #: The kernel that runs the encoder (an instruction set, `triton`), or `none` where the runtime computes all itself.
    kernel: str
    #: How far the rounding of products in half precision may move a probability; 0 where they are float32.
    tolerance: float

    def run(self, batch: FeatureBatch) -> np.ndarray:
        """Return float32[N, H] logits in row order. Raises ShapeError, EngineError."""

    def warm_up(self, sample: FeatureBatch, progress: Progress = go_on) -> WarmedUp:
        """Run on tilings of `sample` until first-run costs are paid, and measure the cost of a run.

        Args:
            sample: at least one request with at least one row.
            progress: may end the list of shapes early; the cost is measured all the same.

        Raises:
            UnavailableError: the device has no memory left.
            EngineError: a run failed.
        """

    def cost_s(self, rows: int) -> float:
        """Predict the seconds of one run; 0 before `warm_up`."""

    def plan(self) -> bytes | None:
        """Return the network as compiled for this machine and runtime, None where the runtime has no such form."""

    def close(self) -> None:
        """Free the device. No run may be in flight."""


class EngineFactory(Protocol):
    """Compiles an ONNX network for one runtime."""

    def __call__(
        self, network: bytes, inputs: Sequence[TensorSpec], heads: int, streams: int, *, plan: bytes | None = None
    ) -> Engine:
        """Return a ready engine.

        Args:
            network: ONNX.
            inputs: the manifest's.
            heads: the network's columns.
            streams: runs in flight at once, on each GPU of an engine that computes on several.
            plan: of an engine of this network, by the same runtime on the same machine: saves compiling it again.

        Raises:
            UnavailableError: the runtime or its device is not there.
            EngineError: what the runtime cannot honour.
        """
