"""Every rewrite against the plain module that it stands for, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from ranker.network.encoder import Attention, CrossFusion, EarlyFusion, EncoderLayer, LateFusion, absent_bias
from ranker.network.model import CrossNetwork
from ranker.network.serving_form import (
    candidate_scores,
    encode_cross,
    encode_early,
    encode_late,
    encode_layer,
    encode_rows,
    fold_layer,
    fold_query_key,
    fold_value_out,
    shared_attention,
    shared_scores,
    split_linear,
)
from tests.ranker.encoders import Sizes, batch, shaken


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_plain_layer_is_pytorchs_post_norm_transformer_layer() -> None:
    layer = shaken(EncoderLayer(24, 12).double(), 1)
    theirs = nn.TransformerEncoderLayer(24, 1, 12, dropout=0.0, batch_first=True, dtype=torch.float64).eval()
    attention = layer.attention
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(
            torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
        )
        any_key_bias = normal(24, seed=9)
        theirs.self_attn.in_proj_bias.copy_(torch.cat([attention.query.bias, any_key_bias, attention.value.bias]))
        theirs.self_attn.out_proj.load_state_dict(attention.out.state_dict())
        theirs.linear1.load_state_dict(layer.hidden.state_dict())
        theirs.linear2.load_state_dict(layer.feed_forward.state_dict())
        theirs.norm1.load_state_dict(layer.norm_attention.state_dict())
        theirs.norm2.load_state_dict(layer.norm_out.state_dict())
    tokens, present = normal(3, 9, 24), torch.ones(3, 9, dtype=torch.float64)
    present[1, 4:] = 0
    expected = theirs(tokens, src_key_padding_mask=present == 0)
    close(layer(tokens, tokens, absent_bias(present)), expected)


def test_folded_query_and_key_give_the_same_attention() -> None:
    attention = shaken(Attention(20, 28, width=16).double(), 1)
    queries, keys = normal(5, 20), normal(7, 28, seed=1)
    plain = torch.softmax(attention.query(queries) @ attention.key(keys).T * attention.scale, dim=-1)
    weight, bias = fold_query_key(attention)
    folded = torch.softmax(functional.linear(queries, weight, bias) @ keys.T, dim=-1)
    close(folded, plain)


def test_folded_value_and_output_give_the_same_mixture() -> None:
    attention = shaken(Attention(20, 28, width=16).double(), 1)
    keys, mixture = normal(7, 28), torch.softmax(normal(5, 7, seed=1), dim=-1)
    weight, bias = fold_value_out(attention)
    expected = attention.out(mixture @ attention.value(keys))
    close(functional.linear(mixture @ keys, weight, bias), expected)


def test_a_split_linear_maps_each_part_by_itself() -> None:
    linear = nn.Linear(12, 5, dtype=torch.float64)
    request, row = normal(4, 7), normal(4, 5, seed=1)
    of_request, of_row = split_linear(linear, (7, 5))
    split = functional.linear(request, of_request, linear.bias) + functional.linear(row, of_row)
    close(split, linear(torch.cat([request, row], dim=-1)))


def test_the_cross_network_maps_the_requests_part_once_and_crosses_the_same() -> None:
    network = shaken(CrossNetwork(12, 3).double(), 1)
    request, row, row_request = normal(2, 7), normal(5, 5, seed=1), torch.tensor([0, 0, 1, 1, 1])
    inputs = crossed = torch.cat([request[row_request], row], dim=-1)
    for layer in network.layers:
        crossed = inputs * layer(crossed) + crossed
    close(network(request, row, row_request), crossed)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("present_actions", [1, 2, 17, 30])
def test_shared_attention_is_the_softmax_of_the_sum(scale: float, present_actions: int) -> None:
    own, candidate, keys = normal(1, 30, 12), normal(4, 6, seed=1), normal(1, 30, 6, seed=2)
    query_key, bias, values = normal(12, 12, seed=3) * scale, normal(12, seed=4), normal(1, 30, 8, seed=5)
    present, row_request = (torch.arange(30) < present_actions).double().unsqueeze(0), torch.zeros(4, dtype=torch.int64)
    shared = shared_scores(own, present, query_key, bias, rows=10)
    added = candidate_scores(candidate, keys.expand(4, -1, -1))
    mixed = shared_attention(shared, added, values, present, row_request)

    pairs = functional.linear(own[:, :10], query_key, bias) @ own.transpose(1, 2)
    scores = pairs + (keys @ candidate.unsqueeze(-1)).transpose(1, 2) + absent_bias(present)
    assert scores.max() - scores[scores > -1e8].min() > scale or present_actions == 1
    close(mixed, torch.softmax(scores, dim=-1) @ values.expand(4, -1, -1))


def test_only_asking_rows_are_computed_and_come_out_the_same() -> None:
    layer = shaken(EncoderLayer(24, 12).double(), 1)
    tokens, bias = normal(3, 9, 24), absent_bias(torch.ones(3, 9, dtype=torch.float64))
    few = encode_layer(tokens[:, :4], tokens, bias, fold_layer(layer, "x"), "x")
    close(few, layer(tokens, tokens, bias)[:, :4])


def test_what_follows_attention_is_the_layers_norms_and_feed_forward() -> None:
    layer = shaken(EncoderLayer(24, 12).double(), 1)
    rows = normal(5, 24)
    normed = layer.norm_attention(rows)
    expected = layer.norm_out(normed + layer.feed_forward(torch.relu(layer.hidden(normed))))
    close(encode_rows(rows, fold_layer(layer, "x"), "x"), expected)


SHAPES = st.builds(
    Sizes,
    actions=st.integers(1, 6),
    dim=st.integers(2, 12),
    action_dim=st.integers(1, 9),
    token_pin_dim=st.integers(1, 9),
    encoder_layers=st.integers(1, 3),
    encoder_hidden=st.integers(1, 9),
    readout_rows=st.integers(1, 5),
    readout_pool=st.booleans(),
)


ENCODE: dict[Any, Callable[..., torch.Tensor]] = {
    EarlyFusion: encode_early,
    LateFusion: encode_late,
    CrossFusion: encode_cross,
}


@pytest.mark.parametrize("fusion", ENCODE)
@settings(max_examples=25, deadline=None)
@given(sizes=SHAPES, length=st.integers(5, 14), fills=st.lists(st.integers(0, 14), min_size=1, max_size=4))
def test_the_serving_form_computes_what_is_published(fusion, sizes: Sizes, length: int, fills) -> None:
    encoder = shaken(fusion(sizes).double(), 2)
    inputs = batch(sizes, tuple(min(fill, length) for fill in fills), length, rows=7)
    close(ENCODE[fusion](encoder, *inputs), encoder(*inputs))


@pytest.mark.parametrize("fusion", ENCODE)
def test_without_any_action_the_readout_is_zero(fusion) -> None:
    encoder = shaken(fusion(Sizes()).double(), 2)
    assert not ENCODE[fusion](encoder, *batch(Sizes(), (0, 0), 20, rows=3)).any()


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0, 4.0, 6.0])
def test_scores_far_apart_stay_as_exact_as_the_plain_modules_in_float32(scale: float) -> None:
    encoder = shaken(EarlyFusion(Sizes()).double(), 2, scale)
    inputs = batch(Sizes(), (100, 3, 40), 100, rows=30, dtype=torch.float32)
    exact = encoder(*(value.double() if value.is_floating_point() else value for value in inputs))
    close(encode_early(encoder, *(v.double() if v.is_floating_point() else v for v in inputs)), exact, 1e-8)
    encoder.float()
    plain, served = encoder(*inputs), encode_early(encoder, *inputs)
    assert (served - exact).abs().max() <= 1e-4 + 10 * (plain - exact).abs().max()


def test_parts_that_spread_too_far_for_a_product_are_added_before_they_are_exponentiated() -> None:
    # The largest sum, -60, lies 120 below that of the largest parts, 0 and 60.
    shared, added = torch.tensor([[[0.0, -60.0, -130.0]]]), torch.tensor([[-130.0, 0.0, 60.0]])
    values = torch.eye(3).unsqueeze(0)
    mixed = shared_attention(shared, added, values, torch.ones(1, 3), torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(mixed, torch.softmax(shared + added.unsqueeze(1), dim=-1))


def test_gradients_reach_every_published_parameter() -> None:
    encoder = shaken(EarlyFusion(Sizes()).double(), 2).train()
    inputs = batch(Sizes(), (100, 0), 100, rows=5)
    encode_early(encoder, *inputs).square().sum().backward()
    computed = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    encoder.zero_grad()
    encoder(*inputs).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert computed[name] is not None, name
        torch.testing.assert_close(computed[name], parameter.grad, rtol=1e-6, atol=1e-9, msg=name)
