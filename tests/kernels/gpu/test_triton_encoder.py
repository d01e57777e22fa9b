"""The Triton kernel against the published modules in float64, over ragged shapes; without a GPU in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.encoder import EncoderShape
from kernels.engine import EngineError
from kernels.gpu.encoder_node import NODE, encoder_alone
from kernels.gpu.tiles import TILES, Launch, tiles_of
from kernels.gpu.torch_network import TorchNetwork
from kernels.gpu.triton_encoder import TritonEncoder
from ranker.network.encoder import EarlyFusion
from ranker.network.serving_form import fold_early
from tests.ranker.encoders import Sizes, batch, shaken

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Of bf16 operands: 8 bits each, a few products one after the other; outputs have a norm of about one each.
TOLERANCE = 1e-2
SMALL = Sizes(actions=3, dim=8, action_dim=8, token_pin_dim=8, encoder_hidden=16, readout_rows=3)
#: As wide as the products: no column is left to sum the mixture's weights in.
FULL = Sizes(actions=3, dim=8, action_dim=4, token_pin_dim=4, encoder_hidden=16, readout_rows=3)
ODD = Sizes(actions=17, dim=24, action_dim=8, token_pin_dim=12, encoder_hidden=20, readout_rows=7)


def network_of(kernel, **more):
    return TorchNetwork(encoder_alone(kernel), torch.device(DEVICE), {NODE: partial(kernel.run, **more)})


def both(sizes: Sizes, fills, length: int, counts, scale: float = 1.0, gaps=(), launch=None, tile_rows=0, mean=0.0):
    """Return the kernel's outputs and the published modules', float[N, K * d] each."""
    encoder = shaken(EarlyFusion(sizes).double(), 3, scale)
    for name, parameter in encoder.named_parameters():
        if name.endswith(("attention.out.bias", "feed_forward.bias")):
            parameter.data += mean
    actions, embeddings, candidates, _ = batch(sizes, fills, length, sum(counts))
    for place in gaps:
        actions[:, place] = 0
    splits = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    weights = {name: weight.detach().numpy() for name, weight in fold_early(encoder).items()}
    kernel = TritonEncoder(weights, EncoderShape(length, sizes.readout_rows, sizes.encoder_layers), launch)
    unread = torch.where((actions != 0).unsqueeze(-1), embeddings, torch.nan).float()  # what no one may read
    found = network_of(kernel)(
        {
            "actions": actions.to(DEVICE),
            "embeddings": unread.to(DEVICE),
            "candidates": candidates.float().to(DEVICE),
            TILES: torch.from_numpy(tiles_of(splits, tile_rows)).to(DEVICE),
        }
    )
    owner = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    with torch.no_grad():
        return found.cpu().numpy(), encoder(actions, embeddings, candidates, owner).numpy()


def differ(found, expected):
    """Return the difference relative to the size of the outputs: its norm over theirs, for the worst row."""
    return (np.linalg.norm(found - expected, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1.0)).max()


@pytest.mark.parametrize(
    ("sizes", "length", "fills", "counts"),
    [
        (Sizes(), 100, (100, 50, 0, 3), (1, 9, 2, 0)),
        (Sizes(), 10, (10, 4), (8, 17)),
        (ODD, 37, (37, 16, 5), (3, 0, 11)),
        (SMALL, 16, (16,), (1,)),
        (FULL, 20, (20, 9), (3, 2)),
        (replace(SMALL, readout_rows=1), 1, (1, 0), (2, 2)),
    ],
)
def test_the_kernel_computes_what_is_published(sizes, length, fills, counts):
    found, expected = both(sizes, fills, length, counts)
    assert differ(found, expected) <= TOLERANCE


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("tile_rows", [1, 2, 8])
def test_every_block_and_tile_computes_the_same(block, tile_rows):
    found, expected = both(ODD, (67, 16, 5), 67, (2, 0, 3), launch=Launch(block, 4), tile_rows=tile_rows)
    assert differ(found, expected) <= TOLERANCE


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    length=st.integers(3, 24),
    ragged=st.lists(st.tuples(st.integers(0, 24), st.integers(0, 10)), min_size=1, max_size=4).filter(
        lambda parts: sum(rows for _, rows in parts) > 0
    ),
)
def test_any_ragged_shape_is_encoded(length, ragged):
    found, expected = both(SMALL, tuple(min(fill, length) for fill, _ in ragged), length, [rows for _, rows in ragged])
    # The worst of hundreds of rows of 24 numbers, where roundings average out less than over the published 96.
    assert differ(found, expected) <= 2 * TOLERANCE


def test_scores_too_far_apart_for_a_product_of_exponentials_are_summed_first():
    """At this scale the sums of such products underflow; bf16 scores of hundreds are not exact either."""
    found, expected = both(Sizes(), (100, 7), 100, (4, 4), scale=5.0)
    assert np.isfinite(found).all()
    plain = shaken(EarlyFusion(Sizes()).double(), 3, 5.0).bfloat16()
    actions, embeddings, candidates, _ = batch(Sizes(), (100, 7), 100, 8)
    with torch.no_grad():
        owner = torch.tensor([0] * 4 + [1] * 4)
        other = plain(actions, embeddings.bfloat16(), candidates.bfloat16(), owner).float().numpy()
    assert differ(found, expected) <= differ(other, expected)


def test_gaps_in_a_sequence_are_skipped_where_they_stand():
    found, expected = both(SMALL, (20, 20), 20, (3, 3), gaps=(0, 2, 11))
    assert differ(found, expected) <= TOLERANCE
    assert not found.reshape(6, 3, -1)[:, [0, 2]].any()


def test_a_mean_that_the_next_norm_takes_away_costs_no_precision():
    found, expected = both(ODD, (37, 16, 5), 37, (3, 0, 4), mean=100.0)
    assert differ(found, expected) <= TOLERANCE


def test_rows_of_no_tile_stay_as_they_are():
    encoder = shaken(EarlyFusion(SMALL).double(), 3)
    weights = {name: weight.detach().numpy() for name, weight in fold_early(encoder).items()}
    kernel = TritonEncoder(weights, EncoderShape(16, 3, 2))
    actions, embeddings, candidates, _ = batch(SMALL, (16,), 16, 4, dtype=torch.float32)
    encoded = torch.full((4, kernel.width), 7.0, device=DEVICE)
    tiles = torch.from_numpy(tiles_of(np.array([0, 2], np.int32), tiles=5))
    given = {"actions": actions, "embeddings": embeddings, "candidates": candidates, TILES: tiles}
    network_of(kernel, encoded=encoded)({name: tensor.to(DEVICE) for name, tensor in given.items()})
    assert (encoded[2:] == 7.0).all()
    assert (encoded[:2] != 7.0).any()


@pytest.mark.parametrize(
    ("length", "launch", "block", "warps"),
    [
        pytest.param(100, None, 128, 8, id="published length"),
        pytest.param(64, None, 64, 4, id="short, same actions per warp"),
        pytest.param(10, None, 16, 4, id="shortest"),
        pytest.param(200, None, 32, 4, id="long, small blocks for every GPU"),
        pytest.param(200, Launch(128, 8), 128, 8, id="long, large blocks for data-centre GPUs"),
    ],
)
def test_short_sequences_take_fewer_warps_and_long_ones_smaller_blocks(length, launch, block, warps):
    module = EarlyFusion(Sizes()).eval()
    weights = {name: weight.detach().numpy() for name, weight in fold_early(module).items()}
    kernel = TritonEncoder(weights, EncoderShape(length, 10, 2), launch)
    assert (kernel.constants["B"], kernel.warps) == (block, warps)


@pytest.mark.parametrize("shape", [EncoderShape(300, 10, 2), EncoderShape(100, 10, 3), EncoderShape(5, 10, 2)])
def test_shapes_that_the_kernel_does_not_serve_are_refused(shape):
    with pytest.raises(EngineError, match="the kernel supports two layers and up to 256 actions"):
        TritonEncoder({}, shape)
