"""The settings of a training: what it learns, and how it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from ranker.errors import SettingError
from ranker.training.checkpoint import CheckpointPlan
from ranker.training.progress import Watcher
from ranker.training.ranks import ALONE, Ranks

Precision = Literal["auto", "fp32", "bf16"]


def precision_of(name: str) -> Precision:
    """Return a precision by name. Raises SettingError for one that there is not."""
    for known in get_args(Precision):
        if name == known:
            precision: Precision = known
            return precision
    raise SettingError(f"no precision {name!r}; there are {', '.join(get_args(Precision))}")


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Everything that decides what a network learns, beside its sizes and the data."""

    seed: int = 7
    epochs: int = 4
    #: Epochs in a row without a better validation loss that are waited out; the next one stops training.
    patience: int = 1
    #: Of all ranks together.
    requests_per_batch: int = 48
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    #: How much a head's loss counts; heads that are not named count 1.
    head_weights: dict[str, float] = field(default_factory=dict)
    #: The random time window is uniform up to here; 0 switches it off.
    time_window_h_max: float = 24.0
    #: Share of requests that get a time window.
    time_window_share: float = 1.0
    #: `bf16` runs the network's products in bfloat16, weights stay float32; `auto` does so on CUDA.
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        bounds = {
            "learning_rate": 0 < self.learning_rate < math.inf,
            "epochs": self.epochs >= 1,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "time_window_h_max": 0 <= self.time_window_h_max < math.inf,
            "time_window_share": 0 <= self.time_window_share <= 1,
        }
        for name, holds in bounds.items():
            if not holds:
                raise SettingError(f"{name} cannot be {getattr(self, name)!r}")

    def weights_of(self, heads: Sequence[str]) -> list[float]:
        """Return each head's weight. Raises SettingError for a weight of a head that there is not."""
        for head, weight in self.head_weights.items():
            if head not in heads:
                raise SettingError(f"no head {head!r} to weigh; the data gives the heads {', '.join(heads)}")
            if not 0 <= weight < math.inf:
                raise SettingError(f"the weight of head {head!r} must be a number from 0 on, got {weight:g}")
        weights = [self.head_weights.get(head, 1.0) for head in heads]
        if not any(weights):
            raise SettingError("every head weighs 0: there is nothing to learn")
        return weights


@dataclass(frozen=True, slots=True)
class Execution:
    """How a training is carried out: nothing here is meant to change what is learned."""

    ranks: Ranks = ALONE
    checkpoints: CheckpointPlan | None = None
    watchers: tuple[Watcher, ...] = ()
    #: Cores per process; None takes all that this process may use.
    threads: int | None = None
