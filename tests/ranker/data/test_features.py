from __future__ import annotations

import numpy as np
import pytest

from feature_client.bulk.write import ForeignValuesError
from feature_client.codec import RowState
from feature_client.fetch import fetch
from feature_client.groups import Embedding, EmbeddingSpace, FeatureGroup, FeatureNeeds, Scalar, SequenceGroup
from feature_client.stores.memory_store import MemoryStore
from model_store.bundle.manifest import Manifest
from ranker.data.actions import RATINGS, ActionLog, action_log
from ranker.data.atomic.recbole import AtomicDataset
from ranker.data.embeddings import DIM, PinEmbeddings, decode_embeddings, encode_embeddings, space_of, svd_embeddings
from ranker.data.features import (
    PIN_GROUP,
    PRIOR_ACTIONS,
    Groups,
    events_of,
    fill_store,
    made_up_parties,
    pin_rows,
    user_rows,
)
from ranker.data.folding import folded_in, folded_vectors
from ranker.data.schema import ActionRule, ActionSchema
from ranker.errors import DatasetError
from ranker.export.manifest import draft_manifest, in_space
from tests.ranker.data.test_actions import dataset_of

VOCABULARY = ("closeup", "hide", "like", "save")
GROUPS = Groups.of(space_of("toy"), RATINGS)

# (user, pin, rating, time): user 1 saves pin 10 and hides pin 11; user 2 likes pin 10 later, then opens pin 12.
LOG = action_log(dataset_of([(1, 10, 5, 100), (1, 11, 1, 200), (2, 10, 4, 300), (2, 12, 3, 400)]))


def axes(*pins: int) -> PinEmbeddings:
    """Give each pin its own axis."""
    vectors = np.zeros((len(pins), DIM), np.float16)
    vectors[np.arange(len(pins)), np.arange(len(pins))] = 1
    return PinEmbeddings(np.array(pins, np.uint64), vectors, space_of("toy"))


EMBEDDINGS = axes(10, 11)
VECTORS = EMBEDDINGS.of(LOG.pin_ids)


def smoothed(own: float, actions: int, overall: float) -> float:
    return (own + PRIOR_ACTIONS * overall) / (actions + PRIOR_ACTIONS)


def test_a_pin_row_counts_only_what_happened_strictly_before() -> None:
    rows = pin_rows(LOG, GROUPS.pin, VECTORS, 300)
    assert rows.states.tolist() == [RowState.PRESENT, RowState.PRESENT, RowState.MISSING]
    pin10, pin11, pin12 = rows.rows
    assert pin10["log_actions"] == pytest.approx(np.log(2))
    assert pin10["save_share"] == pytest.approx(smoothed(1, 1, 0.5))
    assert pin11["save_share"] == pytest.approx(smoothed(0, 1, 0.5))
    assert pin11["hide_share"] == pytest.approx(smoothed(1, 1, 0.5))
    assert pin12 == GROUPS.pin.default_row
    later = pin_rows(LOG, GROUPS.pin, VECTORS, 301).rows[0]
    assert later["log_actions"] == pytest.approx(np.log(3))
    assert later["like_share"] == pytest.approx(smoothed(2, 2, 2 / 3))


def test_the_least_popular_pins_are_the_tail() -> None:
    rows = pin_rows(LOG, GROUPS.pin, VECTORS, 1_000).rows
    assert rows["creator_tail"].tolist() == [0.0, 0.75, 0.75]


def test_a_user_row_folds_in_the_users_pins_by_affinity() -> None:
    rows = user_rows(LOG, GROUPS.user, VECTORS, 1_000)
    saved, liked = rows.rows
    assert rows.states.tolist() == [RowState.PRESENT, RowState.PRESENT]
    # A hide pulls nowhere, and pin 12 has no vector: both users stand where pin 10 does.
    np.testing.assert_allclose(saved["embedding"], VECTORS[0], atol=1e-3)
    np.testing.assert_allclose(liked["embedding"], VECTORS[0], atol=1e-3)
    assert saved["log_actions"] == pytest.approx(np.log(3))
    assert saved["hide_share"] == pytest.approx(smoothed(1, 2, 1 / 4))


def test_a_user_without_a_past_is_missing() -> None:
    rows = user_rows(LOG, GROUPS.user, VECTORS, 300)
    assert rows.states.tolist() == [RowState.PRESENT, RowState.MISSING]
    assert rows.rows[1] == GROUPS.user.default_row


def test_before_the_first_event_nothing_is_known() -> None:
    assert pin_rows(LOG, GROUPS.pin, VECTORS, 0).states.tolist() == [RowState.MISSING] * 3


def test_made_up_parties_are_fixed_and_about_as_common_as_documented() -> None:
    ids = np.arange(100_000, dtype=np.uint64)
    merchant, ad = made_up_parties(ids)
    assert merchant.mean() == pytest.approx(0.2, abs=0.01)
    assert ad.mean() == pytest.approx(0.1, abs=0.01)
    assert (merchant * ad).mean() == pytest.approx(0.02, abs=0.005)
    again, _ = made_up_parties(ids[::-1].copy())
    np.testing.assert_array_equal(again[::-1], merchant)


async def test_a_filled_store_answers_a_fetch_with_the_end_of_the_data() -> None:
    store, told = MemoryStore(), []
    written = await fill_store(store, LOG, EMBEDDINGS, GROUPS, lambda what, count: told.append((what, count)))
    assert written == {"pins": 3, "users": 2, "sequences": 2} == dict(told)
    needs = FeatureNeeds((GROUPS.user,), (GROUPS.pin,), GROUPS.sequence, 64)
    found = await fetch(store, needs, 2, np.array([12, 10, 99], np.uint64))
    assert found.missing().candidates == 1
    assert not found.missing().user
    assert [RATINGS.names[a] for a in found.events["action"]] == ["closeup", "like"]
    assert found.events["pin_id"].tolist() == [12, 10]
    assert found.candidate_rows("pin_core")[1]["log_actions"] == pytest.approx(np.log(3))


async def test_a_store_can_be_filled_as_of_any_time() -> None:
    store = MemoryStore()
    written = await fill_store(store, LOG, EMBEDDINGS, GROUPS, before_ms=300)
    assert written == {"pins": 2, "users": 1, "sequences": 1}
    needs = FeatureNeeds((GROUPS.user,), (GROUPS.pin,), GROUPS.sequence, 64)
    found = await fetch(store, needs, 1, np.array([10, 12], np.uint64))
    assert found.events["pin_id"].tolist() == [11, 10]
    assert found.pins["pin_core"].states[:2].tolist() == [RowState.PRESENT, RowState.MISSING]
    later = await fetch(store, needs, 2, np.array([10], np.uint64))
    assert (later.user["user_core"].states[0], later.sequence_state) == (RowState.MISSING, RowState.MISSING)


async def test_a_store_is_filled_in_the_layout_and_vocabulary_that_the_groups_say() -> None:
    """Bundles stay servable when the data's schema has moved on: fewer shares, other codes, perhaps no sequence."""
    fields = tuple(f for f in GROUPS.pin.fields if f.name in ("embedding", "log_actions", "hide_share", "ad"))
    pin = GROUPS.pin.model_copy(update={"version": 1, "fields": fields})
    sequence = SequenceGroup(name="actions", version=1, actions=VOCABULARY, surfaces=("home",), length_max=9)
    store = MemoryStore()
    await fill_store(store, LOG, EMBEDDINGS, Groups(pin, GROUPS.user, sequence))
    found = await fetch(store, FeatureNeeds((), (pin,), sequence, 64), 1, np.array([11], np.uint64))
    assert [VOCABULARY[a] for a in found.events["action"]] == ["hide", "save"]
    assert found.candidate_rows("pin_core")[0]["hide_share"] == pytest.approx(smoothed(1, 1, 1 / 4))
    without = await fill_store(MemoryStore(), LOG, EMBEDDINGS, Groups(pin, GROUPS.user, None))
    assert without == {"pins": 3, "users": 2}


def test_what_the_data_does_not_know_is_refused_by_name() -> None:
    foreign = GROUPS.pin.model_copy(update={"fields": (*GROUPS.pin.fields, Scalar(name="listen_share"))})
    with pytest.raises(
        DatasetError, match="the data has no action 'listen'; its actions are save, like, hide, closeup"
    ):
        pin_rows(LOG, foreign, VECTORS, 300)
    short = SequenceGroup(name="actions", version=1, actions=VOCABULARY[1:], surfaces=("home",), length_max=9)
    with pytest.raises(
        DatasetError, match="sequence group actions@1 has no action 'closeup'; its actions are hide, like, save"
    ):
        events_of(LOG, LOG.by_user, short)


def test_embeddings_survive_their_archive_and_the_bytes_repeat() -> None:
    content = encode_embeddings(EMBEDDINGS)
    assert content == encode_embeddings(axes(10, 11))
    read = decode_embeddings(content, EMBEDDINGS.space)
    np.testing.assert_array_equal(
        read.of(np.array([11, 7, 10], np.uint64)), EMBEDDINGS.vectors[[1, 0, 0]] * [[1], [0], [1]]
    )
    with pytest.raises(ValueError, match="not an archive of embeddings"):
        decode_embeddings(b"PK\x05\x06" + bytes(18), EMBEDDINGS.space)


def two_tastes() -> ActionLog:
    """Make even users save even pins, odd users odd ones."""
    rng = np.random.default_rng(0)
    picks = [(u, int(p)) for u in range(200) for p in rng.choice(np.arange(u % 2, 120, 2), 10, replace=False)]
    return action_log(dataset_of([(u, p, 5, time) for time, (u, p) in enumerate(picks)]))


def test_pins_of_one_taste_point_the_same_way() -> None:
    embeddings = svd_embeddings(two_tastes(), 10_000, seed=1, name="toy")
    vectors = embeddings.vectors.astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2)
    similar = vectors @ vectors.T
    same = embeddings.pin_ids[:, None] % 2 == embeddings.pin_ids % 2
    np.fill_diagonal(similar, np.nan)
    assert np.nanmean(similar[same]) > 0.03
    assert abs(np.nanmean(similar[~same])) < 0.003


def test_the_producer_reads_nothing_after_its_window() -> None:
    log = two_tastes()
    early = svd_embeddings(log, 120, seed=1, name="toy")
    changed = dataset_of([
        (int(log.user_ids[u]), int(log.pin_ids[p]), 5 if t < 120 else 1, int(t))
        for u, p, t in zip(log.user, log.pin, log.time_ms, strict=True)
    ])  # fmt: skip
    assert encode_embeddings(early) == encode_embeddings(svd_embeddings(action_log(changed), 120, seed=1, name="toy"))
    with pytest.raises(DatasetError, match=r"^the 0 interactions before"):
        svd_embeddings(log, 0, seed=1, name="toy")


def test_pins_that_the_producer_never_saw_get_the_vector_of_their_users() -> None:
    schema = ActionSchema(actions=(ActionRule(name="save", meaning="saved", affinity=1.0),))
    # User 1 acts on the known pins 10 and 11 and on the new pin 12; user 2 on 12 and the new pin 13; nobody on 14 yet.
    users, pins = np.array([1, 1, 1, 2, 2, 2], np.uint64), np.array([10, 11, 12, 12, 13, 14], np.uint64)
    dataset = AtomicDataset(
        name="toy", sha256="", schema=schema, users=users, pins=pins, labels=np.ones((6, 1), bool),
        time_ms=np.arange(6), titles={}, tokens={},
    )  # fmt: skip
    log = action_log(dataset)
    vectors = np.zeros((5, 2), np.float16)
    vectors[0], vectors[1] = (1, 0), (0, 1)
    found = folded_in(log, vectors, stop=5)
    half = np.float32(0.5**0.5)
    np.testing.assert_array_equal(found[:2], vectors[:2])
    np.testing.assert_allclose(found[2], [half, half], atol=1e-6)
    np.testing.assert_allclose(found[3], [half, half], atol=1e-6)  # through user 2, who knows new pins only
    np.testing.assert_array_equal(found[4], [0, 0])
    np.testing.assert_array_equal(folded_in(log, vectors, stop=2)[2:], 0)
    # As a file: pin 9 is of another log, pin 12 has had no vector, and pin 14 has none yet.
    space = EmbeddingSpace(name="toy", version=1, dim=2)
    given = PinEmbeddings(
        np.array([9, 10, 11, 12], np.uint64), np.array([[1, 0], [1, 0], [0, 1], [0, 0]], "<f2"), space
    )
    saved = folded_vectors(log, given, 5)
    assert (saved.pin_ids.tolist(), saved.space) == ([9, 10, 11, 12, 13], space)
    np.testing.assert_array_equal(saved.vectors[:3], given.vectors[:3])
    np.testing.assert_allclose(saved.vectors[3:], np.full((2, 2), half), atol=1e-3)


def test_vectors_that_a_space_would_cut_off_or_is_too_narrow_for_are_refused() -> None:
    for space, says in (
        (EmbeddingSpace(name="codes", version=1, dim=DIM, dtype="int8", scale=0.01), "is not a whole number, and int8"),
        (EmbeddingSpace(name="narrow", version=1, dim=2), "the field needs vectors of width 2"),
    ):
        fields = (Embedding(name="embedding", space=space), *GROUPS.pin.fields[1:])
        group = FeatureGroup(name="pin_core", version=2, entity="pin", fields=fields)
        with pytest.raises(DatasetError, match=f"group pin_core@2: field embedding: .*{says}"):
            pin_rows(LOG, group, VECTORS / 2, 1_000)


async def test_a_log_with_actions_in_the_future_is_refused_before_anything_is_written() -> None:
    seconds_taken_for_milliseconds_twice = 1_790_000_000_000_000
    log = action_log(dataset_of([(1, 10, 5, 100), (2, 12, 3, seconds_taken_for_milliseconds_twice)]))
    store = MemoryStore()
    with pytest.raises(DatasetError, match="1 interactions lie in the future, the newest on 58692-"):
        await fill_store(store, log, EMBEDDINGS, GROUPS)
    assert not store.values


def test_a_space_is_known_by_the_events_and_the_seed_that_made_it() -> None:
    log = two_tastes()
    made = svd_embeddings(log, 10_000, seed=1, name="toy").space
    assert made.ref.startswith("toy-svd@2+")
    assert svd_embeddings(two_tastes(), 10_000, seed=1, name="toy").space == made
    assert svd_embeddings(log, 10_000, seed=2, name="toy").space.content != made.content
    shorter = svd_embeddings(log, int(log.time_ms[len(log.time_ms) // 2]), seed=1, name="toy")
    assert shorter.space.content != made.content
    assert svd_embeddings(log, 10_000, seed=1, name="other").space.name == "other-svd"


async def test_features_of_another_training_are_not_replaced_unless_it_is_said() -> None:
    store = MemoryStore()
    await fill_store(store, LOG, EMBEDDINGS, GROUPS)
    other = Groups.of(space_of("toy", "0123456789abcdef"), RATINGS)
    with pytest.raises(ForeignValuesError, match=r"the store has pin_core@2 of another description"):
        await fill_store(store, LOG, EMBEDDINGS, other)
    (value,) = await store.multi_get([other.pin.key(10)])
    assert value is not None
    assert value.startswith(GROUPS.pin.fingerprint)
    await fill_store(store, LOG, EMBEDDINGS, GROUPS)  # its own it may replace
    await fill_store(store, LOG, EMBEDDINGS, other, replace=True)
    (value,) = await store.multi_get([other.pin.key(10)])
    assert value is not None
    assert value.startswith(other.pin.fingerprint)


def test_groups_of_another_description_get_a_version_of_their_own() -> None:
    draft = draft_manifest("toy", space_of("toy"), RATINGS, RATINGS.heads, sequence_length=100)
    contents = [digit * 16 for digit in "0123"]
    published: list[Manifest] = []
    for number, content in enumerate(contents):
        made = in_space(draft, space_of("toy", content), published)
        assert [group.version for group in made.groups] == [2 + number] * 2
        assert made.embedding_field(PIN_GROUP, "embedding").space.content == content
        assert made.sequence == draft.sequence
        published.append(made)
    for made, content in zip(published, contents, strict=True):
        again = in_space(draft, space_of("toy", content), published)
        assert [group.fingerprint for group in again.groups] == [group.fingerprint for group in made.groups]
