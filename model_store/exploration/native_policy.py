"""An explorer as native code reads it."""

from __future__ import annotations

import ctypes

import numpy as np


class NativePolicy(ctypes.Structure):
    """How a surface explores: `PinrankPolicy` in `kernels/native/propensities.cpp` has the same layout.

    Attributes:
        address: where it stands in memory, for as long as it lives.
    """

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("arms", "parties", "best")),
        *((name, ctypes.c_double) for name in ("share", "regret_max", "temperature", "floor")),
        *((name, ctypes.c_void_p) for name in ("weights", "chances")),
    )

    def __init__(
        self,
        share: float,
        regret_max: float,
        weights: np.ndarray,
        chances: np.ndarray,
        best: int = 0,
        temperature: float = 1.0,
        floor: float = 0.0,
    ) -> None:
        """Copy what an explorer consists of.

        Args:
            share: as in `WeightsExplorer` and `OrderExplorer`, like `regret_max`.
            regret_max: as a fraction.
            weights: float64[1 + A, P], the tuned weights, then those of the A arms; A = 0 draws orders.
            chances: float64[1 + A], the probability that a request gets the order by these weights.
            best: as in `OrderExplorer`, like `temperature` and `floor`.
            temperature: above 0.
            floor: at least 0.
        """
        self._arrays = np.ascontiguousarray(weights, np.float64), np.ascontiguousarray(chances, np.float64)
        sizes = len(weights) - 1, weights.shape[1], best
        super().__init__(*sizes, share, regret_max, temperature, floor, *(array.ctypes.data for array in self._arrays))
        self.address = ctypes.addressof(self)
