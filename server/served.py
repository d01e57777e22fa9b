"""The models a server answers with, by label and by version, and who gets which."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping

import numpy as np

from kernels.engine import FeatureBatch
from model_store.live import LiveModel
from model_store.statistics import Statistics, observed
from model_store.utility import UtilityTable
from pinrank.v1 import ranking_pb2

#: How much of what a version was given and gave is kept for comparing.
_SAMPLES, _SAMPLED_EVERY, _ROWS_A_SAMPLE = 128, 8, 64
_MASK = (1 << 64) - 1


class Served:
    """A live model with the utility table compiled for it, and what its answers say of their origin."""

    def __init__(self, live: LiveModel, utility: UtilityTable, statistics: Statistics | None = None) -> None:
        self.live = live
        self.utility = utility
        #: Of its training, if the bundle has them.
        self.statistics = statistics
        #: Requests that hold it.
        self.in_flight = 0
        #: Lately: float32[N, H] probabilities, and inputs by name.
        self.samples: deque[tuple[np.ndarray, Mapping[str, np.ndarray]]] = deque(maxlen=_SAMPLES)
        self._answers = itertools.count()
        manifest = live.manifest
        groups = [*manifest.groups, *([manifest.sequence] if manifest.sequence else [])]
        #: A response with nothing but its versions, serialised: the same in every answer.
        self.versions: bytes = ranking_pb2.RankResponse(
            versions=ranking_pb2.Versions(
                model=manifest.name,
                model_version=manifest.version,
                model_digest=live.digest,
                utility=utility.digest,
                feature_groups=[group.ref for group in groups],
            )
        ).SerializeToString()

    @property
    def version(self) -> int:
        return self.live.manifest.version

    def sample(self, probabilities: np.ndarray, batch: FeatureBatch) -> None:
        """Keep some of what it is given and gives."""
        if next(self._answers) % _SAMPLED_EVERY == 0:
            inputs = {
                name: values[:_ROWS_A_SAMPLE].copy() for name, values in observed(self.live.manifest, batch).items()
            }
            self.samples.append((probabilities[:_ROWS_A_SAMPLE].copy(), inputs))


class ServedModels:
    """Which model answers a request. Belongs to the event loop, and changes between two requests, never during one."""

    def __init__(self, default_label: str) -> None:
        self.default_label = default_label
        self.by_label: dict[str, Served] = {}
        self.by_version: dict[int, Served] = {}
        self._traffic: Mapping[str, Mapping[str, float]] = {}

    @property
    def default(self) -> Served:
        return self.by_label[self.default_label]

    @property
    def surfaces(self) -> frozenset[str]:
        """Every surface that some model ranks."""
        return frozenset(s.name for served in self.by_version.values() for s in served.live.manifest.surfaces)

    def share_traffic(self, traffic: Mapping[str, Mapping[str, float]]) -> None:
        """Divide what names no label: by surface (`*`: the others), each label's share; the default gets the rest."""
        self._traffic = {surface: dict(sorted(shares.items())) for surface, shares in traffic.items()}

    def assigned(self, surface: str, user_id: int) -> str:
        """Return the label that answers a user who names none; a user stays with it while its share does not shrink."""
        shares = self._traffic.get(surface) or self._traffic.get("*")
        if shares:
            place, reached = _place(user_id), 0.0
            for label, share in shares.items():
                # Each label has the places from its own start on, so that growing it takes nobody from it.
                if reached <= place < reached + share:
                    return label if label in self.by_label else self.default_label
                reached += share
        return self.default_label


def _place(user_id: int) -> float:
    """Spread user ids evenly over 0 to 1 (the finaliser of SplitMix64: Steele, Lea and Flood, 2014)."""
    mixed = (user_id + 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK
    return float((mixed ^ mixed >> 31) / 2**64)
