"""What a killed training needs to go on: one file, replaced whole, that no other run's settings or data will open."""

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
#: What reading a damaged file raises, weights-only loading's own refusals included.
_DAMAGED = (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError)


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """Where checkpoints go, and how often they are written beside after every epoch.

    Attributes:
        folder: holds one checkpoint, the newest.
        resume: go on from the one that is there, if any; without, one that is there is refused, never overwritten.
        every_s: seconds since the last one.
        every_batches: batches since the last one; None counts none.
    """

    folder: Path
    resume: bool = False
    every_s: float = 600.0
    every_batches: int | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training between two batches.

    Attributes:
        run: what the training is of, from `describe_run`.
        epoch: the one to go on in, from 0.
        batch: the next one in that epoch, from 0.
        loss_sum: of the epoch's rows so far.
        rows_done: how many those are.
        network: weights.
        best: weights of the epoch with the lowest validation loss.
        optimiser: state.
        schedule: state.
        epochs: finished ones, each as a plain dict.
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
    """A folder with at most one checkpoint. One process writes."""

    def __init__(self, plan: CheckpointPlan) -> None:
        self._plan = plan
        self._path = plan.folder / FILE

    def open(self) -> bytes | None:
        """Make the folder, and return the checkpoint to go on from.

        Raises:
            CheckpointError: there is one, and nobody asked to resume; or it is empty.
        """
        self._plan.folder.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            return None
        if not self._plan.resume:
            raise CheckpointError(
                f"{self._path} exists already; --resume {self._plan.folder} goes on from it, or name another folder"
            )
        content = self._path.read_bytes()
        if not content:
            raise CheckpointError(f"the checkpoint cannot be read; delete it to start again ({self._path} is empty)")
        return content

    def write(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint; whoever is killed here leaves the old one or the new one, whole."""
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
    """Read a checkpoint of this run; nothing in it is executed.

    Raises:
        CheckpointError: it is damaged, or of a run with other settings or data; the message says which differ.
    """
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if state.pop("format") != _FORMAT:
            raise CheckpointError("the checkpoint was written by another version of this program; start again without")
        checkpoint = Checkpoint(**state)
    except _DAMAGED as error:
        raise CheckpointError(f"the checkpoint cannot be read; delete it to start again ({error})") from error
    differing = differences(checkpoint.run, run)
    if differing:
        raise CheckpointError(
            f"the checkpoint belongs to another run: {differing}. Resume with what it was started with, "
            "or start again in another folder"
        )
    return checkpoint


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Say what differs between two runs; empty when nothing does."""
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return "; ".join(f"{name} was {theirs.get(name, 'unknown')}, is {ours.get(name, 'unknown')}" for name in names)


def describe_run(*settings: Any, heads: tuple[str, ...], examples: Examples, validation: Examples) -> dict[str, str]:
    """Return all that decides what a training comes to, as text by name.

    Args:
        settings: dataclasses whose fields count.
        heads: in the order of the labels' columns.
        examples: data to learn from.
        validation: data to stop by.

    Cost: a digest of all examples, about a second per gigabyte.
    """
    named = {name: repr(value) for part in settings for name, value in asdict(part).items()}
    data = {"the training data": _digest(examples), "the validation data": _digest(validation)}
    return {**named, "heads": ", ".join(heads), **data}


def digest_of(parameters: Mapping[str, Tensor]) -> str:
    """Return a digest of named tensors; of none, a digest of nothing."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in parameters.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _digest(examples: Examples) -> str:
    batch = examples.batch
    arrays = {**batch.request, **batch.candidate, "splits": batch.row_splits, "labels": examples.labels}
    digest = hashlib.blake2b(digest_size=8)
    for name, array in {**arrays, "ages_s": examples.ages_s}.items():
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()
