"""What a network learns from and is judged by: how probable each action is, and the order within each request.

The probabilities alone leave the order of a request's best candidates to chance: most rows are easy to tell apart, and
few minibatches say more about the first three places than about how often an action happens at all. The order alone
leaves probabilities without a scale. Both together are better at both (Sheng et al., KDD 2023, arXiv 2208.06164).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model_store.model.discount import discounts
from model_store.model.selection import order_rows
from ranker.network.calibration import fit_calibration
from ranker.training.progress import Epoch

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


def calibrated_logits(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return float64[N, H], the logits calibrated to these labels as in a bundle.

    Without calibration, the loss of these rows mostly measures whether they have as many candidates per action as the
    rows that the network learned from: validation requests have four times as many.
    """
    calibrated = np.empty(logits.shape)
    for head in range(logits.shape[1]):
        fitted = fit_calibration(logits[:, head], labels[:, head], None if weights is None else weights[:, head])
        calibrated[:, head] = fitted.slope * logits[:, head] + fitted.intercept
    return calibrated


def head_losses(
    logits: np.ndarray, labels: np.ndarray, row_request: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the mean loss of each head over all rows, float64[H].

    Args:
        logits: float[N, H], from `calibrated_logits`; all must be finite.
        labels: float32[N, H] of 0 and 1.
        row_request: int64[N], the request of each row.
        weights: float32[N, H], of each row in the loss of each head; None weighs all alike.
    """
    losses = row_losses(
        torch.from_numpy(logits),
        torch.from_numpy(labels),
        torch.from_numpy(row_request),
        int(row_request[-1]) + 1,
        None if weights is None else torch.from_numpy(weights),
    )
    mean: np.ndarray = losses.numpy().mean(axis=0, dtype=np.float64)
    return mean


def order_quality(utilities: np.ndarray, values: np.ndarray, row_splits: np.ndarray) -> float | None:
    """Return where the order by utility lies between each request's worst order, 0, and its best, 1, on average.

    An order is worth the discounted sum of its rows' values. This is nDCG, except that 0 is the worst order and not an
    order of no value, of which values below 0, such as that of a hide, can be any number of times away.

    Args:
        utilities: float[N], which give the order, as in `select`.
        values: float[N], the utility of what happened.
        row_splits: int[R + 1].

    Returns:
        The mean over the requests that have better and worse orders; None if none has.
    """
    counts = np.diff(row_splits)
    request = np.repeat(np.arange(len(counts)), counts)
    discount = np.concatenate([discounts(int(count)) for count in counts])

    def worth(scores: np.ndarray) -> np.ndarray:
        return np.bincount(request, values[order_rows(scores, request)] * discount, len(counts))

    with np.errstate(invalid="ignore"):  # a value may be infinite, such as a logarithm of what did not happen
        own, best, worst = worth(utilities), worth(values), worth(-values)
        counted = np.isfinite(best - worst) & (best > worst)
    if not counted.any():
        return None
    return float(((own - worst)[counted] / (best - worst)[counted]).mean())


def best_epoch(epochs: Sequence[Epoch]) -> int:
    """Return the position of the best epoch, the first of equals.

    An epoch is judged by its validation loss plus what the utility's order lacks to the best, each relative to the
    first epoch's.
    """
    first = epochs[0]
    lacked = None if first.utility_order is None else 1 - first.utility_order

    def judged(epoch: Epoch) -> float:
        heads = epoch.validation_loss / first.validation_loss
        return heads if not lacked or epoch.utility_order is None else heads + (1 - epoch.utility_order) / lacked

    return min(range(len(epochs)), key=lambda position: judged(epochs[position]))
