"""Estimates of quantities that move, fed one observation at a time. Pure: whoever needs time passes it in."""

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


class DecayingMean:
    """A mean in which each observation counts less with every one that follows (exponential smoothing).

    Attributes:
        value: NaN before the first observation, unless an initial value was given. Every comparison with NaN is false.
    """

    def __init__(self, weight: float, initial: float = math.nan) -> None:
        """Start without observations.

        Args:
            weight: of the latest observation, in (0, 1]; all earlier ones together weigh the rest.
            initial: counts like an earlier observation.
        """
        self.value = initial
        self._weight = weight

    def observe(self, value: float) -> None:
        self.value = value if math.isnan(self.value) else self.value + self._weight * (value - self.value)


class DecayingSum:
    """A sum in which each amount counts less as time passes: after `memory_s` seconds, 1/e of it is left.

    Under a steady load of `x` a second, it is `x * memory_s`. Time that runs backwards is taken for no time at all.
    """

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._sum = self._at_s = 0.0

    def add(self, amount: float, now_s: float) -> None:
        self._sum = self.at(now_s) + amount
        self._at_s = max(self._at_s, now_s)

    @property
    def at_most(self) -> float:
        """A bound on the sum from the latest amount on: it only falls with time."""
        return self._sum

    def at(self, now_s: float) -> float:
        """Return what is left of the sum at a time."""
        past_s = now_s - self._at_s
        return self._sum * math.exp(-past_s / self._memory_s) if past_s > 0 else self._sum

    def exceeds(self, limit: float, now_s: float) -> bool:
        """Return whether the sum at a time is greater; for a limit of at least 0."""
        return self._sum > limit and self.at(now_s) > limit
