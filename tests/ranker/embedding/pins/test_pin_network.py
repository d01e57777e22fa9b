from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ranker.embedding.pins.inputs import read_inputs, uniform_hops
from ranker.embedding.pins.network import Hop, PinNetwork, PinNetworkSettings, _Layer, _mean
from ranker.errors import SettingError
from tests.ranker.embedding.pins.planted import planted

VARIANTS = ("khop", "pooled", "transformer")


def network(variant, neighbours=4, tasks=("a", "b")):
    torch.manual_seed(3)
    settings = PinNetworkSettings(variant=variant, dim=8, trained_dim=2, hidden=16, layers=2)
    return PinNetwork(settings, 3, neighbours, 10, tasks).eval()


def hops(variant, rng):
    shape = (6, 4)
    found = [
        Hop(torch.from_numpy(rng.integers(0, 10, shape)), torch.from_numpy(rng.random(shape).astype(np.float32)))
        for _ in range(2 if variant == "khop" else 1)
    ]
    for hop in found:
        hop.weights[1, 2:] = 0
        hop.weights[2] = 0
    return found


def test_a_mean_is_weighted_by_visits_and_zero_without_neighbours():
    table = torch.arange(20.0).reshape(10, 2)
    hop = Hop(torch.tensor([[1, 3], [2, 0], [0, 0]]), torch.tensor([[3.0, 1.0], [0.5, 0.0], [0.0, 0.0]]))
    assert _mean(table, hop).tolist() == [[3.0, 4.0], [4.0, 5.0], [0.0, 0.0]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_have_length_one_and_do_not_depend_on_neighbours_that_are_not_there(variant):
    rng = np.random.default_rng(0)
    own, table = (torch.from_numpy(rng.standard_normal((n, 5)).astype(np.float32)) for n in (6, 10))
    found = hops(variant, rng)
    with torch.no_grad():
        before = network(variant)(own, table, found)
        for hop in found:
            hop.index[hop.weights == 0] = 9
        after = network(variant)(own, table, found)
    for task in ("a", "b"):
        assert torch.allclose(before[task].norm(dim=1), torch.ones(6), atol=1e-6)
        assert torch.equal(before[task], after[task])
    assert not torch.allclose(before["a"], before["b"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_vector_that_begins_with_the_features_says_what_both_say(variant):
    rng = np.random.default_rng(0)
    own, table = (torch.from_numpy(rng.standard_normal((n, 5)).astype(np.float32)) for n in (6, 10))
    own[0, :3] = 0  # a pin of whose features nothing is known
    without = network(variant)
    kept = PinNetwork(replace(without.settings, features_kept=True), 3, 4, 10, ("a", "b")).eval()
    kept.load_state_dict(
        {**without.state_dict(), "log_lengths.a": torch.tensor(2.0).log(), "log_lengths.b": torch.tensor(0.0)}
    )
    found = hops(variant, rng)
    with torch.no_grad():
        alone, both = without(own, table, found), kept(own, table, found)
    assert kept.settings.width(3) == both["a"].shape[1] == 3 + 8
    features = torch.nn.functional.normalize(own[:, :3], dim=1)
    for task, length in (("a", 2.0), ("b", 1.0)):
        said = [part[1:] @ part[1:].T for part in (features, alone[task], both[task])]
        expected = (said[0] + length**2 * said[1]) / (1 + length**2)
        assert torch.allclose(said[2], expected, atol=1e-6)
        assert torch.allclose(both[task][0], torch.cat([torch.zeros(3), alone[task][0]]), atol=1e-6)
    hidden = PinNetwork(replace(kept.settings, own_dropped=1.0), 3, 4, 10, ("a", "b"))  # in training mode
    assert not hidden(own, table, found)["a"][:, :3].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_neighbour_that_is_there_counts(variant):
    rng = np.random.default_rng(0)
    own, table = (torch.from_numpy(rng.standard_normal((n, 5)).astype(np.float32)) for n in (6, 10))
    found = hops(variant, rng)
    with torch.no_grad():
        before = network(variant)(own, table, found)["a"]
        found[0].index[0, 0] = (found[0].index[0, 0] + 1) % 10
        after = network(variant)(own, table, found)["a"]
    assert not torch.allclose(before[0], after[0], atol=1e-4)
    assert torch.equal(before[1:], after[1:])


def test_a_layer_that_computes_its_first_rows_computes_them_as_one_that_computes_all():
    torch.manual_seed(0)
    layer = _Layer(8).eval()
    tokens, bias = torch.randn(3, 5, 8), torch.randn(3, 4, 5)
    with torch.no_grad():
        (first, paid), (every, paid_by_all) = layer(tokens, bias, rows=1), layer(tokens, bias, rows=5)
        assert torch.allclose(first, every[:, :1], atol=1e-6)
        assert torch.allclose(paid, paid_by_all[:, :, :1], atol=1e-6)
        assert torch.allclose(paid.sum(dim=3), torch.ones(3, 4, 1))


def test_attention_that_only_trusts_the_walks_pools_as_they_weigh():
    rng = np.random.default_rng(0)
    own, table = (torch.from_numpy(rng.standard_normal((n, 5)).astype(np.float32)) for n in (6, 10))
    (hop,) = hops("transformer", rng)
    encoder = network("transformer").encoder
    with torch.no_grad():
        for part in encoder.layers[-1].query.parameters():
            part.zero_()
        encoder.trust.fill_(1.0)
        row, *pooled = encoder(own, table, hop)
    assert row.shape == (6, 8)
    assert len(pooled) == 4
    assert not pooled[0][2].any()
    for one in pooled:
        assert torch.allclose(one, _mean(table, hop), atol=1e-5)


def test_vectors_that_cannot_be_divided_among_heads_are_refused():
    with pytest.raises(SettingError, match="divides the 6 numbers of a vector among 4 heads; use a multiple of 4"):
        PinNetworkSettings(dim=6, variant="transformer")
    PinNetworkSettings(dim=6, variant="pooled")


def test_pins_of_uniform_hops_share_a_context(tmp_path):
    made = planted(tmp_path)
    own = np.arange(len(made.graph.pin_ids))
    one, two = uniform_hops(made.graph, own, np.random.default_rng(0))
    assert (tuple(one.index.shape), tuple(two.index.shape)) == ((60, 10), (60, 50))
    group = made.graph.pin_ids % np.uint64(6)
    for hop in (one, two):
        assert (group[hop.index.numpy()] == group[:, None]).all()
    assert len(np.unique(one.index.numpy()[0])) > 3


def test_inputs_in_memory_are_the_neighbourhoods_of_the_files(tmp_path):
    made = planted(tmp_path)
    inputs = read_inputs(made.neighbourhoods, 5)
    assert np.array_equal(inputs.pin_ids, made.graph.pin_ids)
    assert inputs.index.shape == (60, 5)
    assert inputs.weights.sum(axis=1) == pytest.approx(1, abs=0.5)
    group = made.graph.pin_ids % np.uint64(6)
    assert (
        group[inputs.index][inputs.weights > 0] == np.broadcast_to(group[:, None], (60, 5))[inputs.weights > 0]
    ).all()
