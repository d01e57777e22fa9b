from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ranker.errors import SettingError
from ranker.evaluation.bootstrap import Estimate
from ranker.evaluation.caveats import caveats
from ranker.evaluation.results import Evaluation, HeadScore
from ranker.evaluation.scoring import BundleScores
from ranker.evaluation.tables import head_table, slice_table, terminal_tables
from tests.ranker.scored import CANDIDATES, measured, scored_test


@pytest.fixture
def evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    return measured(scored_test(), tmp_path, monkeypatch)


def score(evaluation: Evaluation, scorer: str, head: str) -> HeadScore:
    return next(s for s in evaluation.scores if (s.scorer, s.head) == (scorer, head))


def test_hit_at_3_by_utility_is_that_of_the_final_order(evaluation: Evaluation) -> None:
    test = scored_test()
    for name, scored in test.by_bundle.items():
        assert scored.utilities is not None
        hits = []
        for start in range(0, len(test.labels), CANDIDATES):
            best = np.argsort(-scored.utilities[start : start + CANDIDATES], kind="stable")[:3]
            hits.append(test.labels[start : start + CANDIDATES][best])
        by_hand = np.sum(hits, axis=1)
        for column, head in ((0, "save"), (1, "hide")):
            counted = test.labels[:, column].reshape(-1, CANDIDATES).any(axis=1)
            hit = score(evaluation, name, head).hit_at_3_by_utility
            assert hit is not None
            assert hit.mean.value == pytest.approx(by_hand[counted, column].mean())


def test_each_order_is_measured_by_its_own_scores(evaluation: Evaluation) -> None:
    save, hide = (score(evaluation, "good", head) for head in ("save", "hide"))
    assert save.hit_at_3_by_head is not None
    assert hide.hit_at_3_by_head is not None
    assert hide.hit_at_3_by_utility is not None
    # By its own probability the hidden pin comes first; by utility it comes last.
    assert (save.hit_at_3_by_head.mean.value, hide.hit_at_3_by_head.mean.value) == (2.0, 1.0)
    assert hide.hit_at_3_by_utility.mean.value is not None
    assert hide.hit_at_3_by_utility.mean.value < 0.5


def test_the_first_of_several_bundles_is_the_baseline(evaluation: Evaluation) -> None:
    assert evaluation.baseline == "good"
    good, bad = (score(evaluation, name, "save").hit_at_3_by_head for name in ("good", "bad"))
    assert good is not None
    assert bad is not None
    assert good.difference is None
    assert good.lift_percent is None
    assert bad.difference is not None
    assert bad.lift_percent is not None
    assert bad.mean.value is not None
    assert good.mean.value is not None
    assert bad.difference.value == pytest.approx(bad.mean.value - good.mean.value)
    assert bad.lift_percent.value == pytest.approx(100 * (bad.mean.value / good.mean.value - 1))
    assert bad.lift_percent.high is not None
    assert bad.lift_percent.high < 0
    final = score(evaluation, "bad", "save").hit_at_3_by_utility
    assert final is not None
    assert final.lift_percent is not None
    assert score(evaluation, "bad", "save").lift_percent == final.lift_percent.value
    assert score(evaluation, "good", "save").lift_percent is None


def test_a_model_differs_from_itself_by_exactly_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = scored_test().by_bundle["good"]
    test = scored_test(by_bundle={"one": good, "other": replace(good, probabilities=good.probabilities.copy())})
    evaluation = measured(test, tmp_path, monkeypatch)
    for head in ("save", "hide"):
        for hit in (
            score(evaluation, "other", head).hit_at_3_by_utility,
            score(evaluation, "other", head).hit_at_3_by_head,
        ):
            assert hit is not None
            assert hit.difference == Estimate(0.0, 0.0, 0.0)


def test_a_single_bundle_is_compared_with_popularity_where_both_have_an_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = scored_test(by_bundle={"good": scored_test().by_bundle["good"]})
    evaluation = measured(test, tmp_path, monkeypatch)
    assert evaluation.baseline == "popularity"
    save = score(evaluation, "good", "save")
    assert save.hit_at_3_by_head is not None
    assert save.hit_at_3_by_utility is not None
    assert save.hit_at_3_by_head.lift_percent is not None
    assert save.hit_at_3_by_utility.lift_percent is None
    assert score(evaluation, "popularity", "save").hit_at_3_by_utility is None


def test_slices_part_the_requests(evaluation: Evaluation) -> None:
    assert [(s.name, s.actions_min, s.actions_below, s.requests) for s in evaluation.slices] == [
        ("cold", 0, 10, 10),
        ("light", 10, 100, 20),
        ("heavy", 100, None, 10),
    ]
    assert sum(s.requests for s in evaluation.slices) == evaluation.requests
    for head in evaluation.heads:
        of_head = [s for s in evaluation.slice_scores if (s.head, s.scorer) == (head.head, "bad")]
        assert sum(s.requests for s in of_head) == head.requests
        hit = score(evaluation, "bad", head.head).hit_at_3_by_head
        assert hit is not None
        if hit.mean.value is not None:
            parts = [s.hit_at_3_by_head for s in of_head]
            summed = sum((h.mean.value or 0) * s.requests for h, s in zip(parts, of_head, strict=True) if h)
            assert summed == pytest.approx(hit.mean.value * head.requests)


def test_a_head_that_nobody_used_has_no_numbers_and_is_still_shown(evaluation: Evaluation) -> None:
    like = score(evaluation, "good", "like")
    assert like.hit_at_3_by_head is not None
    assert like.hit_at_3_by_head.mean == Estimate(None, None, None)
    assert like.auc is None
    assert like.ece is not None
    assert "hit_at_3_by_head_like" not in evaluation.flat("good")
    assert {"hit_at_3_by_utility_save", "hit_at_3_by_head_save", "auc_save", "ece_save"} <= set(evaluation.flat("good"))
    again = json.loads(json.dumps(evaluation.as_json(), allow_nan=False))
    assert [h["positives"] for h in again["heads"]] == [80, 10, 0]
    # By slice, saves take a line for each of three scorers; hides do so among the cold only.
    assert [t.row_count for t in terminal_tables(evaluation)] == [3 * 3, 9 + (3 + 1 + 1) + 3]


def test_a_head_that_a_bundle_lacks_is_shown_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = scored_test()
    narrow = test.by_bundle["bad"]
    narrow = BundleScores(("save",), narrow.probabilities[:, :1], narrow.utilities, None)
    evaluation = measured(replace(test, by_bundle={**test.by_bundle, "bad": narrow}), tmp_path, monkeypatch)
    assert evaluation.scorers[1].heads_missing == ("hide", "like")
    hide = score(evaluation, "bad", "hide")
    assert (hide.hit_at_3_by_head, hide.auc, hide.ece, hide.reliability) == (None, None, None, ())
    # What the final order does to pins that were hidden can be measured all the same.
    assert hide.hit_at_3_by_utility is not None
    line = next(line for line in head_table(evaluation).blocks[1] if line[1].text == "bad")
    assert [cell.text for cell in line[4:]] == ["-"] * 5
    assert any("bad does not predict hide, like" in sentence for sentence in caveats(evaluation))


def test_a_utility_that_cannot_be_evaluated_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = scored_test()
    mute = replace(test.by_bundle["bad"], utilities=None, utility_missing="it has no surface 'related'")
    evaluation = measured(replace(test, by_bundle={**test.by_bundle, "bad": mute}), tmp_path, monkeypatch)
    assert score(evaluation, "bad", "save").hit_at_3_by_utility is None
    assert score(evaluation, "bad", "save").hit_at_3_by_head is not None
    assert any("it has no surface 'related'" in sentence for sentence in caveats(evaluation))


def test_the_best_of_a_head_stands_out_and_for_hide_that_is_the_lowest_by_utility(evaluation: Evaluation) -> None:
    save, hide, _ = head_table(evaluation).blocks
    assert [line[1].text for line in save if line[2].strong] == ["good"]
    assert [line[1].text for line in hide if line[2].strong] == ["good"]
    assert hide[0][0].text == "hide (by utility: lower is better)"
    assert [len(line) for block in slice_table(evaluation).blocks for line in block] == [8] * 17


def test_small_heads_and_slices_are_named_with_their_counts(evaluation: Evaluation) -> None:
    said = " ".join(caveats(evaluation))
    assert "hide is small: 10 candidates received it, in 10 requests of 5 users" in said
    assert "The slice cold is small: 10 requests of 5 users" in said
    assert "10 of 40 requests (25.0%) come from users without any earlier action" in said


def test_pins_that_were_shown_and_nothing_more_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = scored_test()
    saves = ("save",)
    by_bundle = {n: BundleScores(saves, s.probabilities[:, :1], s.utilities, None) for n, s in test.by_bundle.items()}
    narrow = replace(
        test, heads=saves, labels=test.labels[:, :1], popularity=test.popularity[:, :1], by_bundle=by_bundle
    )
    evaluation = measured(narrow, tmp_path, monkeypatch)
    assert 0 < evaluation.events_without_action < evaluation.events == 60
    said = f"{evaluation.events_without_action} of the 60 logged pins of the period were shown and received none"
    assert said in caveats(evaluation)[0]
    assert (
        "The data does not contain the pins that a frontend showed"
        in caveats(replace(evaluation, events_without_action=0))[0]
    )


@pytest.mark.parametrize(
    ("baseline", "message"), [("best", "unknown baseline 'best'; choose one of good, bad, popularity")]
)
def test_an_unknown_baseline_is_refused(
    baseline: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingError, match=message):
        measured(scored_test(), tmp_path, monkeypatch, baseline=baseline)


def test_no_bundle_may_be_called_popularity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = scored_test(by_bundle={"popularity": scored_test().by_bundle["good"]})
    with pytest.raises(SettingError, match="rename the bundle"):
        measured(test, tmp_path, monkeypatch)
