"""Compares kinds of ranker by several trainings of each: one training of either says little.

Two trainings of one recipe, which differ by their seed alone, can be further apart than what is compared. So a kind's
HIT@3 of a request is the mean of its trainings, and the intervals are over users for these means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ranker.evaluation.bootstrap import resample
from ranker.evaluation.evaluate import hits_by_head
from ranker.evaluation.metrics import requests_with
from ranker.evaluation.scoring import ScoredTest


def compared(test: ScoredTest, kinds: Mapping[str, Sequence[str]], resamples: int, seed: int) -> dict[str, Any]:
    """Return the mean HIT@3 of each kind by head, and what each kind gains over each one before it.

    Args:
        test: the scores of all trainings, which predict the same heads.
        kinds: the names of each kind's trainings among the bundles.
        resamples: the number of resamples of users.
        seed: of the resamples.

    Returns:
        By head that a request counts for, and kind: `hit`, `hits` of each training, and `over` each kind before it
        `percent`, `low` and `high`, None where too few users have a hit of that one.
    """
    counted = requests_with(test.labels, test.row_splits)
    by_training: dict[str, np.ndarray] = {}
    for kind, names in kinds.items():
        scored = [test.by_bundle[name] for name in names]
        by_training[kind] = np.stack([hits_by_head(test, one.heads, one.probabilities) for one in scored])
    means = np.concatenate([of_kind.mean(axis=0) for of_kind in by_training.values()], axis=1)
    sums = resample(test.users, means, resamples, seed)
    found: dict[str, Any] = {}
    for column in np.flatnonzero(counted.any(axis=0)).tolist():
        of_head = found.setdefault(test.heads[column], {})
        of_kinds = {kind: sums[number * len(test.heads) + column] for number, kind in enumerate(kinds)}
        for kind, of_kind in by_training.items():
            each = of_kind[..., column].sum(axis=1) / counted[:, column].sum()
            over = {one: ((of_kinds[kind] - of_kinds[one]) / of_kinds[one]).scaled(100).estimate() for one in of_head}
            of_head[kind] = {
                "hit": float(each.mean()),
                "hits": each.tolist(),
                "over": {
                    one: {"percent": lift.value, "low": lift.low, "high": lift.high} for one, lift in over.items()
                },
            }
    return found
