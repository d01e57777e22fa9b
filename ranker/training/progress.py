"""What a training reports on its way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Step:
    """The state of training after a minibatch; `loss` is the epoch's mean so far."""

    epoch: int
    done: int
    total: int
    loss: float
    learning_rate: float
    rows_per_s: float


@dataclass(frozen=True, slots=True)
class Epoch:
    """The result of one epoch. Losses are weighted means per head and row; the losses by head are not weighted."""

    number: int
    train_loss: float
    validation_loss: float
    validation_losses: dict[str, float]


class Watcher(Protocol):
    """Receives the progress of a training, on rank 0 only. An exception that it raises ends the training."""

    def step(self, step: Step) -> None: ...

    def epoch(self, epoch: Epoch) -> None: ...
