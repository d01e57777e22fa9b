from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ranker.data.embeddings import PinEmbeddings
from ranker.embedding.users.model import UserModel, train_users
from ranker.embedding.users.network import tensors
from ranker.embedding.users.sequences import PinRows, Sequences, windows
from ranker.embedding.users.user_vectors import daily_vectors, user_vectors_at, vectors_of_pins
from ranker.errors import DatasetError
from tests.ranker.embedding.users.users import DAY_MS, SMALL, changed_after, log_of, pin_vectors, random_log

LOG = random_log()
GIVEN = pin_vectors(LOG)
MIDDLE_MS, END_MS = int(LOG.time_ms[350]), int(LOG.time_ms[-1]) + 1


@pytest.fixture(scope="module")
def model() -> UserModel:
    return train_users(LOG, GIVEN, MIDDLE_MS, SMALL, "toy")


def test_vectors_are_the_last_outputs_of_the_users_last_actions(model):
    users = np.arange(len(LOG.user_ids))
    found = user_vectors_at(model, LOG, GIVEN, users, np.full(len(users), END_MS))
    pins = PinRows.of(LOG.pin_ids, model.pin_ids, GIVEN)
    sequences = Sequences.of_log(LOG, pins.readable, END_MS, timed=True)
    lengths = np.diff(sequences.splits)
    assert lengths.max() > SMALL.length_max
    for user in users:
        stop = sequences.splits[user + 1]
        first = max(sequences.splits[user], stop - SMALL.length_max)
        if first == stop:
            assert not found[user].any()
            continue
        read = windows(sequences, pins, np.array([first]), np.array([stop]), stop - first)
        expected = model.network(*tensors(read))[0, -1].detach().numpy()
        assert found[user] == pytest.approx(expected, abs=1e-3)
        assert np.linalg.norm(found[user].astype(np.float32)) == pytest.approx(1, abs=1e-3)


def test_events_at_or_after_the_time_of_a_row_change_nothing(model):
    rng = np.random.default_rng(0)
    users = rng.integers(0, len(LOG.user_ids), 200)
    at_ms = LOG.time_ms[rng.integers(0, len(LOG.time_ms), 200)]
    found = user_vectors_at(model, LOG, GIVEN, users, at_ms)
    cut_ms = int(np.median(at_ms))
    other = user_vectors_at(model, changed_after(LOG, cut_ms), GIVEN, users, at_ms)
    early = at_ms <= cut_ms
    assert np.array_equal(found[early], other[early])
    assert not np.array_equal(found[~early], other[~early])


def test_a_row_is_the_same_to_the_last_bit_whichever_others_are_asked_for(model):
    rng = np.random.default_rng(1)
    users = rng.integers(0, len(LOG.user_ids), 300)
    at_ms = rng.integers(LOG.time_ms[0], END_MS, 300)
    found = user_vectors_at(model, LOG, GIVEN, users, at_ms)
    for count in (1, 2, 31, 33, 150):
        some = rng.permutation(300)[:count]
        assert np.array_equal(user_vectors_at(model, LOG, GIVEN, users[some], at_ms[some]), found[some])


def test_users_without_a_readable_event_have_zeros(model):
    log = log_of(np.array([0, 1, 1]), np.array([5_000, 5_000, 7]), LOG.time_ms[:3] + np.arange(3))
    found = user_vectors_at(model, log, GIVEN, np.array([0, 1, 1]), np.array([END_MS, int(log.time_ms[2]), END_MS]))
    assert found.any(axis=1).tolist() == [False, False, True]


def test_only_users_with_new_actions_are_computed_anew_and_all_are_as_if_all_were(model):
    start = daily_vectors(model, LOG, GIVEN, MIDDLE_MS, "first")
    later_ms = MIDDLE_MS + DAY_MS // 2
    full = daily_vectors(model, LOG, GIVEN, later_ms, "full")
    again = daily_vectors(model, LOG, GIVEN, later_ms, "again", start)
    assert np.array_equal(again.user_ids, full.user_ids)
    assert again.vectors.tobytes() == full.vectors.tobytes()
    assert (again.origin.until_ms, again.origin.entity, again.origin.space) == (later_ms, "user", model.space)
    active = np.unique(LOG.user[LOG.before(MIDDLE_MS) : LOG.before(later_ms)])
    assert 0 < len(active) < len(full.user_ids)
    # Who has no new action keeps the vector, whatever it is.
    foreign = replace(start, vectors=np.zeros_like(start.vectors))
    kept = daily_vectors(model, LOG, GIVEN, later_ms, "kept", foreign)
    new = np.isin(kept.user_ids, LOG.user_ids[active])
    assert np.array_equal(kept.vectors[new], full.vectors[np.isin(full.user_ids, LOG.user_ids[active])])
    assert not kept.vectors[~new].any()


def test_previous_vectors_of_another_network_or_a_later_time_are_refused(model):
    start = daily_vectors(model, LOG, GIVEN, MIDDLE_MS, "first")
    with pytest.raises(DatasetError, match="are not known to be older"):
        daily_vectors(model, LOG, GIVEN, MIDDLE_MS - 1, "x", start)
    other = start.origin.space.model_copy(update={"content": "0" * 16})
    with pytest.raises(DatasetError, match="cannot be mixed"):
        daily_vectors(
            model,
            LOG,
            GIVEN,
            END_MS,
            "x",
            replace(start, origin=start.origin.model_copy(update={"space": other})),
        )


def test_vectors_of_pins_of_another_space_and_other_actions_are_refused(model):
    users, at_ms = np.array([0]), np.array([END_MS])
    with pytest.raises(DatasetError, match="reads pins' vectors of given@1"):
        user_vectors_at(model, LOG, pin_vectors(LOG, seed=2), users, at_ms)
    with pytest.raises(DatasetError, match="got none"):
        user_vectors_at(model, LOG, None, users, at_ms)
    fewer = LOG.schema.model_copy(update={"actions": LOG.schema.actions[1:]})
    with pytest.raises(DatasetError, match=r"has the actions like, hide, closeup, .* trained on save"):
        user_vectors_at(model, replace(LOG, schema=fewer), GIVEN, users, at_ms)


def test_pins_have_vectors_in_the_space_of_users(model):
    new = np.array([5_000, 5_001], np.uint64)
    given = PinEmbeddings(np.append(GIVEN.pin_ids, new[1]), np.vstack([GIVEN.vectors, GIVEN.vectors[:1]]), GIVEN.space)
    found = vectors_of_pins(model, np.append(LOG.pin_ids, new), given)
    assert found.space == model.space
    # A pin of which nothing is known has none; a new one with a given vector has one, and so has one of the table.
    assert found.pin_ids.tolist() == [*LOG.pin_ids.tolist(), 5_001]
    assert np.linalg.norm(found.vectors.astype(np.float32), axis=1) == pytest.approx(1, abs=1e-3)


def test_a_network_without_a_table_reads_given_vectors_only():
    model = train_users(LOG, GIVEN, MIDDLE_MS, SMALL.model_copy(update={"table": False}), "toy")
    assert len(model.pin_ids) == 0
    assert vectors_of_pins(model, LOG.pin_ids, GIVEN).pin_ids.tolist() == GIVEN.pin_ids.tolist()
