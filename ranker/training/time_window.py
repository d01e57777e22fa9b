"""The random time window of training: hide the newest actions, as if they had not been recorded yet.

Training requests are made in the middle of what their users are doing, so the newest actions give the next ones away;
a model that leans on them alone repeats the last minute to everybody. Hiding a random stretch of them makes it read
the rest too (TransAct, KDD 2023, arXiv 2306.00248: uniform in 0 to 24 hours).
"""

from __future__ import annotations

import numpy as np

_HOUR_S = 3_600.0


def draw_windows_s(rng: np.random.Generator, requests: int, hours_max: float, share: float) -> np.ndarray:
    """Draw float64[R], seconds to hide per request: uniform in [0, `hours_max`] for a share of them, else 0."""
    windows_s = rng.random(requests) * hours_max * _HOUR_S
    return np.where(rng.random(requests) < share, windows_s, 0.0)


def hidden_share(ages_s: np.ndarray, hours_max: float, share: float) -> float:
    """Return the share of actions, float[R, L] seconds old and +inf past the end, that windows hide on average."""
    present = ages_s[np.isfinite(ages_s)]
    if not hours_max or not len(present):
        return 0.0
    return share * float(np.clip(1 - present / (hours_max * _HOUR_S), 0, 1).mean())


def hide_newest(
    actions: np.ndarray, embeddings: np.ndarray, ages_s: np.ndarray, windows_s: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drop each request's actions that are younger than its window; the rest moves up, in order.

    Args:
        actions: int64[R, L], newest first, 0 past the end.
        embeddings: float32[R, L, D].
        ages_s: float32[R, L], seconds before the request, never falling, +inf past the end.
        windows_s: float[R].

    Returns:
        New arrays like `actions` and `embeddings`, zeros past what is left.
    """
    length = actions.shape[1]
    # Newest first: what is hidden is a prefix, so dropping it is a shift.
    hidden = (ages_s < windows_s[:, None]).sum(axis=1)
    source = np.arange(length) + hidden[:, None]
    kept = source < length
    source = np.minimum(source, max(0, length - 1))
    shifted = np.take_along_axis(actions, source, axis=1)
    moved = np.take_along_axis(embeddings, source[:, :, None], axis=1)
    shifted[~kept] = 0
    moved[~kept] = 0
    return shifted, moved
