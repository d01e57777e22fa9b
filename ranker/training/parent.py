"""Training on from a published version: its parameters, its pin vectors, and what it has not learned from."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from model_store.bundle.archives import decode_arrays
from model_store.bundle.files import EMBEDDINGS, PARAMETERS, Bundle
from ranker.data.actions import ActionLog
from ranker.data.embeddings import PinEmbeddings, embeddings_of
from ranker.data.requests import Split
from ranker.errors import SettingError
from ranker.network.model import NetworkConfig, RankerNetwork

#: The network's sizes, beside its parameters.
_CONFIG = "config"
#: Of the events that are new: learned from, then stopped and calibrated on; the newest are measured on.
_TRAIN_SHARE, _VALIDATION_SHARE = 0.7, 0.15
#: Fewer new events teach nothing that could be measured.
EVENTS_MIN = 200


@dataclass(frozen=True, slots=True, eq=False)
class Parent:
    """A version to train on from.

    Attributes:
        bundle: as published.
        config: sizes of its network.
        parameters: its network's, by name.
        embeddings: the vectors that it was trained on; its successor reads the same space.
        learned_until_ms: it has seen nothing later.
    """

    bundle: Bundle
    config: NetworkConfig
    parameters: Mapping[str, Tensor]
    embeddings: PinEmbeddings
    learned_until_ms: int

    @classmethod
    def of(cls, bundle: Bundle) -> Parent:
        """Read what a bundle brings for training on. Raises SettingError when it does not."""
        ref, until_ms = bundle.manifest.ref, bundle.manifest.lineage.learned_until_ms
        lacking = [name for name in (PARAMETERS, EMBEDDINGS) if name not in bundle.files]
        if lacking or until_ms is None:
            what = ", ".join(lacking) or "the time that it learned until"
            raise SettingError(
                f"{ref} cannot be trained on from: it carries no {what}; make a first version without --parent, which "
                "later ones can be trained on from"
            )
        config, parameters = decode_parameters(bundle.files[PARAMETERS])
        return cls(bundle, config, parameters, embeddings_of(bundle), until_ms)


def encode_parameters(network: RankerNetwork) -> bytes:
    """Encode a network's sizes and parameters as an npz archive of plain arrays."""
    arrays = {name: value.detach().cpu().numpy() for name, value in network.state_dict().items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **{_CONFIG: np.array(json.dumps(asdict(network.config)))})  # type: ignore[arg-type]
    return buffer.getvalue()


def decode_parameters(content: bytes) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """Decode `encode_parameters`. Raises SettingError for anything else."""
    try:
        arrays = decode_arrays(content)
        sizes = json.loads(str(arrays.pop(_CONFIG)))
        config = NetworkConfig(**{**sizes, "hidden": tuple(sizes["hidden"])})
        parameters = {name: torch.from_numpy(array) for name, array in arrays.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise SettingError(f"the bundle's {PARAMETERS} holds no parameters of a ranker: {error}") from error
    return config, parameters


def split_after(log: ActionLog, until_ms: int, before: Split) -> Split:
    """Cut the events from `until_ms` on into what is learned from, stopped on, and measured on, oldest first.

    Args:
        log: all events; rows and sequences still come from the whole past.
        until_ms: what came before is known.
        before: how many slices each part has.

    Raises:
        SettingError: there are too few new events.
    """
    events = len(log.time_ms)
    new = events - log.before(until_ms)
    if new < EVENTS_MIN:
        raise SettingError(
            f"{new} events are newer than what the parent learned from; at least {EVENTS_MIN} are needed"
        )
    start, share = 1 - new / events, new / events
    return Split(
        producer_until=start,
        train_until=start + _TRAIN_SHARE * share,
        validation_until=start + (_TRAIN_SHARE + _VALIDATION_SHARE) * share,
        train_slices=before.train_slices,
        validation_slices=before.validation_slices,
        test_slices=before.test_slices,
    )
