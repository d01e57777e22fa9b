"""Computes how probable answers were, many at a time.

`kernels/native/propensities.cpp` does it in one call without the interpreter lock. Where the library is not built, the
explorers do the same in NumPy.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from kernels.native.library import address, library_if_built
from model_store.exploration.explorer import Explorer, Propensities
from model_store.model.discount import discounts

#: `PinrankAnswer` in propensities.cpp has the same layout.
_ANSWER = struct.Struct("=6q")
_NO_MEMORY = -2


def propensities(answers: Sequence[tuple[Explorer, np.ndarray, np.ndarray]]) -> list[Propensities]:
    """Compute how probable each of several answers was.

    Args:
        answers: of each the explorer of its surface, and the arguments of `Explorer.propensities`.

    Raises:
        ValueError: an order does not hold 1 to N positions, each at most once; or there are not as many parties as the
            explorer weighs.

    Cost: about 5 us an answer of 128 candidates with 4 arms, most of it without the interpreter lock.
    """
    for number, (explorer, parties, _) in enumerate(answers):
        if parties.ndim != 2 or parties.shape[1] != explorer.native.parties:
            raise ValueError(f"answer {number}: {parties.shape} utilities of {explorer.native.parties} parties")
    native = _native()
    return propensities_in_numpy(answers) if native is None else _propensities(answers, native)


def propensities_in_numpy(answers: Sequence[tuple[Explorer, np.ndarray, np.ndarray]]) -> list[Propensities]:
    """Do the same in NumPy: the reference."""
    for number, (_, parties, order) in enumerate(answers):
        in_range = 0 < len(order) <= len(parties) and 0 <= order.min() <= order.max() < len(parties)
        if not in_range or len(np.unique(order)) < len(order):
            raise _bad_order(number, parties)
    return [explorer.propensities_in_numpy(parties, order) for explorer, parties, order in answers]


def _propensities(
    answers: Sequence[tuple[Explorer, np.ndarray, np.ndarray]], native: Callable[..., int]
) -> list[Propensities]:
    packed = bytearray()
    held: list[np.ndarray] = []  # until the call ends
    discounts_at: dict[int, int] = {}
    for explorer, parties, order in answers:
        parties, order = np.ascontiguousarray(parties, np.float64), np.ascontiguousarray(order, np.int64)  # noqa: PLW2901
        held += parties, order
        returned = len(order)
        if returned not in discounts_at:
            held.append(discounts(returned))
            discounts_at[returned] = address(held[-1])
        packed += _ANSWER.pack(
            explorer.native.address, address(parties), address(order), discounts_at[returned], len(parties), returned
        )
    orders, positions = np.empty(len(answers)), np.empty(sum(len(order) for _, _, order in answers))
    wrong = native(bytes(packed), len(answers), address(orders), address(positions))
    if wrong == _NO_MEMORY:
        raise MemoryError(f"no memory for the propensities of {len(answers)} answers")
    if wrong >= 0:
        raise _bad_order(wrong, answers[wrong][1])
    found, start = [], 0
    for whole, (_, _, order) in zip(orders.tolist(), answers, strict=True):
        found.append(Propensities(whole, positions[start : start + len(order)]))
        start += len(order)
    return found


def _bad_order(number: int, parties: np.ndarray) -> ValueError:
    return ValueError(
        f"answer {number}: its order must hold 1 to {len(parties)} positions of its candidates, each at most once"
    )


@cache
def _native() -> Callable[..., int] | None:
    """Return the native function, or None if it is not built."""
    native = library_if_built()
    if native is None:
        return None
    found: Any = native.pinrank_propensities
    found.argtypes = [ctypes.c_char_p, ctypes.c_int64, *[ctypes.c_void_p] * 2]
    found.restype = ctypes.c_int64
    computed: Callable[..., int] = found
    return computed
