"""The file of a trained network: plain arrays in an npz archive, and a description of them. No pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from feature_client.groups import EmbeddingSpace, Frozen
from ranker.embedding.network_archive import decode_archive, encode_archive, write_archive
from ranker.embedding.users.fit import FitSettings
from ranker.embedding.users.model import UserModel, sizes_of
from ranker.embedding.users.network import UserNetwork
from ranker.errors import DatasetError


class _Description(Frozen):
    format: Literal[1]
    settings: FitSettings
    actions: tuple[str, ...]
    pin_space: EmbeddingSpace | None
    space: EmbeddingSpace
    timed: bool
    until_ms: int | None


def encode_network(model: UserModel) -> bytes:
    """Encode a network; equal networks give equal bytes."""
    described = _Description(
        format=1,
        settings=model.settings,
        actions=model.actions,
        pin_space=model.pin_space,
        space=model.space,
        timed=model.network.sizes.timed,
        until_ms=model.until_ms,
    )
    return encode_archive(described, model.pin_ids, model.network)


def decode_network(content: bytes) -> UserModel:
    """Decode what `encode_network` returned. Raises ValueError for anything else."""
    try:
        archive = decode_archive(content)
        described, pin_ids = _Description.model_validate_json(archive.about), archive.pin_ids
        sizes = sizes_of(
            described.settings, len(pin_ids), described.pin_space, described.actions, timed=described.timed
        )
        network = UserNetwork(sizes)
        network.load_state_dict(archive.weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"it holds no network of users: {error}") from error
    return UserModel(
        network=network.eval(),
        pin_ids=pin_ids,
        actions=described.actions,
        pin_space=described.pin_space,
        space=described.space,
        until_ms=described.until_ms,
        settings=described.settings,
    )


def write_network(path: Path, model: UserModel) -> None:
    """Write a network; the file appears when it is complete."""
    write_archive(path, encode_network(model))


def read_network(path: Path) -> UserModel:
    """Read what `write_network` has written.

    Raises:
        DatasetError: the file does not exist, or is damaged. The message names the file and the fix.
    """
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; train a network with `pinrank embed users`")
    try:
        return decode_network(path.read_bytes())
    except ValueError as error:
        raise DatasetError(
            f"{path} is no network of users, or is damaged: {error}; train it again with `pinrank embed users`"
        ) from error
