"""What a network learns from and is judged by: how probable each action is, and the order within each request.

The probabilities alone leave the order of a request's best candidates to chance: most rows are easy to tell apart, and
few minibatches say more about the first three places than about how often an action happens at all. The order alone
leaves probabilities without a scale. Both together are better at both (Sheng et al., KDD 2023, arXiv 2208.06164).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ranker.network.calibration import fit_calibration

#: Weight of the loss of the order; that of the probabilities has weight 1.
ORDER_WEIGHT = 1.0


def row_losses(
    logits: Tensor, labels: Tensor, row_request: Tensor, requests: int, weights: Tensor | None = None
) -> Tensor:
    """Return the loss of each row and head, float32[N, H].

    The loss of the probabilities is the cross-entropy of each row. The loss of the order is the cross-entropy of each
    request between its rows with the action, alike, and the softmax of its logits (ListNet's top one: Cao et al., ICML
    2007); it stands in the rows with the action. A request without the action has no order.

    Args:
        logits: float[N, H].
        labels: float32[N, H] of 0 and 1.
        row_request: int64[N], the request of each row.
        requests: R, the number of requests.
        weights: float32[N, H], of each row in the loss of each head; None weighs all alike.
    """
    logits = logits.float()
    of_rows = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    losses = of_rows + ORDER_WEIGHT * _order_losses(logits, labels, row_request, requests)
    return losses if weights is None else losses * weights


def _order_losses(logits: Tensor, labels: Tensor, row_request: Tensor, requests: int) -> Tensor:
    of_request = logits.new_zeros(requests, logits.shape[1])
    place = row_request.unsqueeze(1).expand_as(logits)
    highest = (of_request - torch.inf).scatter_reduce(0, place, logits.detach(), "amax")[row_request]
    shifted = logits - highest
    total = of_request.index_add(0, row_request, shifted.exp())[row_request]
    acted = of_request.index_add(0, row_request, labels)[row_request]
    return labels * (total.log() - shifted) / acted.clamp_min(1)


def head_losses(
    logits: np.ndarray, labels: np.ndarray, row_request: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the mean loss of each head over all rows, float64[H], with probabilities calibrated as in a bundle.

    Without calibration, the loss of these rows mostly measures whether they have as many candidates per action as the
    rows that the network learned from: validation requests have four times as many.

    Args:
        logits: float[N, H]; all must be finite.
        labels: float32[N, H] of 0 and 1.
        row_request: int64[N], the request of each row.
        weights: float32[N, H], of each row in the loss of each head; None weighs all alike.
    """
    calibrated = np.empty(logits.shape)
    for head in range(logits.shape[1]):
        fitted = fit_calibration(logits[:, head], labels[:, head], None if weights is None else weights[:, head])
        calibrated[:, head] = fitted.slope * logits[:, head] + fitted.intercept
    losses = row_losses(
        torch.from_numpy(calibrated),
        torch.from_numpy(labels),
        torch.from_numpy(row_request),
        int(row_request[-1]) + 1,
        None if weights is None else torch.from_numpy(weights),
    )
    mean: np.ndarray = losses.numpy().mean(axis=0, dtype=np.float64)
    return mean
