"""Checkpoints of a training: one file, replaced atomically, that only a run with equal settings and data can open."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ranker.errors import CheckpointError
from ranker.training.examples import Examples

FILE = "checkpoint.pt"
_FORMAT = 1
#: Errors raised by reading a damaged file, including those of weights-only loading.
_DAMAGED = (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError)


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """Where checkpoints are written, and how often in addition to the end of every epoch.

    Attributes:
        folder: holds one checkpoint, the newest.
        resume: continue from an existing checkpoint. Otherwise an existing checkpoint is an error; it is never
            overwritten.
        every_s: seconds between checkpoints.
        every_batches: batches between checkpoints; None sets no such limit.
    """

    folder: Path
    resume: bool = False
    every_s: float = 600.0
    every_batches: int | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training between two batches.

    Attributes:
        run: description of the run, from `describe_run`.
        epoch: current epoch, counted from 0.
        batch: next batch of that epoch, counted from 0.
        loss_sum: sum of the losses of the epoch's rows so far.
        rows_done: number of those rows.
        network: current weights.
        best: weights of the best epoch.
        optimiser: state of the optimiser.
        schedule: state of the learning-rate schedule.
        epochs: finished epochs, each as a plain dict.
    """

    run: dict[str, str]
    epoch: int
    batch: int
    loss_sum: float
    rows_done: int
    network: dict[str, Any]
    best: dict[str, Any]
    optimiser: dict[str, Any]
    schedule: dict[str, Any]
    epochs: list[dict[str, Any]]


class CheckpointFolder:
    """A folder with at most one checkpoint. Only one process may write to it."""

    def __init__(self, plan: CheckpointPlan) -> None:
        self._plan = plan
        self._path = plan.folder / FILE

    def open(self) -> bytes | None:
        """Create the folder and return the checkpoint to resume from, None if there is none.

        Raises:
            CheckpointError: a checkpoint exists but resuming was not requested, or the file is empty.
        """
        self._plan.folder.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            return None
        if not self._plan.resume:
            raise CheckpointError(
                f"{self._path} already exists; use --resume {self._plan.folder} to continue from it, or choose another "
                "folder"
            )
        content = self._path.read_bytes()
        if not content:
            raise CheckpointError(f"the checkpoint cannot be read; delete it to start again ({self._path} is empty)")
        return content

    def write(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint atomically: a process killed here leaves the old or the new file, complete."""
        partial = self._path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save({"format": _FORMAT, **{name: getattr(checkpoint, name) for name in _FIELDS}}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)
        folder = os.open(self._plan.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


_FIELDS = tuple(Checkpoint.__dataclass_fields__)


def decode_checkpoint(content: bytes, run: Mapping[str, str]) -> Checkpoint:
    """Decode a checkpoint of this run without executing anything in it.

    Raises:
        CheckpointError: it is damaged, or its run has other settings or data; the message names the differences.
    """
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if state.pop("format") != _FORMAT:
            raise CheckpointError("the checkpoint was written by another version of pinrank; start again without it")
        checkpoint = Checkpoint(**state)
    except _DAMAGED as error:
        raise CheckpointError(f"the checkpoint cannot be read; delete it to start again ({error})") from error
    differing = differences(checkpoint.run, run)
    if differing:
        raise CheckpointError(
            f"the checkpoint belongs to another run: {differing}. Resume with the original settings and data, "
            "or start again in another folder"
        )
    return checkpoint


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Describe the differences between two runs; empty if there are none."""
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return "; ".join(
        f"{name} was {theirs.get(name, 'unknown')} and is now {ours.get(name, 'unknown')}" for name in names
    )


def describe_run(*settings: Any, heads: tuple[str, ...], examples: Examples, validation: Examples) -> dict[str, str]:
    """Return everything that determines the result of a training, as text by name.

    Args:
        settings: dataclasses; all of their fields are included.
        heads: in the order of the label columns.
        examples: training examples.
        validation: examples for early stopping.

    Cost: a digest of all examples, about a second per gigabyte.
    """
    named = {name: repr(value) for part in settings for name, value in asdict(part).items()}
    data = {"the training data": _digest(examples), "the validation data": _digest(validation)}
    return {**named, "heads": ", ".join(heads), **data}


def digest_of(parameters: Mapping[str, Tensor]) -> str:
    """Return a digest of named tensors, in their order."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in parameters.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _digest(examples: Examples) -> str:
    batch = examples.batch
    arrays = {**batch.request, **batch.candidate, "splits": batch.row_splits, "labels": examples.labels}
    arrays["ages_s"] = examples.ages_s
    arrays |= {f"pin.{name}": column for name, column in examples.attributes.items()}
    if len(examples.propensities):  # of answered requests; training may weigh by them
        arrays |= {"positions": examples.positions, "propensities": examples.propensities}
    digest = hashlib.blake2b(digest_size=8)
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()
