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
    """Return a precision by name. Raises SettingError for an unknown name."""
    for known in get_args(Precision):
        if name == known:
            precision: Precision = known
            return precision
    raise SettingError(f"unknown precision {name!r}; choose one of {', '.join(get_args(Precision))}")


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Everything that determines what a network learns, other than its sizes and the data."""

    seed: int = 7
    epochs: int = 3
    #: Successive epochs to tolerate that are not better (`best_epoch`); one more stops the training.
    patience: int = 1
    #: Epochs over the newest requests after all others; 0 leaves them out.
    newest_epochs: int = 3
    #: Over all ranks.
    requests_per_batch: int = 24
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    #: Weight of each head's loss; 1 for heads that are not named.
    head_weights: dict[str, float] = field(default_factory=dict)
    #: Upper bound of the random time window, which is uniform from 0; 0 disables the window.
    time_window_h_max: float = 0.0
    #: Share of the requests to which a time window applies.
    time_window_share: float = 1.0
    #: The largest weight of `ranker.training.off_policy`; None weighs all rows alike.
    off_policy_clip: float | None = None
    #: `bf16` computes products in bfloat16 and keeps weights in float32; `auto` means `bf16` on CUDA.
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        bounds = {
            "learning_rate": 0 < self.learning_rate < math.inf,
            "epochs": self.epochs >= 1,
            "newest_epochs": self.newest_epochs >= 0,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "time_window_h_max": 0 <= self.time_window_h_max < math.inf,
            "time_window_share": 0 <= self.time_window_share <= 1,
            "off_policy_clip": self.off_policy_clip is None or 1 <= self.off_policy_clip < math.inf,
        }
        for name, holds in bounds.items():
            if not holds:
                raise SettingError(f"{name} must not be {getattr(self, name)!r}")

    def weights_of(self, heads: Sequence[str]) -> list[float]:
        """Return the weight of each head. Raises SettingError for an unknown head or an invalid weight."""
        for head, weight in self.head_weights.items():
            if head not in heads:
                raise SettingError(
                    f"cannot weigh the unknown head {head!r}; the heads of this data are {', '.join(heads)}"
                )
            if not 0 <= weight < math.inf:
                raise SettingError(
                    f"the weight of head {head!r} must be a finite number of at least 0, but is {weight:g}"
                )
        weights = [self.head_weights.get(head, 1.0) for head in heads]
        if not any(weights):
            raise SettingError(
                "every head has weight 0, so there is nothing to learn; give at least one head a weight above 0"
            )
        return weights


@dataclass(frozen=True, slots=True)
class Execution:
    """How a training runs. None of these settings is meant to change what the network learns."""

    ranks: Ranks = ALONE
    checkpoints: CheckpointPlan | None = None
    watchers: tuple[Watcher, ...] = ()
    #: Cores per process; None uses all cores that are available to this process.
    threads: int | None = None
