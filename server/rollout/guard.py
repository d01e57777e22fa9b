"""Whether a label's answers are as good as the default label's: counted on the event loop, judged purely."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from model_store.bundle.statistics import Distribution, stability_index


@dataclass(slots=True)
class _Half:
    began_s: float
    seconds: list[float] = field(default_factory=list)
    errors: int = 0


class Window:
    """What became of a label's requests in the last `length_s` to 1.5 `length_s`."""

    def __init__(self, length_s: float) -> None:
        self._half_s = length_s / 2
        self._halves = [_Half(-math.inf)]

    def note(self, now_s: float, seconds: float, *, failed: bool) -> None:
        """Note a request that took so long; one that failed counts, its time does not."""
        newest = self._halves[-1]
        if now_s - newest.began_s >= self._half_s:
            newest = _Half(now_s)
            self._halves = [*(h for h in self._halves if now_s - h.began_s < 2.5 * self._half_s), newest]
        if failed:
            newest.errors += 1
        else:
            newest.seconds.append(seconds)

    def seen(self, now_s: float) -> WindowSummary:
        halves = [half for half in self._halves if now_s - half.began_s < 3 * self._half_s]
        seconds = [s for half in halves for s in half.seconds]
        errors = sum(half.errors for half in halves)
        return WindowSummary(len(seconds) + errors, errors, float(np.quantile(seconds, 0.99)) if seconds else 0.0)


@dataclass(frozen=True, slots=True)
class WindowSummary:
    """Of a window: answered and failed requests, the failed ones, and the P99 of the answered."""

    requests: int
    errors: int
    p99_s: float


@dataclass(frozen=True, slots=True)
class Limits:
    """When a label is rolled back.

    Attributes:
        requests_min: of both labels, before anything is judged.
        error_rate_max: beyond the default label's.
        p99_ratio_max: against the default label's.
        psi_max: of any head's probabilities against the default label's.
    """

    requests_min: int
    error_rate_max: float
    p99_ratio_max: float
    psi_max: float


@dataclass(frozen=True, slots=True)
class Healthy:
    note: str


@dataclass(frozen=True, slots=True)
class TooEarly:
    note: str


@dataclass(frozen=True, slots=True)
class Breach:
    reason: str


Verdict = Healthy | TooEarly | Breach


def judge(own: WindowSummary, default: WindowSummary, moved: dict[str, float], limits: Limits) -> Verdict:
    """Compare a label with the default label.

    Args:
        own: of the label.
        default: of the default label, in the same time.
        moved: by head that both have, how far the label's probabilities are from the default's (PSI).
        limits: what is a breach.
    """
    least = min(own.requests, default.requests)
    if least < limits.requests_min:
        return TooEarly(f"{least} of {limits.requests_min} requests")
    rate, usual = own.errors / own.requests, default.errors / default.requests
    if rate > usual + limits.error_rate_max:
        return Breach(
            f"{rate:.2%} of its requests failed, {usual:.2%} of the default label's; "
            f"allowed are {limits.error_rate_max:.2%} more"
        )
    if default.p99_s and own.p99_s > default.p99_s * limits.p99_ratio_max:
        return Breach(
            f"its P99 is {own.p99_s * 1e3:.1f} ms, the default label's {default.p99_s * 1e3:.1f} ms; "
            f"allowed is {limits.p99_ratio_max:g} times as much"
        )
    head, psi = max(moved.items(), key=lambda item: item[1], default=("", 0.0))
    if psi > limits.psi_max:
        return Breach(
            f"its {head} probabilities moved by {psi:.2f} (PSI) against the default label's; "
            f"allowed are {limits.psi_max:g}"
        )
    return Healthy(
        f"errors {rate:.2%} ({usual:.2%}), P99 {own.p99_s * 1e3:.1f} ms ({default.p99_s * 1e3:.1f}), "
        f"largest PSI {psi:.2f}"
    )


def moved_by(own: np.ndarray, other: np.ndarray) -> float:
    """Return the stability index of values against others, float32[N] and float32[M]; 0 where there are none."""
    own, other = own[np.isfinite(own)], other[np.isfinite(other)]
    if not len(own) or not len(other):
        return 0.0
    expected = Distribution.of(other)
    return stability_index(np.array(expected.shares), expected.counts(own))
