"""Judges how a new model version would rank recently answered requests, before it serves. Pure."""

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

#: The rankings of fewer candidates are not compared.
_RANKED_MIN = 8


class NotReadyError(Exception):
    """A version cannot serve yet for reasons outside its bundle, such as features or memory; a retry may succeed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A recent request, with the features and network inputs of a new version."""

    request: RecentRequest
    fetched: FetchedFeatures
    batch: FeatureBatch


def check_features(manifest: Manifest, samples: Sequence[Sample], missing_max: float) -> str:
    """Check that the feature store has about as many rows for a version as for the version that answered.

    Args:
        manifest: the version's manifest.
        samples: recent requests.
        missing_max: by how much the fraction of missing rows may exceed that of the version that answered.

    Returns:
        The result, as a sentence for operators.

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
                f"{manifest.ref}: {now / of:.1%} of {of} {what} of recent requests have no row, against "
                f"{then / of:.1%} for the version that answered them; load {groups} (pinrank features load)"
            )
    return f"features: {missing / max(1, rows):.1%} of {rows} recent candidates have no row"


def _lacking(samples: Sequence[Sample], manifest: Manifest, what: str) -> list[FeatureGroup]:
    """Return the feature groups that lack rows."""
    sides = [sample.fetched.pins if what == "candidates" else sample.fetched.user for sample in samples]
    names = {name for side in sides for name, rows in side.items() if rows.states.any()}
    return [group for group in manifest.groups if group.name in names]


def check_scores(
    manifest: Manifest, utility: UtilityTable, samples: Sequence[Sample], logits: np.ndarray, correlation_min: float
) -> list[str]:
    """Judge a version's scores of recent requests.

    Args:
        manifest: the version's manifest.
        utility: its utility table.
        samples: recent requests.
        logits: float32[N, H], the scores of all their candidates.
        correlation_min: smallest mean rank correlation with the answers that the requests got.

    Returns:
        The results, as sentences for operators.

    Raises:
        BundleError: scores are not finite or all equal, or the order differs too much from the answers.
    """
    if not np.isfinite(logits).all():
        bad = int(np.count_nonzero(~np.isfinite(logits).all(axis=1)))
        raise BundleError(
            f"{manifest.ref}: the scores of {bad} of {len(logits)} candidates of recent requests are not finite"
        )
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
        raise BundleError(
            f"{manifest.ref} gives every candidate of a recent request the same utility; check its utility table"
        )
    found = [f"scores: finite for all {len(logits)} candidates of {len(samples)} recent requests"]
    if correlations:
        mean = float(np.mean(correlations))
        if mean < correlation_min:
            raise BundleError(
                f"{manifest.ref} ranks recent requests too differently from the answers that they got: the rank "
                f"correlation is {mean:.2f}, but at least {correlation_min:g} is required (swap.rank_correlation_min)"
            )
        found.append(f"rank correlation with the answers of recent requests: {mean:.2f}")
    return found


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Spearman's rank correlation of two float[N]; ties are ranked in order of position."""
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
