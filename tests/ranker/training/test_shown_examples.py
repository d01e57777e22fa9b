"""Training from requests that a server answered: what is read, and what only they can teach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_client.codec import RowState
from impressions.joining.attribution import Window
from impressions.joining.join import Wanted, join_log
from kernels.cpu.openvino_engine import OpenVinoEngine
from model_store.bundle.files import Bundle
from model_store.bundle.golden import GoldenRequest, encode_golden
from model_store.model.loaded import load_model
from ranker.data.actions import RATINGS, ActionLog, action_log
from ranker.data.atomic.identifiers import token_id
from ranker.data.atomic.recbole import AtomicDataset, read_atomic
from ranker.data.embeddings import PinEmbeddings, embeddings_of, space_of, svd_embeddings
from ranker.data.requests import Part, Split
from ranker.data.shown import Impressions, Shown, read_shown
from ranker.errors import DatasetError, SettingError
from ranker.export.manifest import draft_manifest
from ranker.recipe import make_bundle
from ranker.training.examples import Examples, Sampling
from ranker.training.parent import Parent
from ranker.training.shown_examples import ShownExampleBuilder
from tests.impressions.logs import Row, action, impression, log_of, seen
from tests.ranker.interactions import KINDS, PINS, USERS, write_atomic
from tests.ranker.test_recipe import RECIPE, Notes

MANIFEST = draft_manifest("toy", space_of("toy"), RATINGS, RATINGS.heads, sequence_length=100)
SPLIT = Split(train_slices=2, validation_slices=1, test_slices=1)
HOUR_MS = 3_600_000
#: After all interactions.
START_MS = 100 * HOUR_MS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> AtomicDataset:
    return read_atomic(write_atomic(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def log(dataset: AtomicDataset) -> ActionLog:
    return action_log(dataset)


def user(number: int) -> int:
    return token_id(f"u{number}")


def pin(number: int) -> int:
    return token_id(f"p{number}")


def joined(folder: Path, impressions: Sequence[Row], actions: Sequence[Row] = (), reports: Sequence[Row] = ()) -> Path:
    join_log(log_of(impressions, actions, reports), folder, Wanted(Window(HOUR_MS, 2_000)))
    return folder


def built(shown: Shown, log: ActionLog, part: Part = "train") -> Examples:
    embeddings = svd_embeddings(log, int(log.time_ms[-1]) + 1, seed=1, name="toy")
    return ShownExampleBuilder(shown, embeddings, MANIFEST, SPLIT, Sampling(), seed=5).build(part)


def four_requests(**changes: Any) -> list[Row]:
    """Return requests of four users, an hour apart: two to train on, one to validate and one to test."""
    rows = [impression(n + 1, START_MS + n * HOUR_MS, user(n), [pin(5 * n + i) for i in range(4)]) for n in range(4)]
    rows[0] |= changes
    return rows


def test_rows_are_the_shown_pins_with_their_outcomes_positions_and_propensities(tmp_path: Path, log: ActionLog) -> None:
    folder = joined(
        tmp_path / "joined",
        four_requests(propensities=[1.0, 0.5, 0.25, 1.0]),
        [action(1, user(0), pin(2), START_MS + 5_000, request_id=1), action(2, user(1), pin(5), START_MS + HOUR_MS)],
        [seen(1, 0, 2)],
    )
    shown = read_shown(Impressions(folder), log)
    examples = built(shown, log)
    assert examples.batch.row_splits.tolist() == [0, 2, 6]
    assert examples.positions.tolist() == [0, 2, 0, 1, 2, 3]
    assert examples.propensities.tolist() == [1.0, 0.25, 1.0, 1.0, 1.0, 1.0]
    assert examples.labels[:, RATINGS.position("save")].tolist() == [0, 1, 1, 0, 0, 0]
    assert shown.history.user_ids[examples.users].tolist() == [user(0), user(1)]
    assert shown.notes == ("2 of 16 shown pins were not seen and are left out",)
    everything = built(read_shown(Impressions(folder, with_unseen=True), log), log)
    assert everything.positions.tolist() == [0, 1, 2, 3] * 2
    taken = everything.take(np.array([1]))
    assert (taken.positions.tolist(), taken.propensities.tolist()) == ([0, 1, 2, 3], [1.0] * 4)


def test_whole_answers_keep_what_nobody_saw_in_the_order_of_the_candidates(tmp_path: Path, log: ActionLog) -> None:
    rows = four_requests(candidates=4, places=[2, 0, 3, 1])
    rows[1] |= {"candidates": 4}  # nothing of it was seen; the others leave three candidates out
    folder = joined(tmp_path / "joined", rows, reports=[seen(1, 0), seen(2)])
    shown = read_shown(Impressions(folder), log)
    assert np.diff(shown.requests.row_splits).tolist() == [1, 4, 4]
    assert shown.whole.row_splits.tolist() == [0, 4, 8]
    assert shown.whole.places.tolist() == [0, 1, 2, 3] * 2
    assert shown.whole.positions.tolist() == [1, 3, 0, 2, 0, 1, 2, 3]
    assert shown.history.pin_ids[shown.whole.pins[:4]].tolist() == [pin(1), pin(3), pin(0), pin(2)]
    assert shown.cut_ms.tolist() == [START_MS + 2 * HOUR_MS, START_MS + 3 * HOUR_MS]
    assert shown.split_ms.tolist() == shown.requests.time_ms.tolist()


def test_each_part_has_the_requests_of_its_time(tmp_path: Path, log: ActionLog) -> None:
    shown = read_shown(Impressions(joined(tmp_path / "joined", four_requests())), log)
    parts: tuple[Part, ...] = ("train", "validation", "test")
    users = [shown.history.user_ids[built(shown, log, part).users].tolist() for part in parts]
    assert users == [[user(0), user(1)], [user(2)], [user(3)]]


def test_the_history_is_what_the_user_had_done_strictly_before_and_each_action_once(
    tmp_path: Path, log: ActionLog
) -> None:
    own = log.by_user[log.user_splits[np.searchsorted(log.user_ids, user(0))] :][0:40]
    known = own[-1]  # the user's last interaction, which the log has as well
    known_pin, known_ms = int(log.pin_ids[log.pin[known]]), int(log.time_ms[known])
    kind = log.schema.names[int(log.action[known])]
    folder = joined(
        tmp_path / "joined",
        four_requests(user_id=user(0)),
        [
            action(1, user(0), known_pin, known_ms, action=kind),
            action(2, user(0), pin(50), START_MS - 1_000, action="hide"),
            action(3, user(0), pin(0), START_MS, request_id=1),
            action(4, user(0), pin(1), START_MS + 9_000, request_id=1),
        ],
    )
    examples = built(read_shown(Impressions(folder), log), log)
    assert examples.activity[0] == 41
    assert examples.ages_s[0, :2].tolist() == [1.0, (START_MS - known_ms) / 1_000]
    codes = examples.batch.request["sequence_actions"][0, :2]
    assert codes.tolist() == [1 + RATINGS.position("hide"), 1 + int(log.action[known])]


def test_pins_and_users_that_the_data_does_not_know_have_missing_rows_and_are_noted(
    tmp_path: Path, log: ActionLog
) -> None:
    rows = four_requests(user_id=77, pin_ids=[pin(0), 91, 92, pin(1)])
    folder = joined(tmp_path / "joined", rows, [action(1, 77, 91, START_MS + 1)])
    shown = read_shown(Impressions(folder), log)
    assert shown.notes == (
        "1 of 4 users in the impressions do not occur in the data; their features count as missing",
        "2 of 16 pins in the impressions do not occur in the data; their features count as missing",
    )
    examples = built(shown, log)
    present = [bool(row.any()) for row in examples.batch.candidate["pin_embedding"]]
    assert present[:4] == [True, False, False, True]
    assert not examples.batch.request["user_embedding"][0].any()
    assert examples.batch.request["user_embedding"][1].any()


def test_a_related_request_starts_from_its_query_pin(tmp_path: Path, log: ActionLog) -> None:
    folder = joined(tmp_path / "joined", four_requests(surface="related", query_pin_id=pin(3)))
    examples = built(read_shown(Impressions(folder), log), log)
    assert examples.surfaces.tolist() == [1, 0]
    assert examples.batch.request["query"].any(axis=1).tolist() == [True, False]


def test_stored_rows_of_a_request_replace_those_of_a_later_world(tmp_path: Path, log: ActionLog) -> None:
    plain = read_shown(Impressions(joined(tmp_path / "plain", four_requests())), log)
    embeddings = svd_embeddings(log, int(log.time_ms[-1]) + 1, seed=1, name="toy")
    builder = ShownExampleBuilder(plain, embeddings, MANIFEST, SPLIT, Sampling(), seed=5)
    # The server read seven candidates, of which it returned four; all rows are those of another time.
    rng = np.random.default_rng(3)
    fetched = _fetched(builder, plain, [pin(n) for n in range(40, 47)])
    for rows in (*fetched.pins.values(), *fetched.user.values()):
        rows.rows["log_actions"] = rng.random(len(rows.rows))
    stored = encode_golden([GoldenRequest(fetched, "home", np.zeros((7, 4), np.float32))])
    places = [6, 2, 0, 5]
    rows_of_log = four_requests(places=places, pin_ids=[pin(40 + place) for place in places], features=stored)
    folder = joined(tmp_path / "stored", rows_of_log, reports=[seen(1, 0, 1, 3)])
    shown = read_shown(Impressions(folder), log, stored_rows=True)
    examples = ShownExampleBuilder(shown, embeddings, MANIFEST, SPLIT, Sampling(), seed=5).build("train")
    expected = fetched.pins["pin_core"].rows["log_actions"][[6, 2, 5]]
    np.testing.assert_allclose(examples.batch.candidate["pin_scalars"][:3, 0], expected, rtol=1e-6)
    assert examples.batch.request["user_scalars"][0, 0] == np.float32(fetched.user["user_core"].rows["log_actions"][0])
    # Without being asked for, they are not read.
    again = ShownExampleBuilder(read_shown(Impressions(folder), log), embeddings, MANIFEST, SPLIT, Sampling(), seed=5)
    assert not np.allclose(again.build("train").batch.candidate["pin_scalars"][:3, 0], expected)


def test_interests_are_as_of_the_slice_or_those_that_the_server_read(tmp_path: Path, log: ActionLog) -> None:
    manifest = draft_manifest("toy", space_of("toy"), RATINGS, RATINGS.heads, sequence_length=100, interests=3)
    embeddings = svd_embeddings(log, int(log.time_ms[-1]) + 1, seed=1, name="toy")

    def builder_of(shown: Shown) -> ShownExampleBuilder:
        return ShownExampleBuilder(shown, embeddings, manifest, SPLIT, Sampling(), seed=5)

    plain = read_shown(Impressions(joined(tmp_path / "plain", four_requests())), log)
    fetched = _fetched(builder_of(plain), plain, [pin(n) for n in range(4)])
    own = fetched.user["user_interests"]
    examples = builder_of(plain).build("train")
    assert own.rows["importance_1"][0] > 0
    assert examples.batch.request["interest_importances"][0, 0] == own.rows["importance_1"][0]
    np.testing.assert_array_equal(examples.batch.request["interests"][0, 0], own.rows["interest_1"][0])
    own.rows["importance_1"] = 0.125  # the server read another row
    without = replace(fetched, user={"user_core": fetched.user["user_core"]})
    for read, name in ((fetched, "read"), (without, "lost")):
        stored = encode_golden([GoldenRequest(read, "home", np.zeros((4, 4), np.float32))])
        folder = joined(tmp_path / name, four_requests(features=stored))
        builder = builder_of(read_shown(Impressions(folder), log, stored_rows=True))
        if read is without:
            with pytest.raises(
                DatasetError, match=r"stored rows of group user_interests have the fields \(\), and the"
            ):
                builder.build("train")
        else:
            assert builder.build("train").batch.request["interest_importances"][0, 0] == 0.125


def _fetched(builder: ShownExampleBuilder, shown: Shown, pins: Sequence[int]) -> Any:
    from ranker.data.requests import Slice
    from ranker.training.examples import FeatureSnapshot

    span = Slice(0, START_MS, START_MS + HOUR_MS)
    vectors = builder._vectors.as_of(shown.dataset, span.start_ms)
    snapshot = FeatureSnapshot.at(span, shown.dataset, builder._groups, vectors, builder._columns)
    candidates = np.searchsorted(shown.dataset.pin_ids, np.array(pins, np.uint64))
    fetched = builder._fetch(builder._request(0), candidates, snapshot.pins, snapshot.users)
    assert (fetched.user["user_core"].states == RowState.PRESENT).all()
    return fetched


def _unknown_action(folder: Path) -> Path:
    return joined(folder, four_requests(), [action(1, user(0), pin(0), START_MS, action="share")])


def _unknown_surface(folder: Path) -> Path:
    return joined(folder, four_requests(surface="search"))


def _too_early(folder: Path) -> Path:
    return joined(folder, [impression(1, 0, user(0), [pin(0)]), *four_requests()[1:]])


def _nothing_seen(folder: Path) -> Path:
    return joined(folder, four_requests()[:1], reports=[seen(1)])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            _unknown_action,
            SettingError,
            "has the action 'share', which the dataset does not define; its actions are save",
        ),
        (
            _unknown_surface,
            SettingError,
            "requests of surface 'search', .* join again with --surface home --surface rel",
        ),
        (_too_early, DatasetError, "no interaction of --data is older than the first request of --impressions"),
        (_nothing_seen, DatasetError, "has no request with a seen pin; join a longer span, or add --with-unseen"),
    ],
)
def test_impressions_that_do_not_fit_the_data_are_refused(
    tmp_path: Path, log: ActionLog, make: Callable[[Path], Path], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_shown(Impressions(make(tmp_path / "joined")), log)


#: In the interactions, users save the pins of their own kind. Of the shown pins, they save those of this kind only.
WANTED_KIND = 1
UTILITY = RECIPE.utility_toml


def contrary(folder: Path, requests: int = 480) -> Path:
    """Join a log of shown pins whose outcomes contradict the interactions."""
    rng = np.random.default_rng(8)
    rows, actions = [], []
    for number in range(1, requests + 1):
        time_ms, who = START_MS + number * 60_000, user(int(rng.integers(USERS)))
        pins = rng.choice(PINS, 9, replace=False)
        rows.append(impression(number, time_ms, who, [pin(int(p)) for p in pins]))
        saved = [int(p) for p in pins if p % KINDS == WANTED_KIND and rng.random() < 0.9]
        actions += [
            action(100 * number + i, who, pin(p), time_ms + 1_000 * (i + 1), request_id=number)
            for i, p in enumerate(saved)
        ]
    return joined(folder, rows, actions)


@pytest.fixture(scope="module")
def impressions(tmp_path_factory: pytest.TempPathFactory) -> Impressions:
    return Impressions(contrary(tmp_path_factory.mktemp("contrary") / "joined"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, dataset: AtomicDataset, impressions: Impressions) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("learned") / "bundle", dataset, RECIPE, Notes(), impressions=impressions)


def embeddings_in(bundle: Bundle) -> PinEmbeddings:
    return embeddings_of(bundle)


def test_what_only_the_impressions_show_is_learned(learned: Bundle, log: ActionLog, impressions: Impressions) -> None:
    assert [head.name for head in learned.manifest.heads] == ["save"]
    shown = read_shown(impressions, log)
    manifest = learned.manifest
    examples = ShownExampleBuilder(shown, embeddings_in(learned), manifest, RECIPE.split, Sampling(), 11).build("test")
    model = load_model(learned, OpenVinoEngine, streams=1)
    probabilities = model.probabilities(model.engine.run(examples.batch))[:, 0]
    model.engine.close()
    kinds = _kinds(shown, examples)
    assert probabilities[kinds == WANTED_KIND].mean() > 0.7
    # Users save these in the interactions; where they are shown, nobody does.
    assert probabilities[kinds != WANTED_KIND].mean() < 0.15


def _kinds(shown: Shown, examples: Examples) -> np.ndarray:
    """Return int64[N], the kind of each pin of the test examples, which are the newest requests."""
    kind_of = {pin(number): number % KINDS for number in range(PINS)}
    newest = shown.requests.pins[-examples.batch.rows :]
    return np.array([kind_of[int(shown.history.pin_ids[place])] for place in newest])


def test_the_lineage_names_the_impressions_and_the_metrics_are_measured_on_them(learned: Bundle) -> None:
    lineage = learned.manifest.lineage
    assert lineage.data.startswith("tiny-taste, impressions ")
    assert lineage.learned_until_ms is not None
    assert START_MS + 359 * 60_000 <= lineage.learned_until_ms <= START_MS + 362 * 60_000
    assert lineage.metrics["auc_save"] > 0.9


def test_equal_impressions_make_equal_bundles(tmp_path: Path, dataset: AtomicDataset, impressions: Impressions) -> None:
    recipe = replace(RECIPE, variant="base", training=replace(RECIPE.training, epochs=1))
    notes = Notes()
    one = make_bundle(tmp_path / "one", dataset, recipe, notes, impressions=impressions)
    other = make_bundle(tmp_path / "other", dataset, recipe, Notes(), impressions=impressions)
    assert one.digest == other.digest
    assert "no shown pin's action is a hide, so the model will have no hide head" in notes.notes


def test_a_successor_learns_from_newer_requests_only(
    tmp_path: Path, dataset: AtomicDataset, learned: Bundle, impressions: Impressions
) -> None:
    parent = Parent.of(learned)
    recipe = replace(RECIPE, version=4, training=replace(RECIPE.training, epochs=1))
    with pytest.raises(SettingError, match="only 120 answered requests are newer than those the parent learned from"):
        make_bundle(tmp_path / "few", dataset, recipe, Notes(), parent=parent, impressions=impressions)
    more = Impressions(contrary(tmp_path / "joined", requests=800))
    made = make_bundle(tmp_path / "next", dataset, recipe, Notes(), parent=parent, impressions=more)
    assert made.manifest.lineage.parent == "toy@3"
    assert (made.manifest.lineage.learned_until_ms or 0) > (learned.manifest.lineage.learned_until_ms or 0)
