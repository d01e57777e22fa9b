"""Training of a published ranker: the cross-entropy of each row, Adam, early stopping, a choice of learning rates."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.rankers.dcn_v2 import DcnV2
from bench.rankers.din import Din
from bench.rankers.inputs import DenseFeatures, Shape
from bench.rankers.rows import Rows
from bench.rankers.sasrec import SasRec
from ranker.training.examples import Examples
from ranker.training.losses import calibrated_logits, head_losses
from ranker.training.minibatches import Minibatches, Part, in_order
from ranker.training.ranks import ALONE, threads_of_this_process

PUBLISHED: Mapping[str, Callable[[Shape], nn.Module]] = {"DCN-v2": DcnV2, "DIN": Din, "SASRec": SasRec}

#: As many as ours.
_REQUESTS_PER_BATCH = 24


@dataclass(frozen=True, slots=True)
class Fitting:
    """How a ranker is trained.

    Attributes:
        learning_rates: each is tried for `epochs_of_rates`; the one with the lowest loss of the held rows goes on.
        epochs_of_rates: epochs of a try.
        epochs: most epochs of the one that goes on, with those of its try.
        patience: successive epochs without a lower loss to tolerate; one more ends the training.
        seed: of the parameters, the order of the requests, and dropout.
    """

    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    epochs_of_rates: int = 2
    epochs: int = 5
    patience: int = 1
    seed: int = 7


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained ranker.

    Attributes:
        network: with the parameters of its best epoch.
        parameters: number of its trainable parameters.
        losses: loss of the held rows after each epoch, by learning rate.
        seconds: of the tries and the rest.
    """

    network: nn.Module
    parameters: int
    losses: Mapping[float, list[float]]
    seconds: float


def fit(make: Callable[[Shape], nn.Module], rows: Rows, fitting: Fitting) -> Fitted:
    """Train a ranker, with the learning rate that is best after the first epochs.

    Rates and epochs are compared by the same loss of the held rows as those of our networks.
    """
    torch.set_num_threads(threads_of_this_process())
    started_s = time.monotonic()
    trainings = [_Training(make, rows, fitting, rate) for rate in fitting.learning_rates]
    for training in trainings:
        training.run(fitting.epochs_of_rates)
    best = min(trainings, key=lambda training: min(training.losses))
    best.run(fitting.epochs)
    parameters = sum(parameter.numel() for parameter in best.network.parameters())
    losses = {training.learning_rate: training.losses for training in trainings}
    return Fitted(best.result(), parameters, losses, time.monotonic() - started_s)


def logits_of(network: nn.Module, examples: Examples) -> np.ndarray:
    """Return float32[N, H], the logits of all rows in their order."""
    network.eval()
    with torch.inference_mode():
        return np.concatenate([_logits(network, part).numpy() for part in in_order(examples, ALONE)])


class _Training:
    """A network, the losses of the held rows after each of its epochs, and its parameters of the best epoch."""

    def __init__(self, make: Callable[[Shape], nn.Module], rows: Rows, fitting: Fitting, learning_rate: float) -> None:
        torch.manual_seed(fitting.seed)
        self.network, self.learning_rate, self.losses = make(rows.shape), learning_rate, list[float]()
        self._rows, self._fitting = rows, fitting
        batch = rows.learned.batch
        for module in self.network.modules():
            if isinstance(module, DenseFeatures):
                module.standardise(
                    torch.from_numpy(batch.request["user_scalars"]), torch.from_numpy(batch.candidate["pin_scalars"])
                )
        self._optimiser = torch.optim.Adam(self.network.parameters(), lr=learning_rate, fused=True)
        self._minibatches = Minibatches(rows.learned, _REQUESTS_PER_BATCH, fitting.seed, ALONE)
        self._best = copy.deepcopy(self.network.state_dict())

    def run(self, epochs: int) -> None:
        """Train until so many epochs are done, or the loss of the held rows has not fallen for too many."""
        while len(self.losses) < epochs and not self._stopped():
            self._learn()
            self.losses.append(_held_loss(self.network, self._rows.held))
            if self.losses[-1] == min(self.losses):
                self._best = copy.deepcopy(self.network.state_dict())

    def result(self) -> nn.Module:
        """Return the network of the best epoch."""
        self.network.load_state_dict(self._best)
        return self.network.eval()

    def _stopped(self) -> bool:
        losses = self.losses
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) > self._fitting.patience

    def _learn(self) -> None:
        """Run an epoch."""
        self.network.train()
        for minibatch in self._minibatches.epoch(len(self.losses), 0):
            self._optimiser.zero_grad()
            for part in minibatch.parts:
                logits = _logits(self.network, part)
                loss = functional.binary_cross_entropy_with_logits(logits, part.labels, reduction="sum")
                (loss / (minibatch.rows * logits.shape[1])).backward()  # type: ignore[no-untyped-call]
            self._optimiser.step()


def _held_loss(network: nn.Module, held: Examples) -> float:
    calibrated = calibrated_logits(logits_of(network, held), held.labels)
    losses = head_losses(calibrated, held.labels, held.batch.row_request())
    return float(losses.mean())


def _logits(network: nn.Module, part: Part) -> Tensor:
    logits: Tensor = network(part.inputs)
    return logits
