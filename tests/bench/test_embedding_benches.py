from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.embeddings import interests, pin_networks, pin_tasks, user_ages, user_lift, user_vectors, vectors_lift
from bench.embeddings.several import compared
from bench.engines.lift import Course
from bench.harness import BenchmarkError, run, whole
from ranker.data.actions import action_log
from ranker.data.atomic.recbole import read_atomic
from ranker.evaluation.scoring import BundleScores, ScoredTest
from tests.ranker.interactions import write_atomic

TOY = Course("toy", "toy", "save")


def test_rankers_on_both_kinds_of_vectors_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "toy", per_user=20)
    monkeypatch.setitem(vectors_lift.GOALS, "toy", vectors_lift.Goal("save", 1.0))
    raw, concluded = run(
        "vectors_lift",
        lambda: vectors_lift.measure(quick=True, courses=(TOY,), data=tmp_path),
        vectors_lift.conclude,
        tmp_path / "results",
    )
    scorers = raw["courses"]["toy"]["heads"]["save"]
    assert scorers.keys() == {"svd", "long svd", "network"}
    assert [list(of_kind["over"]) for of_kind in scorers.values()] == [[], ["svd"], ["svd", "long svd"]]
    assert [len(of_kind["hits"]) for of_kind in scorers.values()] == [2, 2, 2]
    assert [claim.target for claim in concluded.claims] == [1.0, 0.0]
    assert "| toy | save |" in (tmp_path / "results" / "vectors_lift.md").read_text()
    assert not (tmp_path / "vectors_lift").exists()


def test_a_kind_of_ranker_counts_as_the_mean_of_its_trainings() -> None:
    """Two users with a request of five pins each, of which the first was saved, and nothing hidden."""
    labels = np.tile([[1, 0], [0, 0], [0, 0], [0, 0], [0, 0]], (2, 1)).astype(np.float32)
    first, last = [0.9, 0.5, 0.4, 0.3, 0.2], [0.1, 0.5, 0.4, 0.3, 0.2]

    def scored(*scores: float) -> BundleScores:
        return BundleScores(("hide", "save"), np.stack([np.zeros(10), np.array(scores)], axis=1), None, "none")

    by_bundle = {"a": scored(*first, *last), "b": scored(*last, *last), "c": scored(*first, *first)}
    splits, users = np.array([0, 5, 10], np.int32), np.array([3, 4])
    test = ScoredTest(("save", "hide"), labels, labels, splits, users, users, by_bundle)
    found = compared(test, {"old": ["a", "b"], "new": ["a", "c"]}, 200, 7)
    assert found["save"]["old"] == {"hit": 0.25, "hits": [0.5, 0.0], "over": {}}
    assert found["save"]["new"]["hits"] == [0.5, 1.0]
    over = found["save"]["new"]["over"]["old"]
    assert over["percent"] == pytest.approx(200.0)
    # Of two users, a quarter of the resamples has only the one whom the old kind never serves: no lift is defined.
    assert over["low"] is None
    assert "hide" not in found


def test_a_ranker_with_vectors_of_users_is_compared_with_one_without(tmp_path: Path) -> None:
    write_atomic(tmp_path / "toy", per_user=20)
    raw = whole(user_lift.measure(quick=True, course=TOY, data=tmp_path))
    (heads,) = raw["heads"]["early"].values()
    assert {"without", "with"} < heads["save"].keys()
    assert {name: len(spent) for name, spent in raw["latency_ms"].items()} == {"without": 2, "with": 2}
    concluded = user_lift.conclude(raw)
    assert [claim.target for claim in concluded.claims] == [2.0, 0.0, 0.2]
    assert "P50 of an answer" in (concluded.table or "")


def test_several_tasks_are_compared_with_each_alone(tmp_path: Path) -> None:
    folder = write_atomic(tmp_path / "grocery", name="grocery")
    lines = ["item_id:token\tcomplements:token_seq\tsubstitutes:token_seq"]
    inter = folder / "grocery.inter"
    inter.write_text(inter.read_text().replace("\tp", "\t1").replace("u", "2").replace("2ser_id", "user_id"))
    lines += [f"1{pin}\t1{(pin + 1) % 90} 1{(pin + 2) % 90}\t1{(pin + 3) % 90}" for pin in range(90)]
    (folder / "grocery.item").write_text("\n".join(lines) + "\n")
    raw = whole(pin_tasks.measure(quick=True, data=tmp_path))
    assert raw["tasks"].keys() == {"co-save", "complement", "substitute"}
    for found in raw["tasks"].values():
        assert 0 <= found["alone"]["low"] <= found["alone"]["value"] <= found["alone"]["high"] <= 1
    (claim,) = pin_tasks.conclude(raw).claims
    assert claim.measured == sum(found["over"]["value"] >= 0 for found in raw["tasks"].values())


def test_networks_are_compared_on_held_out_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    known, held = [], []
    for user in range(60):
        pins = (rng.permutation(20) * 3 + user % 3).tolist()
        known.append(" ".join(map(str, [user, *pins[:8]])))
        held.append(" ".join(map(str, [user, *pins[8:11]])))
    (tmp_path / "train.txt").write_text("\n".join(known) + "\n")
    (tmp_path / "test.txt").write_text("\n".join(held) + "\n")
    monkeypatch.setenv("PINTEREST_SAVES_DATA", str(tmp_path))
    raw = whole(pin_networks.measure(quick=True))
    assert list(raw["found"]) == ["popularity", *pin_networks.NETWORKS]
    over = raw["found"]["transformer"]["over"]
    assert over.keys() == {"popularity", "khop", "pooled"}
    assert len(pin_networks.conclude(raw).claims) == 3
    monkeypatch.setenv("PINTEREST_SAVES_DATA", str(tmp_path / "none"))
    with pytest.raises(BenchmarkError, match="put the saves there, or name their folder in PINTEREST_SAVES_DATA"):
        whole(pin_networks.measure(quick=True))


def test_users_are_clustered_and_asked_for(tmp_path: Path) -> None:
    write_atomic(tmp_path / "toy")
    raw = whole(interests.measure(quick=True, data=tmp_path, name="toy"))
    assert raw["users_per_s"] > 0
    assert raw["recall"].keys() == {
        *("the mean", "1 clusters", "5 clusters", "20 clusters"),
        *("5 clusters, a list each", "20 clusters, a list each"),
    }
    first, second = interests.conclude(raw).claims
    assert (first.target, second.target) == (500.0, 0.0)


def test_losses_of_networks_of_users_are_compared_on_the_last_fifth_of_each_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "toy", per_user=20)
    lines = [" ".join(map(str, [user, *((user * 7 + step) % 40 for step in range(10))])) for user in range(30)]
    (tmp_path / "taobao.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("TAOBAO_SEQUENCES_DATA", str(tmp_path))
    courses = tuple(replace(user_vectors.COURSES[0], name=name) for name in ("toy", user_vectors.TAOBAO))
    raw = whole(user_vectors.measure(quick=True, courses=courses, data=tmp_path))
    for course in raw["courses"].values():
        assert {"next", "all", "dense", "20 clusters of them, the SVD", "popularity"} < course["asked"].keys()
    assert [claim.target for claim in user_vectors.conclude(raw).claims] == [10.0, 0.0, 10.0, 0.0]
    log = action_log(read_atomic(tmp_path / "toy"))
    known, held = user_vectors.divided(log)
    assert (len(known.user), len(held.user)) == (16 * 60, 4 * 60)
    for user in range(60):
        own = [one.time_ms[one.user == user] for one in (known, held)]
        assert own[0].max() < own[1].min()
    monkeypatch.setenv("TAOBAO_SEQUENCES_DATA", str(tmp_path / "none"))
    with pytest.raises(BenchmarkError, match="name its folder in TAOBAO_SEQUENCES_DATA"):
        whole(user_vectors.measure(quick=True, courses=courses[1:], data=tmp_path))


def test_vectors_of_several_ages_are_asked_for_what_a_user_likes_on_a_day(tmp_path: Path) -> None:
    write_atomic(tmp_path / "toy", per_user=20)
    log = action_log(read_atomic(tmp_path / "toy"))
    until_ms = int(log.time_ms[len(log.time_ms) // 2])
    days = user_ages.days_after(log, until_ms, 3_600_000)
    liked = log.schema.affinities[log.action] > 0
    user, begun_ms = int(days.users[0]), int(days.begun_ms[0])
    own = (log.user == user) & (log.time_ms >= begun_ms) & (log.time_ms < begun_ms + 3_600_000) & liked
    assert sorted(days.held.pins[days.held.contexts == 0].tolist()) == sorted(log.pin_ids[log.pin[own]].tolist())
    before = (log.user == user) & (log.time_ms < begun_ms)
    assert sorted(days.known.pins[days.known.contexts == 0].tolist()) == sorted(log.pin_ids[log.pin[before]].tolist())
    raw = whole(user_ages.measure(quick=True, data=tmp_path, name="toy"))
    assert list(raw["over"]) == ["0", "1", "2", "4", "7"]
    assert "| 7 | " in (user_ages.conclude(raw).table or "")
