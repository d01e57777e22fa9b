"""Measures how well bundles rank the requests of the test period, head by head, with confidence intervals.

HIT@3 is TransAct's metric (arXiv 2306.00248): order the candidates of a request, count how many of the first three
received an action, and average over requests. It is measured in two orders. *By utility* is the final order, given by
the bundle's own utility table, which a pinner would see; heads compete for its places, and for an action such as hide,
lower is better. *By head* is the order given by one head's probability alone, which shows what that head has learned;
higher is better for every head.

One convention applies everywhere: a request counts for a head if some candidate received the head's action. All other
requests score 0 in any order, so relative lifts do not depend on this choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kernels.engine import EngineFactory
from model_store.bundle.files import Bundle
from ranker.baselines.score import BaselinePlan
from ranker.baselines.scores import DOT_PRODUCT, ITEM_KNN, RANKING_TREES, TREES
from ranker.data.actions import ActionLog
from ranker.data.embeddings import PinVectors
from ranker.data.requests import Split, part_slices
from ranker.data.shown import Shown
from ranker.data.users.rows import UserEncoder
from ranker.errors import SettingError
from ranker.evaluation.bootstrap import RESAMPLES, Resampling, resample
from ranker.evaluation.metrics import auc, calibration_error, deciles, hits, reliability, requests_with
from ranker.evaluation.results import (
    POPULARITY,
    ActivitySlice,
    Comparison,
    Evaluation,
    HeadFacts,
    HeadScore,
    Hit,
    Paired,
    ScorerFacts,
    SliceScore,
)
from ranker.evaluation.scoring import ScoredTest, ScoringProgress, score_test
from ranker.training.examples import Sampling

__all__ = ["SLICES", "Evaluation", "evaluate", "hits_by_head"]

#: Slices of users by their least number of actions before the request. The published readout takes the newest 10
#: actions and the published sequence has 100: a cold user cannot fill the readout, and a light user cannot fill the
#: sequence. The numbers are fixed, so that slices mean the same on every dataset.
SLICES = (("cold", 0), ("light", 10), ("heavy", 100))

#: Names that no bundle may have.
BASELINES = (POPULARITY, DOT_PRODUCT, ITEM_KNN, TREES, RANKING_TREES)


def evaluate(
    bundles: Mapping[str, Bundle],
    log: ActionLog,
    factory: EngineFactory,
    sampling: Sampling,
    seed: int,
    split: Split | None = None,
    progress: ScoringProgress = lambda _what, _done, _total: None,
    *,
    baseline: str | None = None,
    data: str = "",
    resamples: int = RESAMPLES,
    shown: Shown | None = None,
    against: BaselinePlan | None = None,
    vectors: Sequence[PinVectors] = (),
    encoders: Sequence[UserEncoder] = (),
) -> Evaluation:
    """Score the test requests with each bundle, with the popularity of each pin per action, and with other baselines.

    Args:
        bundles: bundles by display name, all for the same data.
        log: the history that contains the test period.
        factory: creates the scoring engine.
        sampling: sampling of candidates.
        seed: seed of the sampled candidates, equal for every bundle, and of the resamples.
        split: determines the test period.
        progress: receives the current task (`requests`, then the name of a bundle), the finished units and their total.
        baseline: a bundle or `popularity`. Default: the first of several bundles; `popularity` for a single bundle.
        data: name of the data.
        resamples: number of resamples of users for the intervals; 0 gives no intervals.
        shown: answered requests, whose newest are the test instead of requests made up of the log; `log` is then their
            history.
        against: how to fit the baselines to compare every bundle with; None compares with popularity only.
        vectors: of pins, for the bundles that read their space, instead of those that a bundle carries.
        encoders: the networks of users that bundles carry.

    Raises:
        BundleError: a bundle cannot be loaded, carries no embeddings, or does not fit the data.
        SettingError: the baseline is not among the bundles, or a bundle is named `popularity`.
    """
    baseline = _checked_baseline(bundles, baseline)
    split = split or Split()
    test = score_test(bundles, log, factory, sampling, seed, split, progress, shown, against, vectors, encoders)
    slices = _slices(test)
    hit = _Hits.of(test, slices, baseline, resamples, seed)
    spans = part_slices(log, split, "test") if shown is None else shown.slices(split, "test")
    start_ms, stop_ms = spans[0].start_ms, spans[-1].stop_ms
    acted = _acted(log, test.heads, start_ms, stop_ms)
    scorers = (POPULARITY, *bundles)
    return Evaluation(
        data=data,
        test_start_ms=start_ms,
        test_stop_ms=stop_ms,
        events=len(acted),
        events_without_action=int(np.count_nonzero(~acted)),
        requests=len(test.users),
        rows=len(test.labels),
        users=len(np.unique(test.users)),
        requests_without_history=int(np.count_nonzero(test.activity == 0)),
        candidates=sampling.candidates,
        requests_max=sampling.requests_max,
        seed=seed,
        resamples=resamples,
        baseline=baseline,
        scorers=tuple(_scorer_facts(name, bundle, test) for name, bundle in bundles.items()),
        heads=tuple(_head_facts(head, test, log) for head in test.heads),
        slices=tuple(slices),
        scores=tuple(_head_score(scorer, head, test, hit) for head in test.heads for scorer in scorers),
        slice_scores=tuple(
            _slice_score(scorer, head, span, 1 + number, hit)
            for head in test.heads
            for number, span in enumerate(slices)
            for scorer in scorers
        ),
        comparisons=()
        if against is None
        else tuple(
            Comparison(scorer, rival, head, *(hit.paired(scorer, rival, order, head) for order in ("head", "utility")))
            for head in test.heads
            for scorer in bundles
            for rival in (POPULARITY, *test.baselines)
        ),
        baselines_missing=test.baselines_missing,
        trees=test.trees,
    )


def _checked_baseline(bundles: Mapping[str, Bundle], wanted: str | None) -> str:
    baseline = wanted or (next(iter(bundles)) if len(bundles) > 1 else POPULARITY)
    for name in (name for name in BASELINES if name in bundles):
        raise SettingError(f"{name!r} is the name of a baseline; rename the bundle")
    if baseline not in (*bundles, POPULARITY):
        raise SettingError(f"unknown baseline {baseline!r}; choose one of {', '.join([*bundles, POPULARITY])}")
    return baseline


def _acted(log: ActionLog, heads: tuple[str, ...], start_ms: int, stop_ms: int) -> np.ndarray:
    """Return bool[E], which events of a period are an action of any of the heads."""
    logged = log.labels[log.before(start_ms) : log.before(stop_ms)]
    return np.asarray(logged[:, [log.schema.position(head) for head in heads]].any(axis=1))


@dataclass(frozen=True, slots=True)
class _Hits:
    """Hits and counted requests, summed over users, for all users (slice 0) and each slice of users.

    Attributes:
        heads: names of the columns.
        orders: scorer and order, by position.
        lacking: pairs of a scorer and a head that it lacks.
        sums: [S, O + 1, H]; the position after the orders holds the requests that count.
        baseline: name of the baseline.
    """

    heads: tuple[str, ...]
    orders: tuple[tuple[str, str], ...]
    lacking: frozenset[tuple[str, str]]
    sums: Resampling
    baseline: str

    @staticmethod
    def of(test: ScoredTest, slices: list[ActivitySlice], baseline: str, resamples: int, seed: int) -> _Hits:
        found = {(POPULARITY, "head"): hits_by_head(test, test.heads, test.popularity)}
        for name, scored in {**test.baselines, **test.by_bundle}.items():
            found[name, "head"] = hits_by_head(test, scored.heads, scored.probabilities)
            if scored.utilities is not None:
                found[name, "utility"] = hits(scored.utilities, test.labels, test.row_splits)
        values = np.stack([*found.values(), requests_with(test.labels, test.row_splits)], axis=1)
        inside = np.stack([np.ones(len(test.users), bool), *(_within(test.activity, s) for s in slices)], axis=1)
        sliced = values[:, None] * inside[:, :, None, None]
        sums = resample(test.users, sliced.reshape(len(test.users), -1), resamples, seed)
        shape = sliced.shape[1:]
        return _Hits(
            test.heads,
            tuple(found),
            frozenset(
                (n, h)
                for n, scored in (*test.baselines.items(), *test.by_bundle.items())
                for h in test.heads
                if h not in scored.heads
            ),
            Resampling(sums.measured.reshape(shape), sums.drawn.reshape(-1, *shape)),
            baseline,
        )

    def of_order(self, scorer: str, order: str, head: str, slice_index: int = 0) -> Hit | None:
        """Return the HIT@3 of a scorer; None if it has no such order."""
        mean = self._mean(scorer, order, head, slice_index)
        if mean is None:
            return None
        base = None if scorer == self.baseline else self._mean(self.baseline, order, head, slice_index)
        if base is None:
            return Hit(mean.estimate(), None, None)
        difference = mean - base
        return Hit(mean.estimate(), difference.estimate(), (difference / base).scaled(100).estimate())

    def paired(self, scorer: str, rival: str, order: str, head: str) -> Paired | None:
        """Compare two scorers; None if one has no such order."""
        own, other = (self._mean(name, order, head, 0) for name in (scorer, rival))
        if own is None or other is None:
            return None
        difference = own - other
        lift = (difference / other).scaled(100)
        return Paired(own.estimate(), other.estimate(), difference.estimate(), lift.estimate())

    def counted(self, head: str, slice_index: int = 0) -> int:
        return int(self.sums.measured[slice_index, -1, self.heads.index(head)])

    def _mean(self, scorer: str, order: str, head: str, slice_index: int) -> Resampling | None:
        if (scorer, order) not in self.orders or (order == "head" and (scorer, head) in self.lacking):
            return None
        column = self.heads.index(head)
        return self.sums[slice_index, self.orders.index((scorer, order)), column] / self.sums[slice_index, -1, column]


def hits_by_head(test: ScoredTest, heads: tuple[str, ...], scores: np.ndarray) -> np.ndarray:
    """Count the actions on the three best candidates of each request, which each head orders by its own scores.

    Args:
        test: the requests.
        heads: the H' heads that have scores.
        scores: float[N, H'].

    Returns:
        float64[R, H] in the order of the test's heads, 0 for heads without scores.
    """
    found = np.zeros((len(test.users), len(test.heads)))
    for column, head in enumerate(heads):
        place = test.heads.index(head)
        found[:, place] = hits(scores[:, column], test.labels[:, [place]], test.row_splits)[:, 0]
    return found


def _slices(test: ScoredTest) -> list[ActivitySlice]:
    bounds = [*(start for _, start in SLICES[1:]), None]
    found = []
    for (name, start), stop in zip(SLICES, bounds, strict=True):
        bare = ActivitySlice(name, start, stop, 0, 0)
        users = test.users[_within(test.activity, bare)]
        found.append(ActivitySlice(name, start, stop, len(users), len(np.unique(users))))
    return found


def _within(activity: np.ndarray, span: ActivitySlice) -> np.ndarray:
    below = np.inf if span.actions_below is None else span.actions_below
    return np.asarray((activity >= span.actions_min) & (activity < below))


def _head_score(scorer: str, head: str, test: ScoredTest, hit: _Hits) -> HeadScore:
    labels = test.labels[:, test.heads.index(head)]
    by_utility, by_head = (hit.of_order(scorer, order, head) for order in ("utility", "head"))
    if scorer == POPULARITY:
        scores = test.popularity[:, test.heads.index(head)]
        return HeadScore(scorer, head, by_utility, by_head, _real(auc(scores, labels)), None, ())
    scored = test.by_bundle[scorer]
    if head not in scored.heads:
        return HeadScore(scorer, head, by_utility, None, None, None, ())
    scores = scored.probabilities[:, scored.heads.index(head)]
    bins = reliability(scores, labels)
    ece = _real(calibration_error(bins))
    return HeadScore(scorer, head, by_utility, by_head, _real(auc(scores, labels)), ece, bins, deciles(scores, labels))


def _slice_score(scorer: str, head: str, span: ActivitySlice, slice_index: int, hit: _Hits) -> SliceScore:
    return SliceScore(
        slice=span.name,
        scorer=scorer,
        head=head,
        requests=hit.counted(head, slice_index),
        hit_at_3_by_utility=hit.of_order(scorer, "utility", head, slice_index),
        hit_at_3_by_head=hit.of_order(scorer, "head", head, slice_index),
    )


def _head_facts(head: str, test: ScoredTest, log: ActionLog) -> HeadFacts:
    column, rule = test.heads.index(head), log.schema.rule(head)
    counted = requests_with(test.labels, test.row_splits)[:, column]
    return HeadFacts(
        head=head,
        meaning=rule.meaning,
        lower_is_better=rule.affinity == 0,
        positives=int(test.labels[:, column].sum()),
        requests=int(counted.sum()),
        users=len(np.unique(test.users[counted])),
    )


def _scorer_facts(name: str, bundle: Bundle, test: ScoredTest) -> ScorerFacts:
    scored = test.by_bundle[name]
    return ScorerFacts(
        name=name,
        ref=bundle.manifest.ref,
        digest=bundle.digest,
        trained_on=bundle.manifest.lineage.data,
        heads_missing=tuple(head for head in test.heads if head not in scored.heads),
        utility_missing=scored.utility_missing,
    )


def _real(value: float) -> float | None:
    return value if np.isfinite(value) else None
