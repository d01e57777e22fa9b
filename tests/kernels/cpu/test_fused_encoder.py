"""The native kernel against the published modules in float64, for every instruction set that this processor has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.encoder import EncoderShape, FusedEncoder, Numbers, instruction_sets
from kernels.engine import EngineError, ShapeError
from ranker.network.encoder import EarlyFusion
from ranker.network.serving_form import fold_early
from tests.ranker.encoders import Sizes, batch, shaken

#: Largest difference of outputs that have a norm of about one each, computed in float32.
TOLERANCE = 1e-4
#: The same with bf16 products of operands with 8 bits: the largest, and their root mean square.
TOLERANCE_BF16, DEVIATION_BF16 = 0.04, 0.004
KERNELS = [(isa, numbers) for numbers in ("float32", "bf16") for isa in instruction_sets(numbers)]
ONE_LAYER = Sizes(encoder_layers=1)
ODD = Sizes(actions=17, dim=24, action_dim=8, token_pin_dim=12, encoder_hidden=20, readout_rows=7)
WIDE = Sizes(actions=1, dim=16, action_dim=5, token_pin_dim=40, encoder_hidden=64, readout_rows=18)


def both(
    sizes: Sizes,
    fills: tuple[int, ...],
    length: int,
    rows: int,
    isa: str | None = None,
    scale: float = 1.0,
    numbers: Numbers = "float32",
):
    """Return the kernel's outputs and the published modules', float[N, K * d] each."""
    encoder = shaken(EarlyFusion(sizes).double(), 3, scale)
    actions, embeddings, candidates, row_request = batch(sizes, fills, length, rows)
    embeddings, candidates = embeddings.float(), candidates.float()
    weights = {name: weight.detach().numpy() for name, weight in fold_early(encoder).items()}
    kernel = FusedEncoder(weights, EncoderShape(length, sizes.readout_rows, sizes.encoder_layers), isa, numbers)
    splits = np.searchsorted(row_request.numpy(), np.arange(len(fills) + 1)).astype(np.int32)
    found = kernel.run(actions.numpy(), embeddings.numpy(), candidates.numpy(), splits)
    with torch.no_grad():
        return found, encoder(actions, embeddings.double(), candidates.double(), row_request).numpy()


def test_the_kernel_is_built_with_the_package() -> None:
    assert instruction_sets()[0] == "portable"


SHAPES = pytest.mark.parametrize(
    ("sizes", "length", "fills", "rows"),
    [
        (Sizes(), 100, (100,), 1),
        (Sizes(), 100, (100, 50, 0, 3, 1), 71),
        (Sizes(), 100, (11, 10, 9, 8), 40),
        (Sizes(), 10, (10, 4), 130),
        (ODD, 37, (37, 16, 5), 70),
        (WIDE, 64, (64, 17, 33), 9),
        (replace(Sizes(), readout_rows=1), 1, (1, 0), 4),
        (ONE_LAYER, 100, (100,), 1),
        (ONE_LAYER, 100, (100, 50, 0, 3, 1), 71),
        (ONE_LAYER, 10, (10, 4), 130),
        (replace(ONE_LAYER, action_dim=16, token_pin_dim=16, readout_rows=4), 50, (50, 3, 17), 33),
        (replace(ODD, encoder_layers=1), 37, (37, 16, 5), 70),
        (replace(WIDE, encoder_layers=1), 64, (64, 17, 33), 9),
    ],
)


@pytest.mark.parametrize("isa", instruction_sets())
@SHAPES
def test_the_kernel_computes_what_is_published(isa, sizes: Sizes, length: int, fills, rows: int) -> None:
    found, expected = both(sizes, fills, length, rows, isa)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("isa", instruction_sets("bf16"))
@SHAPES
def test_bf16_products_leave_it_close_to_what_is_published(isa, sizes: Sizes, length: int, fills, rows: int) -> None:
    found, expected = both(sizes, fills, length, rows, isa, numbers="bf16")
    np.testing.assert_allclose(found, expected, atol=TOLERANCE_BF16)
    assert np.sqrt(np.mean((found - expected) ** 2)) < DEVIATION_BF16


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("sizes", [Sizes(), ONE_LAYER])
@pytest.mark.parametrize("scale", [2.0, 3.0, 4.0, 6.0])
def test_scores_far_apart_stay_as_exact_as_the_plain_modules_in_float32(isa, scale: float, sizes: Sizes) -> None:
    found, expected = both(sizes, (100, 7, 100), 100, 20, isa, scale)
    encoder = shaken(EarlyFusion(sizes).double(), 3, scale).float()
    with torch.no_grad():
        plain = encoder(*batch(sizes, (100, 7, 100), 100, 20, dtype=torch.float32)).numpy()
    assert np.abs(found - expected).max() <= 1e-4 + 10 * np.abs(plain - expected).max()


@pytest.mark.parametrize("sizes", [Sizes(), ONE_LAYER])
@pytest.mark.parametrize(("isa", "numbers"), KERNELS)
def test_gaps_in_a_sequence_are_skipped_where_they_stand(isa, numbers, sizes: Sizes) -> None:
    encoder = shaken(EarlyFusion(sizes).double(), 3)
    actions, embeddings, candidates, row_request = batch(sizes, (60, 60), 60, 12)
    actions[0, [0, 3, 4, 40]] = 0
    embeddings[0, 3] = float("nan")  # what stands at an absent action is never read
    weights = {name: weight.detach().numpy() for name, weight in fold_early(encoder).items()}
    kernel = FusedEncoder(weights, EncoderShape(60, 10, sizes.encoder_layers), isa, numbers)
    found = kernel.run(
        actions.numpy(), embeddings.float().numpy(), candidates.float().numpy(), np.array([0, 6, 12], np.int32)
    )
    embeddings[0, 3] = 0.0
    with torch.no_grad():
        expected = encoder(actions, embeddings, candidates, row_request).numpy()
    np.testing.assert_allclose(found, expected, atol=TOLERANCE if numbers == "float32" else TOLERANCE_BF16)


@pytest.mark.parametrize("sizes", [Sizes(), ONE_LAYER])
@pytest.mark.parametrize(("isa", "numbers"), KERNELS)
def test_a_candidates_outputs_do_not_depend_on_its_company(isa, numbers, sizes: Sizes) -> None:
    encoder = shaken(EarlyFusion(sizes), 3)
    actions, embeddings, candidates, _ = batch(sizes, (100,), 100, 90, dtype=torch.float32)
    weights = {name: weight.detach().numpy() for name, weight in fold_early(encoder).items()}
    kernel = FusedEncoder(weights, EncoderShape(100, 10, sizes.encoder_layers), isa, numbers)
    read, alone = (actions.numpy(), embeddings.numpy()), np.array([0, 1], np.int32)
    together = kernel.run(*read, candidates.numpy(), np.array([0, 90], np.int32))
    for row in (0, 31, 32, 89):
        np.testing.assert_array_equal(kernel.run(*read, candidates[row : row + 1].numpy(), alone)[0], together[row])


@pytest.mark.parametrize(("isa", "numbers"), KERNELS)
@pytest.mark.parametrize("fill", [50, 49])
@pytest.mark.parametrize("sizes", [Sizes(), ONE_LAYER])
def test_a_candidate_that_is_not_finite_spoils_no_other(isa, numbers, fill: int, sizes: Sizes) -> None:
    encoder = shaken(EarlyFusion(sizes), 3)
    actions, embeddings, candidates, _ = batch(sizes, (fill,), 50, 11, dtype=torch.float32)
    weights = {name: weight.detach().numpy() for name, weight in fold_early(encoder).items()}
    kernel = FusedEncoder(weights, EncoderShape(50, 10, sizes.encoder_layers), isa, numbers)
    read, splits = (actions.numpy(), embeddings.numpy()), np.array([0, 11], np.int32)
    expected = kernel.run(*read, candidates.numpy(), splits)
    candidates[5] = float("nan")
    found = kernel.run(*read, candidates.numpy(), splits)
    assert np.isnan(found[5]).all()
    others = np.arange(11) != 5
    np.testing.assert_array_equal(found[others], expected[others])


def test_a_request_without_candidates_gives_no_rows() -> None:
    found, expected = both(Sizes(), (20,), 100, 0)
    assert found.shape == expected.shape == (0, 960)


@pytest.mark.parametrize("shape", [EncoderShape(100, 10, 3), EncoderShape(5, 10, 2), EncoderShape(5000, 10, 2)])
def test_shapes_that_the_kernel_is_not_made_for_are_refused(shape) -> None:
    weights = {name: weight.detach().numpy() for name, weight in fold_early(EarlyFusion(Sizes())).items()}
    with pytest.raises(EngineError, match="one or two layers"):
        FusedEncoder(weights, shape)


def test_an_instruction_set_that_is_not_here_is_refused() -> None:
    weights = {name: weight.detach().numpy() for name, weight in fold_early(EarlyFusion(Sizes())).items()}
    with pytest.raises(EngineError, match="portable"):
        FusedEncoder(weights, EncoderShape(100, 10, 2), "mmx")


@pytest.mark.parametrize("splits", [[0, 2], [0, 4], [1, 3], [0, 3, 3], [0, 4, 3]])
def test_rows_that_do_not_fit_their_requests_never_reach_the_kernel(splits) -> None:
    weights = {name: weight.detach().numpy() for name, weight in fold_early(EarlyFusion(Sizes())).items()}
    kernel = FusedEncoder(weights, EncoderShape(20, 10, 2))
    actions, embeddings, candidates, _ = batch(Sizes(), (20,), 20, 3, dtype=torch.float32)
    with pytest.raises(ShapeError):
        kernel.run(actions.numpy(), embeddings.numpy(), candidates.numpy(), np.array(splits, np.int32))
    with pytest.raises(ShapeError):
        kernel.run(actions.numpy()[:, 1:], embeddings.numpy(), candidates.numpy(), np.array([0, 3], np.int32))
