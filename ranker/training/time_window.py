"""The random time window of training: hide the newest actions as if they had not been recorded yet.

A training request falls in the middle of a user's session, so the newest actions give the next ones away, and a model
that relies on them alone only repeats the last minute. Hiding a random span of them makes the model read the rest too
(TransAct, KDD 2023, arXiv 2306.00248: uniform in 0 to 24 hours).
"""

from __future__ import annotations

import numpy as np

_HOUR_S = 3_600.0


def draw_windows_s(rng: np.random.Generator, requests: int, hours_max: float, share: float) -> np.ndarray:
    """Draw float64[R], the seconds to hide per request: uniform in [0, `hours_max`] for a share of them, else 0."""
    windows_s = rng.random(requests) * hours_max * _HOUR_S
    return np.where(rng.random(requests) < share, windows_s, 0.0)


def hidden_share(ages_s: np.ndarray, hours_max: float, share: float) -> float:
    """Return the mean share of actions that windows hide; ages are float[R, L] in seconds, +inf past the end."""
    present = ages_s[np.isfinite(ages_s)]
    if not hours_max or not len(present):
        return 0.0
    return share * float(np.clip(1 - present / (hours_max * _HOUR_S), 0, 1).mean())


def hide_newest(
    actions: np.ndarray, embeddings: np.ndarray, ages_s: np.ndarray, windows_s: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drop the actions that are younger than the request's window; the others move up in order.

    Args:
        actions: int64[R, L], newest first, 0 past the end.
        embeddings: float32[R, L, D].
        ages_s: float32[R, L], seconds before the request, non-decreasing, +inf past the end.
        windows_s: float[R].

    Returns:
        New arrays like `actions` and `embeddings`, with zeros after the remaining actions.
    """
    length = actions.shape[1]
    # Actions are newest first, so the hidden ones are a prefix and dropping them is a shift.
    hidden = (ages_s < windows_s[:, None]).sum(axis=1)
    source = np.arange(length) + hidden[:, None]
    kept = source < length
    source = np.minimum(source, max(0, length - 1))
    shifted = np.take_along_axis(actions, source, axis=1)
    moved = np.take_along_axis(embeddings, source[:, :, None], axis=1)
    shifted[~kept] = 0
    moved[~kept] = 0
    return shifted, moved
