"""A training run of less than a second on generated examples, for tests that kill it or start it with torchrun."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # imported before forks, because optimisers import it at their first step

from kernels.engine import FeatureBatch
from model_store.model.utility import UtilityTable, load_utility
from ranker.data.actions import RATINGS
from ranker.data.embeddings import space_of
from ranker.export.manifest import draft_manifest
from ranker.network.model import NetworkConfig, RankerNetwork
from ranker.training.checkpoint import CheckpointPlan
from ranker.training.examples import Examples
from ranker.training.fit import train
from ranker.training.progress import Epoch, Step
from ranker.training.ranks import joined
from ranker.training.settings import Execution, TrainingConfig

HEADS = ("save", "hide")
LENGTH = 12
SIZES = NetworkConfig(heads=2, actions=4, surfaces=2, scalars=4, dim=8, hidden=(16,), encoder_layers=1, readout_dim=8)
#: 33 requests give three minibatches an epoch. The last one has a single request, so a second rank gets none.
CONFIG = TrainingConfig(seed=5, epochs=2, patience=5, requests_per_batch=16, learning_rate=5e-3, time_window_h_max=24.0)
UTILITY = load_utility(
    b"""
    [surfaces.home]
    weights = { pinner = 1.0 }
    utilities = { pinner = "save * (1 + pin.creator_tail) - hide" }
    [surfaces.related]
    weights = { pinner = 1.0 }
    utilities = { pinner = "save" }
    """,
    draft_manifest("toy", space_of("toy"), RATINGS, HEADS, sequence_length=LENGTH),
)


def examples(seed: int, requests: int = 33) -> Examples:
    """Return examples whose labels follow from the tensors, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, 6, requests)
    rows = int(counts.sum())
    lengths = rng.integers(0, LENGTH + 1, requests)
    present = np.arange(LENGTH) < lengths[:, None]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    batch = FeatureBatch(
        {
            "user_embedding": normal(requests, 8),
            "user_scalars": normal(requests, 4),
            "surface": rng.integers(0, 2, requests),
            "query": normal(requests, 8),
            "sequence_actions": np.where(present, rng.integers(1, 5, (requests, LENGTH)), 0),
            "sequence_embeddings": normal(requests, LENGTH, 8) * present[:, :, None],
        },
        {"pin_embedding": normal(rows, 8), "pin_scalars": normal(rows, 4)},
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
    )
    labels = (batch.candidate["pin_scalars"][:, :2] > 0).astype(np.float32)
    ages_s = np.where(present, np.cumsum(rng.exponential(10_000, (requests, LENGTH)), axis=1), np.inf)
    # Training does not read the other fields, so they stay 0.
    fields: dict[str, Any] = {f.name: np.zeros(requests, np.int64) for f in dataclasses.fields(Examples)}
    fields |= {"batch": batch, "labels": labels, "popularity": np.zeros_like(labels)}
    fields |= {"attributes": {"creator_tail": rng.random(rows).astype(np.float32)}}
    fields |= {"pins": np.zeros(rows, np.int64), "positions": np.zeros(rows, np.int64), "propensities": np.ones(rows)}
    return Examples(**{**fields, "ages_s": ages_s.astype(np.float32)})


def learn(
    execution: Execution,
    config: TrainingConfig = CONFIG,
    dropout: float = 0.1,
    utility: UtilityTable | None = UTILITY,
) -> tuple[RankerNetwork, list[Epoch]]:
    sizes = dataclasses.replace(SIZES, dropout=dropout)
    return train(sizes, HEADS, examples(1), examples(2, 11), config, execution, utility=utility)


class KilledAt:
    """Kills this process with SIGKILL after a number of batches."""

    def __init__(self, batches: int) -> None:
        self._batches = batches

    def step(self, step: Step) -> None:
        if step.done == self._batches:
            os.kill(os.getpid(), signal.SIGKILL)

    def epoch(self, epoch: Epoch) -> None: ...


def killed_in_fsync(times: int) -> None:
    """Kill this process at the n-th fsync of a file."""
    real, left = os.fsync, [times]

    def fsync(fd: Any) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        real(fd)

    os.fsync = fsync


def main(mode: str, folder: str, count: int) -> None:
    if mode == "rank":
        with joined("cpu") as ranks:
            execution = Execution(ranks, CheckpointPlan(Path(folder), resume=True, every_batches=2), threads=1)
            # The second time, both ranks resume from the final checkpoint that rank 0 wrote the first time.
            for _ in range(2):
                network, epochs = learn(execution, dropout=0.0)
            losses = [(epoch.train_loss, epoch.validation_loss, epoch.utility_order) for epoch in epochs]
            torch.save({"weights": network.state_dict(), "losses": losses}, Path(folder) / f"rank-{ranks.rank}.pt")
        return
    if mode == "fsync":
        killed_in_fsync(count)
    watchers = (KilledAt(count),) if mode == "batch" else ()
    learn(Execution(checkpoints=CheckpointPlan(Path(folder), every_batches=2), watchers=watchers, threads=1))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
