from __future__ import annotations

import numpy as np


def poisson(rate_per_s: float, duration_s: float, seed: int) -> np.ndarray:
    """Draw the arrival times of independent callers: a Poisson process.

    Given their number, the arrivals of a Poisson process are uniform on the interval (Kingman, Poisson Processes, 2.4);
    so the number is drawn first, then the times.

    Returns:
        float64[K], ascending seconds in [0, duration_s).
    """
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(0.0, duration_s, rng.poisson(rate_per_s * duration_s)))
