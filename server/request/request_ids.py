"""Names answers with ids that are unique among all servers, never 0, and that nobody can guess from other ids."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable

import numpy as np

_PROCESS_BITS, _COUNT_BITS, _KEY_BITS = 24, 40, 256
_COUNT_MASK = (1 << _COUNT_BITS) - 1
#: With secret round functions, six rounds leave no attack that is cheaper than reading all outputs (Patarin, "Generic
#: Attacks on Feistel Schemes", 2001); two more are spare.
_ROUNDS = 8
#: Ids that are made at once: enough to share the cost of NumPy's calls, and few enough to hold up no request.
_AT_ONCE = 256


class Permutation:
    """A secret permutation of the numbers of so many bits.

    A Feistel network whose rounds share one secret random function, each with a secret number of its own (Lampe and
    Seurin, "Security Analysis of Key-Alternating Feistel Ciphers", 2014). The function is a table of 2^(bits / 2)
    numbers, the output of SHAKE-256 for the key: 4 MiB for 40 bits.
    """

    def __init__(self, bits: int, key: bytes) -> None:
        """Create the permutation of a key; `bits` is even and at most 48."""
        self._half = bits // 2
        self._mask = (1 << self._half) - 1
        drawn = np.frombuffer(hashlib.shake_256(key).digest(4 * (_ROUNDS + (1 << self._half))), "<u4")
        secret = (drawn & np.uint32(self._mask)).astype(np.int32)
        self._rounds, self._table = secret[:_ROUNDS].tolist(), secret[_ROUNDS:]

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """Return int64[N], where each of int64[N] numbers is mapped to."""
        left, right = numbers >> self._half, numbers & self._mask
        for own in self._rounds:
            left, right = right, left ^ self._table.take(right ^ own)
        return np.asarray(left << self._half | right)


class RequestIds:
    """Draws ids: 24 random bits of this process, then a counter of 40 bits, from a random start, secretly permuted.

    A process never repeats an id. Ids of two processes are equal with the probability 2^-64: among a billion answers of
    many processes, 0.03 pairs are expected.

    Who has seen ids of a process knows its 24 bits, and nothing of the other 40: a guess names one of N answers of
    that process with the probability N / 2^40, for a million answers one in a million.
    """

    def __init__(self, random_bits: Callable[[int], int] = secrets.randbits) -> None:
        self._process = (random_bits(_PROCESS_BITS) or 1) << _COUNT_BITS
        self._count = random_bits(_COUNT_BITS)
        self._permutation = Permutation(_COUNT_BITS, random_bits(_KEY_BITS).to_bytes(_KEY_BITS // 8, "big"))
        self._ready: list[int] = []

    def next(self) -> int:
        """Return an id that this process has not returned before: from 1 to 2**64 - 1."""
        if not self._ready:
            counts = np.arange(self._count, self._count + _AT_ONCE) & _COUNT_MASK
            self._count = (self._count + _AT_ONCE) & _COUNT_MASK
            self._ready = self._permutation.of(counts).tolist()
        return self._process | self._ready.pop()
