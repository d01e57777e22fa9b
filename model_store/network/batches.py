"""Which batches show the largest memory of all, and which sizes do not vary with the batch.

A run has N rows of R requests, with 1 <= R <= N <= the limit. What the other modules allow makes every size a sum of
products c * N^a * R^b with c > 0, or the largest of several such sums. The powers may be negative, because `Reshape`
divides by sizes that are one product alone. Such a function is convex in the logarithms of N and R, as is any sum or
product of them, and so are the bytes of all tensors together. On a triangle, a convex function is largest at a corner:
here at one row, at the most rows of one request, or at the most rows of as many requests. These three bound all others.

A fourth batch lies inside the triangle. A convex function that is there as large as its three corners predict is linear
in the logarithms on the whole triangle: a single product, by which a `Reshape` may divide. A size that is the same at
all four is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Fewest rows whose triangle has a batch inside.
_ROWS_MIN = 4
#: Rounding errors of logarithms. A convex function so close to the prediction is as close to one product everywhere.
_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Batches:
    """The corners of the triangle of batches, and one batch inside.

    Attributes:
        pairs: rows and requests of each; the last is inside.
    """

    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def up_to(cls, rows: int) -> Batches:
        """Return those of all batches of at most `rows` rows (or 4, if that is more)."""
        most = max(rows, _ROWS_MIN)
        inside = (round(most ** (2 / 3)), round(most ** (1 / 3)))
        return cls(((1, 1), (most, 1), (most, most), inside))

    def is_product(self, sizes: Sequence[int]) -> bool:
        """Return whether sizes, one per batch, are c * N^a * R^b. They must be convex in the logarithms."""
        if min(sizes) < 1:
            return False
        (_, (most, _), _, (rows, requests)) = self.pairs
        few, one, many, inside = (math.log(size) for size in sizes)
        of_rows, of_requests = math.log(rows) / math.log(most), math.log(requests) / math.log(most)
        predicted = few * (1 - of_rows) + one * (of_rows - of_requests) + many * of_requests
        return abs(inside - predicted) < _TOLERANCE
