"""Networks as files: weights and what they were trained for, as an archive of plain arrays."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from model_store.bundle.archives import decode_arrays

_ABOUT, _PIN_IDS, _WEIGHT = "about", "pin_ids", "weight."


@dataclass(frozen=True, slots=True)
class NetworkArchive:
    """What a file holds.

    Attributes:
        about: a description, as JSON.
        pin_ids: uint64[P], ascending, the pins of the training.
        weights: the network's parameters by name.
        arrays: all others by name.
    """

    about: bytes
    pin_ids: np.ndarray
    weights: dict[str, Tensor]
    arrays: dict[str, np.ndarray]


def weights_of(network: nn.Module) -> dict[str, np.ndarray]:
    """Return the parameters of a network by name."""
    return {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}


def encode_archive(
    about: BaseModel,
    pin_ids: np.ndarray,
    network: nn.Module,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """Encode a network; equal networks give equal bytes."""
    held = {_ABOUT: np.frombuffer(about.model_dump_json().encode(), np.uint8), _PIN_IDS: pin_ids, **(arrays or {})}
    held |= {_WEIGHT + name: array for name, array in weights_of(network).items()}
    content = io.BytesIO()
    np.savez(content, **held)  # type: ignore[arg-type]  # of NumPy
    return content.getvalue()


def write_archive(path: Path, content: bytes) -> None:
    """Write what `encode_archive` returned; the file appears when it is complete."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def decode_archive(content: bytes) -> NetworkArchive:
    """Decode what `encode_archive` returned.

    Raises:
        ValueError: it is no such archive, or its pins are not ascending identifiers.
        KeyError: it lacks an array.
    """
    arrays = decode_arrays(content)
    about, pin_ids = arrays.pop(_ABOUT).tobytes(), arrays.pop(_PIN_IDS)
    if pin_ids.ndim != 1 or pin_ids.dtype != np.uint64 or (pin_ids[1:] <= pin_ids[:-1]).any():
        raise ValueError("its pins are not ascending identifiers")
    weights = {
        name.removeprefix(_WEIGHT): torch.from_numpy(arrays.pop(name))
        for name in [name for name in arrays if name.startswith(_WEIGHT)]
    }
    return NetworkArchive(about, pin_ids, weights, arrays)
