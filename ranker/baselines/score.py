"""Scores the rows of a test with every baseline. LightGBM is optional and imported on use."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from kernels.cores import cores
from model_store.bundle.manifest import Lineage, TrainingRows
from ranker.baselines.item_knn import item_knn_scores
from ranker.baselines.scores import DOT_PRODUCT, ITEM_KNN, RANKING_TREES, TREES, BaselineScores, TreeTraining, one_order
from ranker.baselines.tree_cache import TreeCache
from ranker.baselines.tree_rows import TreeRows
from ranker.cache_folder import default_cache_dir
from ranker.data.actions import ActionLog
from ranker.data.inputs import SEQUENCE_LENGTH
from ranker.data.requests import Part
from ranker.training.examples import Examples, Sampling, newest_and_held

#: Receives the current task, the finished units and their total.
Progress = Callable[[str, int, int], None]

#: Why a baseline has no scores where LightGBM is not installed.
NO_LIGHTGBM = "LightGBM is not installed: pip install 'pinrank[baselines]'"


#: Rows of the test are tabulated for this many requests at a time, which bounds the memory of the tables.
_REQUESTS_PER_TABLE = 200

#: The rows of a lineage that does not name them: the usual ones when lineages began to.
UNSAID = Sampling(negatives=24)

#: Training requests of the trees; more take longer and change little.
TREE_REQUESTS_MAX = 5_000


@dataclass(frozen=True, slots=True)
class BaselinePlan:
    """Which rows the trees learn from, and how they are fitted.

    Attributes:
        sampling: sampling of the network's training rows.
        requests_max: approximate maximum number of the requests among them that the trees learn from, sampled evenly.
        validation_requests_max: number of validation requests, which decide how many trees are kept.
        newest_requests_max: number of validation requests instead, if the network learned from every other one; so do
            the trees then, and the rest decides.
        seed: seed of the sampled rows and of the trees.
        threads: number of threads; None uses all cores of this process. The trees do not depend on it.
        cache: folder of fitted trees.
    """

    sampling: Sampling = field(default_factory=Sampling)
    requests_max: int = TREE_REQUESTS_MAX
    validation_requests_max: int = 1_000
    newest_requests_max: int = 0
    seed: int = 7
    threads: int | None = None
    cache: Path = field(default_factory=lambda: default_cache_dir() / "trees")

    @staticmethod
    def of_training(lineage: Lineage, threads: int | None, requests_max: int = TREE_REQUESTS_MAX) -> BaselinePlan:
        """Return the plan that learns from the rows that a version learned from, by its lineage."""
        rows = lineage.training_rows
        sampling = UNSAID if rows is None else Sampling(rows.negatives, requests_max=rows.requests_max)
        newest = 0 if rows is None else rows.newest_requests_max
        return BaselinePlan(sampling, requests_max, newest_requests_max=newest, seed=lineage.seed, threads=threads)

    def trees(self, part: Part) -> Sampling:
        """Return the sampling of the trees' rows of a part."""
        if part == "validation":
            return replace(self.sampling, requests_max=self.newest_requests_max or self.validation_requests_max)
        return replace(self.sampling, requests_max=min(self.requests_max, self.sampling.requests_max or sys.maxsize))

    def requests_of_network(self, available: int) -> int:
        """Return about how many of the available training requests a network learns from."""
        return min(available, self.sampling.requests_max or available)


def training_rows(sampling: Sampling, newest_requests_max: int) -> TrainingRows | None:
    """Return what a lineage says of the rows of a training; None for those that it need not name."""
    rows = TrainingRows(
        negatives=sampling.negatives, requests_max=sampling.requests_max, newest_requests_max=newest_requests_max
    )
    return None if rows == TrainingRows(negatives=UNSAID.negatives) else rows


class ExampleSource(Protocol):
    """Builds examples of the other parts as those of the test were built."""

    def examples(self, part: Part, sampling: Sampling) -> Examples:
        """Build the examples of a part, with every input of `ranker.data.inputs`."""

    def available(self, part: Part) -> int:
        """Return about how many requests the part has without a maximum."""


@dataclass(frozen=True, slots=True)
class ScoredBaselines:
    """The scores of every baseline by its name, and the reason for each one that has none.

    `trees` says what the trees learned from; None without trees.
    """

    scores: Mapping[str, BaselineScores]
    missing: Mapping[str, str]
    trees: TreeTraining | None = None


def score_baselines(
    test: Examples,
    source: ExampleSource,
    heads: tuple[str, ...],
    actions: Sequence[str],
    log: ActionLog,
    plan: BaselinePlan,
    progress: Progress = lambda _what, _done, _total: None,
) -> ScoredBaselines:
    """Score the rows of a test.

    Args:
        test: the rows, with every input of `ranker.data.inputs`.
        source: builds the rows to learn from.
        heads: the heads, in the order of the label columns.
        actions: the kinds of action of the sequences, in the order of their codes.
        log: the history.
        plan: the rows and settings of the trees.
        progress: receives the progress.

    Returns:
        Popularity is not among them: the examples hold it already.

    Cost: time and memory of the trees grow with `plan.requests_max`, which bounds them; the memory for the test's
    scores is small. Fitted trees are cached, and then only the rows are built.
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
    train, validation, newest = _tree_rows(source, plan, tuple(actions))
    of_network = plan.requests_of_network(source.available("train")) + newest
    learned = TreeTraining(len(train.counts), len(train.labels), of_network)
    fitted = _fitted_trees(train, validation, heads, plan, progress)
    del train, validation  # the test's tables take their place
    return ScoredBaselines(found | _tree_scores(fitted, test, tuple(actions), heads, plan, progress), {}, learned)


def _tree_rows(source: ExampleSource, plan: BaselinePlan, actions: tuple[str, ...]) -> tuple[TreeRows, TreeRows, int]:
    """Return the rows to learn from, those that decide how many trees to keep, and how many of the newest are there."""
    train, validation = (source.examples(part, plan.trees(part)) for part in ("train", "validation"))
    newest = 0
    if plan.newest_requests_max:
        learned, validation = newest_and_held(validation)
        train, newest = Examples.concat([train, learned]), learned.batch.requests
    return TreeRows.of(train, actions), TreeRows.of(validation, actions), newest


def _fitted_trees(
    train: TreeRows, validation: TreeRows, heads: tuple[str, ...], plan: BaselinePlan, progress: Progress
) -> dict[tuple[str, int], str]:
    """Return a model for each kind of trees and each column of a head that has both outcomes."""
    from ranker.baselines.boosted_trees import Objective, TreeSettings, TreeTrainer  # noqa: PLC0415

    settings, cache, own = TreeSettings(seed=plan.seed), TreeCache(plan.cache), threading.local()
    rows = {"train": train.digest(), "validation": validation.digest()}
    kinds: tuple[tuple[str, Objective], ...] = ((TREES, "binary"), (RANKING_TREES, "lambdarank"))
    learned = [head for head in range(len(heads)) if 0 < train.labels[:, head].sum() < len(train.labels)]
    jobs = [(name, objective, head) for name, objective in kinds for head in learned]
    grown = dict.fromkeys(jobs, 0)

    def report(job: tuple[str, Objective, int], trees: int) -> None:
        grown[job] = trees
        progress(TREES, sum(grown.values()), len(jobs) * settings.rounds_max)

    def fit(job: tuple[str, Objective, int]) -> str:
        if not hasattr(own, "trainer"):  # made on first use: preparing the rows takes seconds, and all may be cached
            own.trainer = TreeTrainer(train, validation, settings)
        model: str = own.trainer.fit(*job[1:], lambda trees: report(job, trees))
        return model

    def known_or_fitted(job: tuple[str, Objective, int]) -> str:
        made_of = {**rows, **settings.described(), "objective": job[1], "head": job[2]}
        model = cache.get_or_fit(made_of, lambda: fit(job))
        report(job, settings.rounds_max)
        return model

    # One model per thread: the threads of a single fit would wait for each other many times per tree.
    with ThreadPoolExecutor(max(1, min(plan.threads or cores(), len(jobs)))) as pool:
        try:
            models = list(pool.map(known_or_fitted, jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {(name, head): model for (name, _, head), model in zip(jobs, models, strict=True)}


def _tree_scores(
    fitted: Mapping[tuple[str, int], str],
    test: Examples,
    actions: tuple[str, ...],
    heads: tuple[str, ...],
    plan: BaselinePlan,
    progress: Progress,
) -> dict[str, BaselineScores]:
    from ranker.baselines.boosted_trees import TreeScorer  # noqa: PLC0415

    if not fitted:
        return {}
    scorer, total = TreeScorer(list(fitted.values()), plan.threads or cores()), test.batch.requests
    parts = []
    for start in range(0, total, _REQUESTS_PER_TABLE):
        stop = min(start + _REQUESTS_PER_TABLE, total)
        parts.append(scorer.scores(TreeRows.of(test.take(np.arange(start, stop)), actions)))
        progress(TREES, stop, total)
    scores, found = np.concatenate(parts), {}
    for name in (TREES, RANKING_TREES):
        columns = [place for place, (kind, _) in enumerate(fitted) if kind == name]
        own = tuple(heads[head] for kind, head in fitted if kind == name)
        found[name] = BaselineScores(own, scores[:, columns], probabilities=name == TREES)
    return found
