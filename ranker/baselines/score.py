"""Scores the rows of a test with every baseline. LightGBM is optional and imported on use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from kernels.cores import cores
from model_store.bundle.manifest import Lineage, TrainingRows
from ranker.baselines.item_knn import item_knn_scores
from ranker.baselines.scores import DOT_PRODUCT, ITEM_KNN, RANKING_TREES, TREES, BaselineScores, one_order
from ranker.baselines.tree_cache import TreeCache
from ranker.baselines.tree_rows import TreeRows
from ranker.cache_folder import default_cache_dir
from ranker.data.actions import ActionLog
from ranker.data.inputs import SEQUENCE_LENGTH
from ranker.data.requests import Part
from ranker.training.examples import Examples, Sampling

#: Receives the current task, the finished units and their total.
Progress = Callable[[str, int, int], None]

#: Why a baseline has no scores where LightGBM is not installed.
NO_LIGHTGBM = "LightGBM is not installed: pip install 'pinrank[baselines]'"


@dataclass(frozen=True, slots=True)
class BaselinePlan:
    """Which rows the trees learn from, and how they are fitted.

    Attributes:
        sampling: sampling of the training rows: the network's own.
        validation_requests_max: number of validation requests, which decide how many trees are kept.
        seed: seed of the sampled rows and of the trees.
        threads: number of threads; None uses all cores of this process. The trees do not depend on it.
        cache: folder of fitted trees.
    """

    sampling: Sampling = field(default_factory=Sampling)
    validation_requests_max: int = 2_000
    seed: int = 7
    threads: int | None = None
    cache: Path = field(default_factory=lambda: default_cache_dir() / "trees")

    @staticmethod
    def of_training(lineage: Lineage, threads: int | None) -> BaselinePlan:
        """Return the plan that learns from the rows that a version learned from, by its lineage."""
        rows, usual = lineage.training_rows, Sampling()
        sampling = usual if rows is None else Sampling(rows.negatives, requests_max=rows.requests_max)
        return BaselinePlan(sampling, seed=lineage.seed, threads=threads)


def training_rows(sampling: Sampling) -> TrainingRows | None:
    """Return what a lineage says of the rows of a training; None for the usual ones."""
    rows, usual = (TrainingRows(negatives=s.negatives, requests_max=s.requests_max) for s in (sampling, Sampling()))
    return None if rows == usual else rows


@dataclass(frozen=True, slots=True)
class ScoredBaselines:
    """The scores of every baseline by its name, and the reason for each one that has none."""

    scores: Mapping[str, BaselineScores]
    missing: Mapping[str, str]


def score_baselines(
    test: Examples,
    examples_of: Callable[[Part, Sampling], Examples],
    heads: tuple[str, ...],
    actions: Sequence[str],
    log: ActionLog,
    plan: BaselinePlan,
    progress: Progress = lambda _what, _done, _total: None,
) -> ScoredBaselines:
    """Score the rows of a test.

    Args:
        test: the rows, with every input of `ranker.data.inputs`.
        examples_of: builds the examples of another part in the same way.
        heads: the heads, in the order of the label columns.
        actions: the kinds of action of the sequences, in the order of their codes.
        log: the history.
        plan: the rows and settings of the trees.
        progress: receives the progress.

    Returns:
        Popularity is not among them: the examples hold it already.

    Cost: for 5,000 training requests with 25 to 30 candidates, 10 to 60 s a head on one core, then none: trees are
    cached. Memory for the table of the training rows, about 500 bytes a row.
    """
    dot = np.einsum(
        "nd,nd->n",
        test.batch.candidate["pin_embedding"],
        test.batch.request["user_embedding"][test.batch.row_request()],
    )
    found = {
        DOT_PRODUCT: one_order(heads, dot),
        ITEM_KNN: BaselineScores(heads, item_knn_scores(log, test, heads, SEQUENCE_LENGTH)),
    }
    if find_spec("lightgbm") is None:
        return ScoredBaselines(found, dict.fromkeys((TREES, RANKING_TREES), NO_LIGHTGBM))
    train = TreeRows.of(examples_of("train", plan.sampling), tuple(actions))
    validating = Sampling(plan.sampling.negatives, plan.sampling.candidates, plan.validation_requests_max)
    validation = TreeRows.of(examples_of("validation", validating), tuple(actions))
    found |= _trees(train, validation, TreeRows.of(test, tuple(actions)), heads, plan, progress)
    return ScoredBaselines(found, {})


def _trees(
    train: TreeRows,
    validation: TreeRows,
    test: TreeRows,
    heads: tuple[str, ...],
    plan: BaselinePlan,
    progress: Progress,
) -> Iterator[tuple[str, BaselineScores]]:
    from ranker.baselines.boosted_trees import Objective, TreeSettings, TreeTrainer, predict  # noqa: PLC0415

    settings, threads, cache = TreeSettings(seed=plan.seed), plan.threads or cores(), TreeCache(plan.cache)
    trainer: list[TreeTrainer] = []  # made on first use: preparing the rows takes seconds, and all may be cached
    rows = {"train": train.digest(), "validation": validation.digest()}
    learned = [head for head in range(len(heads)) if 0 < train.labels[:, head].sum() < len(train.labels)]
    kinds: tuple[tuple[str, Objective], ...] = ((TREES, "binary"), (RANKING_TREES, "lambdarank"))

    def fit(objective: Objective, head: int, what: str) -> str:
        if not trainer:
            trainer.append(TreeTrainer(train, validation, settings, threads))
        return trainer[0].fit(objective, head, lambda done: progress(what, done, settings.rounds_max))

    for name, objective in kinds:
        scores = []
        for head in learned:
            what = f"{name}, {heads[head]}"
            made_of = {**rows, **settings.described(), "objective": objective, "head": head}
            model = cache.get_or_fit(made_of, lambda o=objective, h=head, w=what: fit(o, h, w))  # type: ignore[misc]
            scores.append(predict(model, test, threads))
            progress(what, settings.rounds_max, settings.rounds_max)
        if scores:
            yield (
                name,
                BaselineScores(
                    tuple(heads[head] for head in learned), np.stack(scores, axis=1), probabilities=name == TREES
                ),
            )
