from __future__ import annotations

import math


class RunningQuantile:
    """A quantile of a positive quantity, followed as it moves (stochastic approximation of its logarithm).

    Every observation moves it by a few percent, however far away it lies: what is rare and extreme counts once.
    """

    def __init__(self, quantile: float, initial: float, step: float = 0.05) -> None:
        self.value = initial
        self._up, self._down = math.exp(step * quantile), math.exp(-step * (1 - quantile))

    def observe(self, value: float) -> None:
        self.value *= self._up if value > self.value else self._down
