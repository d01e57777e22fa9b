"""Training: seeded minibatches of whole requests, weighted cross-entropy per head, early stopping."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels.engine import ROW_REQUEST, FeatureBatch
from ranker.examples import Examples
from ranker.model import NetworkConfig, RankerNetwork


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    seed: int = 7
    epochs: int = 4
    #: Epochs without a better validation loss before training stops.
    patience: int = 1
    requests_per_batch: int = 48
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    #: How much a head's loss counts; heads that are not named count 1.
    head_weights: dict[str, float] = field(default_factory=dict)
    threads: int = 2


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch came to; losses are weighted means per head and row."""

    number: int
    train_loss: float
    validation_loss: float


def train(
    network_config: NetworkConfig,
    heads: Sequence[str],
    examples: Examples,
    validation: Examples,
    config: TrainingConfig,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    on_epoch: Callable[[Epoch], None] = lambda _epoch: None,
) -> tuple[RankerNetwork, list[Epoch]]:
    """Train a network; the same arguments on the same machine give the same weights.

    Args:
        network_config: the network's sizes.
        heads: names of the labels' columns.
        examples: to learn from.
        validation: to stop by.
        config: how.
        progress: told batches done and in all, over all epochs.
        on_epoch: told each finished epoch.

    Returns:
        The network of the epoch with the lowest validation loss, in evaluation mode, and all epochs.
    """
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    rng = np.random.default_rng(config.seed)
    network = RankerNetwork(network_config)
    network.standardise(
        torch.from_numpy(examples.batch.request["user_scalars"]),
        torch.from_numpy(examples.batch.candidate["pin_scalars"]),
    )
    weights = torch.tensor([config.head_weights.get(head, 1.0) for head in heads])
    batches = -(-examples.batch.requests // config.requests_per_batch)
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, config.learning_rate, total_steps=batches * config.epochs, pct_start=0.1
    )
    epochs: list[Epoch] = []
    best = copy.deepcopy(network.state_dict())
    for number in range(config.epochs):
        network.train()
        total = 0.0
        order = rng.permutation(examples.batch.requests)
        for done, part in enumerate(_minibatches(examples, order, config.requests_per_batch), start=1):
            optimiser.zero_grad()
            loss = _loss(network(**tensors(part.batch)), part.labels, weights)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * part.batch.rows
            progress(number * batches + done, config.epochs * batches)
        logits = predict(network, validation, config.requests_per_batch)
        validation_loss = float(_loss(torch.from_numpy(logits), validation.labels, weights))
        epochs.append(Epoch(number + 1, total / examples.batch.rows, validation_loss))
        on_epoch(epochs[-1])
        if validation_loss == min(epoch.validation_loss for epoch in epochs):
            best = copy.deepcopy(network.state_dict())
        elif len(epochs) - _best(epochs) > config.patience:
            break
    network.load_state_dict(best)
    return network.eval(), epochs


def predict(network: RankerNetwork, examples: Examples, requests_per_batch: int) -> np.ndarray:
    """Return float32[N, H] logits of all rows, in their order, without dropout."""
    network.eval()
    order = np.arange(examples.batch.requests)
    with torch.inference_mode():
        parts = [network(**tensors(part.batch)).numpy() for part in _minibatches(examples, order, requests_per_batch)]
    return np.concatenate(parts)


def tensors(batch: FeatureBatch) -> dict[str, Tensor]:
    """Return a batch as the network's arguments."""
    arrays = {**batch.request, **batch.candidate, ROW_REQUEST: batch.row_request()}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _minibatches(examples: Examples, order: np.ndarray, requests: int) -> Iterator[Examples]:
    for start in range(0, len(order), requests):
        yield examples.take(order[start : start + requests])


def _loss(logits: Tensor, labels: np.ndarray, weights: Tensor) -> Tensor:
    losses = functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels), reduction="none")
    return (losses.mean(dim=0) * weights).sum() / weights.sum()


def _best(epochs: Sequence[Epoch]) -> int:
    """Return how many epochs it took to reach the lowest validation loss."""
    return 1 + int(np.argmin([epoch.validation_loss for epoch in epochs]))
