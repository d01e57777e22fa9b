"""Names answers with ids that are unique among all servers, and never 0."""

from __future__ import annotations

import secrets
from collections.abc import Callable

_COUNT_BITS = 40
_COUNT_MASK = (1 << _COUNT_BITS) - 1


class RequestIds:
    """Draws ids: 24 random bits of this process, then a counter of 40 bits that starts at a random number.

    Two ids are equal only if two processes drew the same 24 bits and their counters overlap. With 1,000 processes of a
    billion answers each, the chance of that is about 6 in 100,000.
    """

    def __init__(self, random_bits: Callable[[int], int] = secrets.randbits) -> None:
        self._process = (random_bits(24) or 1) << _COUNT_BITS
        self._count = random_bits(_COUNT_BITS)

    def next(self) -> int:
        """Return an id that this process has not returned before: from 1 to 2**64 - 1."""
        self._count = (self._count + 1) & _COUNT_MASK
        return self._process | self._count
