"""The slots of keys in a Redis Cluster, many keys at a time (Redis Cluster specification, "Key distribution model")."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from redis.crc import key_slot

SLOTS = 16_384


def _crc_table() -> np.ndarray:
    """Return the CRC-16/XMODEM (polynomial 0x1021) of every byte."""
    crc = np.arange(256, dtype=np.uint16) << 8
    for _ in range(8):
        crc = (crc << 1) ^ np.where(crc & 0x8000, np.uint16(0x1021), np.uint16(0))
    return crc


_TABLE = _crc_table()


def slots_of(keys: Sequence[bytes]) -> np.ndarray:
    """Return the slot of every key, int64[N].

    The slot of a key with braces can depend on a part of the key only; redis-py computes it.

    Cost: a few NumPy calls for each byte of the longest key, independent of the number of keys.
    """
    slots = np.empty(len(keys), np.int64)
    start = 0
    for length, run in groupby(keys, len):  # the keys of a group have the same length
        stop = start + sum(1 for _ in run)
        slots[start:stop] = _of_one_length(keys[start:stop], length)
        start = stop
    return slots


def _of_one_length(keys: Sequence[bytes], length: int) -> np.ndarray:
    octets = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), length)
    crc = np.zeros(len(keys), np.uint16)
    for column in octets.T:
        crc = (crc << 8) ^ _TABLE[(crc >> 8) ^ column]
    slots = (crc % SLOTS).astype(np.int64)
    for tagged in np.flatnonzero((octets == ord("{")).any(axis=1)).tolist():
        slots[tagged] = key_slot(keys[tagged])
    return slots
