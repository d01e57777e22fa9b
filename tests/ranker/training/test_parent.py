"""Training on from a published version, on what is newer, behind gates."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_store.bundle.files import EMBEDDINGS, PARAMETERS, STATISTICS, Bundle
from model_store.bundle.statistics import read_statistics
from ranker.data.actions import action_log
from ranker.data.atomic.recbole import AtomicDataset, read_atomic
from ranker.errors import GateError, SettingError
from ranker.evaluation.bootstrap import Estimate
from ranker.evaluation.gates import Gates, losses, miscalibrated, refusal
from ranker.evaluation.metrics import Decile
from ranker.evaluation.results import HeadScore, Hit
from ranker.network.model import RankerNetwork
from ranker.recipe import make_bundle
from ranker.training.parent import Parent, decode_parameters, encode_parameters, split_after
from tests.ranker.interactions import write_atomic
from tests.ranker.test_recipe import RECIPE, SPLIT, Notes

OPEN = Gates(auc_loss_max=1.0, hit_loss_percent_max=1_000.0, ece_max=1.0, decile_factor_max=1e6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_atomic(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> AtomicDataset:
    """The first six tenths of the events, as yesterday's log."""
    folder = tmp_path_factory.mktemp("older")
    header, *rows = (whole / "tiny-taste.inter").read_text().splitlines()
    (folder / "tiny-taste.inter").write_text("\n".join([header, *rows[: len(rows) * 6 // 10]]) + "\n")
    (folder / "tiny-taste.item").write_text((whole / "tiny-taste.item").read_text())
    return read_atomic(folder)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, older: AtomicDataset) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("first") / "bundle", older, RECIPE, Notes())


def test_a_bundle_carries_what_is_needed_to_train_on(first: Bundle, older: AtomicDataset) -> None:
    parent = Parent.of(first)
    log = action_log(older)
    assert log.time_ms[0] < parent.learned_until_ms < log.time_ms[-1]
    statistics = read_statistics(first)
    assert statistics is not None
    assert set(statistics.heads) == {head.name for head in first.manifest.heads}
    assert "sequence.length" in statistics.inputs
    assert {STATISTICS, PARAMETERS} <= set(first.manifest.files)


def test_a_successor_learns_only_what_is_newer_and_stays_in_its_parents_space(
    tmp_path: Path, first: Bundle, whole: Path
) -> None:
    dataset = read_atomic(whole)
    parent, log = Parent.of(first), action_log(dataset)
    split = split_after(log, parent.learned_until_ms, SPLIT)
    assert log.before(parent.learned_until_ms) == pytest.approx(split.producer_until * len(log.time_ms), abs=1)
    second = make_bundle(tmp_path / "second", dataset, replace(RECIPE, version=4), Notes(), parent=parent, gates=OPEN)
    assert second.manifest.lineage.parent == "toy@3"
    assert (second.manifest.lineage.learned_until_ms or 0) > parent.learned_until_ms
    assert second.files[EMBEDDINGS] == first.files[EMBEDDINGS]
    assert [g.fingerprint for g in second.manifest.groups] == [g.fingerprint for g in first.manifest.groups]
    assert first.manifest.embedding_field("pin_core", "embedding").space.content
    before, after = (decode_parameters(b.files[PARAMETERS])[1] for b in (first, second))
    assert before.keys() == after.keys()
    moved = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 0 < moved < 1  # trained on, not anew
    for name in ("user_mean", "pin_deviation"):
        assert torch.equal(before[name], after[name])


def test_a_gate_that_does_not_hold_leaves_nothing(tmp_path: Path, first: Bundle, whole: Path) -> None:
    with pytest.raises(GateError, match="because the new model is worse than toy@3 on the newest requests: save: AUC"):
        make_bundle(
            tmp_path / "second", read_atomic(whole), replace(RECIPE, version=4), Notes(),
            parent=Parent.of(first), gates=replace(OPEN, auc_loss_max=-1.0),
        )  # fmt: skip
    assert not (tmp_path / "second").exists()


def test_without_enough_that_is_new_nothing_is_trained(first: Bundle, older: AtomicDataset) -> None:
    log = action_log(older)
    with pytest.raises(SettingError, match="only 5 events are newer than those the parent learned from; at least 200"):
        split_after(log, int(log.time_ms[-5]), SPLIT)


def test_versions_that_bring_no_parameters_say_so(first: Bundle) -> None:
    older = replace(first, files={name: content for name, content in first.files.items() if name != PARAMETERS})
    with pytest.raises(SettingError, match="it carries no parameters.npz; train a first version without --parent"):
        Parent.of(older)


def test_sizes_that_a_network_does_not_use_are_not_named_so_that_older_code_reads_it(first: Bundle) -> None:
    plain, _ = decode_parameters(first.files[PARAMETERS])
    for crossed_dim in (0, 8):
        content = encode_parameters(RankerNetwork(replace(plain, crossed_dim=crossed_dim)))
        named = json.loads(str(np.load(io.BytesIO(content))["config"]))
        assert ("crossed_dim" in named) == (crossed_dim > 0)
        assert decode_parameters(content)[0].crossed_dim == crossed_dim


def test_versions_of_older_code_say_so(first: Bundle) -> None:
    config, parameters = decode_parameters(first.files[PARAMETERS])
    network = RankerNetwork(config)
    network.load_state_dict(parameters)
    network.row_number = torch.nn.Linear(3, config.pieces_dim)
    older = replace(first, files={**first.files, PARAMETERS: encode_parameters(network)})
    with pytest.raises(SettingError, match="older code made it, with other layers for the same sizes; train a first"):
        Parent.of(older)


def score(scorer: str, auc: float, hit: float, difference: tuple[float, float, float] | None) -> HeadScore:
    shown = Hit(Estimate(hit, None, None), Estimate(*difference) if difference else None, None)
    return HeadScore(scorer, "save", shown, None, auc, 0.01, ())


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (score("this", 0.8, 0.5, (0.0, -0.01, 0.01)), []),
        (score("this", 0.796, 0.5, (0.0, -0.01, 0.01)), []),
        (
            score("this", 0.794, 0.5, (0.0, -0.01, 0.01)),
            ["save: AUC 0.7940 is more than 0.005 below the parent's 0.8000"],
        ),
        (score("this", 0.8, 0.45, (-0.05, -0.06, -0.005)), []),
        (
            score("this", 0.8, 0.45, (-0.05, -0.06, -0.02)),
            ["save: HIT@3 0.4500 is more than 2% below the parent's 0.5000"],
        ),
    ],
)
def test_gates_compare_head_by_head(own: HeadScore, expected: list[str]) -> None:
    class Found:
        scores = (score("parent", 0.8, 0.5, None), own)

    found = losses(Found(), "this", "parent", Gates())  # type: ignore[arg-type]
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("worst", "limit", "told"),
    [
        (
            Decile(74.0, 21, 500),
            3.0,
            ["save: of 500 rows 74 were predicted to get the action and 21 did, which is beyond"],
        ),
        (Decile(74.0, 21, 500), 4.0, []),
        (Decile(60.0, 200, 500), 3.0, ["save: of 500 rows 60 were predicted to get the action and 200 did"]),
        (Decile(60.0, 0, 500), 1e9, ["save: of 500 rows 60 were predicted to get the action and 0 did"]),
        (Decile(50.0, 0, 500), 2.0, []),  # too few to say anything
    ],
)
def test_a_decile_beyond_the_limit_is_refused_whatever_the_parent_does(
    worst: Decile, limit: float, told: list[str]
) -> None:
    class Found:
        scores = (
            replace(score("this", 0.8, 0.5, None), deciles=(Decile(100.0, 99, 500), worst)),
            replace(score("other", 0.8, 0.5, None), deciles=(Decile(1000.0, 1, 500),)),
        )

    found: Any = Found()
    wrong = miscalibrated(found, "this", replace(OPEN, decile_factor_max=limit))
    assert [text.startswith(start) for text, start in zip(wrong, told, strict=True)] == [True] * len(told)
    if told:
        assert refusal("toy@3", [], wrong).startswith("no bundle was written, because its probabilities are wrong")


def test_a_calibration_error_is_refused_whatever_the_parent_does() -> None:
    class Found:
        scores = (replace(score("this", 0.8, 0.5, None), ece=0.03),)

    found: Any = Found()
    assert miscalibrated(found, "this", Gates()) == ["save: calibration error 0.0300 is above the limit of 0.02"]
    assert miscalibrated(found, "this", Gates(ece_max=0.03)) == []


def test_both_reasons_are_told() -> None:
    both = refusal("toy@3", ["a", "b"], ["c"])
    assert "the new model is worse than toy@3 on the newest requests: a; b. Also, its probabilities are wrong" in both
    assert both.endswith(": c")
    assert refusal("toy@3", [], []) == ""


def test_a_log_of_new_events_alone_lends_its_oldest_tenth_as_the_past(older: AtomicDataset) -> None:
    log = action_log(older)
    split = split_after(log, int(log.time_ms[0]), SPLIT)
    assert split.producer_until == pytest.approx(0.1)
    assert split.train_until == pytest.approx(0.1 + 0.7 * 0.9)
    some = split_after(log, int(log.time_ms[10]), SPLIT)
    assert some.producer_until == pytest.approx(log.before(int(log.time_ms[10])) / len(log.time_ms))


def test_damaged_parameters_are_refused() -> None:
    with pytest.raises(SettingError, match="does not hold the parameters of a ranker"):
        decode_parameters(b"nothing")
