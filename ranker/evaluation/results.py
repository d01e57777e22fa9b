"""What an evaluation says: plain values, ready for JSON; what there is none of is None, never NaN."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ranker.evaluation.bootstrap import Estimate
from ranker.evaluation.metrics import ReliabilityBin

#: The scorer that orders by how often a pin had received the action before.
POPULARITY = "popularity"


@dataclass(frozen=True, slots=True)
class Hit:
    """HIT@3 in one order; beside it, against the baseline, the difference and the relative lift in percent.

    The last two are None for the baseline itself, and where it has no such order.
    """

    mean: Estimate
    difference: Estimate | None
    lift_percent: Estimate | None


@dataclass(frozen=True, slots=True)
class HeadScore:
    """One scorer's quality on one head; None where there is nothing to measure.

    `hit_at_3_by_utility` is None without a utility, `hit_at_3_by_head` and all after it where the scorer lacks the
    head, `ece` where scores are no probabilities, `auc` where all rows are of one kind.
    """

    scorer: str
    head: str
    hit_at_3_by_utility: Hit | None
    hit_at_3_by_head: Hit | None
    auc: float | None
    ece: float | None
    reliability: tuple[ReliabilityBin, ...]

    @property
    def lift_percent(self) -> float | None:
        """The relative lift of HIT@3 in the final order, TransAct's measure; None where there is none."""
        hit = self.hit_at_3_by_utility
        return None if hit is None or hit.lift_percent is None else hit.lift_percent.value


@dataclass(frozen=True, slots=True)
class SliceScore:
    """One scorer's HIT@3 on one head in one slice of users; `requests` are those that count."""

    slice: str
    scorer: str
    head: str
    requests: int
    hit_at_3_by_utility: Hit | None
    hit_at_3_by_head: Hit | None


@dataclass(frozen=True, slots=True)
class ActivitySlice:
    """Requests by users with `actions_min` up to, not including, `actions_below` earlier actions."""

    name: str
    actions_min: int
    actions_below: int | None
    requests: int
    users: int


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """What there is of an action in the test: rows that received it, requests that count for it, and their users."""

    head: str
    meaning: str
    #: Of HIT@3 by utility: the action speaks against the pin.
    lower_is_better: bool
    positives: int
    requests: int
    users: int


@dataclass(frozen=True, slots=True)
class ScorerFacts:
    """Which bundle stands behind a name, and what of it could not be measured."""

    name: str
    ref: str
    digest: str
    trained_on: str
    heads_missing: tuple[str, ...]
    utility_missing: str | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All scores, and what they were measured on."""

    data: str
    #: The test period; its end is not included.
    test_start_ms: int
    test_stop_ms: int
    #: What was logged in the period, and how much of it received none of the heads' actions: shown and nothing more.
    events: int
    events_without_action: int
    requests: int
    rows: int
    users: int
    #: Requests by users who had done nothing before.
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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def flat(self, scorer: str) -> dict[str, float]:
        """Return one scorer's metrics as `<metric>_<head>`; what could not be measured is left out."""
        found: dict[str, float | None] = {}
        for score in (score for score in self.scores if score.scorer == scorer):
            for order in ("utility", "head"):
                hit: Hit | None = getattr(score, f"hit_at_3_by_{order}")
                found[f"hit_at_3_by_{order}_{score.head}"] = None if hit is None else hit.mean.value
            found[f"auc_{score.head}"] = score.auc
            found[f"ece_{score.head}"] = score.ece
        return {name: round(value, 4) for name, value in found.items() if value is not None}
