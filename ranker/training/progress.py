"""What a training reports on its way."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    """The result of one epoch. Losses are weighted means per head and row; the losses by head are not weighted.

    `utility_order` is `order_quality` of the utility over the validation requests; None if they have no such order.
    """

    number: int
    train_loss: float
    validation_loss: float
    validation_losses: dict[str, float]
    utility_order: float | None = None


class Watcher(Protocol):
    """Receives the progress of a training, on rank 0 only. An exception that it raises ends the training."""

    def step(self, step: Step) -> None: ...

    def epoch(self, epoch: Epoch) -> None: ...


class Continued:
    """Passes the progress of a second training on as that of the first one, continued after some steps and epochs."""

    def __init__(self, watcher: Watcher, steps: int, epochs: int) -> None:
        self._watcher, self._steps, self._epochs = watcher, steps, epochs

    def step(self, step: Step) -> None:
        done, total, epoch = step.done + self._steps, step.total + self._steps, step.epoch + self._epochs
        self._watcher.step(replace(step, done=done, total=total, epoch=epoch))

    def epoch(self, epoch: Epoch) -> None:
        self._watcher.epoch(replace(epoch, number=epoch.number + self._epochs))
