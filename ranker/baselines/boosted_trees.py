"""Gradient-boosted trees by LightGBM, one model per head: for probabilities, and for the order within a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import lightgbm as lgb
import numpy as np

from ranker.baselines.tree_rows import TreeRows

#: The metric that is compared counts the first three pins of a request.
_TOP = 3

#: `binary` predicts whether a row receives the action; `lambdarank` orders the rows of a request (Burges, MSR-TR-2010).
Objective = Literal["binary", "lambdarank"]

_METRICS: dict[Objective, dict[str, Any]] = {
    "binary": {"metric": "binary_logloss"},
    "lambdarank": {"metric": "ndcg", "eval_at": [_TOP]},
}


@dataclass(frozen=True, slots=True)
class TreeSettings:
    """What determines the trees, besides the rows. The defaults are tuned to no dataset.

    Attributes:
        seed: seed of the sampling of columns.
        rounds_max: largest number of trees of a model.
        patience: successive trees without a better validation metric to tolerate; the best number of trees is kept.
        learning_rate: weight of each tree.
        leaves: largest number of leaves of a tree.
        rows_min: least number of rows in a leaf.
        columns_share: share of the columns that each tree may read.
        bins: number of values that a column is reduced to.
        rows_for_bins: number of rows that determine these values; LightGBM keeps them as float64 meanwhile.
    """

    seed: int = 7
    rounds_max: int = 300
    patience: int = 20
    learning_rate: float = 0.1
    leaves: int = 31
    rows_min: int = 50
    columns_share: float = 0.5
    bins: int = 63
    rows_for_bins: int = 50_000

    def described(self) -> dict[str, object]:
        """Return everything besides the rows that determines the trees."""
        return {"lightgbm": lgb.__version__, **asdict(self)}


class TreeTrainer:
    """Fits models on the same rows; the columns are reduced to bins once.

    Args:
        train: rows to learn from.
        validation: rows that decide how many trees are kept.
        settings: the settings.

    A trainer serves one thread, and uses one.
    """

    def __init__(self, train: TreeRows, validation: TreeRows, settings: TreeSettings) -> None:
        self._settings = settings
        self._outcomes = tuple((rows.labels, rows.counts) for rows in (train, validation))
        bins = {"max_bin": settings.bins, "bin_construct_sample_cnt": settings.rows_for_bins}
        shared = {**self._parameters("binary"), **bins}
        self._train = lgb.Dataset(train.table, params=shared, feature_name=list(train.names), free_raw_data=True)
        self._validation = lgb.Dataset(validation.table, reference=self._train, params=shared, free_raw_data=True)
        for part in (self._train, self._validation):
            part.construct()

    def fit(self, objective: Objective, head: int, progress: Callable[[int], None] = lambda _done: None) -> str:
        """Return a model of one head, as LightGBM's text.

        Args:
            objective: what to learn.
            head: column of the labels.
            progress: receives the number of finished trees.
        """
        settings = self._settings
        for part, (labels, counts) in zip((self._train, self._validation), self._outcomes, strict=True):
            part.set_label(np.ascontiguousarray(labels[:, head]))
            part.set_group(counts if objective == "lambdarank" else None)
        callbacks: list[Callable[..., Any]] = [
            lgb.early_stopping(settings.patience, first_metric_only=True, verbose=False),
            lambda environment: progress(environment.iteration + 1),
        ]
        booster = lgb.train(
            self._parameters(objective),
            self._train,
            settings.rounds_max,
            valid_sets=[self._validation],
            callbacks=callbacks,
        )
        return booster.model_to_string(num_iteration=booster.best_iteration)

    def _parameters(self, objective: Objective) -> dict[str, Any]:
        settings = self._settings
        return {
            "objective": objective,
            **_METRICS[objective],
            "seed": settings.seed,
            "learning_rate": settings.learning_rate,
            "num_leaves": settings.leaves,
            "min_data_in_leaf": settings.rows_min,
            "feature_fraction": settings.columns_share,
            "feature_pre_filter": False,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": 1,
            "verbosity": -1,
        }


class TreeScorer:
    """Scores rows with models that were fitted before.

    Args:
        models: M models, as `TreeTrainer.fit` returns them.
        threads: number of threads.
    """

    def __init__(self, models: Sequence[str], threads: int) -> None:
        self._boosters = [lgb.Booster(model_str=model) for model in models]
        self._threads = threads

    def scores(self, rows: TreeRows) -> np.ndarray:
        """Return float32[N, M], probabilities of binary models and scores of ranking models."""
        found = [booster.predict(rows.table, num_threads=self._threads) for booster in self._boosters]
        return np.stack(found, axis=1).astype(np.float32)
