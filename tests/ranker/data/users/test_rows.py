"""Rows of users' interests: what they hold, and as of when."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from feature_client.codec import RowState, decode_rows
from feature_client.groups import FeatureGroup, Scalar
from feature_client.stores.memory_store import MemoryStore
from model_store.bundle.tensor_sources import EmbeddingSet, Scalars, SetSimilarities
from ranker.data.actions import RATINGS, ActionLog, action_log
from ranker.data.atomic.recbole import read_atomic
from ranker.data.embeddings import PinEmbeddings, space_of, svd_embeddings
from ranker.data.features import Groups, fill_store, pin_rows
from ranker.data.requests import Slice
from ranker.data.users.interests import InterestSettings, interests_of_user
from ranker.data.users.rows import INTEREST_GROUP, InterestRows, interest_group, rows_by_group
from ranker.errors import DatasetError
from ranker.export.manifest import draft_manifest, in_space
from ranker.training.examples import FeatureSnapshot
from tests.ranker.interactions import write_atomic

COUNT = 4
SPACE = space_of("toy")
MAKER = InterestRows(interest_group(SPACE, COUNT))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ActionLog:
    return action_log(read_atomic(write_atomic(tmp_path_factory.mktemp("data"))))


@pytest.fixture(scope="module")
def before_ms(log: ActionLog) -> int:
    """The time of an event by which a user likes a pin for the first time, and earlier liked another one."""
    liked = log.schema.affinities[log.action] >= 0.5
    return int(log.time_ms[1_000 + np.flatnonzero(liked[1_000:])[0]])


@pytest.fixture(scope="module")
def vectors(log: ActionLog, before_ms: int) -> np.ndarray:
    """As `pin_core` stores them at that time."""
    fitted = svd_embeddings(log, before_ms, 0, "toy").of(log.pin_ids)
    rows: np.ndarray = pin_rows(log, Groups.of(SPACE, RATINGS).pin, fitted, before_ms).rows["embedding"]
    return rows


def every_row(log: ActionLog, vectors: np.ndarray, before_ms: int) -> np.ndarray:
    return rows_by_group([MAKER], log, vectors, before_ms)[INTEREST_GROUP]


def test_a_row_holds_the_vectors_of_the_medoids_and_their_importances(
    log: ActionLog, vectors: np.ndarray, before_ms: int
) -> None:
    rows, held = every_row(log, vectors, before_ms), []
    for user, row in enumerate(rows):
        found = interests_of_user(
            log, PinEmbeddings(log.pin_ids, vectors, SPACE), before_ms, InterestSettings(clusters_max=COUNT), user
        )
        medoids = [] if found is None else found.pins[found.interests.medoids].tolist()
        importances = [] if found is None else found.interests.importances.tolist()
        held.append(len(medoids))
        for place in range(COUNT):
            known = place < len(medoids)
            expected = vectors[medoids[place]] if known else np.zeros(SPACE.dim, np.float16)
            np.testing.assert_array_equal(row[f"interest_{place + 1}"], expected)
            assert row[f"importance_{place + 1}"] == pytest.approx(importances[place] if known else 0)
        # A medoid is a pin that the user really acted on before that time.
        own = log.by_user[log.user_splits[user] : log.user_splits[user + 1]]
        assert set(medoids) <= set(log.pin[own[log.time_ms[own] < before_ms]].tolist())
    assert {0, COUNT} < set(held)


def test_an_event_at_the_time_changes_nothing_and_one_just_before_it_does(
    log: ActionLog, vectors: np.ndarray, before_ms: int
) -> None:
    rows = every_row(log, vectors, before_ms)
    later = log.time_ms >= before_ms
    rng = np.random.default_rng(1)
    other_future = replace(
        log,
        pin=np.where(later, rng.integers(len(log.pin_ids), size=len(log.pin)), log.pin),
        action=np.where(later, 0, log.action),
    )
    assert not np.array_equal(other_future.pin, log.pin)
    np.testing.assert_array_equal(every_row(other_future, vectors, before_ms), rows)
    acting = np.unique(log.user[log.time_ms == before_ms])
    changed = np.flatnonzero(every_row(log, vectors, before_ms + 1) != rows)
    # The ages of all pins grow, too, but that moves no importance of a user by as much as the eighth digit.
    moved = [u for u in changed if _differ(every_row(log, vectors, before_ms + 1)[u], rows[u])]
    assert moved == acting.tolist()


def _differ(one: np.void, other: np.void) -> bool:
    return any(not np.allclose(one[name], other[name], rtol=1e-6) for name in one.dtype.names or ())


def test_rows_of_users_that_are_not_wanted_are_not_made(log: ActionLog, vectors: np.ndarray, before_ms: int) -> None:
    everyone = every_row(log, vectors, before_ms)
    wanted = np.flatnonzero(everyone["importance_1"] > 0)[::2]
    some = rows_by_group([MAKER], log, vectors, before_ms, wanted)[INTEREST_GROUP]
    np.testing.assert_array_equal(some[wanted], everyone[wanted])
    others = np.setdiff1d(np.arange(len(everyone)), wanted)
    assert (some[others] == MAKER.group.default_row).all()
    assert (everyone[others] != MAKER.group.default_row).any()
    assert rows_by_group([], log, vectors, before_ms) == {}


class CountRows:
    """Another maker of rows: how often the user acted."""

    group = FeatureGroup(name="user_counts", version=1, entity="user", fields=(Scalar(name="actions"),))
    inputs = ()

    def rows(self, log: ActionLog, vectors: np.ndarray, users: np.ndarray, before_ms: int) -> np.ndarray:
        assert len(vectors) == len(log.pin_ids)
        rows = np.zeros(len(users), self.group.dtype)
        rows["actions"] = np.bincount(log.user[log.time_ms < before_ms], minlength=len(log.user_ids))[users]
        return rows


async def test_whatever_makes_rows_serves_training_and_stores_alike(log: ActionLog, before_ms: int) -> None:
    groups = replace(Groups.of(SPACE, RATINGS), further=(MAKER, CountRows()))
    embeddings, store = svd_embeddings(log, before_ms, 0, "toy"), MemoryStore()
    written = await fill_store(store, log, replace(embeddings, space=SPACE), groups, before_ms=before_ms)
    span = Slice(0, before_ms, before_ms + 1_000)
    snapshot = FeatureSnapshot.at(span, log, groups, embeddings.of(log.pin_ids), [0])
    acted = np.flatnonzero(snapshot.users["user_core"].states == RowState.PRESENT)
    assert 0 < len(acted) < len(log.user_ids)
    for group in groups.of_users:
        known = snapshot.users[group.name]
        stored = decode_rows(group, await store.multi_get(group.keys(log.user_ids)))
        np.testing.assert_array_equal(stored.states, known.states)
        np.testing.assert_array_equal(stored.rows[acted], known.rows[acted])
        assert written["users" if group.name == "user_core" else group.name] == len(acted)
    assert (snapshot.users["user_counts"].rows["actions"][acted] > 0).all()


def test_a_manifest_with_interests_declares_the_group_and_what_networks_read_of_it() -> None:
    manifest = draft_manifest("toy", SPACE, RATINGS, RATINGS.heads, sequence_length=9, interests=COUNT)
    assert [group.name for group in manifest.groups] == ["user_core", "pin_core", INTEREST_GROUP]
    own = {tensor.name: tensor.source for tensor in manifest.inputs if "interest" in tensor.name}
    vectors, importances = (
        tuple(f"{what}_{number}" for number in range(1, COUNT + 1)) for what in ("interest", "importance")
    )
    assert own == {
        "interests": EmbeddingSet(group=INTEREST_GROUP, fields=vectors),
        "interest_importances": Scalars(group=INTEREST_GROUP, fields=importances),
        "interest_similarities": SetSimilarities(set="interests", pin="pin_embedding"),
    }
    specs = {spec.name: (spec.side, spec.shape) for spec in manifest.specs if spec.name in own}
    assert list(specs.values()) == [("request", (COUNT, 32)), ("request", (COUNT,)), ("candidate", (COUNT,))]
    assert Groups.served_by(manifest) == Groups.of(SPACE, RATINGS, interests=COUNT)


def test_a_group_of_that_name_with_other_fields_is_refused() -> None:
    manifest = draft_manifest("toy", SPACE, RATINGS, RATINGS.heads, sequence_length=0, interests=COUNT)
    for fields in (manifest.group(INTEREST_GROUP).fields[1:], manifest.group(INTEREST_GROUP).fields[COUNT:]):
        other = manifest.group(INTEREST_GROUP).model_copy(update={"fields": fields})
        changed = manifest.model_copy(update={"groups": (*manifest.groups[:2], other)})
        with pytest.raises(
            DatasetError, match=r"group user_interests@1 has the fields .*, which are not interests and"
        ):
            Groups.served_by(changed)


def test_other_numbers_of_interests_and_other_spaces_are_stored_beside_each_other() -> None:
    three, four = (
        draft_manifest("toy", SPACE, RATINGS, RATINGS.heads, sequence_length=0, interests=count) for count in (3, 4)
    )
    assert in_space(four, SPACE, [three]).group(INTEREST_GROUP).version == 2
    other = in_space(three, space_of("toy", "0123456789abcdef"), [three])
    assert other.group(INTEREST_GROUP).version == 2
    assert {field.space.content for field in other.group(INTEREST_GROUP).fields[:3]} == {"0123456789abcdef"}  # type: ignore[union-attr]
    assert in_space(three, SPACE, [three]).group(INTEREST_GROUP).version == 1


def test_the_manifest_of_a_model_without_interests_is_what_it_was_before_there_were_any() -> None:
    manifest = draft_manifest("toy", SPACE, RATINGS, RATINGS.heads, sequence_length=50, similarities=True, recency=True)
    digest = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()
    assert digest == "c87b3dd6c0a118234b5805098931e27111b875da96dcfa91399a18e266042a73"


def test_bundles_of_four_and_of_no_interests_share_what_both_read(tmp_path: Path) -> None:
    without, with_four = (
        draft_manifest("toy", SPACE, RATINGS, RATINGS.heads, sequence_length=0, interests=count) for count in (0, 4)
    )
    assert with_four.groups[:2] == without.groups
    assert with_four.inputs[: len(without.inputs)] == without.inputs
