"""Chooses the model that answers a request: by label, by version, or by the user's share of the traffic."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from zlib import crc32

from kernels.engine import FeatureBatch
from model_store.bundle.stability import Observation, drifts, heads_moved
from model_store.bundle.statistics import Statistics, observed
from model_store.exploration.hashing import mixed
from model_store.exploration.table import Exploration
from model_store.model.loaded import LoadedModel
from model_store.model.utility import UtilityTable
from pinrank.v1 import ranking_pb2
from server.request.parties import PartyTotals, party_values
from server.request.scoring import Scores, scoring_of
from server.request.windows import Window

#: Sampling of a version's inputs and predictions: samples kept, one of so many answers, rows of each.
_OBSERVATIONS, _OBSERVED_EVERY, _ROWS_OBSERVED = 128, 8, 64


class ServedModel:
    """A loaded model with its compiled utility table, and the versions that its answers report."""

    def __init__(
        self,
        model: LoadedModel,
        utility: UtilityTable,
        statistics: Statistics | None = None,
        exploration: Exploration | None = None,
    ) -> None:
        self.model = model
        self.utility = utility
        #: How it explores, if the bundle says so.
        self.exploration = exploration
        #: How the requests of each surface are scored.
        self.scoring = {surface: scoring_of(model.manifest, utility, surface) for surface in utility.surfaces}
        #: Statistics of its training data, if the bundle has them.
        self.statistics = statistics
        #: Number of requests that use this model now.
        self.in_flight = 0
        self._samples: deque[Observation] = deque(maxlen=_OBSERVATIONS)
        self._answers = itertools.count()
        manifest = model.manifest
        groups = [*manifest.groups, *([manifest.sequence] if manifest.sequence else [])]
        #: A serialised response with only its `versions` field, which is the same in every answer.
        self.versions: bytes = ranking_pb2.RankResponse(
            versions=ranking_pb2.Versions(
                model=manifest.name,
                model_version=manifest.version,
                model_digest=model.digest,
                utility=utility.digest,
                feature_groups=[group.ref for group in groups],
                products=model.products.numbers,
            )
        ).SerializeToString()

    @property
    def version(self) -> int:
        return self.model.manifest.version

    def observe(self, scores: Scores, batch: FeatureBatch) -> None:
        """Keep a sample of the model's inputs and predictions."""
        if next(self._answers) % _OBSERVED_EVERY == 0:
            watched = observed(self.model.manifest, batch)
            inputs = {name: values[:_ROWS_OBSERVED].copy() for name, values in watched.items()}
            rows = min(scores.scored, _ROWS_OBSERVED)
            self._samples.append(Observation(scores.probabilities[:rows].copy(), inputs))

    def drifts(self) -> dict[tuple[str, str], float]:
        """Return the PSI between its recent inputs and predictions and its training, by ("input" or "head", name)."""
        return drifts(self.model.manifest, self.statistics, list(self._samples))

    def heads_moved(self, other: ServedModel) -> dict[str, float]:
        """Return for each head the PSI between both models' recent predictions."""
        return heads_moved(
            (self.model.manifest, list(self._samples)),
            (other.model.manifest, list(other._samples)),
        )


class ServedModels:
    """The routing table of models. Belongs to one event loop; it never changes while a request chooses its model."""

    def __init__(self, default_label: str) -> None:
        self.default_label = default_label
        self.by_label: dict[str, ServedModel] = {}
        self.by_version: dict[int, ServedModel] = {}
        #: What answers were worth to parties since the start, by label, surface and the surface's parties.
        self.party_totals: dict[tuple[str, str, tuple[str, ...]], PartyTotals] = {}
        #: Recent outcomes of each label's requests.
        self.windows: dict[str, Window] = {}
        self._traffic: Mapping[str, Mapping[str, float]] = {}

    @property
    def default(self) -> ServedModel:
        return self.by_label[self.default_label]

    @property
    def traffic(self) -> Mapping[str, Mapping[str, float]]:
        """For each surface, each label's share of the calls that do not name a label."""
        return self._traffic

    @property
    def surfaces(self) -> frozenset[str]:
        """All surfaces that at least one served model ranks."""
        return frozenset(s.name for served in self.by_version.values() for s in served.model.manifest.surfaces)

    def share_traffic(self, traffic: Mapping[str, Mapping[str, float]]) -> None:
        """Set each label's share of the calls that do not name a label; the default label gets the rest.

        Args:
            traffic: shares by surface and label; the surface `*` stands for all other surfaces.
        """
        self._traffic = {surface: dict(sorted(shares.items())) for surface, shares in traffic.items()}

    def note_parties(self, now_s: float, label: str, surface: str, served: ServedModel, scores: Scores) -> None:
        """Record what a label's answer is worth to the parties of its surface."""
        values, parties = party_values(scores), served.utility.surfaces[surface].parties
        key = (label, surface, parties)
        totals = self.party_totals.get(key)
        if totals is None:
            totals = self.party_totals[key] = PartyTotals(parties)
        totals.add(values)
        if self.by_label.get(label) is served:  # the window is of the version that answers now
            self.windows[label].note_parties(now_s, surface, parties, values)

    def assigned(self, surface: str, user_id: int) -> str:
        """Return the label that answers a user's call that does not name a label.

        When a label's share grows, the label keeps all its users, and users who leave other labels move only to it. If
        there are several labels besides the default, the others may get users of the default label in return.
        """
        if not self._traffic:
            return self.default_label
        left = 1.0
        for label, share in (self._traffic.get(surface) or self._traffic.get("*") or {}).items():
            # Each label draws independently among the users that the labels before it did not take.
            if mixed(user_id ^ crc32(label.encode()) << 32) / 2**64 * left < share:
                return label if label in self.by_label else self.default_label
            left -= share
        return self.default_label
