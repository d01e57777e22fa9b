from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kernels.engine import FeatureBatch
from model_store.model.recency import recency_of_ages
from ranker.baselines.boosted_trees import Objective, TreeScorer, TreeSettings, TreeTrainer
from ranker.baselines.tree_cache import FILES_MAX, TreeCache
from ranker.baselines.tree_rows import TreeRows
from ranker.evaluation.metrics import auc
from ranker.training.examples import Examples
from tests.ranker.toy_training import HEADS, examples

ACTIONS = ("save", "like", "hide", "closeup")
SETTINGS = TreeSettings(rounds_max=30, rows_min=5)


def full_examples(seed: int, requests: int = 300) -> Examples:
    """Return toy examples with every input."""
    found = examples(seed, requests)
    request = {**found.batch.request, "recency": recency_of_ages(found.ages_s)}
    return replace(found, batch=FeatureBatch(request, found.batch.candidate, found.batch.row_splits))


def rows(seed: int, requests: int = 300) -> TreeRows:
    return TreeRows.of(full_examples(seed, requests), ACTIONS)


def predict(model: str, test: TreeRows, threads: int) -> np.ndarray:
    return TreeScorer([model], threads).scores(test)[:, 0]


@pytest.mark.parametrize("objective", ["binary", "lambdarank"])
def test_trees_learn_each_head_alike_in_any_number_of_threads(objective: Objective) -> None:
    test = rows(3)
    with ThreadPoolExecutor(len(HEADS)) as pool:
        fits = [pool.submit(TreeTrainer(rows(1), rows(2), SETTINGS).fit, objective, head) for head in range(len(HEADS))]
        together = [fit.result() for fit in fits]
    for head in range(len(HEADS)):
        alone = TreeTrainer(rows(1), rows(2), SETTINGS).fit(objective, head)
        scores = predict(alone, test, 1)
        np.testing.assert_array_equal(scores, predict(together[head], test, 2))
        assert auc(scores, test.labels[:, head]) > 0.95
        if objective == "binary":
            assert ((scores > 0) & (scores < 1)).all()


def test_one_trainer_fits_each_objective_as_a_new_one_does() -> None:
    trainer = TreeTrainer(rows(1), rows(2), SETTINGS)
    trainer.fit("lambdarank", 0)
    again = trainer.fit("binary", 1)
    alone = TreeTrainer(rows(1), rows(2), SETTINGS).fit("binary", 1)
    np.testing.assert_array_equal(predict(again, rows(3), 1), predict(alone, rows(3), 1))


def test_the_table_has_the_inputs_and_similarities_of_each_row() -> None:
    given = full_examples(1, 33)
    found = TreeRows.of(given, ACTIONS)
    column = dict(zip(found.names, found.table.T, strict=True))
    owner = given.batch.row_request()
    np.testing.assert_array_equal(column["surface"], given.batch.request["surface"][owner])
    np.testing.assert_array_equal(column["query_3"], given.batch.request["query"][owner, 3])
    np.testing.assert_array_equal(column["recency_0"], given.batch.request["recency"][owner, 0])
    np.testing.assert_array_equal(column["pin_scalars_1"], given.batch.candidate["pin_scalars"][:, 1])
    user, pin = given.batch.request["user_embedding"][owner], given.batch.candidate["pin_embedding"]
    np.testing.assert_allclose(column["user"], (user * pin).sum(axis=1), atol=1e-5)
    assert {"sequence_max", "newest_5_mean", "hide_max"} <= set(column)


def test_a_digest_follows_every_number() -> None:
    before = rows(1)
    assert before.digest() == rows(1).digest()
    for name in ("table", "labels", "counts"):
        changed = rows(1)
        getattr(changed, name).reshape(-1)[7] += 1
        assert changed.digest() != before.digest()


def test_a_cached_model_is_not_fitted_again_unless_it_is_damaged(tmp_path: Path) -> None:
    cache, fitted = TreeCache(tmp_path / "trees"), []

    def fit(text: str) -> str:
        fitted.append(text)
        return text

    assert cache.get_or_fit({"rows": "a"}, lambda: fit("first")) == "first"
    assert TreeCache(tmp_path / "trees").get_or_fit({"rows": "a"}, lambda: fit("again")) == "first"
    assert cache.get_or_fit({"rows": "b"}, lambda: fit("other")) == "other"
    for path in (tmp_path / "trees").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert cache.get_or_fit({"rows": "a"}, lambda: fit("first")) == "first"
    assert fitted == ["first", "other", "first"]


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    cache = TreeCache(tmp_path)
    for number in range(FILES_MAX + 3):
        cache.get_or_fit({"number": number}, lambda: "model")
    assert len(list(tmp_path.iterdir())) == FILES_MAX
