"""Training that continues from a published version: its parameters, pin vectors, and the events it has not seen."""

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

#: Name of the archive's entry that holds the network's sizes.
_CONFIG = "config"
#: Shares of the new events for training, and for early stopping and calibration; the newest are for measuring.
_TRAIN_SHARE, _VALIDATION_SHARE = 0.7, 0.15
#: Of a log without older events, the oldest only serve as the past that features are made of.
_PAST_SHARE = 0.1
#: With fewer new events, nothing measurable can be learned.
EVENTS_MIN = 200


@dataclass(frozen=True, slots=True, eq=False)
class Parent:
    """A version to continue training from.

    Attributes:
        bundle: the published bundle.
        config: sizes of its network.
        parameters: parameters of its network, by name.
        embeddings: vectors that it was trained on; its successor reads the same space.
        learned_until_ms: Unix time in milliseconds; it has seen no later event.
    """

    bundle: Bundle
    config: NetworkConfig
    parameters: Mapping[str, Tensor]
    embeddings: PinEmbeddings
    learned_until_ms: int

    @classmethod
    def of(cls, bundle: Bundle) -> Parent:
        """Read what a bundle carries for further training. Raises SettingError if it lacks any of it."""
        ref, until_ms = bundle.manifest.ref, bundle.manifest.lineage.learned_until_ms
        lacking = [name for name in (PARAMETERS, EMBEDDINGS) if name not in bundle.files]
        if lacking or until_ms is None:
            what = ", ".join(lacking) or "time until which it has learned"
            raise SettingError(
                f"cannot continue training from {ref}: it carries no {what}; train a first version without --parent "
                "and continue from that one"
            )
        config, parameters = decode_parameters(bundle.files[PARAMETERS])
        made = {name: value.shape for name, value in RankerNetwork(config).state_dict().items()}
        if made != {name: value.shape for name, value in parameters.items()}:
            raise SettingError(
                f"cannot continue training from {ref}: older code made it, with other layers for the same sizes; train "
                "a first version without --parent and continue from that one"
            )
        return cls(bundle, config, parameters, embeddings_of(bundle), until_ms)


def encode_parameters(network: RankerNetwork) -> bytes:
    """Encode the sizes and parameters of a network as an npz archive of plain arrays."""
    sizes = asdict(network.config)
    for name in ("interests", "user_vector", "crossed_dim"):
        if not sizes[name]:  # earlier versions of this code do not know it, and read the others
            del sizes[name]
    arrays = {name: value.detach().cpu().numpy() for name, value in network.state_dict().items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **{_CONFIG: np.array(json.dumps(sizes))})  # type: ignore[arg-type]
    return buffer.getvalue()


def decode_parameters(content: bytes) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """Decode the result of `encode_parameters`. Raises SettingError for anything else."""
    try:
        arrays = decode_arrays(content)
        sizes = json.loads(str(arrays.pop(_CONFIG)))
        config = NetworkConfig(**{**sizes, "hidden": tuple(sizes["hidden"])})
        parameters = {name: torch.from_numpy(array) for name, array in arrays.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise SettingError(f"the bundle's {PARAMETERS} does not hold the parameters of a ranker: {error}") from error
    return config, parameters


def split_after(log: ActionLog, until_ms: int, before: Split) -> Split:
    """Split the events from `until_ms` on into training, validation and test parts, oldest first.

    Args:
        log: all events; features and sequences still come from the whole past. If it has no older event, its oldest
            tenth only serves as the past.
        until_ms: Unix time in milliseconds; the parent knows everything earlier.
        before: gives the number of slices of each part.

    Raises:
        SettingError: there are too few new events.
    """
    events = len(log.time_ms)
    new = events - log.before(until_ms)
    if new < EVENTS_MIN:
        raise _too_few(new, "events")
    return _split_from(max(1 - new / events, _PAST_SHARE if new == events else 0.0), before)


def split_of_new(before: Split, count: int, what: str) -> Split:
    """Split items that are all newer than those the parent learned from, in the same proportions.

    Args:
        before: gives the number of slices of each part.
        count: how many items there are.
        what: what they are, for the message.

    Raises:
        SettingError: there are too few.
    """
    if count < EVENTS_MIN:
        raise _too_few(count, what)
    return _split_from(before.producer_until, before)


def _too_few(count: int, what: str) -> SettingError:
    return SettingError(
        f"only {count} {what} are newer than those the parent learned from; at least {EVENTS_MIN} are needed"
    )


def _split_from(start: float, before: Split) -> Split:
    share = 1 - start
    return Split(
        producer_until=start,
        train_until=start + _TRAIN_SHARE * share,
        validation_until=start + (_TRAIN_SHARE + _VALIDATION_SHARE) * share,
        train_slices=before.train_slices,
        validation_slices=before.validation_slices,
        test_slices=before.test_slices,
    )
