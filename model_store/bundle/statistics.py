"""Distributions of a model's inputs and predictions in training; `stability.py` compares them with today's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kernels.engine import FeatureBatch
from model_store.bundle.files import STATISTICS, Bundle, BundleError
from model_store.bundle.manifest import Manifest
from model_store.bundle.tensor_sources import RECENCY_NAMES, Recency, Scalars, SequenceActions

_PARTS = 10
#: Limit on the file; one number takes about 500 bytes.
BYTES_MAX = 4 << 20
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Distribution(BaseModel):
    """The distribution of one number.

    Attributes:
        edges: ascending boundaries between parts; a value equal to an edge belongs to the part after it.
        shares: share of the values in each part; one more than `edges`.
        low, high, mean: minimum, maximum and mean of the values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    edges: Annotated[tuple[Finite, ...], Field(max_length=_PARTS)]
    shares: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    low: Finite
    high: Finite
    mean: Finite

    @model_validator(mode="after")
    def _coherent(self) -> Distribution:
        if len(self.shares) != len(self.edges) + 1 or list(self.edges) != sorted(set(self.edges)):
            raise ValueError("edges must ascend, and there must be one more share than edges")
        return self

    @classmethod
    def of(cls, values: np.ndarray) -> Distribution:
        """Describe an array of any shape with at least one value."""
        values = np.asarray(values, np.float64).ravel()
        edges = np.unique(np.quantile(values, np.linspace(0, 1, _PARTS + 1)[1:-1], method="inverted_cdf"))
        counts = _counts(values, edges)
        return cls(
            edges=tuple(edges.tolist()),
            shares=tuple((counts / len(values)).tolist()),
            low=float(values.min()),
            high=float(values.max()),
            mean=float(values.mean()),
        )

    def counts(self, values: np.ndarray) -> np.ndarray:
        """Count the values in each part: int64[parts]."""
        return _counts(np.asarray(values, np.float64).ravel(), np.asarray(self.edges))

    def span(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}, mean {self.mean:.4g}"


class Statistics(BaseModel):
    """Distributions by name: inputs are `group.field` of scalars and `sequence.length`; heads have their own names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: Annotated[int, Field(ge=1)]
    inputs: dict[str, Distribution]
    heads: dict[str, Distribution]


def read_statistics(bundle: Bundle) -> Statistics | None:
    """Return the statistics of a bundle, or None if it has none. Raises BundleError."""
    content = bundle.files.get(STATISTICS)
    if content is None:
        return None
    if len(content) > BYTES_MAX:
        raise BundleError(f"{bundle.manifest.ref}: {STATISTICS} has {len(content):,} bytes, the limit is {BYTES_MAX:,}")
    try:
        return Statistics.model_validate_json(content)
    except ValidationError as error:
        raise BundleError(f"{bundle.manifest.ref}: {STATISTICS}: {error.errors()[0]['msg']}") from error


def make_statistics(manifest: Manifest, batch: FeatureBatch, probabilities: np.ndarray) -> Statistics:
    """Describe a batch and its float32[N, H] probabilities."""
    heads = {head.name: Distribution.of(probabilities[:, i]) for i, head in enumerate(manifest.heads)}
    inputs = {name: Distribution.of(values) for name, values in observed(manifest, batch).items() if values.size}
    return Statistics(rows=batch.rows, inputs=inputs, heads=heads)


def observed(manifest: Manifest, batch: FeatureBatch) -> Mapping[str, np.ndarray]:
    """Return the values of a batch that are monitored for drift, by name; float[...] each."""
    found: dict[str, np.ndarray] = {}
    for tensor in manifest.inputs:
        values = batch.request.get(tensor.name, batch.candidate.get(tensor.name))
        assert values is not None, "the assembler builds every input"  # noqa: S101
        match tensor.source:
            case Scalars(group=group, fields=fields):
                found |= {f"{group}.{field}": values[:, i] for i, field in enumerate(fields)}
            case Recency():
                found |= {f"recency.{name}": values[:, i] for i, name in enumerate(RECENCY_NAMES)}
            case SequenceActions():
                found["sequence.length"] = np.count_nonzero(values, axis=1)
    return found


def _counts(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
