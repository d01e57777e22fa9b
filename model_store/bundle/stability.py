"""The population stability index (PSI): how far a model's inputs or predictions have shifted.

The index compares the shares of ten parts that had equal weight in the reference: below 0.1 nothing moved, above 0.25
something did (Siddiqi, Credit Risk Scorecards, 2006).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from model_store.bundle.manifest import Manifest
from model_store.bundle.statistics import Distribution, Statistics

#: An empty part would make the index infinite.
_SHARE_MIN = 1e-4


@dataclass(frozen=True, slots=True)
class Observation:
    """What a model read and predicted for some rows of one request.

    Attributes:
        probabilities: float32[N, H], calibrated.
        inputs: the numbers whose distribution is watched, by name (`statistics.observed`).
    """

    probabilities: np.ndarray
    inputs: Mapping[str, np.ndarray]


def stability_index(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the population stability index of two distributions.

    Args:
        expected: float64[K] or int64[K], shares or counts.
        found: the same of what is compared; with a sum above 0.
    """
    one = np.maximum(expected / expected.sum(), _SHARE_MIN)
    other = np.maximum(found / found.sum(), _SHARE_MIN)
    return float(np.sum((other - one) * np.log(other / one)))


def distance(reference: Distribution, values: np.ndarray) -> float:
    """Return the stability index of values, float[N], against a distribution; 0 where no value is finite."""
    values = values[np.isfinite(values)]
    return stability_index(np.array(reference.shares), reference.counts(values)) if len(values) else 0.0


def moved_by(own: np.ndarray, other: np.ndarray) -> float:
    """Return the stability index of values, float32[N], against others, float32[M]; 0 where either has none."""
    other = other[np.isfinite(other)]
    return distance(Distribution.of(other), own) if len(other) else 0.0


def drifts(
    manifest: Manifest, trained: Statistics | None, lately: Sequence[Observation]
) -> dict[tuple[str, str], float]:
    """Return how far a model's inputs and predictions are from its training, by ("input" or "head", name)."""
    if trained is None or not lately:
        return {}
    found: dict[tuple[str, str], float] = {}
    for i, head in enumerate(manifest.heads):
        if head.name in trained.heads:
            values = np.concatenate([one.probabilities[:, i] for one in lately])
            found["head", head.name] = distance(trained.heads[head.name], values)
    for name, reference in trained.inputs.items():
        given = [one.inputs[name] for one in lately if name in one.inputs]
        if given:
            found["input", name] = distance(reference, np.concatenate(given))
    return found


def heads_moved(
    own: tuple[Manifest, Sequence[Observation]], other: tuple[Manifest, Sequence[Observation]]
) -> dict[str, float]:
    """Return how far each head that both models have moved, from what both predicted; {} where either did nothing."""
    (manifest, lately), (usual_manifest, usually) = own, other
    if not lately or not usually:
        return {}
    found, places = {}, {head.name: i for i, head in enumerate(usual_manifest.heads)}
    for i, head in enumerate(manifest.heads):
        if head.name in places:
            column = np.concatenate([one.probabilities[:, i] for one in lately])
            against = np.concatenate([one.probabilities[:, places[head.name]] for one in usually])
            found[head.name] = moved_by(column, against)
    return found
