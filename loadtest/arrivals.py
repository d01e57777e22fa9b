from __future__ import annotations

from pathlib import Path

import numpy as np

from loadtest.errors import LoadError


class ArrivalsError(LoadError):
    """Recorded arrivals cannot be used; the message names the fix."""


def poisson(rate_per_s: float, duration_s: float, seed: int) -> np.ndarray:
    """Draw the arrival times of independent callers: a Poisson process.

    Given their number, the arrivals of a Poisson process are uniform on the interval (Kingman, Poisson Processes, 2.4),
    so the function draws the number first and then the times.

    Returns:
        float64[K], ascending seconds in [0, duration_s).
    """
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(0.0, duration_s, rng.poisson(rate_per_s * duration_s)))


def recorded(path: Path, speed: float, duration_s: float) -> np.ndarray:
    """Read recorded arrival times: seconds, one per line, or a .npy file. Only their differences matter.

    Args:
        path: the file.
        speed: speed-up factor; 2 plays the arrivals twice as fast.
        duration_s: later arrivals are dropped.

    Returns:
        float64[K], ascending seconds from 0.

    Raises:
        ArrivalsError: the file cannot be read, or contains a value that is not a time.
    """
    try:
        times_s = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, ndmin=1)
        times_s = np.sort(np.asarray(times_s, np.float64).reshape(-1))
    except (OSError, ValueError, TypeError) as error:
        raise ArrivalsError(
            f"cannot read arrivals from {path}: {error} (write seconds, one per line, or a .npy file)"
        ) from error
    if not len(times_s) or not np.isfinite(times_s).all():
        raise ArrivalsError(f"{path} has no arrivals, or times that are not finite numbers")
    since_s: np.ndarray = (times_s - times_s[0]) / speed
    return since_s[since_s < duration_s]
