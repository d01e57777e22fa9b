"""The file of a trained network: plain arrays in an npz archive, and a description of them. No pickles."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from feature_client.groups import EmbeddingSpace, Frozen
from model_store.bundle.archives import decode_arrays
from ranker.embedding.users.fit import FitSettings
from ranker.embedding.users.model import UserModel, sizes_of
from ranker.embedding.users.network import UserNetwork
from ranker.errors import DatasetError

_DESCRIPTION, _PINS, _WEIGHTS = "description", "pin_ids", "network."


class _Description(Frozen):
    format: Literal[1]
    settings: FitSettings
    actions: tuple[str, ...]
    pin_space: EmbeddingSpace | None
    space: EmbeddingSpace
    timed: bool
    until_ms: int | None


def write_network(path: Path, model: UserModel) -> None:
    """Write a network; the file appears when it is complete. Equal networks give equal bytes."""
    described = _Description(
        format=1,
        settings=model.settings,
        actions=model.actions,
        pin_space=model.pin_space,
        space=model.space,
        timed=model.network.sizes.timed,
        until_ms=model.until_ms,
    )
    arrays: dict[str, Any] = {
        _DESCRIPTION: np.frombuffer(described.model_dump_json().encode(), np.uint8),
        _PINS: model.pin_ids,
    }
    arrays |= {f"{_WEIGHTS}{name}": weight.numpy() for name, weight in model.network.state_dict().items()}
    content = io.BytesIO()
    np.savez(content, **arrays)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content.getvalue())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_network(path: Path) -> UserModel:
    """Read what `write_network` has written.

    Raises:
        DatasetError: the file does not exist, or is damaged. The message names the file and the fix.
    """
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; train a network with `pinrank embed users`")
    try:
        arrays = decode_arrays(path.read_bytes())
        described = _Description.model_validate_json(arrays.pop(_DESCRIPTION).tobytes())
        pin_ids = arrays.pop(_PINS)
        if pin_ids.ndim != 1 or pin_ids.dtype != np.uint64 or (pin_ids[1:] <= pin_ids[:-1]).any():
            raise ValueError("its pins are not ascending identifiers")
        sizes = sizes_of(
            described.settings, len(pin_ids), described.pin_space, described.actions, timed=described.timed
        )
        network = UserNetwork(sizes)
        weights = {name.removeprefix(_WEIGHTS): torch.from_numpy(array) for name, array in arrays.items()}
        network.load_state_dict(weights)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DatasetError(
            f"{path} is no network of users, or is damaged: {error}; train it again with `pinrank embed users`"
        ) from error
    return UserModel(
        network=network.eval(),
        pin_ids=pin_ids,
        actions=described.actions,
        pin_space=described.pin_space,
        space=described.space,
        until_ms=described.until_ms,
        settings=described.settings,
    )
