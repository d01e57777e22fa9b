"""The models a server answers with, by label and by version, and who gets which."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from zlib import crc32

import numpy as np

from kernels.engine import FeatureBatch
from model_store.bundle.stability import Observation, drifts, heads_moved
from model_store.bundle.statistics import Statistics, observed
from model_store.model.loaded import LoadedModel
from model_store.model.utility import UtilityTable
from pinrank.v1 import ranking_pb2
from server.request.windows import Window

#: How much of what a version read and predicted is kept for comparing.
_OBSERVATIONS, _OBSERVED_EVERY, _ROWS_OBSERVED = 128, 8, 64
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
        self._lately: deque[Observation] = deque(maxlen=_OBSERVATIONS)
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

    def observe(self, probabilities: np.ndarray, batch: FeatureBatch) -> None:
        """Keep some of what it reads and predicts."""
        if next(self._answers) % _OBSERVED_EVERY == 0:
            watched = observed(self.model.manifest, batch)
            inputs = {name: values[:_ROWS_OBSERVED].copy() for name, values in watched.items()}
            self._lately.append(Observation(probabilities[:_ROWS_OBSERVED].copy(), inputs))

    def drifts(self) -> dict[tuple[str, str], float]:
        """Return how far its inputs and predictions are from its training (PSI), by ("input" or "head", name)."""
        return drifts(self.model.manifest, self.statistics, list(self._lately))

    def heads_moved(self, other: ServedModel) -> dict[str, float]:
        """Return how far each head is from the same head of another model (PSI), by what both predicted lately."""
        return heads_moved(
            (self.model.manifest, list(self._lately)),
            (other.model.manifest, list(other._lately)),
        )


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
    def traffic(self) -> Mapping[str, Mapping[str, float]]:
        """By surface, each label's share of the calls that name no label."""
        return self._traffic

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
