"""Collects the pins of many answers, each in the order of its answer, into one array for each column of the log.

`kernels/native/gather.cpp` does it in one call without the interpreter lock, so that the event loop does not wait for
it. Where the library is not built, NumPy does the same.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from impressions.writing.rows import AnsweredRequest
from kernels.native.library import address, library_if_built

#: `Answer` in gather.cpp has the same layout.
_ANSWER = struct.Struct("=12q")


@dataclass(frozen=True, slots=True)
class Pins:
    """The N returned pins of several answers, one answer after the other.

    Attributes:
        pin_ids: uint64[N].
        places: uint32[N], positions in the request.
        probabilities: float32, flat: of each pin, one for each head of its answer. So are the next two.
        party_utilities: float64.
        attributes: float64; NaN for candidates that were trimmed.
        utilities: float32[N].
    """

    pin_ids: np.ndarray
    places: np.ndarray
    probabilities: np.ndarray
    party_utilities: np.ndarray
    attributes: np.ndarray
    utilities: np.ndarray


def gather(requests: Sequence[AnsweredRequest]) -> Pins:
    """Collect the pins of answers. Raises ValueError if an order has a position outside its request."""
    native = _native()
    return gather_in_numpy(requests) if native is None else _gather(requests, native)


def _gather(requests: Sequence[AnsweredRequest], native: Callable[..., int]) -> Pins:
    packed = bytearray()
    pins = heads = parties = attributes = 0
    for request in requests:
        scores, constants, values = request.scores, request.constants, request.attribute_values
        returned, head_count, party_count = scores.top, len(constants.heads), len(constants.parties)
        packed += _ANSWER.pack(
            address(request.pin_ids), *scores.addresses, address(values),
            len(request.pin_ids), returned, values.shape[1], head_count, party_count, len(values),
        )  # fmt: skip
        pins += returned
        heads += returned * head_count
        parties += returned * party_count
        attributes += returned * len(values)
    found = Pins(
        np.empty(pins, np.uint64),
        np.empty(pins, np.uint32),
        np.empty(heads, np.float32),
        np.empty(parties, np.float64),
        np.empty(attributes, np.float64),
        np.empty(pins, np.float32),
    )
    columns = (found.pin_ids, found.places, found.probabilities, found.party_utilities, found.attributes)
    wrong = native(bytes(packed), len(requests), *map(address, columns), address(found.utilities))
    if wrong >= 0:
        raise ValueError(f"request {requests[wrong].request_id}: its order has a position that it does not have")
    return found


@cache
def _native() -> Callable[..., int] | None:
    """Return the native function, or None if it is not built."""
    native = library_if_built()
    if native is None:
        return None
    found: Any = native.pinrank_gather
    found.argtypes = [ctypes.c_char_p, ctypes.c_int64, *[ctypes.c_void_p] * 6]
    found.restype = ctypes.c_int64
    gather_pins: Callable[..., int] = found
    return gather_pins


def gather_in_numpy(requests: Sequence[AnsweredRequest]) -> Pins:
    """Do the same in NumPy: the reference."""
    orders = [request.scores.order for request in requests]
    for request, order in zip(requests, orders, strict=True):
        if len(order) and not 0 <= order.min() <= order.max() < len(request.pin_ids):
            raise ValueError(f"request {request.request_id}: its order has a position that it does not have")
    both = list(zip(requests, orders, strict=True))
    return Pins(
        np.concatenate([request.pin_ids[order] for request, order in both]),
        np.concatenate(orders).astype(np.uint32),
        np.concatenate([request.scores.probabilities[order].ravel() for request, order in both]),
        np.concatenate([request.scores.party_utilities[order].ravel() for request, order in both]),
        np.concatenate([_of_order(request.attribute_values, order).ravel() for request, order in both]),
        np.concatenate([request.scores.utilities[order] for request, order in both]),
    )


def _of_order(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return float64[K, A] of float64[A, M]; candidates from M on were trimmed, and have no values."""
    found = np.full((len(order), len(values)), np.nan)
    scored = order < values.shape[1]
    found[scored] = values.T[order[scored]]
    return found
