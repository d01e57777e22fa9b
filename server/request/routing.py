"""The models a server answers with, by label and by version, and who gets which."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from zlib import crc32

import numpy as np

from kernels.engine import FeatureBatch
from model_store.bundle.statistics import Distribution, Statistics, observed, stability_index
from model_store.model.loaded import LoadedModel
from model_store.model.utility import UtilityTable
from pinrank.v1 import ranking_pb2
from server.rollout.guard import Window, moved_by

#: How much of what a version was given and gave is kept for comparing.
_SAMPLES, _SAMPLED_EVERY, _ROWS_A_SAMPLE = 128, 8, 64
_MASK = (1 << 64) - 1


class ServedModel:
    """A live model with the utility table compiled for it, and what its answers say of their origin."""

    def __init__(self, model: LoadedModel, utility: UtilityTable, statistics: Statistics | None = None) -> None:
        self.model = model
        self.utility = utility
        #: Of its training, if the bundle has them.
        self.statistics = statistics
        #: Requests that hold it.
        self.in_flight = 0
        #: Lately: float32[N, H] probabilities, and inputs by name.
        self.samples: deque[tuple[np.ndarray, Mapping[str, np.ndarray]]] = deque(maxlen=_SAMPLES)
        self._answers = itertools.count()
        manifest = model.manifest
        groups = [*manifest.groups, *([manifest.sequence] if manifest.sequence else [])]
        #: A response with nothing but its versions, serialised: the same in every answer.
        self.versions: bytes = ranking_pb2.RankResponse(
            versions=ranking_pb2.Versions(
                model=manifest.name,
                model_version=manifest.version,
                model_digest=model.digest,
                utility=utility.digest,
                feature_groups=[group.ref for group in groups],
            )
        ).SerializeToString()

    @property
    def version(self) -> int:
        return self.model.manifest.version

    def sample(self, probabilities: np.ndarray, batch: FeatureBatch) -> None:
        """Keep some of what it is given and gives."""
        if next(self._answers) % _SAMPLED_EVERY == 0:
            inputs = {
                name: values[:_ROWS_A_SAMPLE].copy() for name, values in observed(self.model.manifest, batch).items()
            }
            self.samples.append((probabilities[:_ROWS_A_SAMPLE].copy(), inputs))


class ServedModels:
    """Which model answers a request. Belongs to the event loop, and changes between two requests, never during one."""

    def __init__(self, default_label: str) -> None:
        self.default_label = default_label
        self.by_label: dict[str, ServedModel] = {}
        self.by_version: dict[int, ServedModel] = {}
        #: What became of each label's requests lately.
        self.windows: dict[str, Window] = {}
        self._traffic: Mapping[str, Mapping[str, float]] = {}

    @property
    def default(self) -> ServedModel:
        return self.by_label[self.default_label]

    @property
    def surfaces(self) -> frozenset[str]:
        """Every surface that some model ranks."""
        return frozenset(s.name for served in self.by_version.values() for s in served.model.manifest.surfaces)

    def share_traffic(self, traffic: Mapping[str, Mapping[str, float]]) -> None:
        """Divide what names no label: by surface (`*`: the others), each label's share; the default gets the rest."""
        self._traffic = {surface: dict(sorted(shares.items())) for surface, shares in traffic.items()}

    def assigned(self, surface: str, user_id: int) -> str:
        """Return the label that answers a user who names none.

        A label that grows keeps its users, and takes them from others only to itself; where there are several labels
        beside the default, they may get users of the default in return.
        """
        left = 1.0
        for label, share in (self._traffic.get(surface) or self._traffic.get("*") or {}).items():
            # A draw of its own for each label, among those whom the labels before left.
            if _place(user_id ^ crc32(label.encode()) << 32) * left < share:
                return label if label in self.by_label else self.default_label
            left -= share
        return self.default_label


def _place(number: int) -> float:
    """Spread numbers evenly over 0 to 1 (the finaliser of SplitMix64: Steele, Lea and Flood, 2014)."""
    mixed = (number + 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ mixed >> 31) / 2**64


def drifts(served: ServedModel) -> dict[tuple[str, str], float]:
    """Return how far what a version is given and gives is from its training (PSI), by (input or head, name)."""
    trained, samples = served.statistics, list(served.samples)
    if trained is None or not samples:
        return {}
    found: dict[tuple[str, str], float] = {}
    for i, head in enumerate(served.model.manifest.heads):
        if head.name in trained.heads:
            values = np.concatenate([probabilities[:, i] for probabilities, _ in samples])
            found["head", head.name] = _distance(trained.heads[head.name], values)
    for name, expected in trained.inputs.items():
        given = [inputs[name] for _, inputs in samples if name in inputs]
        if given:
            found["input", name] = _distance(expected, np.concatenate(given))
    return found


def heads_moved(own: ServedModel, other: ServedModel) -> dict[str, float]:
    """Return how far each head that both have moved (PSI), from what both gave lately."""
    found = {}
    places = {head.name: i for i, head in enumerate(other.model.manifest.heads)}
    given, usual = list(own.samples), list(other.samples)
    if not given or not usual:
        return {}
    for i, head in enumerate(own.model.manifest.heads):
        if head.name in places:
            column = np.concatenate([probabilities[:, i] for probabilities, _ in given])
            against = np.concatenate([probabilities[:, places[head.name]] for probabilities, _ in usual])
            found[head.name] = moved_by(column, against)
    return found


def _distance(expected: Distribution, values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return stability_index(np.array(expected.shares), expected.counts(values)) if len(values) else 0.0
