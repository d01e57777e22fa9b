"""What a new version makes of requests that were answered lately, judged before it answers anybody. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from feature_client.features import FetchedFeatures
from feature_client.groups import FeatureGroup
from kernels.engine import FeatureBatch
from model_store.bundle.files import BundleError
from model_store.bundle.manifest import Manifest
from model_store.model.loaded import calibrate
from model_store.model.utility import UtilityTable
from server.proving.recent_requests import RecentRequest

#: Fewer candidates have no order worth comparing.
_RANKED_MIN = 8


class NotReadyError(Exception):
    """What surrounds a bundle does not let it serve yet: features, memory. A later try may succeed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A recent request as a new version would see it."""

    request: RecentRequest
    fetched: FetchedFeatures
    batch: FeatureBatch


def check_features(manifest: Manifest, samples: Sequence[Sample], missing_max: float) -> str:
    """See whether the feature store holds what a version reads as well as what was read by the one that answered.

    Args:
        manifest: the version's.
        samples: recent requests.
        missing_max: how much larger a part of them may lack rows.

    Returns:
        What was found, for people.

    Raises:
        NotReadyError: features are missing, or could not be read.
    """
    failure = next((s.fetched.store_failure for s in samples if s.fetched.store_failure), None)
    if failure:
        raise NotReadyError(f"{manifest.ref}: the feature store cannot be read: {failure}")
    rows = sum(sample.fetched.candidates for sample in samples)
    missing = sum(sample.fetched.missing().candidates for sample in samples)
    before = sum(sample.request.pins_missing for sample in samples)
    users = sum(sample.fetched.missing().user for sample in samples)
    users_before = sum(sample.request.user_missing for sample in samples)
    for what, now, then, of in (
        ("candidates", missing, before, rows),
        ("users", users, users_before, len(samples)),
    ):
        if (now - then) / max(1, of) > missing_max:
            groups = ", ".join(group.ref for group in _lacking(samples, manifest, what))
            raise NotReadyError(
                f"{manifest.ref}: {now / of:.1%} of {of} {what} of recent requests have no row ({then / of:.1%} for "
                f"the version that answered them); load {groups} (pinrank features load)"
            )
    return f"features: {missing / max(1, rows):.1%} of {rows} recent candidates without a row"


def _lacking(samples: Sequence[Sample], manifest: Manifest, what: str) -> list[FeatureGroup]:
    """Return the groups of which rows are missing."""
    sides = [sample.fetched.pins if what == "candidates" else sample.fetched.user for sample in samples]
    names = {name for side in sides for name, rows in side.items() if rows.states.any()}
    return [group for group in manifest.groups if group.name in names]


def check_scores(
    manifest: Manifest, utility: UtilityTable, samples: Sequence[Sample], logits: np.ndarray, correlation_min: float
) -> list[str]:
    """Judge a version's scores of recent requests.

    Args:
        manifest: the version's.
        utility: its table.
        samples: the requests.
        logits: float32[N, H] of all their rows.
        correlation_min: least mean rank correlation with what they were answered.

    Returns:
        What was found, for people.

    Raises:
        BundleError: scores that are not finite or say nothing, or another order altogether.
    """
    if not np.isfinite(logits).all():
        bad = int(np.count_nonzero(~np.isfinite(logits).all(axis=1)))
        raise BundleError(f"{manifest.ref}: {bad} of {len(logits)} candidates of recent requests get no finite score")
    probabilities = calibrate(manifest, logits)
    splits = np.cumsum([sample.batch.rows for sample in samples])[:-1]
    correlations, flat = [], 0
    for sample, own in zip(samples, np.split(probabilities, splits), strict=True):
        surface = sample.request.surface
        utilities = utility.combine(surface, utility.party_utilities(surface, own, sample.fetched))
        if not np.isfinite(utilities).all():
            raise BundleError(f"{manifest.ref}: the utility of a recent request's candidate is not finite")
        given = sample.request.utilities
        both = np.isfinite(given)
        if len(own) < _RANKED_MIN or np.count_nonzero(both) < _RANKED_MIN:
            continue
        if np.ptp(utilities) == 0:
            flat += 1
        elif np.ptp(given[both]):
            correlations.append(rank_correlation(utilities[both], given[both]))
    if flat and not correlations:
        raise BundleError(f"{manifest.ref} gives every candidate of a recent request the same utility")
    found = [f"scores: finite for all {len(logits)} candidates of {len(samples)} recent requests"]
    if correlations:
        mean = float(np.mean(correlations))
        if mean < correlation_min:
            raise BundleError(
                f"{manifest.ref} orders recent requests unlike what they were answered: rank correlation {mean:.2f}, "
                f"at least {correlation_min:g} is asked for (swap.rank_correlation_min)"
            )
        found.append(f"rank correlation with what was answered: {mean:.2f}")
    return found


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Spearman's coefficient of two float[N] without ties that matter."""
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
