"""Bundles against baselines: the first table, and the gate before a version is published."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ranker.baselines.score import NO_LIGHTGBM, UNSAID, BaselinePlan, training_rows
from ranker.baselines.scores import DOT_PRODUCT, ITEM_KNN, RANKING_TREES, TREES, TreeTraining
from ranker.errors import SettingError
from ranker.evaluation.gates import shortfalls
from ranker.evaluation.report import report_html
from ranker.evaluation.results import Comparison, Evaluation, Paired
from ranker.evaluation.scoring import BundleScores
from ranker.evaluation.tables import baseline_lines, baseline_table, terminal_tables
from ranker.training.examples import Sampling
from tests.ranker.scored import HEADS, measured, scored_test

GOOD, BAD = (scored_test().by_bundle[name] for name in ("good", "bad"))
#: The dot product equals the good bundle, and ranks alike for every head; trees are worse at saves.
AGAINST = {
    DOT_PRODUCT: BundleScores(HEADS, GOOD.probabilities, GOOD.probabilities[:, 0], None),
    ITEM_KNN: BundleScores(HEADS[:2], np.zeros_like(GOOD.probabilities[:, :2]), None, None),
    TREES: BundleScores(HEADS, BAD.probabilities, BAD.utilities, None),
}


@pytest.fixture
def evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    test = scored_test(baselines=AGAINST, baselines_missing={RANKING_TREES: NO_LIGHTGBM})
    return measured(test, tmp_path, monkeypatch, against=BaselinePlan())


def comparison(evaluation: Evaluation, scorer: str, baseline: str, head: str) -> Comparison:
    wanted = (scorer, baseline, head)
    return next(c for c in evaluation.comparisons if (c.scorer, c.baseline, c.head) == wanted)


def by_head(evaluation: Evaluation, scorer: str, baseline: str, head: str) -> Paired:
    found = comparison(evaluation, scorer, baseline, head).by_head
    assert found is not None
    return found


def test_bundles_are_compared_with_every_baseline_on_every_head(evaluation: Evaluation) -> None:
    rivals = ["popularity", DOT_PRODUCT, ITEM_KNN, TREES]
    assert [(c.head, c.scorer, c.baseline) for c in evaluation.comparisons] == [
        (head, scorer, rival) for head in HEADS for scorer in ("good", "bad") for rival in rivals
    ]
    same = by_head(evaluation, "good", DOT_PRODUCT, "save")
    assert same.own == same.baseline
    assert (same.difference.value, same.difference.low, same.difference.high) == (0.0, 0.0, 0.0)
    ahead = by_head(evaluation, "good", TREES, "save")
    assert ahead.own.value == by_head(evaluation, "good", "popularity", "save").own.value
    assert ahead.difference.low is not None
    assert ahead.difference.low > 0


def test_orders_that_one_side_lacks_are_not_compared(evaluation: Evaluation) -> None:
    assert comparison(evaluation, "good", ITEM_KNN, "like").by_head is None
    assert comparison(evaluation, "good", ITEM_KNN, "save").by_utility is None
    assert comparison(evaluation, "good", DOT_PRODUCT, "save").by_utility is not None


def test_a_version_falls_short_only_where_the_whole_interval_lies_below_zero(evaluation: Evaluation) -> None:
    assert shortfalls(evaluation, "good") == []  # equal to the dot product
    found = shortfalls(evaluation, "bad")
    assert [line.split(":")[0] for line in found] == ["save", "hide"]
    assert all(f" of {DOT_PRODUCT}, a difference of -" in line for line in found)
    behind = by_head(evaluation, "bad", DOT_PRODUCT, "save")
    for high, short in ((-1e-9, True), (0.0, False), (0.1, False), (None, False)):
        changed = replace(behind, difference=replace(behind.difference, high=high))
        assert changed.behind is short


def test_popularity_and_item_knn_inform_and_refuse_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = scored_test(baselines={ITEM_KNN: AGAINST[DOT_PRODUCT]}, by_bundle={"bad": BAD})
    evaluation = measured(test, tmp_path, monkeypatch, against=BaselinePlan())
    assert by_head(evaluation, "bad", ITEM_KNN, "save").behind
    assert shortfalls(evaluation, "bad") == []


def test_the_first_table_shows_the_baselines(evaluation: Evaluation) -> None:
    shown = baseline_table(evaluation)
    block = shown.blocks[0]
    assert [line[1].text for line in block] == ["good", "popularity", DOT_PRODUCT, ITEM_KNN, TREES]
    assert block[0][2].text == f"{by_head(evaluation, 'good', TREES, 'save').own.value:.4f}"
    assert block[2][3].text == "+0.0% [+0.0, +0.0]"
    assert not block[2][3].strong
    assert shown.blocks[1][2][3].strong
    assert terminal_tables(evaluation)[0].title == "Against baselines"
    html = report_html(evaluation)
    assert html.index("Against baselines") < html.index("<h2>Heads")
    again = json.loads(json.dumps(evaluation.as_json(), allow_nan=False))
    assert again["comparisons"][1]["by_head"]["difference"]["value"] == 0.0


def test_what_could_not_be_compared_and_what_is_behind_is_said(evaluation: Evaluation) -> None:
    lines = baseline_lines(evaluation)
    assert lines[0] == f"{RANKING_TREES} is not compared: LightGBM is not installed: pip install 'pinrank[baselines]'"
    assert [line.split(":")[:2] for line in lines[1:]] == [
        ["bad is behind a baseline", " save"],
        ["bad is behind a baseline", " hide"],
    ]
    assert "pinrank[baselines]" in report_html(evaluation)


def test_a_lineage_keeps_the_baselines_numbers(evaluation: Evaluation) -> None:
    metrics = evaluation.flat("bad")
    assert metrics["hit_at_3_by_head_save (dot product)"] == 2.0
    assert metrics["hit_at_3_by_head_save"] < 2.0
    assert "hit_at_3_by_head_like (item kNN)" not in metrics


def test_what_the_trees_learned_from_is_said_in_note_json_and_lineage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = scored_test(baselines=AGAINST, trees=TreeTraining(4_983, 155_000, 26_320))
    evaluation = measured(test, tmp_path, monkeypatch, against=BaselinePlan())
    said = "learned from a sample of 4,983 of the about 26,320 requests (155,000 rows)"
    assert said in str(terminal_tables(evaluation)[0].caption)
    assert said in report_html(evaluation)
    as_json = json.loads(json.dumps(evaluation.as_json(), allow_nan=False))
    assert as_json["trees"] == {"requests": 4_983, "rows": 155_000, "requests_of_network": 26_320}
    assert evaluation.flat("bad")["training_requests (LightGBM)"] == 4_983


@pytest.mark.parametrize(("network", "fewer"), [(5_000, False), (5_400, False), (6_000, True)])
def test_a_difference_that_sampling_explains_is_not_called_a_sample(network: int, fewer: bool) -> None:
    trees = TreeTraining(5_000, 150_000, network)
    assert trees.fewer is fewer
    assert ("sample" in str(trees)) is fewer


def test_the_trees_learn_from_no_more_than_the_network_and_their_own_maximum() -> None:
    for own, most, wanted in ((None, 5_000, 5_000), (300, 5_000, 300), (8_000, 5_000, 5_000)):
        plan = BaselinePlan(Sampling(negatives=8, requests_max=own), most)
        assert plan.trees("train") == Sampling(negatives=8, requests_max=wanted)
        assert plan.requests_of_network(26_320) == (own or 26_320)


@pytest.mark.parametrize("name", ["popularity", DOT_PRODUCT, TREES])
def test_a_bundle_may_not_be_called_like_a_baseline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="is the name of a baseline; rename the bundle"):
        measured(scored_test(by_bundle={name: GOOD}), tmp_path, monkeypatch)


def test_a_lineage_names_all_rows_but_those_that_were_usual_before_it_did() -> None:
    assert training_rows(UNSAID, 0) is None
    rows = training_rows(Sampling(negatives=8, requests_max=100), 0)
    assert rows is not None
    assert (rows.negatives, rows.requests_max, rows.newest_requests_max) == (8, 100, 0)
    rows = training_rows(UNSAID, 2_000)
    assert rows is not None
    assert rows.newest_requests_max == 2_000
