from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ranker.embedding.graph.materialised import materialise
from ranker.embedding.graph.neighbours import make_neighbours
from ranker.embedding.pins import training as pin_training
from ranker.embedding.pins.candidates import SampleSettings
from ranker.embedding.pins.inputs import read_inputs
from ranker.embedding.pins.network import PinNetworkSettings
from ranker.embedding.pins.producer import train_producer
from ranker.embedding.pins.tasks import CO_SAVE, Task, Tasks
from ranker.embedding.pins.trained import read_network, vectors_of, write_network
from ranker.embedding.pins.training import PinTraining, _Batch, _loss
from ranker.embedding.retrieval import by_popularity, by_vectors, questions, ranked, retrieval
from ranker.errors import DatasetError, DivergedError, SettingError
from tests.ranker.embedding.edges import EdgeList
from tests.ranker.embedding.pins.planted import GROUPS, PINS, WALKS, edges, features, planted

SIZES = PinNetworkSettings(variant="pooled", dim=8, trained_dim=4, hidden=16)
SHORT = PinTraining(epochs_max=3, batch=32, learning_rate=1e-2)


def train(made, sizes=SIZES, training=SHORT, tasks=CO_SAVE, folder=None, note=lambda _epoch: None):
    return train_producer("toy", made.neighbourhoods, made.graph, WALKS, tasks, folder, sizes, training, note=note)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def trained(made):
    return train(made)


@pytest.mark.parametrize("variant", ["khop", "pooled", "transformer"])
@pytest.mark.parametrize("trained_dim", [0, 4])
def test_every_variant_learns_what_belongs_together(made, variant, trained_dim):
    longer = replace(SHORT, epochs_max=30, patience=30)
    found = train(made, replace(SIZES, variant=variant, trained_dim=trained_dim), longer)
    vectors = vectors_of(found, made.neighbourhoods, made.graph)["co-save"]
    held = [(context, 1_000 + pin) for context in range(120) for pin in range(context % GROUPS, PINS, GROUPS)]
    asked = questions(edges(), EdgeList(held, per_batch=10_000))
    recall = {
        name: retrieval(asked, ranked(asked, scorer), scorer).recall[10].value
        for name, scorer in (("ours", by_vectors(asked, vectors)), ("popularity", by_popularity(asked)))
    }
    assert recall["ours"] > 0.95
    assert recall["popularity"] < 0.4


def test_vectors_from_files_are_those_that_training_computes(made):
    for variant in ("pooled", "transformer"):
        found = train(made, replace(SIZES, variant=variant))
        inputs = read_inputs(made.neighbourhoods, 5)
        table = torch.cat([torch.from_numpy(inputs.features), found.network.trained], dim=1)
        with torch.no_grad():
            expected = found.network(table, table, [inputs.hop(np.arange(PINS))])["co-save"].numpy()
        vectors = vectors_of(found, made.neighbourhoods)["co-save"]
        assert np.abs(vectors.vectors - expected).max() < 1e-3  # as float16
        assert np.array_equal(vectors.pin_ids, made.graph.pin_ids)


def test_the_space_is_known_by_what_made_it(made, trained, tmp_path):
    space = trained.about.space("co-save")
    assert (space.name, space.dim) == ("toy-co-save", 8)
    assert trained.about.until_ms == 77
    assert train(made).about == trained.about
    others = [
        train(made, training=replace(SHORT, seed=1)),
        train(made, replace(SIZES, own_dropped=0.4)),
        train(planted(tmp_path, edges(seed=9))),
    ]
    assert len({space.content, *(other.about.space("co-save").content for other in others)}) == 4


def test_a_sampled_training_learns_as_well(made):
    sampled = replace(SHORT, epochs_max=15, patience=15, sample=SampleSettings(all_max=10, uniform=12, hard=8))
    vectors = vectors_of(train(made, training=sampled), made.neighbourhoods)["co-save"]
    numbers = vectors.vectors.astype(np.float32)
    group = np.arange(PINS) % GROUPS
    nearest = np.argsort(-numbers @ numbers.T, axis=1)[:, : PINS // GROUPS]
    assert (group[nearest] == group[:, None]).mean() > 0.95


def test_a_new_pin_has_a_vector_near_its_neighbours_in_the_same_space(made, tmp_path):
    new = 5_000
    later = planted(tmp_path, edges(more=[(0, new), (6, new), (12, new)]))  # contexts of group 0
    trained = train(made, replace(SIZES, own_dropped=0.5), replace(SHORT, epochs_max=60, patience=60))
    after = vectors_of(trained, later.neighbourhoods)["co-save"]
    assert after.space == trained.about.space("co-save")
    own = after.of(np.array([new], np.uint64)).astype(np.float32)[0]
    nearest = np.argsort(-after.vectors[:-1].astype(np.float32) @ own)[:3]
    assert (nearest % GROUPS == 0).all()


def test_every_task_has_vectors_of_its_own(made, tmp_path):
    # Co-saves are of one group; pairs are of one block of six pins, one of each group.
    pairs = [(1_000 + pin, 1_000 + pin - pin % GROUPS + other) for pin in range(PINS) for other in range(GROUPS)]
    table = {"context_id": [pin for pin, _ in pairs], "pin_id": [other for _, other in pairs]}
    pq.write_table(
        pa.table({name: pa.array(ids, pa.uint64()) for name, ids in table.items()}), tmp_path / "pairs.parquet"
    )
    tasks = Tasks(tasks=(*CO_SAVE.tasks, Task(name="block", pairs="pairs.parquet", weight=2.0)))
    longer = replace(SHORT, epochs_max=60, patience=60)
    found = train(made, replace(SIZES, trained_dim=16, hidden=32, dropped=0.0), longer, tasks, tmp_path)
    assert found.about.until_ms is None  # the file does not say when its edges came to be
    vectors = vectors_of(found, made.neighbourhoods)
    assert vectors["co-save"].space != vectors["block"].space
    kinds = {"co-save": np.arange(PINS) % GROUPS, "block": np.arange(PINS) // GROUPS}
    for task, one in vectors.items():
        cosines = one.vectors.astype(np.float32) @ one.vectors.T.astype(np.float32)
        np.fill_diagonal(cosines, -2)
        nearest = np.argmax(cosines, axis=1)
        assert {kind: (own[nearest] == own).mean() > 0.8 for kind, own in kinds.items()} == {
            kind: kind == task for kind in kinds
        }


def test_vectors_longer_than_a_space_allows_are_refused_before_the_training(made):
    with pytest.raises(
        SettingError, match=r"the vectors would have 4,\d+ numbers, .* 4,096 at most; use fewer features"
    ):
        train(made, replace(SIZES, dim=4_096, features_kept=True))


def test_a_loss_is_over_the_candidates_that_are_not_left_out_and_at_the_best_of_the_scales():
    rng = np.random.default_rng(1)
    pins, vectors = np.array([3, 5, 8, 9]), torch.from_numpy(rng.standard_normal((4, 6)).astype(np.float32))
    drawn = torch.from_numpy(np.log([1.0, 0.5, 1.0, 1.0]).astype(np.float32))
    rows = np.array([0, 1])
    # Pin 3 asks for 5 and knows 9 and 7, which is no candidate; pin 8 asks for 9.
    left_out = np.array([0, 1, 0, 0]), np.array([3, 8, 9, 7])
    batch = _Batch("a", 1.0, (rows, np.array([3, 8])), left_out, (rows, np.array([5, 9])), 2)

    def expected(scale):
        cosines = vectors.numpy() @ vectors.numpy().T / np.linalg.norm(vectors.numpy(), axis=1)[:, None]
        scores = cosines * scale - drawn.numpy()
        first, second = scores[0, [1, 2]], scores[2, [3, 0, 1]]
        return np.mean([np.log(np.exp(one).sum()) - one[0] for one in (first, second)])

    losses = {scale: _loss(batch, pins, vectors, [torch.tensor(scale)], drawn).item() for scale in (0.5, 1.0, 3.0)}
    assert losses == pytest.approx({scale: expected(scale) for scale in losses}, rel=1e-5)
    every = _loss(batch, pins, vectors, [torch.tensor(scale) for scale in losses], drawn)
    assert every.item() == min(losses.values())


def test_pairs_that_were_drawn_at_random_cannot_be_foretold(made, tmp_path, monkeypatch):
    monkeypatch.setattr(pin_training, "_HELD_OUT", 0.2)
    # What was learned from the other direction of a pair, or from another task, would tell.
    generator, judged = np.random.default_rng(2), []
    first, second = generator.integers(1_000, 1_000 + PINS, (2, 90))
    for name in ("complement", "substitute"):
        pairs = {"context_id": [*first, *second], "pin_id": [*second, *first]}
        pq.write_table(pa.table({key: pa.array(ids, pa.uint64()) for key, ids in pairs.items()}), tmp_path / name)
    tasks = Tasks(tasks=tuple(Task(name=name, pairs=name) for name in ("complement", "substitute")))
    sizes, longer = replace(SIZES, trained_dim=16, own_dropped=0.0), replace(SHORT, epochs_max=60, patience=60)
    train(made, sizes, longer, tasks, tmp_path, judged.append)
    assert judged[-1].loss < judged[0].loss / 2
    # How sure the network is of what it cannot know does not count, only its order.
    assert all(0.95 < loss / np.log(PINS) < 1.5 for loss in judged[-1].held_out.values()), judged[-1]


def test_a_network_survives_its_file_and_a_damaged_file_is_named(made, trained, tmp_path):
    path = tmp_path / "network.npz"
    write_network(path, trained)
    found = read_network(path)
    assert found.about == trained.about
    first, second = (vectors_of(one, made.neighbourhoods)["co-save"].vectors for one in (trained, found))
    assert np.array_equal(first, second)
    whole = path.read_bytes()
    for content in (whole[:-40], b"", b"no archive", whole.replace(b"pooled", b"poolex")):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match="holds no network of pins .*; train it with `pinrank embed pins`"):
            read_network(path)
    for changed in (replace(trained, features=trained.features[1:]), replace(trained, pin_ids=trained.pin_ids[::-1])):
        write_network(path, changed)
        with pytest.raises(DatasetError, match="holds no network of pins"):
            read_network(path)
    with pytest.raises(DatasetError, match="does not exist; train a network with `pinrank embed pins`"):
        read_network(tmp_path / "none.npz")


def test_vectors_that_begin_with_the_features_survive_the_file_of_their_network(made, tmp_path):
    found = train(made, replace(SIZES, features_kept=True))
    assert found.about.space("co-save").dim == found.about.width + 8
    write_network(tmp_path / "network.npz", found)
    read = read_network(tmp_path / "network.npz")
    first, second = (vectors_of(one, made.neighbourhoods)["co-save"] for one in (found, read))
    assert first.space == second.space
    assert np.array_equal(first.vectors, second.vectors)
    given = features().embeddings.of(first.pin_ids).astype(np.float32)
    begin = first.vectors[:, : found.about.width].astype(np.float32)
    cosines = (given * begin).sum(axis=1) / np.linalg.norm(given, axis=1) / np.linalg.norm(begin, axis=1)
    assert cosines.min() > 0.999  # as float16


def test_other_features_and_other_graphs_are_refused(made, trained, tmp_path):
    other = features()
    space = other.embeddings.space.model_copy(update={"name": "other"})
    origin = other.origin.model_copy(update={"space": space})
    other = replace(other, embeddings=replace(other.embeddings, space=space), origin=origin)
    neighbours = make_neighbours(made.neighbourhoods.folder.parent / "n", WALKS)
    foreign = materialise(neighbours, [other], tmp_path / "m")
    with pytest.raises(
        DatasetError, match=r"the network reads random@1\+00000000000000ab as features, and .* has other@1"
    ):
        vectors_of(trained, foreign)
    later = planted(tmp_path / "later", edges(more=[(0, 5_000)]))
    with pytest.raises(DatasetError, match="has other pins than the graph"):
        train_producer("toy", made.neighbourhoods, later.graph, WALKS, CO_SAVE, tmp_path, SIZES, SHORT)
    more = planted(tmp_path / "more", neighbours=9)
    with pytest.raises(DatasetError, match="neighbours, and the network was trained with 5; walk with --neighbours 5"):
        vectors_of(trained, more.neighbourhoods)
    hops = train(made, replace(SIZES, variant="khop"))
    with pytest.raises(DatasetError, match="draws neighbours from the graph, which is missing"):
        vectors_of(hops, made.neighbourhoods)


def test_pins_may_have_more_neighbours_than_any_had_in_training(tmp_path):
    few = planted(tmp_path / "few", EdgeList([(1, 1_000), (1, 1_001), (2, 1_001), (2, 1_002)], until_ms=77))
    found = train_producer("toy", few.neighbourhoods, few.graph, WALKS, CO_SAVE, tmp_path, SIZES, SHORT)
    assert found.about.neighbours == 5
    later = planted(tmp_path / "later", EdgeList([(1, pin) for pin in range(1_000, 1_006)], until_ms=78))
    assert len(vectors_of(found, later.neighbourhoods)["co-save"].pin_ids) == 6


def test_a_loss_that_is_not_finite_ends_the_training(made):
    with pytest.raises(DivergedError, match="no longer finite; lower --learning-rate"):
        train(made, training=replace(SHORT, learning_rate=1e30))
