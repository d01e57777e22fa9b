"""The results of an evaluation as plain values, ready for JSON. A missing value is None, never NaN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ranker.baselines.scores import TREES, TreeTraining
from ranker.evaluation.bootstrap import Estimate
from ranker.evaluation.metrics import Decile, ReliabilityBin, worst_decile

#: The scorer that orders pins by how often they had received the action before.
POPULARITY = "popularity"


@dataclass(frozen=True, slots=True)
class Hit:
    """HIT@3 in one order, with its difference from the baseline and its relative lift in percent.

    The last two are None for the baseline itself, and if the baseline has no such order.
    """

    mean: Estimate
    difference: Estimate | None
    lift_percent: Estimate | None


@dataclass(frozen=True, slots=True)
class HeadScore:
    """One scorer's quality on one head; None if there is nothing to measure.

    `hit_at_3_by_utility` is None without a utility; `hit_at_3_by_head` and all later fields, if the scorer lacks the
    head; `ece`, if scores are not probabilities; `auc`, if all rows have or all rows lack the action.
    """

    scorer: str
    head: str
    hit_at_3_by_utility: Hit | None
    hit_at_3_by_head: Hit | None
    auc: float | None
    ece: float | None
    reliability: tuple[ReliabilityBin, ...]
    deciles: tuple[Decile, ...] = ()

    @property
    def worst_decile(self) -> Decile | None:
        """The decile whose number of actions differs most from the predicted one; None where there are too few."""
        return worst_decile(self.deciles)

    @property
    def lift_percent(self) -> float | None:
        """The relative lift of HIT@3 in the final order, TransAct's metric; None if it does not exist."""
        hit = self.hit_at_3_by_utility
        return None if hit is None or hit.lift_percent is None else hit.lift_percent.value


@dataclass(frozen=True, slots=True)
class Paired:
    """HIT@3 of a bundle and of a baseline in the same kind of order, on the same resamples of users."""

    own: Estimate
    baseline: Estimate
    difference: Estimate
    lift_percent: Estimate

    @property
    def behind(self) -> bool:
        """Whether the whole interval of the difference lies below 0. False without an interval: nothing is shown."""
        return self.difference.high is not None and self.difference.high < 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """A bundle against one baseline on one head; None if one of the two has no such order."""

    scorer: str
    baseline: str
    head: str
    by_head: Paired | None
    by_utility: Paired | None


@dataclass(frozen=True, slots=True)
class SliceScore:
    """One scorer's HIT@3 on one head in one slice of users; `requests` is the number of requests that count."""

    slice: str
    scorer: str
    head: str
    requests: int
    hit_at_3_by_utility: Hit | None
    hit_at_3_by_head: Hit | None


@dataclass(frozen=True, slots=True)
class ActivitySlice:
    """Requests of users with at least `actions_min` and fewer than `actions_below` earlier actions."""

    name: str
    actions_min: int
    actions_below: int | None
    requests: int
    users: int


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """The occurrences of an action in the test: rows that received it, requests that count for it, and their users."""

    head: str
    meaning: str
    #: Whether a lower HIT@3 by utility is better, because the action speaks against the pin.
    lower_is_better: bool
    positives: int
    requests: int
    users: int


@dataclass(frozen=True, slots=True)
class ScorerFacts:
    """The bundle behind a name, and what could not be measured of it."""

    name: str
    ref: str
    digest: str
    trained_on: str
    heads_missing: tuple[str, ...]
    utility_missing: str | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All scores, and the data that they were measured on."""

    data: str
    #: The test period, Unix times in milliseconds, end exclusive.
    test_start_ms: int
    test_stop_ms: int
    #: Events in the period, and how many of them received none of the heads' actions and were only shown.
    events: int
    events_without_action: int
    requests: int
    rows: int
    users: int
    #: Requests of users without earlier actions.
    requests_without_history: int
    candidates: int
    requests_max: int | None
    seed: int
    resamples: int
    baseline: str
    scorers: tuple[ScorerFacts, ...]
    heads: tuple[HeadFacts, ...]
    slices: tuple[ActivitySlice, ...]
    scores: tuple[HeadScore, ...]
    slice_scores: tuple[SliceScore, ...]
    #: Every bundle against every baseline, popularity included; empty if no baselines were asked for.
    comparisons: tuple[Comparison, ...] = ()
    #: Why a baseline could not be compared with.
    baselines_missing: Mapping[str, str] = field(default_factory=dict)
    #: What LightGBM learned from; None without it.
    trees: TreeTraining | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def flat(self, scorer: str) -> dict[str, float]:
        """Return one scorer's metrics as `<metric>_<head>`, without those that could not be measured.

        The HIT@3 of the baselines that it was compared with follow, with the baseline's name in parentheses.
        """
        found: dict[str, float | None] = {}
        for score in (score for score in self.scores if score.scorer == scorer):
            for order in ("utility", "head"):
                hit: Hit | None = getattr(score, f"hit_at_3_by_{order}")
                found[f"hit_at_3_by_{order}_{score.head}"] = None if hit is None else hit.mean.value
            found[f"auc_{score.head}"] = score.auc
            found[f"ece_{score.head}"] = score.ece
            found[f"worst_decile_{score.head}"] = None if score.worst_decile is None else score.worst_decile.off
        for comparison in (comparison for comparison in self.comparisons if comparison.scorer == scorer):
            for order, paired in (("utility", comparison.by_utility), ("head", comparison.by_head)):
                name = f"hit_at_3_by_{order}_{comparison.head} ({comparison.baseline})"
                found[name] = None if paired is None else paired.baseline.value
        if self.trees is not None:
            found[f"training_requests ({TREES})"] = self.trees.requests
        return {name: round(value, 4) for name, value in found.items() if value is not None}
