from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ranker.data.actions import RATINGS, ActionLog, ActionSchema, action_log, strongest_action
from ranker.data.atomic.recbole import read_atomic
from ranker.data.embeddings import PinEmbeddings, space_of, svd_embeddings
from ranker.data.inputs import SEQUENCE_LENGTH
from ranker.data.requests import PINS_MAX, Part, Slice, Split, part_slices, producer_until_ms, slice_requests
from ranker.errors import DatasetError, SettingError
from ranker.export.manifest import draft_manifest
from ranker.training.examples import ExampleBuilder, Examples, Sampling
from tests.ranker.data.test_actions import dataset_of
from tests.ranker.interactions import write_atomic

SPLIT = Split(train_slices=3, validation_slices=2, test_slices=2)
MANIFEST = draft_manifest("toy", space_of("toy"), RATINGS, RATINGS.names, sequence_length=100)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ActionLog:
    return action_log(read_atomic(write_atomic(tmp_path_factory.mktemp("data"))))


def build(log: ActionLog, part: Part = "train", sampling: Sampling | None = None) -> Examples:
    embeddings = svd_embeddings(log, producer_until_ms(log, SPLIT), seed=1, name="toy")
    builder = ExampleBuilder(log, embeddings, MANIFEST, SPLIT, sampling or Sampling(candidates=40), seed=5)
    return builder.build(part)


def rerated(log: ActionLog, from_ms: int) -> ActionLog:
    """Shuffle the ratings, and who acted when, among all events from a time on."""
    rng = np.random.default_rng(9)
    later = np.arange(log.before(from_ms), len(log.time_ms))
    shuffled = np.arange(len(log.time_ms))
    shuffled[later] = rng.permutation(later)
    labels = RATINGS.labels({"rating": rng.integers(1, 6, len(shuffled)).astype(np.float32)}, len(shuffled))
    labels[: later[0]] = log.labels[: later[0]]
    user, pin = log.user[shuffled], log.pin[shuffled]
    return replace(
        log, user=user, pin=pin, labels=labels, action=strongest_action(labels), by_user=np.argsort(user, kind="stable")
    )


def test_parts_follow_each_other_without_gap_or_overlap(log: ActionLog) -> None:
    parts: tuple[Part, ...] = ("train", "validation", "test")
    spans = [span for part in parts for span in part_slices(log, SPLIT, part)]
    assert spans[0].start_ms == producer_until_ms(log, SPLIT)
    assert all(a.stop_ms == b.start_ms for a, b in pairwise(spans))
    assert spans[-1].stop_ms == log.time_ms[-1] + 1
    assert len({span.number for span in spans}) == len(spans)
    with pytest.raises(SettingError, match="must rise"):
        Split(producer_until=0.9)


def test_a_request_is_a_run_of_one_users_actions_and_knows_only_what_was_strictly_before() -> None:
    # Ten actions of user 1, of which two happen at time 50; one of user 2 between them.
    times = [10, 20, 30, 50, 50, 60, 70, 80, 90, 100]
    events = sorted(
        [(1, 100 + i, 5 if i == 1 else 3, t) for i, t in enumerate(times)] + [(2, 500, 5, 55)], key=lambda e: e[3]
    )
    log = action_log(dataset_of(events))
    requests = slice_requests(log, Slice(0, 50, 101), 2, np.random.default_rng(0))
    assert [len(r.chosen) for r in requests] == [7, 1]
    first, second = requests
    assert log.pin_ids[log.pin[first.chosen]].tolist() == list(range(103, 110))
    assert log.pin_ids[log.pin[first.history]].tolist() == [102, 101]  # newest first, at most two, none at time 50
    assert (second.surface, len(second.history)) == ("home", 0)
    long = slice_requests(log, Slice(0, 10, 101), 64, np.random.default_rng(0))
    assert [len(r.chosen) for r in long] == [PINS_MAX, 2, 1]
    assert len(long[1].history) == PINS_MAX


def test_what_may_be_asked_from_follows_from_the_affinity_of_the_action() -> None:
    events = [(1, 10, 5, 0), (1, 11, 3, 1), (1, 12, 1, 2), (1, 13, 3, 3)]

    def asked_from(affinity_of_closeups: float) -> set[int | None]:
        rules = (*RATINGS.actions[:3], RATINGS.rule("closeup").model_copy(update={"affinity": affinity_of_closeups}))
        log = action_log(dataset_of(events, ActionSchema(actions=rules)))
        drawn = [slice_requests(log, Slice(0, 3, 4), 64, np.random.default_rng(seed)) for seed in range(20)]
        return {None if r.query_pin is None else int(log.pin_ids[r.query_pin]) for (r,) in drawn}

    assert asked_from(0.3) == {None, 10}
    assert asked_from(0.5) == {None, 11}  # pin 12 was hidden


def test_a_related_request_starts_from_the_pin_saved_or_liked_last(log: ActionLog) -> None:
    span = part_slices(log, SPLIT, "train")[0]
    requests = slice_requests(log, span, 64, np.random.default_rng(0))
    related = [r for r in requests if r.surface == "related"]
    assert 0.2 < len(related) / len(requests) < 0.7
    liked = (RATINGS.position("save"), RATINGS.position("like"))
    for request in related:
        newest = next(event for event in request.history if log.action[event] in liked)
        assert request.query_pin == log.pin[newest]


def test_candidates_are_the_pins_acted_on_and_others_never_acted_on(log: ActionLog) -> None:
    train, test = build(log, sampling=Sampling(negatives=24)), build(log, "test")
    acted = np.add.reduceat(train.labels[:, RATINGS.position("closeup")], train.batch.row_splits[:-1])
    assert acted.min() >= 1
    assert acted.max() <= PINS_MAX
    np.testing.assert_array_equal(np.diff(train.batch.row_splits), acted + 24)
    assert set(np.diff(test.batch.row_splits)) == {40}


def test_requests_can_be_thinned_and_taken_apart(log: ActionLog) -> None:
    whole = build(log)
    thinned = build(log, sampling=Sampling(requests_max=20))
    assert 5 < thinned.batch.requests < 40 < whole.batch.requests
    some = whole.take(np.array([4, 1]))
    for name in ("users", "activity", "ages_s"):
        np.testing.assert_array_equal(getattr(some, name), getattr(whole, name)[[4, 1]])
    start, stop = whole.batch.row_splits[4:6]
    np.testing.assert_array_equal(some.labels[: stop - start], whole.labels[start:stop])
    np.testing.assert_array_equal(some.batch.request["query"], whole.batch.request["query"][[4, 1]])
    assert some.batch.row_splits[-1] == len(some.labels) == some.batch.rows


def test_examples_know_who_asked_how_active_they_were_and_how_old_their_actions_are() -> None:
    # User 3 acts every second, pin after pin; user 4 has no past when asking.
    events = [(3, pin, 5, 1_000 * pin) for pin in range(1, 151)] + [(4, 500, 5, 149_500)]
    log = action_log(dataset_of(sorted(events, key=lambda event: event[3])))
    split = Split(producer_until=0.5, train_until=0.96, validation_until=0.98, train_slices=1, validation_slices=1)
    embeddings = PinEmbeddings(log.pin_ids, np.ones((len(log.pin_ids), 32), np.float16), space_of("toy"))
    builder = ExampleBuilder(log, embeddings, MANIFEST, split, Sampling(), 5)
    train, test = builder.build("train"), builder.build("test")
    assert train.users.tolist() == [0] * train.batch.requests
    assert train.activity.tolist() == [75 + 8 * i for i in range(train.batch.requests)]
    ages_s = train.ages_s[0]
    assert ages_s[:75].tolist() == [float(age) for age in range(1, 76)]  # newest first
    assert np.isinf(ages_s[75:]).all()
    assert len(ages_s) == SEQUENCE_LENGTH
    long = train.ages_s[-1]  # more actions than a sequence holds: the newest of them
    assert long.tolist() == [float(age) for age in range(1, SEQUENCE_LENGTH + 1)]
    newcomer = test.users.tolist().index(1)
    assert test.activity[newcomer] == 0
    assert np.isinf(test.ages_s[newcomer]).all()


def test_drawn_pins_are_as_often_new_as_the_pins_acted_on() -> None:
    """Where every second event is on a pin that nobody acted on before, so is every second drawn pin."""
    rng = np.random.default_rng(4)
    events = []
    for time in range(4_000):
        pin = 10_000 + time if time % 2 else int(rng.integers(300))
        events.append((int(rng.integers(40)), pin, 5, time))
    log = action_log(dataset_of(events))
    examples = build(log)
    unknown = examples.batch.candidate["pin_scalars"][:, 0] == 0
    acted = examples.labels.any(axis=1)
    assert unknown[acted].mean() == pytest.approx(0.5, abs=0.05)
    assert unknown[~acted].mean() == pytest.approx(0.5, abs=0.05)


def test_where_no_pin_is_new_only_known_ones_are_drawn(log: ActionLog) -> None:
    assert (build(log).batch.candidate["pin_scalars"][:, 0] > 0).all()


def test_the_future_moves_no_tensor(log: ActionLog) -> None:
    """Tensors of the first slice's requests stay put when everything from its end on is shuffled."""
    first, second, _ = part_slices(log, SPLIT, "train")
    changed = rerated(log, second.start_ms)
    only_first = Split(producer_until=SPLIT.producer_until, train_slices=3)
    embeddings = svd_embeddings(log, producer_until_ms(log, SPLIT), seed=1, name="toy")
    assert np.array_equal(
        embeddings.vectors, svd_embeddings(changed, producer_until_ms(log, SPLIT), seed=1, name="toy").vectors
    )

    def first_slice(history: ActionLog) -> list[dict[str, np.ndarray]]:
        builder = ExampleBuilder(history, embeddings, MANIFEST, only_first, Sampling(negatives=0), seed=5)
        built = builder.build_slice(first, "train")
        return [{**one.batch.request, **one.batch.candidate, "labels": one.labels} for one in built]

    before, after = first_slice(log), first_slice(changed)
    assert len(before) == len(after) > 10
    for ours, theirs in zip(before, after, strict=True):
        for name, tensor in ours.items():
            np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def test_what_a_request_led_to_shows_in_its_labels_only(log: ActionLog) -> None:
    """Rating the chosen pins of one slice anew changes that slice's labels and none of its tensors."""
    first, _, _ = part_slices(log, SPLIT, "train")
    changed = replace(log, labels=log.labels.copy(), action=log.action.copy())
    own = slice(log.before(first.start_ms), log.before(first.stop_ms))
    builders = [
        ExampleBuilder(h, svd_embeddings(log, first.start_ms, 1, name="toy"), MANIFEST, SPLIT, Sampling(), 5)
        for h in (log, changed)
    ]
    requests = slice_requests(log, first, 64, np.random.default_rng(0))
    newest = {r.user: r for r in requests}
    last_events = np.concatenate([r.chosen for r in newest.values()])
    assert set(last_events) <= set(range(own.start, own.stop))
    changed.labels[last_events] = ~changed.labels[last_events]
    changed.action[last_events] = RATINGS.position("hide")
    ours, theirs = (b.build_slice(first, "train") for b in builders)
    moved = 0
    for one, other in zip(ours, theirs, strict=True):
        moved += not np.array_equal(one.labels, other.labels)
        for side in ("request", "candidate"):
            for name, tensor in getattr(one.batch, side).items():
                np.testing.assert_array_equal(tensor, getattr(other.batch, side)[name], err_msg=name)
    assert moved == len(newest)


def test_a_part_without_requests_is_refused() -> None:
    log = action_log(dataset_of([(1, pin, 5, 7) for pin in range(20)]))
    builder = ExampleBuilder(log, svd_embeddings(two_users(), 100, 1, name="toy"), MANIFEST, Split(), Sampling(), 5)
    with pytest.raises(DatasetError, match="the train part of the data has no request"):
        builder.build("train")


def two_users() -> ActionLog:
    return action_log(dataset_of([(u, p, 5, 1) for u in (1, 2, 3) for p in range(u, u + 4)]))
