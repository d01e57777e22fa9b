"""How similar a candidate is to its user, the query and each kind of past action: the products a ranker starts from.

One function computes them from the assembled tensors of a request, so that training, serving and the baselines that a
network is held against read the same numbers. A network has to learn these products from the vectors; a tree cannot.
`kernels/native/similarities.cpp` computes them; where the library is not built, NumPy does, and gives the same bits.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from kernels.engine import FeatureBatch
from kernels.native.library import address, library_if_built
from model_store.bundle.tensor_sources import similarity_count

#: The newest actions that have columns of their own; as in similarities.cpp.
NEWEST = 5
#: The struct `Compared` of similarities.cpp.
_COMPARED = struct.Struct("=9q")


def similarity_names(actions: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the columns of `similarities` for these kinds of action: K = 6 + 2A names.

    `user` and `query` are dot products. All others are cosines between the candidate and the pins of the sequence: over
    all of them, over the newest five, and over those of one kind of action.
    """
    groups = ("sequence", f"newest_{NEWEST}", *actions)
    return ("user", "query", *(f"{group}_{statistic}" for group in groups for statistic in ("max", "mean")))


def similarities(
    pins: np.ndarray,
    user: np.ndarray,
    query: np.ndarray,
    sequence: np.ndarray,
    sequence_actions: np.ndarray,
    actions: int,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Compare the candidates of one request with its user, its query and its sequence.

    Args:
        pins: float32[N, D], vectors of the candidates.
        user: float32[D], in the same space.
        query: float32[D], zeros without a query.
        sequence: float32[L, D], vectors of the pins of the newest actions, newest first, zeros past the end.
        sequence_actions: int64[L], the code of each action plus one, 0 past the end.
        actions: A, the number of kinds of action.
        out: float32[N, K], without gaps, for the result.

    Returns:
        float32[N, 6 + 2A], in the order of `similarity_names`; the first two columns if L is 0. A cosine with a vector
        of zeros is 0, and so are the columns of a sequence, or a kind of action, without entries. What is not finite in
        a vector stays not finite.

    Raises:
        ValueError: the vectors differ in their dimensions.

    Cost: about 25 us for 128 candidates, 100 actions and 32 dimensions.
    """
    dim = pins.shape[1:]
    if not user.shape == query.shape == dim or (len(sequence) and sequence.shape[1:] != dim):
        raise ValueError(
            f"vectors of different dimensions: {pins.shape}, {user.shape}, {query.shape}, {sequence.shape}"
        )
    found = np.empty((len(pins), similarity_count(len(sequence), actions)), np.float32) if out is None else out
    native = native_similarities()
    if native is None:
        found[:] = similarities_in_numpy(pins, user, query, sequence, sequence_actions, actions)
        return found
    arrays: list[np.ndarray] = [np.ascontiguousarray(array, np.float32) for array in (pins, user, query, sequence)]
    arrays.append(np.ascontiguousarray(sequence_actions, np.int64))
    native.compare(*map(address, arrays), *pins.shape, len(sequence), actions, address(found))
    return found


def similarities_in_numpy(
    pins: np.ndarray,
    user: np.ndarray,
    query: np.ndarray,
    sequence: np.ndarray,
    sequence_actions: np.ndarray,
    actions: int,
) -> np.ndarray:
    """Do the same in NumPy: the reference."""
    found = np.zeros((len(pins), similarity_count(len(sequence), actions)), np.float32)
    found[:, :2] = _products(pins, np.stack([user, query]))
    length = int(np.count_nonzero(sequence_actions))  # entries are newest first, and the padding follows them
    if not length:
        return found
    candidates, past = _unit(pins), _unit(sequence[:length])
    cosines, kinds = _products(candidates, past), sequence_actions[:length]
    members = [np.ones(length, bool), np.arange(length) < NEWEST, *(kinds == code + 1 for code in range(actions))]
    for place, member in enumerate(members):
        if member.any():
            # Zeros of both signs are equal, so their order must not matter.
            found[:, 2 + 2 * place] = cosines[:, member].max(axis=1) + np.float32(0)
            mean = np.add.accumulate(past[member])[-1] / np.float32(np.count_nonzero(member))
            found[:, 3 + 2 * place] = _products(candidates, mean[None])[:, 0]
    return found


def set_similarities(pins: np.ndarray, held: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Compare the candidates of one request with each vector of an embedding set.

    Args:
        pins: float32[N, D], vectors of the candidates.
        held: float32[K, D], the vectors of the set, zeros for those that are left out.
        out: float32[N, K], for the result.

    Returns:
        float32[N, K], cosines; 0 with a vector of zeros. What is not finite in a vector stays not finite.

    Raises:
        ValueError: the vectors differ in their dimensions.

    Cost: about 15 us for 128 candidates, 5 vectors and 32 dimensions.
    """
    nothing, kinds = np.zeros(pins.shape[1], np.float32), len(held)
    # Each vector is the only action of its own kind, whose largest cosine is the one with it.
    codes = np.arange(1, kinds + 1, dtype=np.int64)
    found = similarities(pins, nothing, nothing, held, codes, kinds)[:, 6::2]
    if out is None:
        return np.ascontiguousarray(found)
    out[:] = found
    return out


def set_similarities_in_numpy(pins: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Do the same in NumPy: the reference."""
    # Zeros of both signs are equal, so their order must not matter.
    return _products(_unit(pins), _unit(held)) + np.float32(0)


def similarities_of_batch(batch: FeatureBatch, actions: int) -> np.ndarray:
    """Return `similarities` of all requests of a batch, float32[N, 6 + 2A].

    Args:
        batch: with the tensors `user_embedding`, `query`, `sequence_embeddings`, `sequence_actions` and
            `pin_embedding`.
        actions: A, the number of kinds of action.
    """
    request, pins = batch.request, batch.candidate["pin_embedding"]
    found = np.empty((batch.rows, 6 + 2 * actions), np.float32)
    for number in range(batch.requests):
        rows = slice(int(batch.row_splits[number]), int(batch.row_splits[number + 1]))
        similarities(
            pins[rows],
            request["user_embedding"][number],
            request["query"][number],
            request["sequence_embeddings"][number],
            request["sequence_actions"][number],
            actions,
            found[rows],
        )
    return found


class NativeSimilarities:
    """Calls `kernels/native/similarities.cpp`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._call: Any = library.pinrank_similarities
        self._call.argtypes, self._call.restype = [ctypes.c_char_p, ctypes.c_void_p], ctypes.c_int64

    def compare(self, *compared_and_to: int) -> None:
        """Do what `similarities` does, for arrays at these addresses, without gaps.

        Args:
            compared_and_to: the addresses of `pins`, `user`, `query`, `sequence` and `sequence_actions`; the numbers of
                candidates, dimensions, entries and kinds of action; and the address of the result. Without a sequence,
                it has no entries, and its two addresses are not read.
        """
        *compared, to = compared_and_to
        if self._call(_COMPARED.pack(*compared), to):
            raise MemoryError("no memory for the similarities of a request")


@cache
def native_similarities() -> NativeSimilarities | None:
    """Return the native functions, or None if the library is not built."""
    native = library_if_built()
    return None if native is None else NativeSimilarities(native)


def _products(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return float32[N, M], the products of float32[N, D] and float32[M, D], summed one dimension after the other."""
    found: np.ndarray = ones[:, :1] * others[:, 0]
    for d in range(1, ones.shape[1]):
        found += ones[:, d : d + 1] * others[:, d]
    return found


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return float32[N, D], scaled to length one; zeros stay zeros."""
    squares = vectors[:, 0] * vectors[:, 0]
    for d in range(1, vectors.shape[1]):
        squares += vectors[:, d] * vectors[:, d]
    lengths = np.sqrt(squares)[:, None]
    return np.asarray(vectors / np.where(lengths == 0, np.float32(1), lengths), np.float32)
