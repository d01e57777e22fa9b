from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ranker.data.actions import ActionLog
from ranker.embedding.users import fit as fitting
from ranker.embedding.users.fit import (
    FitSettings,
    candidates_of,
    predictions_of,
    softmax_loss,
    targets_of,
)
from ranker.embedding.users.model import train_users
from ranker.embedding.users.sequences import Sequences
from ranker.embedding.users.user_vectors import user_vectors_at, vectors_of_pins
from ranker.errors import DatasetError, SettingError
from tests.ranker.embedding.users.users import DAY_MS, SMALL, changed_after, log_of, random_log


def sequences_of(log, timed: bool = True) -> Sequences:
    return Sequences.of_log(log, np.ones(len(log.pin_ids), bool), 1 << 60, timed=timed)


@given(
    seed=st.integers(0, 2**32 - 1),
    loss=st.sampled_from(["next", "all", "dense"]),
    timed=st.booleans(),
    horizon=st.integers(1, 9),
)
def test_an_action_predicts_liked_pins_of_its_user_that_come_later_within_the_horizon(seed, loss, timed, horizon):
    sequences = sequences_of(random_log(seed=seed, users=5, events=40, days=20.0), timed)
    settings = FitSettings(loss=loss, horizon_days=horizon, horizon_actions=horizon)
    found, user = targets_of(sequences, settings), sequences.users
    for event in range(len(user)):
        later = [e for e in range(event + 1, len(user)) if user[e] == user[event] and sequences.liked[e]]
        if loss == "next":
            later = later[:1]
        elif sequences.time_ms is None:
            later = [e for e in later if e <= event + horizon]
        else:
            later = [e for e in later if sequences.time_ms[e] <= sequences.time_ms[event] + horizon * DAY_MS]
        assert found.events[found.first[event] : found.stop[event]].tolist() == later


@pytest.mark.parametrize("loss", ["next", "all", "dense"])
def test_predictions_are_drawn_from_the_targets_of_their_action(loss):
    sequences = sequences_of(random_log(events=300))
    settings = FitSettings(loss=loss, positives=4, predictions=50)
    targets = targets_of(sequences, settings)
    first, stop = sequences.splits[:20], sequences.splits[1:21]
    made = predictions_of(sequences, targets, first, stop, settings, np.random.default_rng(0))
    assert made.pins.shape == (len(made.row), 1 if loss == "next" else 4)
    assert 10 <= len(made.row) <= 50
    for row, column, pins in zip(made.row, made.column, made.pins, strict=True):
        event = first[row] + column
        assert event < stop[row]
        able = targets.events[targets.first[event] : targets.stop[event]]
        assert set(pins.tolist()) <= set(sequences.pins[able].tolist())
    if loss == "all":
        assert len(np.unique(made.row)) == len(made.row)


def test_windows_of_an_epoch_cover_each_action_once_and_are_of_one_user():
    sequences = sequences_of(random_log())
    assert np.diff(sequences.splits).max() > 2 * 7
    for _ in range(5):
        batches = fitting._batches(sequences, 7, 6, np.random.default_rng(_))
        first, stop = (np.concatenate([batch[side] for batch in batches]) for side in (0, 1))
        assert (stop - first).max() == 7
        covered = np.sort(np.concatenate([np.arange(a, b) for a, b in zip(first, stop, strict=True)]))
        assert covered.tolist() == list(range(len(sequences.pins)))
        assert np.array_equal(sequences.users[first], sequences.users[stop - 1])


def test_the_sampled_softmax_estimates_the_normaliser_of_all_pins():
    rng = np.random.default_rng(3)
    count, drawn = 400, 1_500
    torch.manual_seed(0)
    users = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
    pins = torch.nn.functional.normalize(torch.randn(count, 8), dim=1)
    temperature, shares = torch.tensor(3.0), rng.dirichlet(np.full(count, 0.3))
    predicted = rng.choice(count, (20, 1), p=shares)
    exact = softmax_loss(users, pins, temperature, torch.from_numpy(predicted), torch.zeros(count))
    settings = FitSettings(candidates=60)
    losses, uncorrected = [], []
    for _ in range(drawn):
        # What the rest of the batch predicts: draws by the shares, beside the 20 of interest.
        batch = np.concatenate([predicted, rng.choice(count, (40, 1), p=shares)])
        among = candidates_of(batch, shares, settings, rng)
        assert len(among.pins) < count
        places = torch.from_numpy(np.searchsorted(among.pins, predicted))
        chosen = pins[torch.from_numpy(among.pins)]
        losses.append(softmax_loss(users, chosen, temperature, places, torch.from_numpy(among.log_share)).item())
        uncorrected.append(softmax_loss(users, chosen, temperature, places, torch.zeros(len(among.pins))).item())
    assert np.mean(losses) == pytest.approx(exact.item(), abs=0.1)
    assert abs(np.mean(uncorrected) - exact.item()) > 0.5


def test_few_pins_are_all_candidates():
    found = candidates_of(np.array([[3]]), np.full(50, 0.02), FitSettings(candidates=50), np.random.default_rng(0))
    assert found.pins.tolist() == list(range(50))
    assert not found.log_share.any()


#: A user of the planted log: 3 random pins, 2 of a kind, 3 random ones, and 4 that the kind foretells.
STEPS, FORETOLD_FROM = 12, 8
START_MS, HOUR_MS = 1_600_000_000_000, 3_600_000


def planted(users: int, seed: int = 0) -> ActionLog:
    """Return a log in which a kind of pins foretells others, three actions later, with random popular pins between.

    Pins 0 to 9 are popular, 10 to 17 of the four kinds, and 18 to 41 those that the kinds foretell.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for kind in rng.integers(0, 4, users):
        early = rng.integers(0, 10, 3), 10 + 2 * kind + rng.permutation(2), rng.integers(0, 10, 3)
        rows.append(np.concatenate([*early, 18 + 6 * kind + rng.permutation(6)[:4]]))
    user, step = np.repeat(np.arange(users), STEPS), np.tile(np.arange(STEPS), users)
    return log_of(user, np.concatenate(rows), START_MS + step * HOUR_MS + user)


@pytest.mark.parametrize("timed", [True, False])
def test_dense_finds_what_an_early_action_foretells(timed):
    log, asked, at_ms = planted(200), np.arange(150, 200), START_MS + FORETOLD_FROM * HOUR_MS
    # The last 50 users are new: what is to be found of them is missing in the training.
    learned = np.flatnonzero((log.user < 150) | (log.time_ms < at_ms))
    training = log_of(log.user[learned], log.pin[learned], log.time_ms[learned])
    settings = SMALL.model_copy(update={"epochs": 20, "dim": 32, "dropout": 0.0})
    model = train_users(training, None, 1 << 60, settings, "planted", timed=timed)
    users = user_vectors_at(model, log, None, asked, np.full(len(asked), at_ms)).astype(np.float32)
    pins = vectors_of_pins(model, log.pin_ids, None)
    assert np.array_equal(pins.pin_ids, log.pin_ids)
    right = log.pin[log.by_user].reshape(-1, STEPS)[asked, FORETOLD_FROM:]
    counts = np.bincount(training.pin, minlength=len(log.pin_ids))

    def recall(scores):
        best = np.argsort(-scores, axis=1)[:, :6]
        return np.mean([np.isin(own, top).mean() for own, top in zip(right, best, strict=True)])

    assert recall(np.tile(counts, (len(asked), 1))) < 0.3
    assert recall(users @ pins.vectors.T.astype(np.float32)) > 0.9


@pytest.mark.parametrize("loss", ["next", "all", "dense"])
def test_training_reads_nothing_from_its_end_on(loss):
    log = random_log()
    until_ms = int(log.time_ms[400])
    settings = SMALL.model_copy(update={"loss": loss, "epochs": 1})
    one = train_users(log, None, until_ms, settings, "toy")
    # Later events may be others, may be missing, and may be of users and pins that nobody knows yet.
    early = log.time_ms < until_ms
    fewer = log_of(log.user[early], log.pin[early], log.time_ms[early], log.action[early])
    more = log_of(
        np.append(log.user, [77, 78]),
        np.append(log.pin, [5, 99]),
        np.append(log.time_ms, [until_ms, until_ms + 1]),
        np.append(log.action, [0, 0]),
    )
    assert len(more.pin_ids) > len(log.pin_ids)
    for changed in (changed_after(log, until_ms), fewer, more):
        other = train_users(changed, None, until_ms, settings, "toy")
        assert one.space == other.space
        for name, weight in one.network.state_dict().items():
            assert torch.equal(weight, other.network.state_dict()[name]), name
    later = train_users(changed_after(log, until_ms), None, until_ms + DAY_MS, settings, "toy")
    assert later.space != one.space


def test_too_little_to_learn_from_is_refused():
    log = log_of(np.array([0, 1]), np.array([0, 1]), np.array([5, 6]))
    with pytest.raises(DatasetError, match="nothing to predict"):
        train_users(log, None, 10, SMALL, "toy")
    with pytest.raises(DatasetError, match="no action in the window"):
        train_users(log, None, 5, SMALL, "toy")
    with pytest.raises(SettingError, match="--pins"):
        train_users(log, None, 10, SMALL.model_copy(update={"table": False}), "toy")
    with pytest.raises(ValueError, match="cannot be shared by 3 heads"):
        FitSettings(dim=16, heads=3)
