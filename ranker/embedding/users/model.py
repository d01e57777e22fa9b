"""A trained network of users' vectors, with all that it must be given, and its training from a log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from feature_client.groups import EmbeddingSpace
from ranker.data.actions import ActionLog
from ranker.data.embeddings import PinEmbeddings, content_digest
from ranker.embedding.users.fit import FitSettings, fit
from ranker.embedding.users.network import NetworkSizes, UserNetwork
from ranker.embedding.users.sequences import PinRows, Sequences
from ranker.errors import DatasetError, SettingError

#: Version of the producer. Raise it when the same data would give other vectors.
PRODUCER_VERSION = 1


@dataclass(frozen=True, slots=True)
class UserModel:
    """A trained network, and what it must be given.

    Attributes:
        network: in evaluation mode.
        pin_ids: uint64[K], ascending; the pins of its table.
        actions: the vocabulary of actions.
        pin_space: the space of the given vectors of pins; None if the network reads none.
        space: the space of its users' vectors.
        until_ms: it was trained on events before this Unix time in milliseconds; None for data without times.
        settings: how it was trained.
    """

    network: UserNetwork
    pin_ids: np.ndarray
    actions: tuple[str, ...]
    pin_space: EmbeddingSpace | None
    space: EmbeddingSpace
    until_ms: int | None
    settings: FitSettings


def train_users(
    log: ActionLog,
    pin_vectors: PinEmbeddings | None,
    before_ms: int,
    settings: FitSettings,
    name: str,
    *,
    timed: bool = True,
    progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None,
) -> UserModel:
    """Train a network on a log; equal arguments give equal weights on one machine.

    Args:
        log: the history; only events strictly before `before_ms` are read.
        pin_vectors: the given vectors of pins; None if there are none.
        before_ms: end of the producer's window, Unix time in milliseconds.
        settings: how to train.
        name: name of the dataset, after which the space is named.
        timed: whether the log has times; see `ordered_log`.
        progress: told after every batch.

    Raises:
        DatasetError: the window has too few actions.
        SettingError: the network would know nothing of pins.
        DivergedError: the loss is no longer finite.
    """
    if pin_vectors is None and not settings.table:
        raise SettingError("a network without a table of pins needs given vectors of pins (--pins)")
    pin_ids = np.unique(log.pin_ids[log.pin[: log.before(before_ms)]]) if settings.table else np.zeros(0, np.uint64)
    readable = PinRows.of(log.pin_ids, pin_ids, pin_vectors).readable
    whole = Sequences.of_log(log, readable, before_ms, timed=timed)
    if not len(whole.pins):
        raise DatasetError("no action in the window is on a pin that the network can know; use more data")
    # Users and pins that only later events know must not even be counted.
    occurring, pin = np.unique(whole.pins, return_inverse=True)
    active = np.flatnonzero(np.diff(whole.splits))
    sequences = replace(whole, pins=pin, splits=np.append(whole.splits[active], len(pin)))
    pins = PinRows.of(log.pin_ids[occurring], pin_ids, pin_vectors)
    pin_space = None if pin_vectors is None else pin_vectors.space
    sizes = sizes_of(settings, len(pin_ids), pin_space, log.schema.names, timed=timed)
    given = log.user_ids[whole.users], log.pin_ids[whole.pins], sequences.actions, sequences.liked
    times = () if sequences.time_ms is None else (sequences.time_ms,)
    used = pins.vectors, "" if pin_space is None else pin_space.ref
    content = content_digest("users", PRODUCER_VERSION, settings, log.schema.names, *used, *given, *times)
    space = EmbeddingSpace(name=f"{name}-users", version=PRODUCER_VERSION, dim=settings.dim, content=content)
    network = fit(sequences, pins, sizes, settings, progress)
    return UserModel(network, pin_ids, log.schema.names, pin_space, space, before_ms if timed else None, settings)


def sizes_of(
    settings: FitSettings, pins: int, pin_space: EmbeddingSpace | None, actions: tuple[str, ...], *, timed: bool
) -> NetworkSizes:
    """Return the sizes of a network."""
    return NetworkSizes(
        pins=pins,
        pin_dim=0 if pin_space is None else pin_space.dim,
        actions=len(actions),
        timed=timed,
        dim=settings.dim,
        layers=settings.layers,
        heads=settings.heads,
        length_max=settings.length_max,
    )
