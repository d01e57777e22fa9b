from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ranker.network.model import NetworkConfig, RankerNetwork
from ranker.network.pieces import Pieces

SIZES = NetworkConfig(heads=3, actions=4, surfaces=2, scalars=4)
LENGTH = 100


def inputs(seed: int = 0, *, sequence: bool = True) -> dict[str, torch.Tensor]:
    """Two requests, three and one rows; the first has a full sequence, the second none at all."""
    drawn = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=drawn)

    actions = torch.randint(1, 5, (2, LENGTH), generator=drawn)
    actions[1] = 0
    tensors = {
        "user_embedding": normal(2, 32),
        "user_scalars": normal(2, 4),
        "surface": torch.tensor([0, 1]),
        "query": normal(2, 32),
        "pin_embedding": normal(4, 32),
        "pin_scalars": normal(4, 4),
        "row_request": torch.tensor([0, 0, 0, 1]),
    }
    if sequence:
        embeddings = normal(2, LENGTH, 32) * (actions != 0).unsqueeze(-1)
        tensors |= {"sequence_actions": actions, "sequence_embeddings": embeddings}
    return tensors


@pytest.fixture
def network() -> RankerNetwork:
    torch.manual_seed(1)
    return RankerNetwork(SIZES).eval()


def test_an_empty_sequence_gives_finite_logits_and_gradients(network: RankerNetwork) -> None:
    logits = network(**inputs())
    assert logits.shape == (4, 3)
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in network.parameters())


def test_padding_is_never_read(network: RankerNetwork) -> None:
    clean = inputs()
    clean["sequence_actions"][0, 20:] = 0
    dirty = {name: tensor.clone() for name, tensor in clean.items()}
    dirty["sequence_embeddings"][0, 20:] = 1e3
    dirty["sequence_embeddings"][1] = -1e3
    torch.testing.assert_close(network(**clean), network(**dirty))


def test_the_sequence_moves_the_scores_of_its_own_request_only(network: RankerNetwork) -> None:
    before = inputs()
    after = {name: tensor.clone() for name, tensor in before.items()}
    after["sequence_actions"][0, 40] = 1 + before["sequence_actions"][0, 40] % 4
    moved = (network(**before) - network(**after)).abs().amax(dim=1)
    assert (moved[:3] > 0).all()
    assert moved[3] == 0


def test_the_candidate_is_fused_before_the_first_layer(network: RankerNetwork) -> None:
    """How much a change of the sequence moves a score depends on the candidate."""
    before = inputs()
    before["pin_scalars"][:] = 0
    after = {name: tensor.clone() for name, tensor in before.items()}
    after["sequence_embeddings"][0] *= -1
    encoder = network.encoder
    assert encoder is not None

    def encoded(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        names = ("sequence_actions", "sequence_embeddings", "pin_embedding", "row_request")
        found: torch.Tensor = encoder(*(tensors[name] for name in names))
        return found

    moved = encoded(before) - encoded(after)
    assert not torch.allclose(moved[0], moved[1], atol=1e-3)


def test_the_network_without_a_sequence_takes_none() -> None:
    torch.manual_seed(1)
    network = RankerNetwork(replace(SIZES, fusion="none")).eval()
    assert network.encoder is None
    assert network(**inputs(sequence=False)).shape == (4, 3)


def test_rows_do_not_depend_on_what_shares_their_batch(network: RankerNetwork) -> None:
    whole = inputs()
    request = ("user_embedding", "user_scalars", "surface", "query", "sequence_actions", "sequence_embeddings")
    alone = {name: tensor[:1] if name in request else tensor[:3] for name, tensor in whole.items()}
    # Sums are taken in another order for another number of rows, in one that depends on the processor.
    torch.testing.assert_close(network(**whole)[:3], network(**alone), rtol=1e-5, atol=1e-5)


def test_scalars_are_standardised_with_what_was_seen(network: RankerNetwork) -> None:
    values = torch.tensor([[1.0, 5.0, 0.0, 2.0], [3.0, 5.0, 4.0, 2.0]])
    network.standardise(values, values)
    assert network.pin_mean.tolist() == [2.0, 5.0, 2.0, 2.0]
    assert network.user_deviation.tolist() == [1.0, 1.0, 2.0, 1.0]  # what never varied is left alone


def test_only_the_first_numbers_of_each_vector_are_crossed_with_the_other_features():
    torch.manual_seed(1)
    sizes = replace(SIZES, fusion="none", user_vector=6, cross_rank=8)
    network = RankerNetwork(replace(sizes, crossed_dim=20)).eval()
    before = inputs(sequence=False) | {"user_vector": torch.randn(2, 6)}
    vectors = ("user_embedding", "query", "pin_embedding")
    beyond, within = ({name: tensor.clone() for name, tensor in before.items()} for _ in range(2))
    for name in vectors:
        beyond[name][..., 20:] += 1
        within[name][..., 19] += 1
    assert torch.equal(network(**before), network(**beyond))
    assert not torch.allclose(network(**before), network(**within))
    # A network of so short vectors is the same, weight by weight.
    short = RankerNetwork(replace(sizes, dim=20)).eval()
    short.load_state_dict(network.state_dict())
    cut = {name: tensor[..., :20] if name in vectors else tensor for name, tensor in before.items()}
    assert torch.equal(network(**before), short(**cut))


def test_the_encoder_reads_all_numbers_of_vectors_of_which_few_are_crossed():
    for fusion, read in (("late", ["sequence_embeddings"]), ("early", ["sequence_embeddings", "pin_embedding"])):
        torch.manual_seed(1)
        network = RankerNetwork(replace(SIZES, fusion=fusion, crossed_dim=20)).eval()
        for name in read:
            before = inputs()
            after = before | {name: before[name] + (torch.arange(32) >= 20)}
            assert not torch.allclose(network(**before)[:3], network(**after)[:3]), (fusion, name)


def test_a_network_crosses_no_more_numbers_than_its_vectors_have():
    assert [replace(SIZES, crossed_dim=given).crossed_numbers for given in (0, 20, 32, 64)] == [32, 20, 32, 32]


def test_an_untrained_network_orders_by_the_product_of_user_and_pin():
    torch.manual_seed(2)
    network = RankerNetwork(replace(SIZES, fusion="none", similarities=14, pieces=16)).eval()
    pins, user, scalars = torch.randn(200, 32), torch.randn(1, 32), torch.randn(200, 4)
    similarities = torch.rand(200, 14)
    similarities[:, 0] = pins @ user[0] / 32
    network.standardise(scalars[:1], scalars, similarities)
    nothing = {"surface": torch.tensor([0]), "query": torch.zeros(1, 32), "row_request": torch.zeros(200, dtype=int)}
    with torch.no_grad():
        logits = network(
            user, scalars[:1], pin_embedding=pins / 32, pin_scalars=scalars, similarities=similarities, **nothing
        )
    ranks = torch.cat([similarities[:, :1], logits], dim=1).argsort(dim=0).argsort(dim=0)
    assert torch.corrcoef(ranks.double().T)[0, 1:].min() > 0.95


def test_pieces_say_how_much_of_each_piece_lies_below_a_number():
    pieces = Pieces(2, 4)
    pieces.fit(torch.tensor([[0.0, 7.0], [1.0, 7.0], [2.0, 7.0], [3.0, 7.0], [10.0, 7.0]]))
    found = pieces(torch.tensor([[-1.0, 7.0], [0.5, 9.0], [6.5, 0.0], [99.0, 7.0]]))
    # Pieces hold equally many rows: [0, 1], [1, 2], [2, 3], [3, 10]. A number that never changes says nothing.
    expected = [[0, 0, 0, 0], [0.5, 0, 0, 0], [1, 1, 1, 0.5], [1, 1, 1, 1]]
    torch.testing.assert_close(found, torch.tensor([[part for one in row for part in (one, 0)] for row in expected]))
