from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StraightCost:
    """A linear cost model that learns nothing. Tests use binary fractions of seconds, so that sums are exact."""

    fixed_s: float = 0.0
    per_request_s: float = 0.0
    per_row_s: float = 0.0
    #: Ratio of a careful prediction to a typical one.
    careful: float = 1.0
    slowdown: float = 1.0

    def predict_s(self, requests, rows):
        return self.fixed_s + self.per_request_s * requests + self.per_row_s * rows

    def measured_s(self, rows, *, alone):
        return self.predict_s(1, rows) / (self.slowdown if alone else 1.0)

    def rows_of(self, seconds):
        left_s = seconds - self.fixed_s - self.per_request_s
        return max(1, math.ceil(left_s / self.per_row_s)) if self.per_row_s else 1 << 20

    def finish_s(self, requests, rows):
        return self.careful * self.predict_s(requests, rows)
