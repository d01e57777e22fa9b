from __future__ import annotations

from pathlib import Path

import numpy as np

from loadtest.errors import LoadError


class ArrivalsError(LoadError):
    """Recorded arrivals cannot be used; the message says what to change."""


def poisson(rate_per_s: float, duration_s: float, seed: int) -> np.ndarray:
    """Draw the arrival times of independent callers: a Poisson process.

    Given their number, the arrivals of a Poisson process are uniform on the interval (Kingman, Poisson Processes, 2.4);
    so the number is drawn first, then the times.

    Returns:
        float64[K], ascending seconds in [0, duration_s).
    """
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(0.0, duration_s, rng.poisson(rate_per_s * duration_s)))


def recorded(path: Path, speed: float, duration_s: float) -> np.ndarray:
    """Read when requests arrived: seconds, one a line, or a .npy file; only their differences count.

    Args:
        path: the file.
        speed: 2 plays it twice as fast.
        duration_s: what comes later is left out.

    Returns:
        float64[K], ascending seconds from 0.

    Raises:
        ArrivalsError: no such file, or something in it that is no time.
    """
    try:
        times_s = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, ndmin=1)
        times_s = np.sort(np.asarray(times_s, np.float64).reshape(-1))
    except (OSError, ValueError, TypeError) as error:
        raise ArrivalsError(
            f"cannot read arrivals from {path}: {error} (seconds, one a line, or a .npy file)"
        ) from error
    if not len(times_s) or not np.isfinite(times_s).all():
        raise ArrivalsError(f"{path} holds no arrivals, or times that are not finite")
    since_s: np.ndarray = (times_s - times_s[0]) / speed
    return since_s[since_s < duration_s]
