"""Vectors of users as of a time: of many users at many times, of all once a day, and of those with new actions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ranker.data.actions import ActionLog
from ranker.data.embeddings import PinEmbeddings
from ranker.embedding.users.model import UserModel
from ranker.embedding.users.network import tensors
from ranker.embedding.users.sequences import PinRows, Sequences, windows
from ranker.embedding.vector_file import UserVectors, VectorsOrigin
from ranker.errors import DatasetError

#: Users in a run of the network. The number is always the same, and so is what each run computes for a user, to the
#: last bit, whoever the others are.
_BLOCK = 32
#: The narrowest window.
_WIDTH_MIN = 16


def user_vectors_at(
    model: UserModel,
    log: ActionLog,
    pin_vectors: PinEmbeddings | None,
    users: np.ndarray,
    at_ms: np.ndarray,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> np.ndarray:
    """Compute users' vectors as of given times.

    Args:
        model: the trained network.
        log: the history; of each user, only events strictly before `at_ms` are read.
        pin_vectors: the given vectors of pins, in `model.pin_space`; None if the network reads none.
        users: int64[N], positions in `log.user_ids`; a user may occur several times.
        at_ms: int64[N], Unix time in milliseconds.
        progress: told how many distinct histories are done.

    Returns:
        float16[N, D], rows of length one. Zeros for users without an earlier event on a pin that the network knows or
        that has a vector. A row depends on the user's own events only, so it is the same, to the last bit, whichever
        other rows are asked for.

    Raises:
        DatasetError: the log has other actions than the network knows, or `pin_vectors` are of another space.

    Cost: on one core, with 64 numbers and two layers, about 0.2 ms for a history of 12 actions, 0.6 ms for 60, and
        4 ms for 256. Users are computed once for all times between which they did nothing.
    """
    if log.schema.names != model.actions:
        raise DatasetError(
            f"the data has the actions {', '.join(log.schema.names)}, and the network was trained on "
            f"{', '.join(model.actions)}; pass the actions.toml of its training with --actions"
        )
    pins = PinRows.of(log.pin_ids, model.pin_ids, _checked(model, pin_vectors))
    sequences = Sequences.of_log(log, pins.readable, int(at_ms.max(initial=0)), timed=model.network.sizes.timed)
    stop = sequences.stops(users, np.searchsorted(log.time_ms, at_ms))
    found = np.zeros((len(users), model.space.dim), np.float16)
    some = np.flatnonzero(stop > sequences.splits[users])
    stops, inverse = np.unique(stop[some], return_inverse=True)  # a stop belongs to one user
    first = np.maximum(sequences.splits[sequences.users[stops - 1]], stops - model.network.sizes.length_max)
    found[some] = _last_vectors(model, sequences, pins, first, stops, progress)[inverse]
    return found


def daily_vectors(
    model: UserModel,
    log: ActionLog,
    pin_vectors: PinEmbeddings | None,
    at_ms: int,
    made_by: str,
    previous: UserVectors | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> UserVectors:
    """Compute the vectors of all users as of a time, or only of those with actions since the previous ones.

    Args:
        model: the trained network.
        log: the history; only events strictly before `at_ms` are read.
        pin_vectors: see `user_vectors_at`.
        at_ms: Unix time in milliseconds.
        made_by: the command.
        previous: vectors as of an earlier time, of the same network. Users without an event since keep theirs.
        progress: told how many are done.

    Returns:
        The vectors of all users who have one. The same as without `previous`, if the pins' vectors are the same.

    Raises:
        DatasetError: as `user_vectors_at`; or `previous` is of another network, or of a later time.
    """
    users = np.unique(log.user[: log.before(at_ms)])
    kept_ids, kept = np.zeros(0, np.uint64), np.zeros((0, model.space.dim), np.float16)
    if previous is not None:
        since_ms = _until_ms(previous, model, at_ms)
        users = np.unique(log.user[log.before(since_ms) : log.before(at_ms)])
        keep = ~np.isin(previous.user_ids, log.user_ids[users])
        kept_ids, kept = previous.user_ids[keep], previous.vectors[keep]
    made = user_vectors_at(model, log, pin_vectors, users, np.full(len(users), at_ms), progress)
    some = made.any(axis=1)
    ids = np.concatenate([kept_ids, log.user_ids[users][some]])
    order = np.argsort(ids)
    origin = VectorsOrigin(space=model.space, until_ms=at_ms, made_by=made_by, entity="user")
    return UserVectors(ids[order], np.concatenate([kept, made[some]])[order], origin)


def vectors_of_pins(model: UserModel, pin_ids: np.ndarray, pin_vectors: PinEmbeddings | None) -> PinEmbeddings:
    """Return the vectors of pins in the space of users: a user's dot products with them order all pins.

    Args:
        model: the trained network.
        pin_ids: uint64[P], ascending.
        pin_vectors: see `user_vectors_at`.

    Returns:
        Vectors of those pins that the network knows or that have a given vector.
    """
    pins = PinRows.of(pin_ids, model.pin_ids, _checked(model, pin_vectors))
    some = np.flatnonzero(pins.readable)
    found = np.zeros((len(some), model.space.dim), np.float16)
    with torch.inference_mode():
        for start in range(0, len(some), 1 << 14):
            part = some[start : start + (1 << 14)]
            rows, vectors = torch.from_numpy(pins.rows[part]), torch.from_numpy(pins.vectors[part].astype(np.float32))
            found[start : start + len(part)] = model.network.pin_vectors(rows, vectors).numpy()
    return PinEmbeddings(pin_ids[some], found, model.space)


def _checked(model: UserModel, pin_vectors: PinEmbeddings | None) -> PinEmbeddings | None:
    given = None if pin_vectors is None else pin_vectors.space
    if given != model.pin_space:
        needed, got = ("none" if space is None else space.ref for space in (model.pin_space, given))
        raise DatasetError(f"the network reads pins' vectors of {needed}, and got {got}; pass those of its training")
    return pin_vectors


def _until_ms(previous: UserVectors, model: UserModel, at_ms: int) -> int:
    origin = previous.origin
    if origin.space != model.space:
        raise DatasetError(
            f"the previous vectors are of {origin.space.ref}, and the network makes {model.space.ref}; they cannot be "
            "mixed: leave the previous ones out"
        )
    if origin.until_ms is None or origin.until_ms > at_ms:
        raise DatasetError("the previous vectors are not known to be older than the new ones; leave them out")
    return origin.until_ms


def _last_vectors(
    model: UserModel,
    sequences: Sequences,
    pins: PinRows,
    first: np.ndarray,
    stop: np.ndarray,
    progress: Callable[[int, int], None],
) -> np.ndarray:
    """Return float16[B, D], the vector after the last action of each window.

    Windows of about equal lengths go through the network together, always as many of the same width.
    """
    found = np.zeros((len(first), model.space.dim), np.float16)
    width = np.maximum(_WIDTH_MIN, 1 << np.ceil(np.log2(np.maximum(stop - first, 1))).astype(np.int64))
    done = 0
    with torch.inference_mode():
        for columns in np.unique(width):
            of_width = np.flatnonzero(width == columns)
            for start in range(0, len(of_width), _BLOCK):
                own = of_width[start : start + _BLOCK]
                filled = np.resize(own, _BLOCK)
                read = windows(sequences, pins, first[filled], stop[filled], int(columns))
                states = model.network.states(*tensors(read))
                last = states[torch.arange(_BLOCK), torch.from_numpy(read.lengths - 1)]
                found[own] = model.network.user_vectors(last).numpy()[: len(own)]
                done += len(own)
                progress(done, len(first))
    return found
