from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from ranker.training.losses import (
    ORDER_WEIGHT,
    best_epoch,
    calibrated_logits,
    head_losses,
    order_quality,
    row_losses,
)
from ranker.training.progress import Epoch

ROW_REQUEST = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
LABELS = np.array([[1, 0], [0, 0], [1, 1], [0, 0], [0, 1], [0, 0], [0, 0], [1, 0], [0, 0]], np.float32)
SPLITS = np.array([0, 3, 5, 9])
LOGITS = np.random.default_rng(3).normal(0, 2, LABELS.shape)


def slowly(logits: np.ndarray) -> np.ndarray:
    """Compute the loss of each row and head one after the other, from its definition."""
    losses = np.zeros(logits.shape)
    for row, request in enumerate(ROW_REQUEST):
        rows = np.flatnonzero(request == ROW_REQUEST)
        for head in range(logits.shape[1]):
            probability = 1 / (1 + math.exp(-logits[row, head]))
            acted = LABELS[row, head] == 1
            losses[row, head] = -math.log(probability if acted else 1 - probability)
            if acted:
                share = math.exp(logits[row, head]) / sum(math.exp(logits[other, head]) for other in rows)
                losses[row, head] -= ORDER_WEIGHT * math.log(share) / LABELS[rows, head].sum()
    return losses


def judged_heads(
    logits: np.ndarray, labels: np.ndarray, row_request: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    return head_losses(calibrated_logits(logits, labels, weights), labels, row_request, weights)


def of_rows(logits: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    given = None if weights is None else torch.from_numpy(weights)
    found = row_losses(
        torch.from_numpy(logits), torch.from_numpy(LABELS), torch.from_numpy(ROW_REQUEST), 3, given
    ).numpy()
    return np.asarray(found)


def test_a_row_costs_what_its_probability_and_its_place_in_the_order_cost() -> None:
    np.testing.assert_allclose(of_rows(LOGITS), slowly(LOGITS), rtol=1e-5, atol=1e-6)


def test_weights_multiply_the_loss_of_their_row() -> None:
    weights = np.linspace(0, 3, LABELS.size, dtype=np.float32).reshape(LABELS.shape)
    np.testing.assert_allclose(of_rows(LOGITS, weights), slowly(LOGITS) * weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_huge_logits_give_finite_losses(logit: float) -> None:
    assert np.isfinite(of_rows(np.full(LABELS.shape, logit))).all()


def test_no_row_and_no_request_cost_nothing() -> None:
    nothing = torch.zeros(0, 2)
    assert row_losses(nothing, nothing, torch.zeros(0, dtype=torch.int64), 0).shape == (0, 2)


def test_the_order_teaches_only_within_a_request() -> None:
    logits = torch.from_numpy(LOGITS).requires_grad_()
    losses = row_losses(logits, torch.from_numpy(LABELS), torch.from_numpy(ROW_REQUEST), 3)
    losses[[0, 2], 0].sum().backward()
    assert logits.grad is not None
    assert (logits.grad[ROW_REQUEST != 0] == 0).all()
    assert (logits.grad[:, 1] == 0).all()
    assert logits.grad[1, 0] > 0  # the row without the action, which the order puts below the others


def test_a_network_is_judged_by_what_calibration_cannot_mend() -> None:
    rng = np.random.default_rng(5)
    request = np.repeat(np.arange(500), 20)
    logits = rng.normal(0, 1, (10_000, 2)) - 2
    labels = (rng.random((10_000, 2)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    judged = judged_heads(logits, labels, request)
    # As from training on requests with far fewer candidates per action.
    np.testing.assert_allclose(judged_heads(logits + 3, labels, request), judged, rtol=1e-3)
    noisy = logits.copy()
    noisy[:, 1] += rng.normal(0, 2, 10_000)
    worse = judged_heads(noisy, labels, request)
    assert worse[0] == pytest.approx(judged[0])
    assert worse[1] > judged[1] + 0.01


def test_the_calibration_counts_rows_by_their_weights() -> None:
    request, logits = np.repeat(np.arange(2), 4), np.zeros((8, 1))
    labels = np.array([1, 1, 0, 0, 0, 0, 0, 0], np.float32)[:, None]
    plain = judged_heads(logits, labels, request)
    even = np.where(labels > 0, 3.0, 1.0).astype(np.float32)
    weighed = judged_heads(logits, labels, request, even)
    assert weighed[0] > plain[0]  # a share of one half is the hardest to predict


def worth(values: np.ndarray) -> float:
    return float(values @ (1 / np.log2(np.arange(len(values)) + 2)))


def test_an_order_lies_between_the_worst_and_the_best_of_all_orders() -> None:
    # The first request has a value below 0, and nothing worth having; in the second, all rows are worth the same.
    values = np.array([0.0, -2.0, 0.0, 0.5, 0.5, 1.0, 0.0, -1.0, 0.3])
    utilities = np.array([0.1, 0.3, 0.2, 0.0, 1.0, 0.2, 0.9, -np.inf, np.nan])
    first, last = values[:3], values[5:]
    expected = 0.0
    for own, best_first in ((first, [1, 2, 0]), (last, [1, 0, 2, 3])):
        every = [worth(np.array(order)) for order in permutations(own)]
        expected += (worth(own[best_first]) - min(every)) / (max(every) - min(every)) / 2
    assert order_quality(utilities, values, SPLITS) == pytest.approx(expected)
    assert order_quality(values, values, SPLITS) == pytest.approx(1)
    assert order_quality(-values, values, SPLITS) == pytest.approx(0)


def test_requests_without_a_better_order_do_not_count() -> None:
    values = np.array([1.0, 0.0, 0.0, 0.5, 0.5, 0.0, -np.inf, np.inf, 0.0])
    assert order_quality(values, values, SPLITS) == pytest.approx(1)
    values[0] = 0
    assert order_quality(values, values, SPLITS) is None


def epochs_of(*judged: tuple[float, float | None]) -> list[Epoch]:
    return [Epoch(number, 0.5, loss, {}, order) for number, (loss, order) in enumerate(judged, start=1)]


@pytest.mark.parametrize(
    ("judged", "best"),
    [
        # 0.2 of the first epoch's loss is worth as much as 0.2 of what its order lacks, whatever their scales.
        ([(0.01, 0.5), (0.008, 0.35), (0.0125, 0.7)], 2),
        ([(0.01, 0.5), (0.007, 0.4), (0.0125, 0.6)], 1),
        ([(0.01, 0.5), (0.008, 0.35)], 0),
        ([(0.01, None), (0.009, None), (0.009, None)], 1),
        ([(0.01, 1.0), (0.009, 0.9)], 1),
    ],
    ids=["order", "heads", "first", "no order", "nothing lacking"],
)
def test_epochs_are_judged_by_heads_and_order_alike(judged: list[tuple[float, float | None]], best: int) -> None:
    assert best_epoch(epochs_of(*judged)) == best
